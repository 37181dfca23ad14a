"""Export: the committed global parameters of a run, as a directory that others load.

`<run_dir>/export/` holds what the task writes (for language: Hugging Face's `save_pretrained` files and tokenizer), the
model card `README.md`, and `training.json`, the facts that the card is made from.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.files import read_json, whole_directory, write_json, write_text
from trainer.volume import Volume, worker_configs

if TYPE_CHECKING:
    import torch

    from trainer.checkpoint import Checkpoint

FACTS = "training.json"


@dataclass(frozen=True)
class TrainedRun:
    """A run on this machine, and where its parts lie.

    Attributes:
        directory: The run directory.
        config: As its workers recorded it; what concerns this command alone is as the user has it now.
        volumes: Of the workers, in the order in which they are looked at.
    """

    directory: Path
    config: TrainingConfig
    volumes: tuple[Volume, ...]

    @classmethod
    def find(cls, config: TrainingConfig) -> Self:
        """The run in `config.run_dir` (or `runs/<run_id>`): no other parameter has to be given again.

        Raises:
            ConfigError: No run is named, there is none, or it is another one.
        """
        from trainer.monitor.report import read_run

        if not config.run_dir and not config.run_id:
            raise ConfigError("run_dir", "", "must name the run's directory")
        directory = Path(config.run_dir or Path("runs") / config.run_id)
        if not directory.is_dir():
            raise ConfigError("run_dir", directory, "no such directory")
        recorded = read_run(directory).config
        if recorded and config.run_id not in ("", recorded.get("run_id")):
            raise ConfigError("run_id", config.run_id, f"the run in {directory} is {recorded.get('run_id')}")
        config = config.with_values(run_dir=str(directory))
        if recorded:
            try:
                trained = TrainingConfig.from_tree(recorded)
            except ConfigError as error:  # another version's, or damaged
                raise ConfigError("run_dir", directory, f"what its workers recorded cannot be used: {error}") from None
            config = _as_trained(trained, config)
        # In a pod the run directory is a worker's own volume; on one machine it holds one for each worker.
        return cls(directory, config, tuple(map(Volume.of, (*worker_configs(config), config))))

    @cached_property
    def checkpoint(self) -> "Checkpoint":
        """The newest checkpoint of any worker that verifies. Raises ConfigError if there is none."""
        from trainer import checkpoint

        places = list(dict.fromkeys(volume.checkpoints for volume in self.volumes))
        found = [newest for place in places if (newest := checkpoint.newest(place)) is not None]
        if not found:
            looked = ", ".join(map(str, places))
            raise ConfigError("run_dir", self.directory, f"has no checkpoint to export; looked in {looked}")
        return max(found, key=lambda one: (one.round, one.step))

    @cached_property
    def dataset(self) -> Path:
        """The directory of the dataset that the run was trained on. Raises ConfigError if it is nowhere."""
        from trainer import data
        from trainer.data.dataset import READY

        places = [data.directory(self.config, volume.datasets) for volume in self.volumes]
        for place in places:
            if (place / READY).exists():
                return place
        raise ConfigError("dataset", self.config.dataset, f"is not in {places[0].parent}: precache it again")

    def build(self) -> "torch.nn.Module":
        """The model with the committed global parameters (of a run that averages them: their average), on the CPU.

        In evaluation mode; its buffers are recomputed from them.
        """
        import torch

        from trainer import data, models
        from trainer.data.dataset import read_manifest
        from trainer.tasks import scoring, tasks

        manifest = read_manifest(self.dataset)
        if manifest is None:
            raise ConfigError("dataset", self.dataset, "has no manifest: precache it again")
        places = [models.directory(self.config, manifest.for_model, volume.models) for volume in self.volumes]
        place = next((one for one in places if (one / models.READY).exists()), places[0])
        model = models.build(place, self.config.seed)
        parameters = self.checkpoint.averaged_parameters()
        # What is not trained is as it was at the start, and in no checkpoint.
        own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if own.keys() != parameters.keys():
            different = sorted(own.keys() ^ parameters.keys())
            raise TrainingError(f"{self.checkpoint.path} is not of this model: {different[0]} is in one of them only")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(parameters[name])
        model.eval()
        cpu, size = torch.device("cpu"), self.config.per_device_train_batch_size
        with torch.random.fork_rng([]):
            torch.manual_seed(self.config.seed)
            task = tasks()[models.resolve(self.config.model).family.task]
            scoring.recompute_buffers(task, model, data.open_dataset(self.dataset), size, cpu)
        return model


def export(config: TrainingConfig, output: Path | str | None = None) -> Path:
    """Write the newest committed global parameters as a directory, whole or not at all.

    A run that is not finished can be exported too: its card says so. With `hf_upload` the directory is then pushed.

    Args:
        config: Names the run by `run_dir` or `run_id`.
        output: Where to; `<run_dir>/export` by default. What is there is replaced.

    Raises:
        ConfigError: There is no run, or it has no checkpoint; or HF_TOKEN is missing.
        TrainingError: The hub has refused.
    """
    from trainer import models
    from trainer.tasks import tasks

    check_upload(config)
    run = TrainedRun.find(config)
    directory = Path(output) if output else run.directory / "export"
    model = run.build()
    with whole_directory(directory) as temporary:
        tasks()[models.resolve(run.config.model).family.task].export(model, run.dataset, temporary)
        facts = _facts(run, sum(parameter.numel() for parameter in model.parameters()))
        write_json(temporary / FACTS, facts)
        write_text(temporary / "README.md", model_card(facts))
        for path in temporary.rglob("*"):  # safetensors keeps its files from others, who are to load them
            path.chmod(path.stat().st_mode | 0o444)
    push(run.config, directory)
    return directory


def _as_trained(recorded: TrainingConfig, now: TrainingConfig) -> TrainingConfig:
    """A worker's configuration with what the user says now, and without the place where its volume lay then."""
    then, given, default = recorded.to_flat(), now.to_flat(), TrainingConfig().to_flat()
    values = {name: given[name] for name in TrainingConfig.names_in_scope("command")}
    for name in TrainingConfig.names_in_scope("place"):
        if given[name] != default[name]:
            values[name] = given[name]
        elif Path(then[name]).is_relative_to(then["run_dir"]):
            values[name] = default[name]
        elif name == "checkpoint_path" and Path(then[name]).name == Path(then["run_dir"]).name:
            values[name] = str(Path(then[name]).parent)  # each worker has its own below the one that was chosen
    return recorded.with_values(**values)


