"""The best per-device batch size of a worker's device, and its speed (`heterogeneous`)."""

import contextlib
import importlib.metadata
import logging
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from trainer.config import TrainingConfig
from trainer.errors import TrainingError, one_line
from trainer.files import read_json, write_json
from trainer.island.layout import local
from trainer.tasks import Task
from trainer.worker.compilation import trial_passes

logger = logging.getLogger(__name__)

MARGIN = 0.1  # fraction of the free memory that a batch must leave
GAIN = 0.05  # a larger batch must be faster by this fraction to be worth its memory
TIMED = 3  # number of timed passes, after an untimed one
GRADIENT_BYTES = 4  # per parameter
STATE_BYTES = 8  # per parameter, for Adam's moments, which do not exist before the first step
# A container's limit, its usage, and the cached files in it, in both versions of control groups
_CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)

Batch = Callable[[int], dict[str, Tensor]]
Measure = Callable[[int], tuple[float, float]]


@dataclass(frozen=True)
class Profile:
    """The best batch size of a device, in samples, and its forward and backward speed in samples per second."""

    batch_size: int
    speed: float


def profile(
    config: TrainingConfig,
    task: Task,
    model: nn.Module,
    batch: Batch,
    cache: Path,
    data: str,
    together: Measure | None = None,
) -> Profile:
    """Find the largest divisor of `batch_size` that fits as a per-device batch size and still gains throughput.

    Model, optimizer, RNG state and the position in the data stay unchanged. A size that, extrapolated from smaller
    ones, is too large for the free memory is not tried. The search ends at the first size that runs out of memory.

    Args:
        batch: Returns training samples on the model's device.
        cache: File on the worker's volume that caches the result for each model, dataset, device and set of versions.
        data: The dataset's hash.
        together: Like `measure`, in all processes of an island at once, because they share a CPU's memory.

    Raises:
        TrainingError: Not even `min_batch_size` samples fit, or `together` raises it.
    """
    device = next(model.parameters()).device
    sharing = max(1, config.island) if device.type == "cpu" else 1
    of = _conditions(config, device, data)
    if known := _cached(cache, of):
        return known

    # Try one size after the other
    logger.info("profiling %s: per-device batch sizes %s", of["device"], ", ".join(map(str, sizes(config))))
    run: Measure = together or (lambda size: measure(task, model, batch(size), size))
    best: Profile | None = None
    parameters = sum(local(parameter).numel() for parameter in model.parameters() if parameter.requires_grad)
    fixed, per_sample = GRADIENT_BYTES * parameters, 0.0  # bytes
    for size in sizes(config):
        room = (_free(device) / sharing - STATE_BYTES * parameters) * (1 - MARGIN)
        try:
            speed, used = _within(room, fixed + per_sample * size, run, size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if best is None:
                reason = f"min_batch_size = {size} samples do not fit into the memory of {of['device']}"
                raise TrainingError(f"{reason}: {one_line(error)}") from None
            logger.info("%d samples do not fit: %s", size, one_line(error))
            break
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        logger.info("%d samples: %.1f per second", size, speed)
        if best and speed < best.speed * (1 + GAIN):
            break
        best, per_sample = Profile(size, speed), max(0.0, used - fixed) / size
        if together:  # it may end this process, and the next one then uses this size
            write_json(cache, {**of, "profile": asdict(best)})
    assert best is not None
    write_json(cache, {**of, "profile": asdict(best)})
    return best


def _within(room: float, expected: float, run: Measure, size: int) -> tuple[float, float]:
    """Run a size. Raises MemoryError if it is expected to take, or took, more than `room` bytes."""
    if expected > room:
        raise MemoryError(f"it would take {expected / 1e9:.1f} GB")
    speed, used = run(size)
    if used > room:
        raise MemoryError(f"it took {used / 1e9:.1f} GB, of {room / 1e9:.1f} GB available")
    return speed, used


def _cached(cache: Path, conditions: dict[str, Any]) -> Profile | None:
    """The cached result; None if there is none for these conditions."""
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
        kept = read_json(cache)
        known = Profile(**kept.pop("profile"))
        if kept == conditions:
            return known
    return None


def sizes(config: TrainingConfig) -> list[int]:
    """The per-device batch sizes to try.

    They are divisors of a process's part of `batch_size`, each at least twice the previous one.
    """
    chosen: list[int] = []
    for size in range(config.min_batch_size, min(config.max_batch_size, config.process_batch_size) + 1):
        if config.process_batch_size % size == 0 and (not chosen or size >= 2 * chosen[-1]):
            chosen.append(size)
    return chosen


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch has an exception for CUDA; for libraries and CPUs there are only messages."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def measure(task: Task, model: nn.Module, batch: dict[str, Tensor], size: int) -> tuple[float, float]:
    """Samples per second (forward and backward), and the peak memory of the passes in bytes."""
    device, seconds = next(model.parameters()).device, []
    with _peak(device) as taken, trial_passes(task, model, batch) as trial:
        for _ in range(1 + TIMED):
            started = time.perf_counter()
            trial()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return size / statistics.median(seconds[1:]), taken()


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], float]]:
    """Measure the block's peak memory in bytes above the usage before. Call the yielded function afterwards."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak (proc(5)); otherwise it is the process's
    rss = psutil.Process().memory_info().rss
    yield lambda: max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - rss)


def _free(device: torch.device) -> float:
    """Bytes that this process may still allocate."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    for place, limit, taken, cached in _CONTAINERS:
        group = Path(place)
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such file, or "max" (no limit)
            counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / taken).read_text()) - int(counted[cached])
            free = min(free, int((group / limit).read_text()) - used)
    return free


def _conditions(config: TrainingConfig, device: torch.device, data: str) -> dict[str, Any]:
    """What a profile depends on."""
    cuda = device.type == "cuda"
    return {
        "model": config.model,
        "dataset": data,
        "sizes": sizes(config),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "cores": 0 if cuda else torch.get_num_threads(),
        "memory": torch.cuda.get_device_properties(device).total_memory if cuda else 0,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
