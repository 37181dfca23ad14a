"""Atomic checkpoints: one directory each, written completely or not at all, verified when read.

    round-000012-step-00000600/
        global.safetensors   the global state, identical in all workers: `model.<parameter>`,
                             `outer.<state>.<parameter>`
        worker.safetensors   the worker's own state: inner optimizer, RNG and, inside a round, its parameters
        state.json           everything that is not a tensor
        manifest.json        format; sha256 and size of each file; written last

A directory whose manifest is missing or does not match is torn or corrupt: it is skipped, with a warning that names it,
and the previous one is used.
"""

import logging
import queue
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.errors import TrainingError
from trainer.files import read_json, sha256, whole_directory, write_json

if TYPE_CHECKING:  # `launch` looks at checkpoints, and need not import torch for that
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 2  # of `state.json`; a checkpoint of another format is refused
FILES = ("global.safetensors", "worker.safetensors", "state.json", "manifest.json")
_Job = tuple[dict[str, Any], "dict[str, Tensor]", "dict[str, Tensor]"]
_NAME = re.compile(r"round-(\d+)-step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files have been verified.

    Attributes:
        path: Its directory.
        round: Committed rounds.
        step: Schedule position, in inner steps; beyond the round's start if it was taken inside a round.
        state: The content of `state.json`.
    """

    path: Path
    round: int
    step: int
    state: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether this is its run's final checkpoint."""
        return bool(self.state["complete"])

    @cached_property
    def global_tensors(self) -> "dict[str, Tensor]":
        """`model.<parameter>` and `outer.<state>.<parameter>`, float32."""
        from safetensors.torch import load_file

        return load_file(self.path / "global.safetensors")

    def parameters(self) -> "dict[str, Tensor]":
        """The global parameters by name, float32."""
        prefix = "model."
        return {
            name.removeprefix(prefix): value for name, value in self.global_tensors.items() if name.startswith(prefix)
        }

    def averaged_parameters(self) -> "dict[str, Tensor]":
        """Their moving average by name, if the run keeps one (`trainer.diloco.Averaged`); else the parameters."""
        lag = self.global_tensors
        return {name: value + lag.get(f"outer.lag.{name}", 0.0) for name, value in self.parameters().items()}

    def worker(self) -> dict[str, Any]:
        """The worker's own state, as `save` received it."""
        from safetensors.torch import load_file

        return _join(self.state["worker_state"], load_file(self.path / "worker.safetensors"))


class OtherFormat(TrainingError):
    """A checkpoint of another version of this program: an older one cannot replace it."""


def read(path: Path) -> Checkpoint:
    """Verify and open one checkpoint.

    Raises:
        OtherFormat: It was written by another version of this program.
        TrainingError: It is not a checkpoint, or it is torn or corrupt; the message names the file.
    """
    try:
        manifest = read_json(path / "manifest.json")
        if manifest["format"] != FORMAT:
            raise OtherFormat(
                f"checkpoint {path} has format {manifest['format']}; this version reads format {FORMAT} only: finish "
                "the run with the version that began it, or start a new run (another run_id)"
            )
        for name, entry in manifest["files"].items():
            file = path / name
            if file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
                raise TrainingError(f"checkpoint {path} is corrupt: {name} differs from what was written")
        state = read_json(path / "state.json")
        return Checkpoint(path, state["round"], state["step"], state)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TrainingError(f"checkpoint {path} is torn: {type(error).__name__}: {error}") from None


def paths(directory: Path) -> list[Path]:
    """The checkpoints in a directory, newest first, not verified."""
    found = [path for path in directory.glob("round-*") if _NAME.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(found, key=version_of, reverse=True)


def name_of(round: int, step: int) -> str:
    """The name of a checkpoint's directory."""
    return f"round-{round:06d}-step-{step:08d}"


def version_of(path: Path) -> tuple[int, int]:
    """The round and the step of a checkpoint, from the name of its directory."""
    round, step = re.findall(r"\d+", path.name)
    return int(round), int(step)


def newest(directory: Path, warn: Callable[[str], None] = logger.warning) -> Checkpoint | None:
    """The newest checkpoint in `directory` that verifies; `warn` is called for each newer one that does not.

    Raises:
        OtherFormat: The newest intact one was written by another version of this program.
    """
    for path in paths(directory):
        try:
            return read(path)
        except OtherFormat:
            raise
        except TrainingError as error:
            warn(f"{error}; going back to the previous one")
    return None


def newest_state(directory: Path) -> dict[str, Any]:
    """`state.json` of the newest intact checkpoint in `directory`, or {}. Cheap: tensors are not read."""
    for path in paths(directory):
        try:
            files = read_json(path / "manifest.json")["files"]
            if all((path / name).stat().st_size == entry["bytes"] for name, entry in files.items()):
                return dict(read_json(path / "state.json"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    return {}


def is_complete(directory: Path) -> bool:
    """Whether the newest intact checkpoint in `directory` is its run's final one. As cheap as `newest_state`."""
    return bool(newest_state(directory).get("complete"))


class Checkpointer:
    """Saves checkpoints off the training thread, one at a time, and keeps the newest few.

    Args:
        directory: Where this worker keeps this run's checkpoints.
        keep: How many to keep.
        on_saved: Called, on the checkpointer's thread, when a checkpoint is durable: path, seconds, bytes.
    """

    def __init__(self, directory: Path, keep: int, on_saved: Callable[[Path, float, int], None]) -> None:
        self._directory, self._keep, self._on_saved = directory, keep, on_saved
        self._queue: queue.Queue[_Job | None] = queue.Queue(1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpointer", daemon=True)
        self._thread.start()

    def save(
        self,
        global_tensors: "Mapping[str, Tensor]",
        worker: Mapping[str, Any],
        state: Mapping[str, Any],
        *,
        complete: bool,
    ) -> None:
        """Copy the state, and write it on another thread. Waits if the previous one is still being written.

        Args:
            global_tensors: Written to `global.safetensors`.
            worker: Nested dicts and lists of tensors and JSON values.
            state: JSON values, with `round` and `step`.
            complete: Whether this is the run's final checkpoint.

        Raises:
            TrainingError: An earlier checkpoint could not be written.
        """
        self._raise()
        tree, own = _split(worker)
        document = {**state, "format": FORMAT, "complete": complete, "worker_state": tree}
        self._queue.put((document, {k: _copy(v) for k, v in global_tensors.items()}, own))

    def wait(self) -> None:
        """Return when everything is durable. Raises TrainingError if it could not be written."""
        self._queue.join()
        self._raise()

    def close(self) -> None:
        """Write what is queued, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise TrainingError(f"a checkpoint could not be written to {self._directory}: {self._error}")

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._write(*job)
            except BaseException as error:  # `wait` must not wait forever
                self._error = error
            finally:
                self._queue.task_done()

    def _write(self, state: dict[str, Any], global_tensors: "dict[str, Tensor]", own: "dict[str, Tensor]") -> None:
        from safetensors.torch import save_file

        started = time.perf_counter()
        path = self._directory / name_of(state["round"], state["step"])
        with whole_directory(path) as temporary:
            save_file(global_tensors, temporary / "global.safetensors")
            save_file(own, temporary / "worker.safetensors")
            write_json(temporary / "state.json", state)
            sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
            files = {name: {"sha256": sha256(temporary / name), "bytes": size} for name, size in sizes.items()}
            write_json(temporary / "manifest.json", {"format": FORMAT, "files": files})
        self._on_saved(path, time.perf_counter() - started, sum(sizes.values()))
        found = paths(self._directory)
        abandoned = found[: found.index(path)]  # the run has gone back to an earlier round
        for old in (*abandoned, *found[len(abandoned) + self._keep :]):
            shutil.rmtree(old, ignore_errors=True)


def _copy(tensor: "Tensor") -> "Tensor":
    return tensor.detach().to("cpu", copy=True).contiguous()


def _split(value: Any, path: str = "") -> "tuple[Any, dict[str, Tensor]]":
    """Split a tree into JSON, where a name stands for each tensor, and copies of the tensors by name."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return {"tensor": path}, {path: _copy(value)}
    if isinstance(value, Mapping):
        # Optimizers number their parameters: JSON's keys are text, so the keys' own types are kept beside them.
        parts = {str(key): _split(part, f"{path}/{key}") for key, part in value.items()}
        numbers = [str(key) for key in value if isinstance(key, int)]
        tensors = {name: tensor for _, found in parts.values() for name, tensor in found.items()}
        return {"map": {key: tree for key, (tree, _) in parts.items()}, "numbers": numbers}, tensors
    if isinstance(value, list | tuple):
        items = [_split(part, f"{path}/{index}") for index, part in enumerate(value)]
        return {"list": [tree for tree, _ in items]}, {name: t for _, found in items for name, t in found.items()}
    return {"value": value}, {}


def _join(tree: dict[str, Any], tensors: "Mapping[str, Tensor]") -> Any:
    """The inverse of `_split`; tuples come back as lists."""
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "map" in tree:
        numbers = set(tree["numbers"])
        return {int(key) if key in numbers else key: _join(part, tensors) for key, part in tree["map"].items()}
    if "list" in tree:
        return [_join(part, tensors) for part in tree["list"]]
    return tree["value"]


def seed_random_state(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python: models use all three (SpecAugment, layer drop)."""
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of these generators; torch's on the CPU and on every GPU."""
    import torch

    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, gauss_next = random.getstate()
    return {
        "cpu": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(numbers), gauss_next],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore `random_state`; with another number of GPUs, their generators are left alone."""
    import torch

    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss_next))
