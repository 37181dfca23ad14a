"""An example pipeline with precache."""

from kfp import dsl

from components.precache import precache


@dsl.pipeline(name="precache-example")
def example_pipeline(dataset: str = "stdlib") -> None:
    """Put a dataset and a model onto the volumes of two workers, before any training."""
    data = precache(job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, model="gpt-neo-x:tiny", dataset=dataset, device="cpu")
    data.set_caching_options(False)  # a cache key does not cover the volumes
