"""An example pipeline with evaluate."""

from kfp import dsl

from components.evaluate import evaluate
from components.export import export
from components.precache import precache
from components.train import train


@dsl.pipeline(name="evaluate-example")
def example_pipeline(total_steps: int = 200) -> None:
    """Train, export and evaluate: all four steps."""
    data = precache(
        job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        model="gpt-neo-x:tiny",
        dataset="stdlib",
        total_steps=total_steps,
        device="cpu",
    ).set_caching_options(False)
    config, precached = data.outputs["config"], data.outputs["precached"]
    checkpoint = train(config=config, precached=precached).set_caching_options(False).outputs["checkpoint"]
    model = export(config=config, checkpoint=checkpoint).set_caching_options(False).outputs["exported_model"]
    scored = evaluate(config=config, checkpoint=checkpoint, exported_model=model, precached=precached)
    scored.set_caching_options(False)
