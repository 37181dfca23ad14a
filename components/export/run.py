"""What the export component does."""

from typing import Any

from kfp import dsl

from components.step import hand_on, step
from trainer.config import TrainingConfig
from trainer.files import read_json


def run(config: dict[str, Any], model: dsl.Model) -> None:
    """Export, and hand on the Hugging Face directory.

    Args:
        config: The resolved configuration, by flat name.
        model: Output artifact: what `from_pretrained` takes.
    """
    with step("export"):
        from trainer.export import FACTS, export

        settings = TrainingConfig.from_flat(config)
        directory = export(settings)
        hand_on(directory, model.path)
        facts = read_json(directory / FACTS)
        names = ("run_id", "model", "parameters", "complete", "round", "step", "samples", "tokens")
        model.metadata.update({"path": str(directory)} | {name: facts[name] for name in names})
        print(f"model of round {facts['round']}, step {facts['step']}, exported to {directory}")
