"""What the export component does."""

from typing import Any

from kfp import dsl

from components.step import hand_on, step
from trainer.config import TrainingConfig


def run(config: dict[str, Any], model: dsl.Model) -> None:
    """Export, and hand on the Hugging Face directory.

    Args:
        config: The resolved configuration, by flat name.
        model: Output artifact: what `from_pretrained` takes.
    """
    with step("export"):
        from trainer.export import export

        settings = TrainingConfig.from_flat(config)
        directory = export(settings)
        hand_on(directory, model.path)
        model.metadata.update({"run_id": settings.run_id, "model": settings.model, "path": str(directory)})
