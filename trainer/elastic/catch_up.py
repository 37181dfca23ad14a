"""The global state between members: what this member serves to others, and what it fetches to catch up."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import TYPE_CHECKING

from torch import Tensor

from trainer.diloco.codecs import Fp32
from trainer.diloco.collective import decoded
from trainer.diloco.quorum import Reduced
from trainer.diloco.state import Fragment, GlobalState
from trainer.elastic.round_watch import RoundWatch
from trainer.errors import Interrupted, TrainingError
from trainer.etcd.client import EtcdClient, Json
from trainer.protocol.member import MemberMachine
from trainer.protocol.records import RoundState
from trainer.timeouts import MemberTimeouts
from trainer.transport.channel import Offer, TransferError
from trainer.transport.fetch import fetch

if TYPE_CHECKING:
    from trainer.config import TrainingConfig

log = logging.getLogger(__name__)


class Replica:
    """This member's copy of the global state, its hash, and the coded means of the last commits.

    `find` serves them to other members, from a donor's threads:

        state/<term>.<round>   the global state after that round
        mean/<term>.<round>    the mean that its outer step was taken with, as it was coded
        <name>                 what `offer` was given under this name

    Args:
        state: The worker's; brought to the open round in place.
        machine: The member's; its term is the state's.
        executor: Runs the hashing.
        secret: The run's, which donors and fetchers share.
        ended: Whether this process is to end.
    """

    def __init__(
        self,
        client: EtcdClient,
        config: "TrainingConfig",
        state: GlobalState,
        machine: MemberMachine,
        executor: Executor,
        secret: bytes,
        watch: RoundWatch,
        ended: Callable[[], bool],
        timeouts: MemberTimeouts,
    ) -> None:
        self.state = state
        self._client, self._config, self._machine, self._executor = client, config, machine, executor
        self._secret, self._watch, self._ended, self._timeouts = secret, watch, ended, timeouts
        self._hash: Future[str] | None = None  # of the state as it is
        self._deadline = 0.0  # for catching up, on the monotonic clock
        self._means: deque[tuple[str, Offer]] = deque()
        self._offers: dict[str, Mapping[str, Tensor]] = {}

    # The hash

    def hashing(self) -> Future[str]:
        """The hash of the state, computed in the background."""
        if self._hash is None:
            self._hash = self._executor.submit(self.state.hash)
        return self._hash

    def changed(self) -> None:
        """Forget the hash: the state has changed, or is about to."""
        if self._hash is not None:
            self._hash.result()  # it reads the state
        self._hash = None

    # Serving

    def offer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Serve these tensors under this name from now on. They may change meanwhile."""
        self._offers[name] = tensors

    def find(self, name: str) -> Offer | None:
        """What this member can serve under a name; called on the donor's threads."""
        kind, _, version = name.partition("/")
        if kind == "mean":
            return next((offer for known, offer in list(self._means) if known == version), None)
        if kind != "state":
            tensors = self._offers.get(name)
            return Offer({"member": self._machine.id}, dict(tensors)) if tensors else None
        if version != f"{self._machine.term}.{self.state.round}":
            return None
        round, step, state = self.state.borrow()
        return Offer({"round": round, "step": step}, state) if version == f"{self._machine.term}.{round}" else None

    def keep_mean(self, round: int, reduced: Reduced, steps: int, fragment: Fragment) -> None:
        """Keep the mean of a committed round, as it was coded, for members that lack it."""
        buffers = {str(index): rows for index, (_, rows) in enumerate(reduced.coded)}
        scales = {name: scale for name, (scale, _) in zip(buffers, reduced.coded, strict=True)}
        meta = {"weight": reduced.weight, "steps": steps, "fragment": fragment.index, "coded": scales}
        self._means.append((f"{self._machine.term}.{round}", Offer(meta, buffers)))
        while len(self._means) > self._kept_rounds():
            self._means.popleft()

    def _kept_rounds(self) -> int:
        """`catch_up_rounds`, but no more means than are cheaper to send than the state itself."""
        fragment = self.state.fragments[0]
        mean = (fragment.stop - fragment.start) * fragment.codec.row / fragment.codec.block
        if not isinstance(fragment.codec, Fp32):
            mean *= 2  # with two members, the mean is kept as what each of them has sent
        size = sum(tensor.nbytes for tensor in self.state.tensors.values())
        return min(self._config.catch_up_rounds, int(size / mean))

    # Catching up

    def start_catching_up(self) -> None:
        """The time for catching up, `elastic.rdzv_timeout`, begins."""
        self._deadline = time.monotonic() + self._config.elastic.rdzv_timeout

    def replay(self, record: RoundState, first: int) -> int:
        """Take the outer steps from round `first` to the record's base, from their means, as far as these can be had.

        Returns:
            The round of the state afterwards.

        Raises:
            Interrupted: This process is to end.
            TrainingError: The time for catching up is over.
        """
        self._check_deadline(record)
        if record.base.round - self.state.round > self._kept_rounds():
            return self.state.round
        self.changed()
        donors = self._donors()
        for round in range(first, record.base.round + 1):
            try:
                meta, buffers = self._fetch(f"mean/{record.term}.{round}", donors, record)
            except (TransferError, _TooLate):
                break
            fragment = self.state.fragments[meta["fragment"]]
            coded = tuple((scale, buffers[name]) for name, scale in meta["coded"].items())
            if meta["weight"] > 0:
                mean = decoded(coded, fragment.codec, fragment.stop - fragment.start)
                self.state.apply(mean, meta["steps"], fragment)
            else:
                self.state.skip(meta["steps"])
            self.keep_mean(round, Reduced(meta["weight"], coded, ""), meta["steps"], fragment)
        return self.state.round

    def fetch_state(self, record: RoundState) -> bool:
        """Replace the state by the record's base; whether that was possible.

        Raises:
            Interrupted: This process is to end.
            TrainingError: The run has ended, or the time for catching up is over.
        """
        self._check_deadline(record)
        try:
            name = f"state/{record.term}.{record.base.round}"
            meta, buffers = self._fetch(name, self._donors(), record)
        except _TooLate:
            return False  # a newer state is to be had
        except TransferError as error:
            self._watch.check_verdict()  # the donors may have completed the run, and left
            log.info("round %d is not available yet: %s", record.base.round, error)
            self._watch.pause(self._timeouts.poll)
            return False
        self.changed()
        self.state.load(meta["round"], meta["step"], buffers)
        self._means.clear()
        return True

    def fetch_offer(self, name: str) -> dict[str, Tensor] | None:
        """What another member offers under this name; None if no member does."""
        for endpoint in self._donors():
            with suppress(TransferError):
                return self._fetch(name, [endpoint])[1]
        return None

    def _fetch(self, name: str, donors: list[str], record: RoundState | None = None) -> tuple[Json, dict[str, Tensor]]:
        """Fetch an offer, as long as it is worth it.

        Raises:
            TransferError: No donor has it.
            _TooLate: The run has moved on from `record` meanwhile.
            Interrupted: This process is to end.
        """

        def stopping() -> bool:
            return self._ended() or (record is not None and self._too_late(record))

        try:
            return fetch(name, donors, self._secret, stopping=stopping, timeout=self._timeouts.find)
        except Interrupted:
            if self._ended():
                raise
            raise _TooLate from None

    def _too_late(self, record: RoundState) -> bool:
        """Whether the base of `record` is no use any more: the rounds since could not be replayed."""
        now = self._watch.record
        if now is None:
            return False
        return now.term != record.term or now.base.round - record.base.round > self._kept_rounds()

    def _check_deadline(self, record: RoundState) -> None:
        if time.monotonic() > self._deadline:
            raise TrainingError(
                f"the state of round {record.base.round} could not be had from the other members for "
                f"{self._config.elastic.rdzv_timeout:.0f} s (elastic.rdzv_timeout): they do not have it, or the "
                "network is too slow for this model and these rounds"
            )

    def _donors(self) -> list[str]:
        members = self._watch.patiently(lambda: self._client.list("members/"))
        return [entry.value["address"] for key, entry in members.items() if key != f"members/{self._machine.id}"]


class _TooLate(Exception):
    """The run has moved on while something was fetched."""
