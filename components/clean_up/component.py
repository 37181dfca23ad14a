"""The clean-up component."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def clean_up(
    job_id: str,
    launcher: str,
    run_id: str,
    elastic_etcd_run_id: str,
    deployment_name: str,
    deployment_namespace: str,
) -> None:
    """End what still runs of the training, however its steps have ended. What it needs follows from the names."""
    values = dict(locals())
    from components.clean_up.run import run

    run(values.pop("job_id"), values)