def add_scores(directory: Path, scores: Mapping[str, float]) -> None:
    """Write an export's model card anew, with the scores of its evaluation."""
    write_text(directory / "README.md", model_card(read_json(directory / FACTS), scores))


def check_upload(config: TrainingConfig) -> None:
    """Raise ConfigError if `hf_upload` is set and there is no HF_TOKEN: better before a training than after it."""
    if config.hf_upload and not os.environ.get("HF_TOKEN"):
        raise ConfigError("hf_upload", config.hf_upload, "needs the environment variable HF_TOKEN")


def push(config: TrainingConfig, directory: Path, only: str | None = None) -> None:
    """Push an export to the Hugging Face Hub, if `hf_upload` asks for it; a repository that is new is private.

    Args:
        only: The one file to push; all of them by default.

    Raises:
        ConfigError: HF_TOKEN is missing.
        TrainingError: The hub has refused, or cannot be reached.
    """
    if not config.hf_upload:
        return
    check_upload(config)
    from huggingface_hub import HfApi

    name = config.trained_model_hf_name
    try:
        hub = HfApi(token=os.environ["HF_TOKEN"])
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=name,
            folder_path=directory,
            allow_patterns=only,
            commit_message=f"{config.run_id}: {only or 'trained with DiLoCo'}",
        )
    except Exception as error:  # whatever it is, the export itself stands
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrainingError(f"the model is in {directory}, but could not be pushed to {name}: {reason}") from error


