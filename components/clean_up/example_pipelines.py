"""An example pipeline with clean_up."""

from kfp import dsl

from components.clean_up import clean_up
from components.precache import precache
from components.train import train


@dsl.pipeline(name="clean-up-example")
def example_pipeline(launcher: str = "auto", deployment_name: str = "mine") -> None:
    """Train, and leave nothing running, however the training ends."""
    where = {"nodes": 2, "etcd_endpoints": [], "advanced": {}}
    names = {"launcher": launcher, "run_id": "", "deployment_name": deployment_name, **where}
    job_id = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    data = precache(job_id=job_id, model="gpt-neo-x:tiny", dataset="stdlib", device="cpu", **names)
    data.set_caching_options(False)
    with dsl.ExitHandler(clean_up(job_id=job_id, **names).set_caching_options(False)):
        trained = train(config=data.outputs["config"], precached=data.outputs["precached"])
        trained.set_caching_options(False)
