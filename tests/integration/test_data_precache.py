"""Precaching on a real disk: done once, repaired when it is damaged, safe when processes die or meet."""

import shutil
import subprocess
import sys
import textwrap
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer import data
from trainer.config import TrainingConfig
from trainer.data.precache import damage
from trainer.errors import ConfigError, TrainingError
from trainer.volume import Volume


class Log(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)

    def has(self, part: str) -> bool:
        return any(part in line for line in self)


def config(root: Path, **changes: Any) -> TrainingConfig:
    values = {
        "model": "gpt-neo-x:test",
        "dataset": f"files:{root / 'source'}",
        "tokenizer": "bytes",
        "sequence_length": 32,
        "validation_fraction": 0.2,
        "device": "cpu",
        "run_id": "test",
        "run_dir": str(root / "run"),
        "dataset_cache_dir": str(root / "volume" / "datasets"),
        "model_cache_dir": str(root / "volume" / "models"),
    }
    return TrainingConfig.from_flat({**values, **changes})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    for number in range(60):
        (tmp_path / "source" / f"{number:02}.txt").write_text(f"document {number}: " + "grün und blau " * number)
    return tmp_path


@pytest.fixture
def made(root: Path) -> Path:
    """The directory of a dataset that has been precached."""
    own = config(root)
    data.precache(own, Volume.of(own), Log())
    return data.directory(own, Volume.of(own).datasets)


def again(root: Path, **changes: Any) -> Log:
    log = Log()
    own = config(root, **changes)
    data.precache(own, Volume.of(own), log)
    return log


def content(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in path.rglob("*")
        if file.is_file()
    }


def test_stdlib_from_source_to_batches(tmp_path: Path) -> None:
    """What `make run` trains on, a bounded part of it."""
    own = config(tmp_path, dataset="stdlib", tokenizer="bpe:512", max_samples=60, sequence_length=128)
    manifest = data.precache(own, Volume.of(own), Log())
    dataset = data.open_dataset(data.directory(own, Volume.of(own).datasets))
    assert dataset.manifest == manifest
    assert (len(dataset.train), len(dataset.validation)) == (manifest.train.sequences, manifest.validation.sequences)
    assert manifest.train.documents + manifest.validation.documents == 60

    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(dataset.tokenizer_dir)
    sizes = data.tokenizer.token_bytes(tokenizer)
    held_out = dataset.validation[np.arange(len(dataset.validation))]
    assert np.array_equal(held_out["bytes"], sizes[held_out["input_ids"][:, 1:]].sum(axis=1))
    order = data.SampleOrder(len(dataset.train), own.seed)
    [batch] = data.batches(dataset.train, order, range(8), 8)
    assert batch["input_ids"].shape == (8, 128)
    assert int(batch["input_ids"].max()) < manifest.vocabulary_size == 512
    everything = dataset.train[np.arange(len(dataset.train))]["input_ids"].ravel()
    assert "import" in tokenizer.decode(everything[:2000])
    assert (sizes[everything].sum() - manifest.train.bytes) <= 0
    assert sum(manifest.byte_counts) == manifest.train.bytes


def test_a_second_time_does_nothing_and_says_so(root: Path, made: Path) -> None:
    before = content(made)
    log = again(root)
    assert log[0] == f"dataset files:{root / 'source'} is already precached in {made}"
    assert log.has("model gpt-neo-x:test is already precached in")
    assert content(made) == before


def test_other_inputs_have_other_directories(root: Path) -> None:
    volume = Volume.of(config(root))
    changes: list[dict[str, Any]] = [
        {},
        {"sequence_length": 16},
        {"tokenizer": "bpe:300"},
        {"max_samples": 10},
        {"validation_fraction": 0.3},
        {"dataset": "stdlib"},
    ]
    assert len({data.directory(config(root, **change), volume.datasets) for change in changes}) == len(changes)
    for change in ({"seed": 1}, {"total_steps": 5000}, {"run_id": "other"}):
        assert data.directory(config(root, **change), volume.datasets) == data.directory(config(root), volume.datasets)