def _facts(run: TrainedRun, parameters: int) -> dict[str, Any]:
    """What the model card says, as JSON values. No path of this machine."""
    from trainer import models
    from trainer.data.dataset import read_manifest
    from trainer.monitor.report import read_run, summary

    manifest = read_manifest(run.dataset)
    assert manifest is not None  # `build` has read it
    content = summary(read_run(run.directory))
    family, _, argument = run.config.dataset.partition(":")
    return {
        "run_id": run.config.run_id,
        "model": run.config.model,
        "parameters": parameters,
        "complete": run.checkpoint.complete,
        "round": run.checkpoint.round,
        "step": run.checkpoint.step,
        "samples": content["samples"],
        "tokens": content["tokens"],
        "bytes_sent": content["bytes_sent"],
        "workers": len(content["workers"]),
        "description": run.config.experiment_description,
        "tags": run.config.experiment_tags,
        "settings": run.config.in_scope("card"),
        "data": {
            "name": f"{family}:{Path(argument).name}" if argument else family,
            "task": models.resolve(run.config.model).family.task,
            "revision": manifest.revision,
            "facts": {name: fact for name, fact in {**manifest.for_model, **manifest.facts}.items() if _is_short(fact)},
            "train": manifest.train.model_dump(),
            "validation": manifest.validation.model_dump(),
            "hash": manifest.hash,
        },
        "versions": content["versions"] or manifest.versions,
    }


def model_card(facts: Mapping[str, Any], scores: Mapping[str, float] | None = None) -> str:
    """The card in the hub's format: YAML for machines, then text for people."""
    import yaml

    from trainer.tasks import tasks

    data, settings = facts["data"], facts["settings"]
    results = [{"type": name, "value": value} for name, value in (scores or {}).items()]
    head = {
        "library_name": "transformers",
        "tags": list(dict.fromkeys(["diloco", *facts["tags"]])),
        "model-index": [
            {
                "name": facts["run_id"],
                "results": [
                    {
                        "task": {"type": data["task"].replace("_", "-")},
                        "dataset": {"name": f"{data['name']} (held out)", "type": data["name"]},
                        "metrics": results,
                    }
                ],
            }
        ],
    }
    if not results:
        del head["model-index"]
    task = tasks()[data["task"]]
    if task.pipeline_tag:
        head["pipeline_tag"] = task.pipeline_tag
    method = "data-parallel training" if settings["optim_method"] == "ddp" else "DiLoCo"
    state = (
        ""
        if facts["complete"]
        else f"\n> The training is not finished: these are its parameters after round {facts['round']}.\n"
    )
    sizes = {
        split: ", ".join(f"{number:,} {name}" for name, number in counts.items())
        for split, counts in (("trained on", data["train"]), ("held out", data["validation"]))
    }
    amounts = {"workers": "workers", "rounds": "round", "inner steps": "step", "bytes sent": "bytes_sent"}
    amounts |= {"samples": "samples", "tokens": "tokens"}
    work = {name: f"{facts[fact] or 0:,}" for name, fact in amounts.items()}
    scored = _table({_label(name): f"{value:.4f}" for name, value in (scores or {}).items()}, ("Score", "Held out"))
    return f"""\
---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}
---

# {_text(facts["run_id"])}

{_text(facts["model"])} with {facts["parameters"]:,} parameters, trained with {method}. {_text(facts["description"])}
{state}
```python
{task.how_to_load.strip()}
```

## Data

{_text(data["name"])}, revision `{_text(data["revision"])}`.

{_table(sizes, ("Split", "Size"))}

{_table({_label(name): str(fact) for name, fact in data["facts"].items()}, ("Property", "Value"))}

Content hash `{data["hash"]}`.

## Training

{_table(work, ("Work", "Amount"))}

{_table({name: str(value) for name, value in settings.items()}, ("Parameter", "Value"))}

## Scores

{scored if scores else "Not evaluated yet."}

## Versions

{_table(facts["versions"], ("Library", "Version"))}
"""


def _is_short(fact: object) -> bool:
    return isinstance(fact, str | int | float) and len(str(fact)) < 80


def _table(rows: Mapping[str, str], head: tuple[str, str]) -> str:
    lines = [head, ("---", "---"), *rows.items()]
    return "\n".join(f"| {_text(name)} | {_text(value)} |" for name, value in lines)


def _label(score: str) -> str:
    return score.replace("_", " ").replace("per", "a") if score.endswith("per_byte") else score.replace("_", " ")


def _text(value: object) -> str:
    """A user's words inside markdown: on one line, and no markup."""
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").replace("`", "'").split())
