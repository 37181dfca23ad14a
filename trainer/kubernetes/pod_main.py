"""The command of a run's pods: `python -m trainer pod <command> --config FILE`.

A pod sends messages to its step through its log, each as a line with a keyword and JSON:

    metrics {"local_rank": 0, "event": "round", …}   an event of a worker's metrics.jsonl, as it happens
    precached {"hash": …, "train": …}                the dataset on this pod's claim
    result {"port": 6901}                            the result is ready to be fetched (`trainer.transport.handover`)
"""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.config import TrainingConfig, load_config
from trainer.errors import ConfigError, one_line, raise_on_sigterm
from trainer.timeouts import KubernetesTimeouts
from trainer.volume import Volume

METRICS, PRECACHED, RESULT = "metrics", "precached", "result"  # the keywords
EVALUATION = "evaluation.json"  # the scores, among a result's files


def run(what: str, config_file: Path, *, slot: int | None = None, port: int = 0) -> int:
    """Do a pod's work. Returns its exit status.

    Args:
        what: "precache", "train", "held-out", "export" or "evaluate".
        slot: The node's preferred slot.
        port: The port on which to serve a result; 0: any free one.

    Raises:
        ConfigError, TrainingError: Same as the corresponding commands outside a cluster.
        Interrupted: After SIGTERM. An agent (`train`) handles SIGTERM itself once it runs.
    """
    raise_on_sigterm()
    config = load_config(config_file)

    # Divide the usable cores among the pod's processes: on a node with two cores, a pod with a limit of 16 would
    # otherwise run 16 threads. torch reads the variable when it is imported.
    processes = config.elastic.nproc_per_node if what == "train" else 1
    threads = max(1, min(config.cpu_cores, len(os.sched_getaffinity(0))) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if what == "train":
        return _train(config, slot)
    if what == "precache":
        return _precache(config)
    return _serve(_RESULTS[what](config), port)


def parse(line: str) -> tuple[str, dict[str, Any]] | None:
    """The message in a line of a pod's log: its keyword and content; None for any other line."""
    word, _, rest = line.partition(" ")
    if word not in (METRICS, PRECACHED, RESULT) or not rest.startswith("{"):
        return None
    try:
        return word, json.loads(rest)
    except ValueError:  # a torn line
        return None


def _send(word: str, content: Mapping[str, Any]) -> None:
    print(f"{word} {json.dumps(content)}", flush=True)


def _train(config: TrainingConfig, slot: int | None) -> int:
    """Run one node's agent and send its workers' events to the step."""
    from trainer.events import EventReader
    from trainer.files import write_json
    from trainer.launch.agent import run_agent, standby, worker_command

    # The workers read the configuration with this pod's `DILOCO_*` variables resolved
    own = Path(config.run_dir) / "config.json"
    write_json(own, config.model_dump(mode="json"))
    command = worker_command(own)
    starting = standby(config, command)  # before any threads exist
    readers = {rank: EventReader(Volume.of(config, rank).metrics, last=0) for rank in range(config.workers_per_node)}
    ended = threading.Event()
    interval = KubernetesTimeouts().echo

    # Send events from a thread until the agent has ended, and once more after that
    def echo() -> None:
        last = False
        while not last:
            last = ended.wait(interval)
            for rank, reader in readers.items():
                for event in reader.read():
                    _send(METRICS, {"local_rank": rank, **event})

    echoing = threading.Thread(target=echo)
    echoing.start()
    try:
        return run_agent(config, command, slot, standby=starting)
    finally:
        ended.set()
        echoing.join()


def _precache(config: TrainingConfig) -> int:
    from trainer import data

    manifest = data.precache(config, Volume.of(config))
    _send(PRECACHED, manifest.model_dump(mode="json", exclude={"files", "byte_counts"}))
    return 0


def _held_out(config: TrainingConfig) -> dict[str, Path]:
    """The files of the dataset's held-out shard, with its manifest and tokenizer, by name."""
    from trainer import data
    from trainer.data.manifest import MANIFEST, read_manifest

    directory = data.directory(config, Volume.of(config).datasets)
    manifest = read_manifest(directory)
    if manifest is None:
        raise ConfigError("dataset", config.dataset, f"is not precached in {directory}")
    names = [MANIFEST, *(name for name in manifest.files if not name.startswith("train-"))]
    return {name: directory / name for name in names}


def _export(config: TrainingConfig) -> dict[str, Path]:
    """Export the model in the layout of `from_pretrained`, and evaluate it. Returns its files and the scores, by name.

    One pod does both, because starting another one (with torch) takes longer than evaluating a small model. If the
    evaluation fails, the result does not contain the scores, and the step `evaluate` tries again.
    """
    from trainer.export.export import TrainedRun, export

    newest = TrainedRun.find(config).checkpoint
    if not newest.complete:  # another claim has the final checkpoint
        allowed = f"its final checkpoint is not on this claim: the newest is {newest.path.name}"
        raise ConfigError("run_id", config.run_id, allowed)
    directory = export(config)
    try:
        scores = _evaluate(config)  # also adds them to the model card
    except Exception as error:
        print(f"warning: the model is exported, but not evaluated: {one_line(error)}", flush=True)
        scores = {}
    return scores | {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}


def _evaluate(config: TrainingConfig) -> dict[str, Path]:
    """Evaluate the model. Returns the scores. The model card with them stays on the claim and is pushed from there."""
    from trainer.export.evaluate import evaluate

    evaluate(config)
    return {EVALUATION: Path(config.run_dir) / EVALUATION}


_RESULTS: dict[str, Callable[[TrainingConfig], dict[str, Path]]] = {
    "held-out": _held_out,
    "export": _export,
    "evaluate": _evaluate,
}


def _serve(files: Mapping[str, Path], port: int) -> int:
    """Serve a result until the step has fetched it."""
    from trainer.transport.handover import TOKEN_VARIABLE, ResultServer

    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise ConfigError(TOKEN_VARIABLE, "", "must be in the environment")
    with ResultServer(files, token, port) as server:
        _send(RESULT, {"port": server.port})
        server.wait(KubernetesTimeouts().result)
    return 0
