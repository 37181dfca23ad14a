"""The pipeline: precache → train → export → evaluate.

    precache ──config──▶ train ──model──▶ export ──model──▶ evaluate ──▶ metrics, report
        └──────────────── dataset, and what train hands on ────▲

Its parameters are those of `TrainingConfig`, all of them, and are listed nowhere else. Only precache takes them; it
checks them before anything else starts, and hands on the resolved configuration.
"""

import inspect
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Optional

from kfp import compiler, dsl

from components.evaluate.component import evaluate
from components.export.component import export
from components.precache.component import precache_component
from components.train.component import train
from trainer.config import Parameter, TrainingConfig

DESCRIPTION = (
    "Train a model with DiLoCo over workers that are far apart, unequal, and come and go: "
    "precache the model and the data, train, export, evaluate."
)


def training_pipeline(parameters: Sequence[Parameter]) -> Any:
    """The pipeline with these parameters; one that is not among them takes its default.

    Args:
        parameters: All of them, for a backend. For `kfp.local`, see `precache_component`.

    Returns:
        A KFP GraphComponent, named `diloco-training`.
    """
    names = [parameter.name for parameter in parameters]
    precache = precache_component(parameters)

    def diloco_training(*channels: Any) -> None:
        values = dict(zip(names, channels, strict=True))
        data = _uncached(precache(job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, **values))
        config, dataset = data.outputs["config"], data.outputs["precached"]
        trained = _uncached(train(config=config, precached=dataset))
        exported = _uncached(export(config=config, trained=trained.outputs["model"]))
        model = exported.outputs["model"]
        _uncached(evaluate(config=config, trained=trained.outputs["model"], model=model, precached=dataset))

    diloco_training.__signature__ = inspect.Signature([_argument(parameter) for parameter in parameters])  # type: ignore[attr-defined]
    diloco_training.__doc__ = "\n".join([DESCRIPTION, "", "Args:", *map(_documentation, parameters)])
    return dsl.pipeline(diloco_training, name="diloco-training", display_name="DiLoCo training")


def _uncached(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """The steps work on the workers' own directories, which a cache key does not cover."""
    return task.set_caching_options(False)


def _argument(parameter: Parameter) -> inspect.Parameter:
    annotation = Optional[parameter.type] if parameter.optional else parameter.type  # noqa: UP045 - KFP knows no other
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(parameter.name, kind, default=parameter.default, annotation=annotation)


def _documentation(parameter: Parameter) -> str:
    return f"    {parameter.name}: {describe(parameter)}"


def describe(parameter: Parameter) -> str:
    """What the Kubeflow UI shows about a parameter."""
    text = parameter.description
    if parameter.choices:
        text += f" One of: {', '.join(choice or '(empty)' for choice in parameter.choices)}."
    if parameter.later:
        text += f" Not available yet: {parameter.later}."
    return text


diloco_training = training_pipeline(TrainingConfig.parameters())


@cache
def compiled() -> str:
    """The pipeline as YAML: what the Kubeflow UI, `kfp run create` and our own `submit` take."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pipeline.yaml"
        compiler.Compiler().compile(diloco_training, str(path))
        return path.read_text(encoding="utf-8")
