"""What the pods of a training run: `python -m trainer pod <command> --config FILE`.

What a pod has to tell its step goes through its log, a line each: a word and JSON.

    metrics {"local_rank": 0, "event": "round", …}   an event of a worker's metrics.jsonl, as it happens
    precached {"hash": …, "train": …}                what lies on this pod's claim now
    result {"port": 7001}                            the result can be taken (`trainer.transport.handover`)
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.config import TrainingConfig, load_config
from trainer.errors import ConfigError, raise_on_sigterm
from trainer.volume import Volume

METRICS, PRECACHED, RESULT = "metrics", "precached", "result"
RESULT_LIMIT = 1800.0  # seconds in which the step must have come for a result, or gone on with it
_ECHO_INTERVAL = 0.5  # seconds


def run(what: str, config_file: Path, *, slot: int | None = None, port: int = 0) -> int:
    """Do a pod's work; returns its exit status.

    Args:
        what: "precache", "train", "held-out", "export" or "evaluate".
        config_file: The pod's configuration; `DILOCO_*` variables go before it.
        slot: The slot that a node would like to have.
        port: Where a result is served; 0: anywhere.

    Raises:
        ConfigError, TrainingError: As the commands that do the same outside of a cluster.
        Interrupted: After SIGTERM. An agent (`train`) has its own way to leave, once it is there.
    """
    raise_on_sigterm()
    config = load_config(config_file)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(config, what)))  # before torch is imported, which reads it
    if what == "train":
        return _train(config, slot)
    if what == "precache":
        return _precache(config)
    return _serve(_RESULTS[what](config), port)


def _threads(config: TrainingConfig, what: str) -> int:
    """Threads of each of the pod's processes: their share of the cores that they may use and that the node has.

    Without the node's number a pod that may use 16 cores would have 16 threads stand in each other's way on two.
    """
    processes = config.elastic.nproc_per_node if what == "train" else 1
    return max(1, min(config.cpu_cores, len(os.sched_getaffinity(0))) // processes)


def parse(line: str) -> tuple[str, dict[str, Any]] | None:
    """What a line of a pod's log tells the step, if it is not for people."""
    word, _, rest = line.partition(" ")
    if word not in (METRICS, PRECACHED, RESULT) or not rest.startswith("{"):
        return None
    try:
        return word, json.loads(rest)
    except ValueError:  # a line that was torn
        return None


def _tell(word: str, content: Mapping[str, Any]) -> None:
    sys.stdout.write(f"{word} {json.dumps(content)}\n")
    sys.stdout.flush()


def _train(config: TrainingConfig, slot: int | None) -> int:
    """One node's agent; its workers' metrics are said aloud."""
    from trainer.files import write_json
    from trainer.launch.agent import run_agent
    from trainer.monitor.events import EventReader

    own = Path(config.run_dir) / "config.json"
    write_json(own, config.model_dump(mode="json"))
    readers = {
        rank: EventReader(Volume.of(config, rank).metrics, last=0) for rank in range(config.elastic.nproc_per_node)
    }
    ended = threading.Event()

    def echo() -> None:
        last = False
        while not last:
            last = ended.wait(_ECHO_INTERVAL)
            for rank, reader in readers.items():
                for event in reader.read():
                    _tell(METRICS, {"local_rank": rank, **event})

    echoing = threading.Thread(target=echo)
    echoing.start()
    try:
        return run_agent(config, [sys.executable, "-u", "-m", "trainer", "train", "--config", str(own)], slot)
    finally:
        ended.set()
        echoing.join()


def _precache(config: TrainingConfig) -> int:
    from trainer import data

    manifest = data.precache(config, Volume.of(config))
    _tell(PRECACHED, manifest.model_dump(mode="json", exclude={"files", "byte_counts"}))
    return 0


def _held_out(config: TrainingConfig) -> dict[str, Path]:
    """The dataset's held-out part, with its manifest and tokenizer."""
    from trainer import data
    from trainer.data.dataset import MANIFEST, read_manifest

    directory = data.directory(config, Volume.of(config).datasets)
    manifest = read_manifest(directory)
    if manifest is None:
        raise ConfigError("dataset", config.dataset, f"is not precached in {directory}")
    names = [MANIFEST, *(name for name in manifest.files if not name.startswith("train-"))]
    return {name: directory / name for name in names}


def _export(config: TrainingConfig) -> dict[str, Path]:
    """The model, as `from_pretrained` takes it.

    Raises:
        ConfigError: This claim's newest checkpoint is not the run's final one, which another claim has then.
    """
    from trainer.export.export import TrainedRun, export

    newest = TrainedRun.find(config).checkpoint
    if not newest.complete:
        raise ConfigError(
            "run_id", config.run_id, f"its final checkpoint is not here: the newest is {newest.path.name}"
        )
    directory = export(config)
    return {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}


def _evaluate(config: TrainingConfig) -> dict[str, Path]:
    """The scores. The model card with them stays on the claim, and goes to the hub from there."""
    from trainer.export.evaluate import evaluate

    evaluate(config)
    return {"evaluation.json": Path(config.run_dir) / "evaluation.json"}


_RESULTS: dict[str, Callable[[TrainingConfig], dict[str, Path]]] = {
    "held-out": _held_out,
    "export": _export,
    "evaluate": _evaluate,
}


def _serve(files: Mapping[str, Path], port: int) -> int:
    from trainer.transport.handover import TOKEN_VARIABLE, ResultServer

    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise ConfigError(TOKEN_VARIABLE, "", "must be in the environment")
    with ResultServer(files, token, port) as server:
        _tell(RESULT, {"port": server.server_port})
        server.wait(RESULT_LIMIT)
    return 0
