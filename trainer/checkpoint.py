"""Atomic checkpoints: one directory each, written completely or not at all, verified when read.

    round-000012-step-00000600/
        global.safetensors   the global state, equal in all workers: `model.<parameter>`, `outer.<state>.<parameter>`
        worker.safetensors   the worker's own state: inner optimizer, RNG and, within a round, its parameters
        state.json           everything except the tensors
        manifest.json        format; sha256 and size of each file; written last

A directory whose manifest is missing or does not match is torn or corrupt. Readers skip it, with a warning that names
it, and use the previous one.
"""

import json
import logging
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.errors import TrainingError
from trainer.files import read_json, sha256, whole_directory, write_json

if TYPE_CHECKING:  # `launch` reads checkpoints, without torch
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 2  # of `state.json`; a checkpoint of another format is refused
FILES = ("global.safetensors", "worker.safetensors", "state.json", "manifest.json")
_NAME = re.compile(r"round-(\d+)-step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, verified."""

    path: Path
    round: int  # committed rounds
    step: int  # schedule position, in inner steps; past the round's start if it was saved within a round
    state: dict[str, Any]  # the content of `state.json`

    @property
    def complete(self) -> bool:
        """Whether it is its run's final checkpoint."""
        return bool(self.state["complete"])

    @cached_property
    def global_tensors(self) -> "dict[str, Tensor]":
        """`model.<parameter>` and `outer.<state>.<parameter>`, float32."""
        from safetensors.torch import load_file

        return load_file(self.path / "global.safetensors")

    def parameters(self) -> "dict[str, Tensor]":
        """The global parameters by name, float32."""
        split = ((name.partition("."), value) for name, value in self.global_tensors.items())
        return {name: value for (kind, _, name), value in split if kind == "model"}

    def averaged_parameters(self) -> "dict[str, Tensor]":
        """The parameters' moving average, if the run keeps one (`trainer.diloco.Averaged`); else `parameters`."""
        lag = self.global_tensors
        return {name: value + lag.get(f"outer.lag.{name}", 0.0) for name, value in self.parameters().items()}

    def worker(self) -> dict[str, Any]:
        """The worker's own state, as passed to `save`."""
        from safetensors.torch import load_file

        return _join(self.state["worker_state"], load_file(self.path / "worker.safetensors"))


class OtherFormat(TrainingError):
    """The checkpoint was written by another version of this program. Readers do not fall back to an older one."""


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
                f"checkpoint {path} has format {manifest['format']}, but this version only reads format {FORMAT}: "
                "finish the run with the version that started it, or start a new run (another run_id)"
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
    return f"round-{round:06d}-step-{step:08d}"


def version_of(path: Path) -> tuple[int, int]:
    """A checkpoint's round and step, from the name of its directory."""
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
    """`state.json` of the newest intact checkpoint in `directory`, or {}. Cheap, because tensors are not read."""
    for path in paths(directory):
        try:
            files = read_json(path / "manifest.json")["files"]
            if all((path / name).stat().st_size == entry["bytes"] for name, entry in files.items()):
                return dict(read_json(path / "state.json"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    return {}


def is_complete(directory: Path) -> bool:
    """Whether the newest intact checkpoint in `directory` is its run's final one. Also cheap."""
    return bool(newest_state(directory).get("complete"))


class Checkpointer:
    """Saves checkpoints in `directory` off the training thread, one at a time, and keeps the newest `keep`.

    Calls `on_saved` (path, seconds, bytes) on its own thread when a checkpoint is durable.

    Args:
        lasts: Whether a tensor of the worker's state stays unchanged after `save`, so that it need not be copied.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        on_saved: Callable[[Path, float, int], None],
        lasts: "Callable[[Tensor], bool]" = lambda tensor: False,
    ) -> None:
        self._directory, self._keep, self._on_saved, self._lasts = directory, keep, on_saved, lasts
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpointer")
        self._last: Future[None] | None = None

    def save(
        self,
        tensors: "Mapping[str, Tensor]",
        worker: Mapping[str, Any],
        state: Mapping[str, Any],
        *,
        complete: bool,
        release: Callable[[], object] = lambda: None,
    ) -> None:
        """Copy the worker's state and write everything on another thread. Waits if a save is still in progress.

        Args:
            tensors: The global state for `global.safetensors`, on the host; not copied.
            worker: Nested dicts and lists of tensors and JSON values.
            state: JSON values, including `round` and `step`.
            release: Called when the tensors that were not copied may change again.
        """
        self.wait()  # raises TrainingError if the previous one could not be written
        own: dict[str, Tensor] = {}
        document = {**state, "format": FORMAT, "complete": complete, "worker_state": _split(worker, own)}
        own = {name: tensor if self._lasts(tensor) else _copy(tensor) for name, tensor in own.items()}
        self._last = self._thread.submit(self._write, document, dict(tensors), own, release)

    def wait(self) -> None:
        """Return when all checkpoints are durable. Raises TrainingError if one could not be written."""
        if self._last is not None and (error := self._last.exception()):
            raise TrainingError(f"a checkpoint could not be written to {self._directory}: {error}")

    def close(self) -> None:
        """Wait for the last checkpoint and end the thread."""
        self._thread.shutdown()

    def _write(
        self,
        state: dict[str, Any],
        global_tensors: "dict[str, Tensor]",
        own: "dict[str, Tensor]",
        release: Callable[[], object],
    ) -> None:
        from safetensors.torch import save_file

        # Write the files, then their manifest
        started = time.perf_counter()
        path = self._directory / name_of(state["round"], state["step"])
        with whole_directory(path) as temporary:
            try:
                save_file(global_tensors, temporary / "global.safetensors")
                save_file(own, temporary / "worker.safetensors")
            finally:
                release()
                global_tensors.clear()  # these may be the last references to the memory
                own.clear()
            write_json(temporary / "state.json", state)
            sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
            files = {name: {"sha256": sha256(temporary / name), "bytes": size} for name, size in sizes.items()}
            write_json(temporary / "manifest.json", {"format": FORMAT, "files": files})
        self._on_saved(path, time.perf_counter() - started, sum(sizes.values()))

        # Remove old checkpoints, and newer ones if the run went back to an earlier round
        found = paths(self._directory)
        newer = found.index(path)
        for old in (*found[:newer], *found[newer + self._keep :]):
            shutil.rmtree(old, ignore_errors=True)


def pack(value: Any) -> bytes:
    """A tree of mappings and lists of tensors, numpy arrays and JSON values as bytes, without pickle."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_split(value, tensors)).encode()
    return len(tree).to_bytes(8, "little") + tree + save({name: _copy(tensor) for name, tensor in tensors.items()})


def unpack(packed: bytes) -> Any:
    """The inverse of `pack`; tuples come back as lists."""
    from safetensors.torch import load

    end = 8 + int.from_bytes(packed[:8], "little")
    return _join(json.loads(packed[8:end]), load(packed[end:]))


def _copy(tensor: "Tensor") -> "Tensor":
    return tensor.detach().to("cpu", copy=True).contiguous()


def _as_tensor(array: np.ndarray) -> "Tensor":
    import torch

    return torch.from_numpy(np.array(array))


def _split(value: Any, tensors: "dict[str, Tensor]", path: str = "") -> dict[str, Any]:
    """The JSON of a tree, with names in place of the tensors, which are added to `tensors` by name."""
    from torch import Tensor

    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, np.ndarray):
        tensors[path] = _as_tensor(value)
        return {"array": path}
    if isinstance(value, Mapping):
        # Optimizers number their parameters, but JSON keys are text: keep a list of the numbers
        numbers = [str(key) for key in value if isinstance(key, int)]
        parts = {str(key): _split(part, tensors, f"{path}/{key}") for key, part in value.items()}
        return {"map": parts, "numbers": numbers}
    if isinstance(value, list | tuple):
        return {"list": [_split(part, tensors, f"{path}/{index}") for index, part in enumerate(value)]}
    return {"value": value}


def _join(tree: dict[str, Any], tensors: "Mapping[str, Tensor]") -> Any:
    """The inverse of `_split`; tuples come back as lists."""
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "array" in tree:
        return tensors[tree["array"]].numpy()
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
    """The state of the global generators, including torch's on the CPU and every GPU."""
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
    """Restore `random_state`. If the number of GPUs has changed, their generators are left alone."""
    import torch

    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss_next))
