"""An example pipeline with export."""

from kfp import dsl

from components.export import export
from components.precache import precache
from components.train import train


@dsl.pipeline(name="export-example")
def example_pipeline(run_id: str = "mine") -> None:
    """Export the model of a finished run: precache and train find their work already done."""
    data = precache(run_id=run_id, model="gpt-neo-x:tiny", dataset="stdlib", device="cpu").set_caching_options(False)
    config = data.outputs["config"]
    trained = train(config=config, precached=data.outputs["precached"]).set_caching_options(False)
    export(config=config, checkpoint=trained.outputs["checkpoint"]).set_caching_options(False)
