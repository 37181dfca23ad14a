"""A custom pipeline that trains with DiLoCo between its own steps.

    python examples/own_pipeline.py                  writes build/own.yaml, for the UI or `kfp run create`
    python examples/own_pipeline.py --here runs/own  runs it on this machine

The steps of this project are ordinary KFP components. Only `precache` takes the training's parameters: the common
ones by name, all others in `advanced`. It checks them and outputs them as `config`.
"""

import argparse
from pathlib import Path

from kfp import compiler, dsl

from components.export import export
from components.precache import precache
from components.runtime import IMAGE
from components.train import train


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # that image has kfp
def plan(budget: int, batch_size: int) -> int:
    """A step before the training: the number of inner steps for this budget of samples."""
    return budget // batch_size


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def announce(model: dsl.Input[dsl.Model], note: dsl.Output[dsl.Markdown]) -> None:
    """A step after the training: a note about the model."""
    from pathlib import Path

    size = sum(path.stat().st_size for path in Path(model.path).rglob("*"))
    Path(note.path).write_text(f"{model.metadata['model']}, {model.metadata['step']:.0f} steps, {size:,} bytes\n")


@dsl.pipeline(name="own")
def pipeline(dataset: str = "stdlib", budget: int = 800, run_id: str = "", advanced: dict = {}) -> None:  # noqa: B006
    """Plan, train, announce."""
    data = precache(
        job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,  # names the run if `run_id` is empty
        run_id=run_id,
        model="gpt-neo-x:tiny",
        tokenizer="bytes",
        dataset=dataset,
        sequence_length=64,
        total_steps=plan(budget=budget, batch_size=4).output,
        local_steps=5,
        batch_size=4,
        per_device_train_batch_size=4,
        lr=2e-3,
        warmup_steps=2,
        device="cpu",
        wandb_logging=False,
        advanced=advanced,
    ).set_caching_options(False)  # the steps work on volumes, which a cache key does not cover
    config = data.outputs["config"]
    trained = train(config=config, precached=data.outputs["precached"]).set_caching_options(False)
    exported = export(config=config, checkpoint=trained.outputs["checkpoint"]).set_caching_options(False)
    announce(model=exported.outputs["exported_model"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile or run a pipeline with the step `train`.")
    parser.add_argument("--here", type=Path, help="run it on this machine, in this directory")
    here = parser.parse_args().here
    if here is None:
        Path("build").mkdir(exist_ok=True)
        compiler.Compiler().compile(pipeline, "build/own.yaml")
        return
    from pipelines.local import run_pipeline  # `kfp.local`, with readable output

    run_pipeline(pipeline, {"advanced": {"run_dir": str(here)}}, here)


if __name__ == "__main__":
    main()
