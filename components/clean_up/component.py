"""The clean-up component."""

from kfp import dsl

from components.runtime import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def clean_up(
    job_id: str, launcher: str, run_id: str, deployment_name: str, nodes: int, etcd_endpoints: list, advanced: dict
) -> None:
    """Stop everything of the run that is still running, however its steps ended. Names and places identify it."""
    values = dict(locals())
    from components import steps

    steps.clean_up(values.pop("job_id"), values)
