"""Export and evaluation of a tiny GPT-NeoX that is really saved, loaded and scored."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from trainer import data, models
from trainer.__main__ import main
from trainer.checkpoint import Checkpointer
from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.events import EventLog
from trainer.export.evaluate import evaluate
from trainer.export.export import export
from trainer.export.run import TrainedRun
from trainer.files import read_json
from trainer.monitor.report import write_report
from trainer.volume import Volume, worker_configs

TEXT = "Tree number {n}, called “Älteste Eiche”: {n} rings, {m} leaves, and one owl (✓).\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory after training: precached data and model, metrics, and each worker's checkpoints."""
    directory = tmp_path_factory.mktemp("made")
    texts = directory / "texts"
    texts.mkdir()
    for n in range(60):
        (texts / f"{n}.txt").write_text("".join(TEXT.format(n=n, m=m) for m in range(n, n + 4)))
    config = TrainingConfig.from_flat(
        {
            "model": "gpt-neo-x:test",
            "dataset": f"files:{texts}",
            "tokenizer": "bytes",
            "device": "cpu",
            "sequence_length": 64,
            "validation_fraction": 0.3,
            "run_id": "oak",
            "run_dir": str(directory / "run"),
            "batch_size": 8,
            "per_device_train_batch_size": 4,
            "experiment_tags": ["trees"],
            "warmup_steps": 0,
            "experiment_description": "Counts | leaves <b>",
            "total_steps": 4,
            "local_steps": 2,
        }
    )
    for rank, own in enumerate(worker_configs(config)):
        volume = Volume.of(own)
        manifest = data.precache(own, volume, log=lambda line: None)
        model = models.build(models.directory(own, manifest.for_model, volume.models), seed=7)
        for complete, shift in ((False, 0.0), (True, 0.01)):
            save(volume, model, round=1 + complete, step=2 * (1 + complete), shift=shift, complete=complete)
        with EventLog(volume.metrics) as metrics:
            settings = own.model_dump(mode="json")
            metrics.write("start", run_id="oak", worker=rank, config=settings, versions={"torch": torch.__version__})
            metrics.write("membership", change="joined", members=["000-aaaaaaaa", "001-bbbbbbbb"])
            for step in range(1, 5):
                metrics.write(
                    "step", round=1, step=step, loss=5.0 - step, lr=0.1, samples=8, tokens=8 * 64, seconds=0.1
                )
            place = {"round": 2, "step": 4, "term": 1, "cursor": {"position": 64, "returned": []}}
            metrics.write("round", **place, loss=1.0, bytes_sent=1000, samples=16, exposed_seconds=0.1)
            metrics.write("end", status="complete", round=2, step=4, global_hash="aa")
    return directory


def save(volume: Volume, model: torch.nn.Module, round: int, step: int, shift: float, complete: bool) -> None:
    """Write a checkpoint whose global parameters are the model's, moved by `shift`."""
    checkpointer = Checkpointer(volume.checkpoints, 3, lambda *_: None)
    parameters = {f"model.{name}": tensor.detach() + shift for name, tensor in model.named_parameters()}
    checkpointer.save(parameters, {}, {"round": round, "step": step}, complete=complete)
    checkpointer.wait()
    checkpointer.close()


