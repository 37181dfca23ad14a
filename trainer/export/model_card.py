"""The model card: an export's `README.md`, written from the data in `training.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.export.run import TrainedRun
from trainer.files import read_json, write_text

FACTS = "training.json"


def facts_of(run: TrainedRun, parameters: int) -> dict[str, Any]:
    """The content of `training.json` as JSON values. It contains no path of this machine."""
    from trainer import models
    from trainer.data.manifest import read_manifest
    from trainer.monitor.report import read_run, summary

    def is_short(fact: object) -> bool:
        return isinstance(fact, str | int | float) and len(str(fact)) < 80

    manifest = read_manifest(run.dataset)
    assert manifest is not None  # `build` has read it
    history, checkpoint = read_run(run.directory, run.config.run_id), run.checkpoint
    content = summary(history)
    is_whole = len(history.workers) == history.all_workers  # a pod has only one worker's file
    # Of local data, only the name: its path is this machine's
    family, _, argument = run.config.dataset.partition(":")
    return {
        "run_id": run.config.run_id,
        "model": run.config.model,
        "parameters": parameters,
        **{name: getattr(checkpoint, name) for name in ("complete", "round", "step")},
        **{name: content[name] for name in ("samples", "tokens")},
        "bytes_sent": content["bytes_sent"] if is_whole else None,
        "workers": history.all_workers,
        "description": run.config.experiment_description,
        "tags": run.config.experiment_tags,
        "settings": run.config.in_scope("card"),
        "data": {
            "name": f"{family}:{Path(argument).name}" if argument else family,
            "task": models.resolve(run.config.model).family.task,
            "revision": manifest.revision,
            "facts": {name: fact for name, fact in {**manifest.for_model, **manifest.facts}.items() if is_short(fact)},
            "train": manifest.train.model_dump(),
            "validation": manifest.validation.model_dump(),
            "hash": manifest.hash,
        },
        "versions": content["versions"] or manifest.versions,
    }


def add_scores(directory: Path, scores: Mapping[str, float]) -> None:
    """Rewrite an export's model card with the scores of its evaluation."""
    write_text(directory / "README.md", model_card(read_json(directory / FACTS), scores))


def model_card(facts: Mapping[str, Any], scores: Mapping[str, float] | None = None) -> str:
    """The card in the hub's format: YAML metadata, then Markdown (`model_card.md.j2`)."""
    import jinja2
    import yaml

    from trainer.tasks import tasks

    data, scores = facts["data"], scores or {}
    task = tasks()[data["task"]]

    # Metadata for the hub's search and leaderboards
    head: dict[str, Any] = {"library_name": "transformers", "tags": list(dict.fromkeys(["diloco", *facts["tags"]]))}
    if scores:
        result = {
            "task": {"type": data["task"].replace("_", "-")},
            "dataset": {"name": f"{data['name']} (held out)", "type": data["name"]},
            "metrics": [{"type": name, "value": value} for name, value in scores.items()],
        }
        head["model-index"] = [{"name": facts["run_id"], "results": [result]}]
    if task.pipeline_tag:
        head["pipeline_tag"] = task.pipeline_tag

    # Text for people. `text` escapes users' words, so that they are not markup
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"text": _text, "thousands": lambda value: f"{value or 0:,}"}
    return environment.get_template("model_card.md.j2").render(
        **facts,
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
        how_to_load=task.how_to_load.strip(),
        scores=scores,
    )


def _text(value: object) -> str:
    """A user's text inside Markdown, on one line and without markup."""
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").replace("`", "'").split())
