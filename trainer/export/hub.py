"""The Hugging Face Hub: pushing an export."""

import os
from pathlib import Path

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError


def check_upload(config: TrainingConfig) -> None:
    """Raise ConfigError if `hf_upload` is set without HF_TOKEN, before training starts rather than after it."""
    if config.hf_upload and not os.environ.get("HF_TOKEN"):
        raise ConfigError("hf_upload", config.hf_upload, "needs the environment variable HF_TOKEN")


def push(config: TrainingConfig, directory: Path, only: str | None = None) -> None:
    """Push an export, or `only` one of its files, to the Hugging Face Hub if `hf_upload` is set.

    New repositories are private.

    Raises:
        ConfigError: HF_TOKEN is missing.
        TrainingError: The hub rejects the upload or cannot be reached.
    """
    if not config.hf_upload:
        return
    check_upload(config)
    from huggingface_hub import HfApi

    name = config.trained_model_hf_name
    try:
        hub = HfApi(token=os.environ["HF_TOKEN"])
        hub.create_repo(name, private=True, exist_ok=True)
        message = f"{config.run_id}: {only or 'trained with DiLoCo'}"
        hub.upload_folder(repo_id=name, folder_path=directory, allow_patterns=only, commit_message=message)
    except Exception as error:  # any kind: the export itself is intact
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingError(f"the model is in {directory}, but could not be pushed to {name}: {reason}") from error