def test_workers_agree_on_the_content(root: Path, made: Path) -> None:
    shutil.copytree(root / "source", root / "copied" / "source")
    first = data.open_dataset(made).manifest
    own = config(root / "copied")
    second = data.precache(own, Volume.of(own), Log())
    assert (first.hash, first.revision) == (second.hash, second.revision)
    assert first.files == second.files
    changed = config(root, sequence_length=16)
    assert data.precache(changed, Volume.of(changed), Log()).hash != first.hash


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    ("harm", "name", "problem"),
    [
        (Path.unlink, "READY", "READY is missing"),
        (Path.unlink, "train-00000.arrow", "train-00000.arrow is missing"),
        (truncate, "train-00000.arrow", "bytes instead of"),
        (flip, "validation-00000.arrow", "validation-00000.arrow is corrupt"),
        (flip, "tokenizer/tokenizer.json", "tokenizer/tokenizer.json is corrupt"),
        (flip, "manifest.json", "manifest.json is corrupt"),
        (truncate, "manifest.json", "manifest.json is corrupt"),
    ],
)
def test_damage_is_repaired(root: Path, made: Path, harm: Any, name: str, problem: str) -> None:
    intact = {path: body for path, (_, body) in content(made).items()}
    harm(made / name)
    log = again(root)
    assert log[0].startswith(f"repairing {made}: ")
    assert problem in log[0]
    assert {path: body for path, (_, body) in content(made).items()} == intact
    assert damage(made) is None


@pytest.mark.parametrize("name", ["READY", "train-00000.arrow"])
def test_training_refuses_what_is_not_whole(made: Path, name: str) -> None:
    truncate(made / name) if name != "READY" else (made / name).unlink()
    with pytest.raises(ConfigError) as error:
        data.open_dataset(made)
    assert str(error.value) == (
        f"dataset = '{made.name}': is not precached in {made.parent}: run `python -m trainer precache` first"
    )


def test_a_changed_source_is_read_anew(root: Path, made: Path) -> None:
    before = data.open_dataset(made)
    held = before.train[np.arange(len(before.train))]["input_ids"]
    (root / "source" / "new.txt").write_text("something new " * 50)
    log = again(root)
    assert log[0] == f"rebuilding {made}: its source has changed"
    assert data.open_dataset(made).manifest.hash != before.manifest.hash
    # A run that is training on the old one goes on with it.
    assert np.array_equal(before.train[np.arange(len(before.train))]["input_ids"], held)


def test_another_worker_takes_what_is_there(root: Path, made: Path) -> None:
    other = {"dataset_cache_dir": str(root / "other" / "datasets"), "model_cache_dir": str(root / "other" / "models")}
    own = config(root, **other)
    log = Log()
    manifest = data.precache(own, Volume.of(own), log, source=made.parent)
    taken = data.directory(own, Volume.of(own).datasets)
    assert log[0] == f"copying dataset files:{root / 'source'} from {made}"
    assert data.open_dataset(taken).manifest == manifest == data.open_dataset(made).manifest
    assert damage(taken) is None
    shutil.rmtree(made)
    assert damage(taken) is None


def test_damaged_goods_are_not_taken(root: Path, made: Path) -> None:
    flip(made / "train-00000.arrow")
    own = config(root, dataset_cache_dir=str(root / "other" / "datasets"))
    log = Log()
    data.precache(own, Volume.of(own), log, source=made.parent)
    assert not log.has("copying")
    assert damage(data.directory(own, Volume.of(own).datasets)) is None


def test_every_worker_of_a_run(root: Path) -> None:
    from trainer.volume import worker_configs

    own = config(root, nodes=3, dataset_cache_dir=None, model_cache_dir=None)
    log = Log()
    data.precache_all(own, log)
    volumes = [Volume.of(worker) for worker in worker_configs(own)]
    hashes = [data.open_dataset(data.directory(own, volume.datasets)).manifest.hash for volume in volumes]
    assert len(hashes) == 3
    assert len(set(hashes)) == 1
    assert sum("copying" in line for line in log) == 2


