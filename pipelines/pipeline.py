"""The pipeline: precache → train → export → evaluate.

    precache ──config──▶ train ──model──▶ export ──model──▶ evaluate ──▶ metrics, summary, report
        └──────────────── dataset, and train's model ──────────▲

Its parameters are all those of `TrainingConfig`, the only list of them. Only precache takes them: it checks them before
anything else starts, and outputs the resolved configuration.

On a backend, train, export and evaluate are inside an exit handler: clean-up follows, however they end. Precache is
outside: an exit handler is a nested DAG, whose inputs would be all parameters instead of precache's two outputs. What
precache creates belongs to the workflow, and precache itself cleans it up.
"""

import inspect
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from components.clean_up import clean_up
from components.evaluate import evaluate
from components.export import export
from components.precache import precache
from components.train import train
from trainer.config import Parameter, TrainingConfig

DESCRIPTION = (
    "Train a model with DiLoCo over distant, unequal workers that may join and leave at any time: "
    "precache the model and the data, train, export, evaluate."
)


def training_pipeline(*, exit_handler: bool) -> Any:
    """The pipeline, with all parameters and their defaults.

    Args:
        exit_handler: Clean up however the run ends. A backend needs it: there SIGTERM may not reach a step, or leave it
            too little time. On one machine, processes die with their step.

    Returns:
        A KFP GraphComponent named `diloco-training`.
    """
    parameters = TrainingConfig.parameters()

    def diloco_training(*channels: Any) -> None:
        values = dict(zip((parameter.name for parameter in parameters), channels, strict=True))
        data = _uncached(precache(job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, **values))
        config, dataset = data.outputs["config"], data.outputs["precached"]
        if not exit_handler:
            steps(config, dataset)
            return
        named = {name: values[name] for name in clean_up.component_spec.inputs if name != "job_id"}
        with dsl.ExitHandler(_uncached(clean_up(job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, **named)), name="steps"):
            steps(config, dataset)

    def steps(config: Any, dataset: Any) -> None:
        trained = _uncached(train(config=config, precached=dataset))
        exported = _uncached(export(config=config, trained=trained.outputs["model"]))
        model = exported.outputs["model"]
        _uncached(evaluate(config=config, trained=trained.outputs["model"], model=model, precached=dataset))

    # KFP reads the pipeline's parameters from the signature, and their descriptions from the docstring
    diloco_training.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(p.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=p.default, annotation=p.type)
            for p in parameters
        ]
    )
    arguments = [f"    {parameter.name}: {describe(parameter)}" for parameter in parameters]
    diloco_training.__doc__ = "\n".join([DESCRIPTION, "", "Args:", *arguments])
    return dsl.pipeline(diloco_training, name="diloco-training", display_name="DiLoCo training")


def _uncached(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Switch caching off: the steps work on the workers' own volumes, which a cache key does not cover."""
    return task.set_caching_options(False)


def describe(parameter: Parameter) -> str:
    """A parameter's description in the compiled pipeline."""
    if not parameter.choices:
        return parameter.description
    return f"{parameter.description} One of: {', '.join(choice or '(empty)' for choice in parameter.choices)}."


diloco_training = training_pipeline(exit_handler=True)


@cache
def compiled() -> str:
    """The pipeline as YAML, for the Kubeflow UI, `kfp run create` and our own `submit`."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pipeline.yaml"
        compiler.Compiler().compile(diloco_training, str(path))
        return path.read_text(encoding="utf-8")
