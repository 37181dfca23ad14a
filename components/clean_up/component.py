"""The clean-up component."""

from kfp import dsl

from components.runtime import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def clean_up(
    job_id: str, launcher: str, run_id: str, deployment_name: str, nodes: int, etcd_endpoints: list, advanced: dict
) -> None:
    """Stop everything of the run that is still running, however its steps ended. Names and places identify it.

    The exit handler of a pipeline on a backend, where a terminated step may get no time to clean up. Also deletes the
    objects that only the run needed; claims stay. On one machine it does nothing, because workers end with their step.

    Args:
        job_id: Names the run if `run_id` is empty: the same as precache's.
        launcher: As precache's.
        run_id: As precache's.
        deployment_name: As precache's.
        nodes: As precache's.
        etcd_endpoints: As precache's.
        advanced: As precache's; only what says which run it is, and on which clusters, is used.
    """
    values = dict(locals())
    from components import steps

    steps.clean_up(values.pop("job_id"), values)
