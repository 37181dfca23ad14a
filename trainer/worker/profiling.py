"""Which per-device batch size a worker's own device takes best, and how fast it then is (`heterogeneous`)."""

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
from trainer.tasks import Task
from trainer.tasks.scoring import autocast, restore

logger = logging.getLogger(__name__)

MARGIN = 0.1  # of the memory that is free, which a batch must leave
GAIN = 0.05  # a larger batch must be faster by this share, or it is not worth its memory
TIMED = 3  # passes that are timed, after one that is not
GRADIENT_BYTES = 4  # a parameter
STATE_BYTES = 8  # a parameter, of Adam's moments, which there are none of before the first step
# A container's limit, what it has taken, and what of that are cached files; in both versions of control groups.
_CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)

Batch = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class Profile:
    """What a device does best.

    Attributes:
        batch_size: Samples in a forward pass.
        speed: Samples a second, of forward and backward passes.
    """

    batch_size: int
    speed: float


def profile(config: TrainingConfig, task: Task, model: nn.Module, batch: Batch, cache: Path, data: str) -> Profile:
    """The largest per-device batch size that fits and still gains throughput, of those that divide `batch_size`.

    Model, optimizer, random numbers and the position in the data are left as they are. A size that the free memory does
    not take (with a margin, by what smaller ones took for each sample) is not tried; one that runs out of memory all
    the same is the end of the search.

    Args:
        batch: Gives so many real training samples, on the model's device.
        cache: File on the worker's volume that keeps the result: it is measured once for a model, data, device and
            versions.
        data: The dataset's hash.

    Raises:
        TrainingError: Not even `min_batch_size` samples fit.
    """
    device = next(model.parameters()).device
    of = _what_it_depends_on(config, device, data)
    if known := _read(cache, of):
        return known
    logger.info("profiling %s: per-device batch sizes %s", of["device"], ", ".join(map(str, sizes(config))))
    best: Profile | None = None
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    fixed, per_sample = GRADIENT_BYTES * parameters, 0.0  # bytes
    for size in sizes(config):
        room = (_free(device) - STATE_BYTES * parameters) * (1 - MARGIN)
        try:
            if fixed + per_sample * size > room:
                raise MemoryError(f"it would take {(fixed + per_sample * size) / 1e9:.1f} GB")
            speed, used = _measure(task, model, batch(size), size)
            if used > room:
                raise MemoryError(f"it took {used / 1e9:.1f} GB, of {room / 1e9:.1f} GB that are to spare")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if best is None:
                reason = f"min_batch_size = {size} samples do not fit into the memory of {of['device']}"
                raise TrainingError(f"{reason}: {one_line(error)}") from None
            logger.info("%d samples do not fit: %s", size, one_line(error))
            break
        finally:
            _give_memory_back(device)
        logger.info("%d samples: %.1f a second", size, speed)
        if best and speed < best.speed * (1 + GAIN):
            break
        best, per_sample = Profile(size, speed), max(0.0, used - fixed) / size
    assert best is not None
    write_json(cache, {**of, "profile": asdict(best)})
    return best


def sizes(config: TrainingConfig) -> list[int]:
    """The per-device batch sizes to try: divisors of `batch_size`, each at least twice the one before."""
    chosen: list[int] = []
    for size in range(config.min_batch_size, min(config.max_batch_size, config.batch_size) + 1):
        if config.batch_size % size == 0 and (not chosen or size >= 2 * chosen[-1]):
            chosen.append(size)
    return chosen


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: torch has an exception for CUDA's, its libraries and a CPU have messages."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def _measure(task: Task, model: nn.Module, batch: dict[str, Tensor], size: int) -> tuple[float, float]:
    """Samples a second, and the bytes that the passes took at their peak."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seconds = []
    try:
        with _peak(device) as taken, torch.random.fork_rng([device] if cuda else []):
            for _ in range(1 + TIMED):
                started = time.perf_counter()
                with autocast(device):
                    loss = task.loss(model, batch)
                loss.backward()
                if cuda:
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - started)
    finally:
        model.zero_grad(set_to_none=True)
        restore(model, buffers)
    return size / statistics.median(seconds[1:]), taken()


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], float]]:
    """Afterwards: how many bytes the block took at its peak, above what was taken before. 0 where nothing tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5)); else it is the process's
    rss = psutil.Process().memory_info().rss
    yield lambda: max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - rss)


def _free(device: torch.device) -> float:
    """Bytes that this process may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    for place, limit, taken, cached in _CONTAINERS:
        group = Path(place)
        with contextlib.suppress(OSError, ValueError, KeyError):  # there is no such file; or "max", which is no limit
            counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / taken).read_text()) - int(counted[cached])
            free = min(free, int((group / limit).read_text()) - used)
    return free


def _give_memory_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _what_it_depends_on(config: TrainingConfig, device: torch.device, data: str) -> dict[str, Any]:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.processor() or platform.machine()}"
    return {
        "model": config.model,
        "dataset": data,
        "sizes": sizes(config),
        "device": name,
        "cores": 0 if cuda else torch.get_num_threads(),
        "memory": torch.cuda.get_device_properties(device).total_memory if cuda else 0,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def _read(cache: Path, of: dict[str, Any]) -> Profile | None:
    """What the file says, if it is of the same."""
    try:
        found = read_json(cache)
        kept = Profile(**found.pop("profile"))
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    return kept if found == of else None
