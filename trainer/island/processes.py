"""The processes of an island: a leader and its followers."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, Interrupted, TrainingError, one_line
from trainer.process import loopback, number_from

END = "end"  # the last command; its value is the exit status
INLINE = 1016  # bytes of a command that fits into one message
LENGTH = 8  # bytes of its length field
FOREVER = timedelta(days=365)  # a follower's wait for a command, because the leader may wait for other workers
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")

T = TypeVar("T")


class Island:
    """The processes of a node that form one worker. Local rank 0 leads; the others run its commands.

    Commands are registered by name in each process, in any order (`on`). The leader calls them with `run`, always from
    its main thread; the followers are in `follow`.

    Attributes:
        rank: This process's rank, from 0.
        size: Number of processes.
        device: This process's device.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._handlers: dict[str, Callable[..., Any]] = {}
        self._control: Any = dist.new_group(backend="gloo", timeout=FOREVER)

    @classmethod
    @contextmanager
    def form(cls, config: TrainingConfig, device: torch.device) -> Iterator["Island"]:
        """Connect the processes started by this node's agent. At the end, the followers end with the leader.

        Raises:
            ConfigError: The agent started another number of processes.
            TrainingError: A process is gone.
        """
        rank, size = number_from("LOCAL_RANK"), number_from("LOCAL_WORLD_SIZE") or 1
        if size != config.island:
            raise ConfigError("elastic.nproc_per_node", config.island, f"must be {size}, the processes of this node")
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        with lost_processes(), _over_loopback():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                timeout=timedelta(seconds=config.elastic.nccl.timeout),
                store=dist.HashStore() if size == 1 else None,
                rank=rank,
                world_size=size,
            )
            island = cls(rank, size, device)
        # The followers end with the status that the leader ends with
        status = 1
        try:
            yield island
            status = 0
        except Interrupted:
            status = 143
            raise
        except ConfigError:
            status = 2
            raise
        finally:
            island._end(status)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # Commands

    def on(self, **handlers: Callable[..., Any]) -> None:
        """Register what this process does for each command."""
        assert not handlers.keys() & self._handlers.keys()
        self._handlers |= handlers

    def run(self, command: str, **values: Any) -> Any:
        """Run a command in all processes at the same time. Returns the leader's result.

        Args:
            values: The handler's arguments: JSON values.

        Raises:
            TrainingError: A process is gone. Otherwise, whatever the leader's handler raises.
        """
        with lost_processes():
            self._share(json.dumps([command, values]).encode())
            return self._handlers[command](**values)

    def follow(self) -> int:
        """Run the leader's commands until it ends. Returns the leader's exit status."""
        while True:
            with lost_processes():
                command, values = json.loads(self._share(None))
                if command == END:
                    return int(values["status"])
                try:
                    self._handlers[command](**values)
                except Interrupted:
                    continue  # all of them were: wait for the leader's next command

    # For handlers; all processes call these

    def total(self, values: Tensor) -> Tensor:
        """Sum a tensor on the processes' device over the processes, in place."""
        dist.all_reduce(values)
        return values

    def agree(self, value: bool) -> bool:
        """The leader's value."""
        return bool(self._broadcast(torch.tensor([value], dtype=torch.uint8)).item())

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        dist.all_reduce(torch.zeros(1), group=self._control)

    def collect(self, payload: bytes) -> list[bytes]:
        """Each process's payload, by rank, in the leader; empty in the followers."""
        own = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(payload)]), group=self._control)
        longest = max(1, *(int(size) for size in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in range(self.size)] if self.leads else None
        dist.gather(padded, found, group=self._control)
        return [] if found is None else [bytes(one.numpy())[: int(n)] for one, n in zip(found, sizes, strict=True)]

    def share(self, payload: bytes | None) -> bytes:
        """The leader's payload, in all processes. The followers' argument is ignored."""
        return self._share(payload if self.leads else None)

    def share_tensors(self, tensors: list[Tensor]) -> None:
        """Set tensors to the leader's values, in place."""
        for tensor in tensors:
            dist.broadcast(tensor, 0)

    def _share(self, payload: bytes | None) -> bytes:
        # Short payloads, which are nearly all, take one message
        head = torch.zeros(LENGTH + INLINE, dtype=torch.uint8)
        if payload is not None:
            short = payload[:INLINE]
            head[:LENGTH] = torch.frombuffer(bytearray(len(payload).to_bytes(LENGTH, "little")), dtype=torch.uint8)
            head[LENGTH : LENGTH + len(short)] = torch.frombuffer(bytearray(short), dtype=torch.uint8)
        found = bytes(self._broadcast(head).numpy())
        length = int.from_bytes(found[:LENGTH], "little")
        if length <= INLINE:
            return found[LENGTH : LENGTH + length]
        whole = torch.empty(length, dtype=torch.uint8)
        if payload is not None:
            whole = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        return bytes(self._broadcast(whole).numpy())

    def _broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, 0, group=self._control)
        return tensor

    def _end(self, status: int) -> None:
        """End the followers with the leader's status, and close all connections."""
        # After a failure, the followers may be busy and would not receive it, because gloo sends nothing before the
        # other end listens. They notice that this process ends.
        if self.leads and status != 1:
            with suppress(RuntimeError):  # a follower is gone: the agent ends the others
                self._share(json.dumps([END, {"status": status}]).encode())
        if status in (0, 143) and dist.is_initialized():  # otherwise a process may be gone, and nccl would wait for it
            dist.destroy_process_group()


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turn broken connections into TrainingErrors."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, TrainingError) or not (isinstance(error, dist.DistError) or any(w in text for w in _LOST)):
            raise
        raise TrainingError(f"another process of this worker is gone: {one_line(error)}") from None


@contextmanager
def _over_loopback() -> Iterator[None]:
    """Make gloo connect through the loopback interface, because an island is on one machine."""
    address, name = loopback(), "GLOO_SOCKET_IFNAME"
    found = (one for one, own in psutil.net_if_addrs().items() if any(a.address == address for a in own))
    before, interface = os.environ.get(name), next(found, None)
    if interface is None:
        yield
        return
    os.environ[name] = interface
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
