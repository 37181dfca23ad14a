"""Export: the committed global parameters of a run as a directory that others can load.

`<run_dir>/export/` contains the task's files (for language models, those of `save_pretrained` and the tokenizer), the
model card `README.md`, and `training.json`, the data on the card.
"""

from pathlib import Path

from trainer.config import TrainingConfig
from trainer.export.hub import check_upload, push
from trainer.export.model_card import FACTS, facts_of, model_card
from trainer.export.run import TrainedRun
from trainer.files import whole_directory, write_json, write_text

__all__ = ["FACTS", "TrainedRun", "export"]


def export(config: TrainingConfig, output: Path | str | None = None) -> Path:
    """Write the newest committed global parameters as a directory, atomically.

    An unfinished run can also be exported; its card says so. With `hf_upload`, the directory is then pushed.

    `output` is `<run_dir>/export` by default; an existing directory is replaced.

    Raises:
        ConfigError: There is no run, it has no checkpoint, or HF_TOKEN is missing.
        TrainingError: The hub rejects the upload.
    """
    from trainer import models
    from trainer.tasks import tasks

    check_upload(config)
    run = TrainedRun.find(config)
    directory = Path(output) if output else run.directory / "export"
    model = run.build()
    with whole_directory(directory) as temporary:
        tasks()[models.resolve(run.config.model).family.task].export(model, run.dataset, temporary)
        facts = facts_of(run, sum(parameter.numel() for parameter in model.parameters()))
        write_json(temporary / FACTS, facts)
        write_text(temporary / "README.md", model_card(facts))
        for path in temporary.rglob("*"):  # safetensors makes its files readable only by the owner
            path.chmod(path.stat().st_mode | 0o444)
    push(run.config, directory)
    return directory
