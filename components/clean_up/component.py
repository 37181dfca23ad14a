"""The clean-up component."""

from kfp import dsl

from components.runtime import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def clean_up(
    job_id: str, launcher: str, run_id: str, deployment_name: str, nodes: int, etcd_endpoints: list, advanced: dict
) -> None:
    """Stop every part of the run that is still running, however its steps ended. Its inputs identify the run.

    This is the exit handler of a pipeline on a backend, where a terminated step may get no time to clean up. It also
    deletes the objects that only the run needed; claims stay. On one machine it does nothing, because workers end with
    their step.

    Args:
        job_id: Names the run if `run_id` is empty; same value as for precache.
        launcher: Same value as for precache.
        run_id: Same value as for precache.
        deployment_name: Same value as for precache.
        nodes: Same value as for precache.
        etcd_endpoints: Same value as for precache.
        advanced: Same value as for precache; only what identifies the run and its clusters is used.
    """
    values = dict(locals())
    from components import steps

    steps.clean_up(values.pop("job_id"), values)