@pytest.fixture
def run_dir(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, elsewhere: nothing may depend on where it was trained."""
    monkeypatch.setattr("trainer.tasks.language_modelling.MOST_NEW", 8)
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def of(run_dir: Path, **values: Any) -> TrainingConfig:
    """What a user gives to find the run: its directory."""
    return TrainingConfig.from_flat({"run_dir": str(run_dir), "device": "cpu", **values})


def test_export_holds_the_newest_committed_global_parameters(run_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = export(of(run_dir))

    assert directory == run_dir / "export"
    assert (directory / "model.safetensors").exists() and (directory / "generation_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(directory)
    newest = sorted((run_dir / "worker-0" / "checkpoints" / "oak").glob("round-*"))[-1]
    from safetensors.torch import load_file

    saved = load_file(newest / "global.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[f"model.{name}"])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("Älteste Eiche ✓").input_ids) == "Älteste Eiche ✓"
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in directory.iterdir()), "others may read it"
    assert not list(run_dir.glob(".export*")), "nothing half-written stays behind"


def test_a_corrupt_newest_checkpoint_is_passed_over(run_dir: Path) -> None:
    for file in run_dir.glob("worker-*/checkpoints/oak/round-000002*/global.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    directory = export(of(run_dir))

    assert read_json(directory / "training.json")["round"] == 1
    assert "not finished" in (directory / "README.md").read_text()


def test_the_most_advanced_worker_is_exported(run_dir: Path) -> None:
    shutil.rmtree(next(run_dir.glob("worker-0/checkpoints/oak/round-000002*")))
    assert read_json(export(of(run_dir)) / "training.json")["complete"]


def test_card_tells_data_training_and_versions(run_dir: Path) -> None:
    card = (export(of(run_dir)) / "README.md").read_text()

    head = yaml.safe_load(card.split("---")[1])
    assert head["tags"] == ["diloco", "trees"] and head["pipeline_tag"] == "text-generation"
    assert "model-index" not in head
    assert "| held out | " in card and "| rounds | 2 |" in card and "| bytes sent | 2,000 |" in card
    assert "| local_steps | 2 |" in card and torch.__version__ in card and "Not evaluated yet" in card
    assert "| outer_momentum | 0.9 |" in card, "what was taken, where none was given"
    assert "Counts \\| leaves &lt;b>" in card, "a user's words are no markup"
    assert str(run_dir.parent.parent) not in card, "no path of this machine"


def in_a_pod(run_dir: Path, worker: int, **values: Any) -> TrainingConfig:
    """The configuration of a pod, which has the volume of only one worker."""
    volume = run_dir / f"worker-{worker}"
    own = {"model_cache_dir": "models", "dataset_cache_dir": "datasets", "checkpoint_path": "checkpoints"}
    return of(volume, **{name: str(volume / folder) for name, folder in own.items()}, **values)


def test_the_volume_of_one_worker_tells_of_the_whole_run(run_dir: Path) -> None:
    whole = read_json(export(of(run_dir)) / "training.json")
    directory = export(in_a_pod(run_dir, 1))
    facts, card = read_json(directory / "training.json"), (directory / "README.md").read_text()
    assert (facts["workers"], facts["samples"], facts["tokens"]) == (2, 64, 64 * 64)
    assert facts | {"bytes_sent": whole["bytes_sent"]} == whole
    assert facts["bytes_sent"] is None and "bytes sent" not in card, "what the others have sent is not known"
    assert "| workers | 2 |" in card and "| samples | 64 |" in card


def test_a_run_is_exported_although_another_one_has_used_its_volume_since(run_dir: Path) -> None:
    config = in_a_pod(run_dir, 0, run_id="oak", eval_samples=5)
    before = read_json(export(config) / "training.json")
    with EventLog(run_dir / "worker-0" / "metrics.jsonl") as metrics:
        metrics.write("start", run_id="elm", worker=0, config={"run_id": "elm", "model": "resnet18:tiny"})
        metrics.write("end", status="complete", round=1, step=1)
    assert read_json(export(config) / "training.json") == before
    evaluate(config, log=lambda line: None)
    facts = run_dir / "worker-0" / "export" / "training.json"
    facts.write_text(json.dumps({**before, "run_id": "elm"}))
    with pytest.raises(ConfigError, match=r"run_id = 'oak': .*export is the export of elm: export again"):
        evaluate(config)


def test_what_cannot_be_exported_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run_dir = .*must name"):
        export(TrainingConfig())
    with pytest.raises(ConfigError, match=r"no such directory"):
        export(of(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"run_id = 'elm': the run in .* is oak"):
        export(of(run_dir, run_id="elm"))
    for worker in run_dir.glob("worker-*"):
        shutil.rmtree(worker / "checkpoints")
    with pytest.raises(ConfigError, match=r"no checkpoint to export; looked in .*worker-0.*worker-1"):
        export(of(run_dir))
    assert not (run_dir / "export").exists()


def test_below_a_chosen_checkpoint_path_each_worker_has_its_own(tmp_path: Path) -> None:
    run_dir, chosen = tmp_path / "run", tmp_path / "elsewhere"
    config = of(run_dir, run_id="oak", checkpoint_path=str(chosen), nodes=2)
    places = [Volume.of(own).checkpoints for own in worker_configs(config)]
    assert places == [chosen / "worker-0" / "oak", chosen / "worker-1" / "oak"]
    for own in worker_configs(config):
        with EventLog(Volume.of(own).metrics) as metrics:
            metrics.write("start", run_id="oak", config=own.model_dump(mode="json"))
    found = TrainedRun.find(of(run_dir))  # what the run was told need not be said again
    assert [volume.checkpoints for volume in found.volumes[:2]] == places


def test_a_recorded_configuration_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with EventLog(tmp_path / "worker-0" / "metrics.jsonl") as metrics:
        metrics.write("start", run_id="oak", worker=0, config={"run_id": "oak", "nodez": 2})
    with pytest.raises(ConfigError, match=r"the recorded configuration cannot be used: nodez = 2: no such parameter"):
        export(of(tmp_path))


def test_a_checkpoint_of_another_model_is_refused(run_dir: Path) -> None:
    save(Volume.of(worker_configs(of(run_dir, run_id="oak"))[0]), torch.nn.Linear(2, 2), 9, 18, 0.0, complete=True)
    with pytest.raises(TrainingError, match="is not of this model"):
        export(of(run_dir))


class Hub:
    """Stands in for the hub's client, which is the last thing before the network."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 - emptied by the test
    error: Exception | None = None

    def __init__(self, token: str) -> None:
        self.token = token

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append((name, options))
        if self.error:
            raise self.error

    def upload_folder(self, **options: Any) -> None:
        files = {path.name for path in Path(options["folder_path"]).iterdir()}
        self.calls.append((self.token, {**options, "files": files}))


def test_push_takes_its_token_from_the_environment_alone(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    config = of(run_dir, hf_upload=True, trained_model_hf_name="me/oak")
    Hub.calls = []

    with pytest.raises(ConfigError, match="hf_upload = True: needs the environment variable HF_TOKEN"):
        export(config)
    assert not (run_dir / "export").exists(), "refused before anything is done"

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    export(config)
    (name, created), (token, pushed) = Hub.calls
    assert name == pushed["repo_id"] == "me/oak" and created["private"] and token == "hf_secret"
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= pushed["files"]
    written = [path.read_bytes() for path in (run_dir / "export").iterdir()]
    assert not any(b"hf_secret" in content for content in written)

    monkeypatch.setattr(Hub, "error", RuntimeError("403 Forbidden\nlong story"))
    with pytest.raises(TrainingError, match=r"could not be pushed to me/oak: 403 Forbidden$"):
        export(config)


def by_hand(run_dir: Path, config: TrainingConfig) -> dict[str, float]:
    """Bits a byte of the export and of the unigram byte model, one token and one byte at a time."""
    from transformers import AutoModelForCausalLM

    place = data.directory(config, run_dir / "worker-0" / "datasets")
    held_out = data.open_dataset(place).validation
    train = data.open_dataset(place).train
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    # With the tokenizer `bytes` a token is a byte, and 256 ends a text; what did not fill a sequence is not in `train`.
    counts = np.array(read_json(place / "manifest.json")["byte_counts"]) + 1
    tokens = train[np.arange(len(train))]["input_ids"]
    assert 0 <= (counts - 1).sum() - np.sum(tokens < 256) < 64
    nats, unigram, size, predicted = 0.0, 0.0, 0, 0
    for row in held_out[np.arange(len(held_out))]["input_ids"]:
        with torch.no_grad():
            logits = model(torch.tensor(row[None])).logits[0].double().log_softmax(-1)
        for position, token in enumerate(row[1:]):
            nats -= logits[position, token].item()
            predicted += 1
            if token < 256:
                unigram -= math.log(counts[token] / counts.sum())
                size += 1
    scale = 1 / math.log(2) / size
    return {"loss": nats / predicted, "bits": nats * scale, "unigram": unigram * scale, "bytes": size}


def test_scores_agree_with_a_count_by_hand(made: Path, run_dir: Path) -> None:
    export(of(run_dir))
    lines: list[str] = []

    found = evaluate(of(run_dir, per_device_train_batch_size=4, batch_size=4), log=lines.append)

    settings = json.loads((run_dir / "worker-0" / "metrics.jsonl").read_text().splitlines()[0])["config"]
    expected = by_hand(run_dir, TrainingConfig.model_validate(settings))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected["loss"]), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(expected["bits"], rel=1e-5)
    assert found["unigram_bits_per_byte"] == pytest.approx(expected["unigram"], rel=1e-9)
    assert found["bytes"] == expected["bytes"] and found["tokens_per_second"] > 0
    assert list(found)[:4] == ["loss", "perplexity", "bits_per_byte", "unigram_bits_per_byte"], "a step shows the first"
    assert "bits per byte" in lines[0] and "unigram bits per byte" in lines[0]

    assert read_json(run_dir / "evaluation.json") == found
    report = write_report(run_dir).read_text()
    assert read_json(run_dir / "summary.json")["evaluation"]["bits_per_byte"] == found["bits_per_byte"]
    assert found["sample"]["prompt"] and found["sample"]["prompt"] in report
    card = (run_dir / "export" / "README.md").read_text()
    assert f"| bits per byte | {found['bits_per_byte']:.4f} |" in card and "Not evaluated yet" not in card
    metrics = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"]
    assert {"type": "loss", "value": found["loss"]} in metrics


def test_the_held_out_files_and_the_export_are_enough_and_others_are_refused(run_dir: Path, tmp_path: Path) -> None:
    config = of(run_dir, eval_samples=5)
    export(config)
    whole = evaluate(config, log=lambda line: None)
    part = tmp_path / "part"
    shutil.copytree(
        next((run_dir / "worker-0" / "datasets").glob("files-*")),
        part,
        ignore=shutil.ignore_patterns("train-*", "READY"),
    )
    for worker in run_dir.glob("worker-*"):
        for room in ("checkpoints", "datasets", "models"):
            shutil.rmtree(worker / room)

    again = evaluate(config, dataset=part, log=lambda line: None)
    assert whole["sequences"] == again["sequences"] == 5
    assert (whole["loss"], whole["sample"]) == (again["loss"], again["sample"]), "the same every time"

    manifest = read_json(part / "manifest.json")
    (part / "manifest.json").write_text(json.dumps({**manifest, "hash": "other"}))
    with pytest.raises(ConfigError, match="not the data that the exported model was trained on"):
        evaluate(config, dataset=part)
    (part / "manifest.json").write_text(json.dumps(manifest))
    next(part.glob("validation-*")).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is incomplete: validation-.* is missing or torn"):
        evaluate(config, dataset=part)
    with pytest.raises(ConfigError, match="precache it again"):
        evaluate(config)


def test_evaluation_without_an_export_says_what_to_do(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no export in .*python -m trainer export"):
        evaluate(of(run_dir))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(run_dir: Path) -> None:
    export(of(run_dir))
    with pytest.raises(ConfigError, match=r"device = .*--device cpu"):
        evaluate(of(run_dir, device="cuda"))


def test_token_contents_spell_the_text() -> None:
    """What the unigram byte model pays for is the text itself, whatever the tokenizer."""
    from trainer.data import tokenizer as tokenizers

    text = "def größe(x):\n    return '✓' * x\n" * 20
    for spec in ("bytes", "bpe:300"):
        made = tokenizers.load(spec, [text])
        contents = tokenizers.token_contents(made)
        ids = tokenizers.encode(made, [text])[0]
        assert b"".join(contents[token] for token in ids) == text.encode()
        assert contents[made.eos_token_id] == b""
        assert tokenizers.token_bytes(made).tolist() == [len(content) for content in contents]


def test_the_commands_find_the_run_in_its_directory(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--run-dir", str(run_dir), "--device", "cpu"]
    assert main(["export", *place]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run_dir / "export")
    assert main(["evaluate", *place]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run_dir / "report.html")
    with pytest.raises(ConfigError, match="run_dir = '': must name the run's directory"):
        main(["export"])


@pytest.mark.parametrize("command", [["export", "--run-dir"], ["evaluate", "--run-dir"], ["report"]])
def test_a_run_that_was_never_trained_is_named(command: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run_dir = .*: holds no run that was trained"):
        main([*command, str(tmp_path)])
    for name in ("one", "two"):
        with EventLog(tmp_path / name / "worker-0" / "metrics.jsonl"):
            pass
    with pytest.raises(ConfigError, match=r"run_dir = .*contains runs, but is not a run itself: name one of one, two$"):
        main([*command, str(tmp_path)])
    assert not (tmp_path / "report.html").exists()
