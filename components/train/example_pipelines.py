"""An example pipeline with train."""

from kfp import dsl

from components.precache import precache
from components.train import train


@dsl.pipeline(name="train-example")
def example_pipeline(dataset: str = "stdlib", total_steps: int = 200) -> None:
    """Train a small language model with two workers."""
    data = precache(
        job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        model="gpt-neo-x:tiny",
        dataset=dataset,
        total_steps=total_steps,
        device="cpu",
    ).set_caching_options(False)
    trained = train(config=data.outputs["config"], precached=data.outputs["precached"])
    trained.set_caching_options(False)
