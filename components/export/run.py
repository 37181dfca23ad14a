"""What the export component does."""

from typing import Any

from kfp import dsl

from components.launcher import launcher_of
from components.step import step
from trainer.config import TrainingConfig


def run(config: dict[str, Any], trained: dsl.Model, model: dsl.Model) -> None:
    """Export, and hand on the Hugging Face directory.

    Args:
        config: The resolved configuration, by flat name.
        trained: Input artifact: what the train component has handed on.
        model: Output artifact: what `from_pretrained` takes.
    """
    with step("export"):
        launcher_of(TrainingConfig.from_flat(config)).export(trained).hand_on(model)
