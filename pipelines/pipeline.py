"""The pipeline: precache → train → export → evaluate.

    precache ──config──▶ train ──checkpoint──▶ export ──model──▶ evaluate ──▶ metrics, summary, report
        └──────────────── dataset, and train's checkpoint ──────────▲

Its parameters are derived from `TrainingConfig`: the common ones, and `advanced` for all the others. Only precache
takes them. It checks them before anything else starts, and outputs the resolved configuration.

On a backend, train, export and evaluate are inside an exit handler, so that clean-up runs however they end. Precache is
outside: an exit handler is a nested DAG, and its inputs would be all parameters instead of precache's two outputs.
The objects that precache creates belong to the workflow, and precache cleans them up itself.
"""

import inspect
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Value
from kfp import compiler, dsl

from components.clean_up import clean_up
from components.evaluate import evaluate
from components.export import export
from components.parameters import ADVANCED, ADVANCED_DESCRIPTION, common
from components.precache import precache
from components.train import train
from trainer.config import Parameter

DESCRIPTION = (
    "Train a model with DiLoCo over distant, unequal workers that may join and leave at any time: "
    "precache the model and the data, train, export, evaluate."
)


def training_pipeline(*, exit_handler: bool) -> Any:
    """The pipeline, with its parameters and their defaults.

    Args:
        exit_handler: Clean up however the run ends. A backend needs it because SIGTERM may not reach a step, or may
            leave it too little time. On one machine, processes die with their step.

    Returns:
        A KFP GraphComponent named `diloco-training`.
    """
    parameters = common()
    defaults = {p.name: (p.type, p.default) for p in parameters} | {ADVANCED: (dict, {})}

    def diloco_training(*channels: Any) -> None:
        values = dict(zip(defaults, channels, strict=True))
        data = _uncached(precache(job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, **values))
        config, dataset = data.outputs["config"], data.outputs["precached"]
        if not exit_handler:
            steps(config, dataset)
            return
        named = {name: values[name] for name in clean_up.component_spec.inputs if name != "job_id"}
        ending = _uncached(clean_up(job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, **named))
        with dsl.ExitHandler(ending, name="train, export, evaluate"):  # the graph's box for these steps
            steps(config, dataset)

    def steps(config: Any, dataset: Any) -> None:
        checkpoint = _uncached(train(config=config, precached=dataset)).outputs["checkpoint"]
        model = _uncached(export(config=config, checkpoint=checkpoint)).outputs["exported_model"]
        _uncached(evaluate(config=config, checkpoint=checkpoint, exported_model=model, precached=dataset))

    # KFP reads the pipeline's parameters from the signature, and their descriptions from the docstring
    diloco_training.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)
            for name, (kind, default) in defaults.items()
        ]
    )
    described = {p.name: describe(p) for p in parameters} | {ADVANCED: ADVANCED_DESCRIPTION}
    arguments = [f"    {name}: {description}" for name, description in described.items()]
    diloco_training.__doc__ = "\n".join([DESCRIPTION, "", "Args:", *arguments])
    return dsl.pipeline(diloco_training, name="diloco-training", display_name="DiLoCo training")


def _uncached(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Disable caching, because the steps work on the workers' own volumes, which a cache key does not cover."""
    return task.set_caching_options(False)


def describe(parameter: Parameter) -> str:
    """A parameter's description in the compiled pipeline."""
    if not parameter.choices:
        return parameter.description
    return f"{parameter.description} One of: {', '.join(choice or '(empty)' for choice in parameter.choices)}."


@cache
def compiled(*, literals: bool = True) -> str:
    """The pipeline as YAML, for the Kubeflow UI, `kfp run create` and our own `submit`.

    Args:
        literals: Include the allowed values of choices and booleans, from which the UI (2.17) makes drop-downs
            (kubeflow/pipelines KEP-11385). Backends before 2.16 cannot read a pipeline with them.
    """
    pipeline = training_pipeline(exit_handler=True)
    if literals:
        # kfp 2.17 has the field in its specification, but its compiler rejects `typing.Literal`
        inputs = pipeline.pipeline_spec.root.input_definitions.parameters
        for parameter in common():
            for value in (True, False) if parameter.type is bool else parameter.choices or ():
                inputs[parameter.name].literals.add().CopyFrom(ParseDict(value, Value()))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        return path.read_text(encoding="utf-8")