PRECACHE_AND_HANG = """
    import sys
    from pathlib import Path
    from trainer import data
    from trainer.config import TrainingConfig
    from trainer.data import text
    from trainer.data.families.text_files import Files
    from trainer.volume import Volume

    text._CHUNK_BYTES = text._SHARD_BYTES = text._BATCH_CHARACTERS = 1000  # so that something is written early
    documents = Files.documents

    def hanging(self, revision):
        for number, document in enumerate(documents(self, revision)):
            if number == 30:
                print("half-way", flush=True)
                sys.stdin.read()
            yield document

    Files.documents = hanging
    config = TrainingConfig.model_validate_json(sys.argv[1])
    data.precache(config, Volume.of(config))
"""


@pytest.mark.timeout(600)
def test_killed_half_way_while_another_waits(root: Path) -> None:
    own = config(root)
    path = data.directory(own, Volume.of(own).datasets)
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PRECACHE_AND_HANG), own.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin and child.stdout
    try:
        assert child.stdout.readline() == "half-way\n"
        torn = [file for file in path.parent.rglob("*.arrow") if file.stat().st_size]
        assert torn, "nothing was written before the kill"
        assert not path.exists()

        waiting = threading.Event()
        log = Log()

        def note(line: str) -> None:
            log(line)
            if line.startswith("waiting for another process"):
                waiting.set()

        thread = threading.Thread(target=lambda: data.precache(own, Volume.of(own), note))
        thread.start()
        assert waiting.wait(300)
        assert not path.exists()
    finally:
        child.kill()
        child.wait()
    thread.join(300)
    assert not thread.is_alive()
    assert log.has("sequences of 32 tokens to train on")
    assert damage(path) is None
    data.open_dataset(path)
    assert not [file for file in torn if file.exists()]


def test_several_at_once_make_it_once(root: Path) -> None:
    own = config(root)
    logs = [Log() for _ in range(4)]
    with ThreadPoolExecutor(len(logs)) as threads:
        list(threads.map(lambda log: data.precache(own, Volume.of(own), log), logs))
    assert sorted(log.has("sequences of 32 tokens to train on") for log in logs) == [False, False, False, True]
    assert sum(log.has("model gpt-neo-x:test written into") for log in logs) == 1


def test_a_full_disk_is_noticed_before_and_during(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = config(root)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(ConfigError, match=r"dataset_cache_dir = .* needs 16.83 MB, but its disk has only 1 kB"):
            data.precache(own, Volume.of(own), Log())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("datasets.arrow_writer.ArrowWriter.write_table", full)
        with pytest.raises(TrainingError, match=r"the disk of .* is full"):
            data.precache(own, Volume.of(own), Log())
    datasets = Volume.of(own).datasets
    assert not [path for path in datasets.iterdir() if path.is_dir()]
    again(root)
    assert damage(data.directory(own, datasets)) is None


@pytest.mark.parametrize("field", ["dataset_cache_dir", "model_cache_dir"])
def test_a_volume_that_cannot_be_written_is_named(root: Path, field: str) -> None:
    (root / "file").touch()
    with pytest.raises(ConfigError, match=rf"{field} = .*: cannot be written: Not a directory"):
        again(root, **{field: str(root / "file" / "below")})


def test_an_interrupted_precache_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.data.families.text_files import Files

    def interrupted(self: Files, revision: str) -> Any:
        yield "some text"
        raise KeyboardInterrupt

    monkeypatch.setattr(Files, "documents", interrupted)
    own = config(root)
    with pytest.raises(KeyboardInterrupt):
        data.precache(own, Volume.of(own), Log())
    assert not [path for path in Volume.of(own).datasets.iterdir() if path.is_dir()]
