"""The transfer of the global state: serving it to other members, and fetching it to catch up."""

import logging
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress

from torch import Tensor

from trainer.diloco.codecs import Fp32
from trainer.diloco.collective import decoded
from trainer.diloco.quorum import Reduced
from trainer.diloco.state import Fragment, GlobalState
from trainer.elastic.round_watch import RoundWatch
from trainer.errors import Interrupted, TrainingError
from trainer.etcd.client import Json
from trainer.protocol.member import MemberMachine
from trainer.protocol.records import RoundState
from trainer.transport.donor import Offer
from trainer.transport.fetch import TransferError, fetch
from trainer.transport.transport import Transport

log = logging.getLogger(__name__)


class Replica:
    """This member's copy of the global state, its hash, and the coded means of the last commits.

    `find` serves them to other members, on a donor's threads:

        state/<term>.<round>   the global state after that round, if there is memory to continue meanwhile
        mean/<term>.<round>    the coded mean of its outer step
        <name>                 the worker's tensors in `offers`

    Args:
        state: Brought to the open round in place.
        machine: Its term is that of the state.
        executor: Runs the hashing.
        transport: Used for fetching.
    """

    def __init__(
        self, watch: RoundWatch, state: GlobalState, machine: MemberMachine, executor: Executor, transport: Transport
    ) -> None:
        self.state = state
        self._watch, self._machine, self._executor, self._transport = watch, machine, executor, transport
        self._hash: Future[str] | None = None  # of the current state
        self._deadline = 0.0  # for catching up, on the monotonic clock
        self._means: deque[tuple[str, Offer]] = deque()
        self.offers: dict[str, Mapping[str, Tensor]] = {}  # may change while they are served

    def hashing(self) -> Future[str]:
        """The hash of the state, computed in the background."""
        if self._hash is None:
            self._hash = self._executor.submit(self.state.hash)
        return self._hash

    def changed(self) -> None:
        """Forget the hash: the state has changed, or is about to."""
        if self._hash is not None:
            self._hash.result()  # wait, because it reads the state
        self._hash = None

    # Serving

    def find(self, name: str) -> Offer | None:
        """The offer with a name, if this member has it. Called on the donor's threads."""
        kind, _, version = name.partition("/")
        if kind == "mean":
            return next((offer for known, offer in list(self._means) if known == version), None)
        if kind != "state":
            tensors = self.offers.get(name)
            return Offer({"member": self._machine.id}, dict(tensors)) if tensors else None
        round = self.state.round
        if version != f"{self._machine.term}.{round}" or (lent := self.state.borrow(round)) is None:
            return None
        step, state = lent
        return Offer({"round": round, "step": step}, state)

    def keep_mean(self, round: int, reduced: Reduced, steps: int, fragment: Fragment) -> None:
        """Keep the coded mean of a committed round for members that missed it.

        If the step of a single member replaced θ, its parameters may have been copied (`Outcome.exact`): a replay of
        the mean would differ from them by rounding, so the others fetch the state.
        """
        if reduced.lone and self.state.outer.replaces:
            return
        buffers = {str(index): rows for index, (_, rows) in enumerate(reduced.coded)}
        scales = {name: scale for name, (scale, _) in zip(buffers, reduced.coded, strict=True)}
        meta = {"weight": reduced.weight, "steps": steps, "fragment": fragment.index, "coded": scales}
        if reduced.factors is not None:
            buffers["factors"] = reduced.factors
        self._means.append((f"{self._machine.term}.{round}", Offer(meta, buffers)))
        while len(self._means) > self._kept_rounds() or self._size_of_means() > self._size_of_state():
            self._means.popleft()

    def _kept_rounds(self) -> int:
        """The number of means to keep: `catch_up_rounds`, but only while they are cheaper to send than the state."""
        fragment = self.state.fragments[0]
        codec = fragment.codec
        row = codec.row if isinstance(codec, Fp32) else codec.row + codec.mean.row  # at most: see `all_to_all`
        mean = (fragment.stop - fragment.start) * row / codec.block
        return min(self._watch.config.catch_up_rounds, int(self._size_of_state() / mean))

    def _size_of_means(self) -> int:
        return sum(rows.nbytes for _, offer in self._means for rows in offer.buffers.values())

    def _size_of_state(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.tensors.values())

    # Catching up

    def start_catching_up(self) -> None:
        """Start the time limit for catching up, `elastic.rdzv_timeout`."""
        self._deadline = time.monotonic() + self._watch.config.elastic.rdzv_timeout

    def replay(self, record: RoundState, first: int) -> int:
        """Perform `effects.ReplayMeans`. Raises TrainingError if catching up takes too long."""
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
            # Take the same step as the members of the round
            fragment = self.state.fragments[meta["fragment"]]
            coded = tuple((scale, buffers[name]) for name, scale in meta["coded"].items())
            factors = buffers.get("factors")
            if meta["weight"] > 0:
                try:
                    mean = decoded(coded, fragment.codec, fragment.stop - fragment.start)
                    if len(mean) != fragment.stop - fragment.start:
                        raise ValueError(f"it has {len(mean)} values")
                except (ValueError, RuntimeError) as error:  # the full state is fetched instead
                    log.warning("the mean of round %d cannot be decoded: %s", round, error)
                    break
                if factors is not None:
                    mean = fragment.merge.scaled(mean, factors)
                self.state.apply(mean, meta["steps"], fragment)
            else:
                self.state.skip(meta["steps"])
            reduced = Reduced(meta["weight"], coded, "", factors=factors)
            self.keep_mean(round, reduced, meta["steps"], fragment)
        return self.state.round

    def fetch_state(self, record: RoundState) -> bool:
        """Perform `effects.FetchState`. Raises TrainingError if the run is over or catching up takes too long."""
        self._check_deadline(record)
        try:
            name = f"state/{record.term}.{record.base.round}"
            meta, buffers = self._fetch(name, self._donors(), record)
        except _TooLate:
            return False  # a newer state is available
        except TransferError as error:
            self._watch.check_verdict()  # the donors may have completed the run and left
            log.info("round %d is not available yet: %s", record.base.round, error)
            self._watch.pause(self._watch.timeouts.poll)
            return False
        self.changed()
        self.state.load(meta["round"], meta["step"], buffers)
        self._means.clear()
        return True

    def fetch_offer(self, name: str) -> dict[str, Tensor] | None:
        """Another member's offer with this name; None if no member has one."""
        for id, endpoints in self._donors().items():
            with suppress(TransferError):
                return self._fetch(name, {id: endpoints})[1]
        return None

    def _fetch(
        self, name: str, donors: Mapping[str, tuple[str, ...]], record: RoundState | None = None
    ) -> tuple[Json, dict[str, Tensor]]:
        """Fetch an offer, unless the run moves on.

        Raises:
            TransferError: No donor has it.
            _TooLate: The rounds since the base of `record` can no longer be replayed.
            Interrupted: This process has to end.
        """
        watch = self._watch

        def stopping() -> bool:
            now = watch.record
            if watch.ended() or record is None or now is None:
                return watch.ended()
            return now.term != record.term or now.base.round - record.base.round > self._kept_rounds()

        try:
            return fetch(self._transport, name, donors, stopping=stopping, timeout=watch.timeouts.find)
        except Interrupted:
            if watch.ended():
                raise
            raise _TooLate from None

    def _check_deadline(self, record: RoundState) -> None:
        if time.monotonic() > self._deadline:
            raise TrainingError(
                f"the other members did not provide the state of round {record.base.round} within "
                f"{self._watch.config.elastic.rdzv_timeout:.0f} s (elastic.rdzv_timeout): they do not have it, or the "
                "network is too slow for this model and these rounds"
            )

    def _donors(self) -> dict[str, tuple[str, ...]]:
        """The other members' endpoints, by id."""
        members = self._watch.patiently(lambda: self._watch.client.list("members/"))
        found = {key.partition("/")[2]: tuple(entry.value["endpoints"]) for key, entry in members.items()}
        return {id: endpoints for id, endpoints in found.items() if id != self._machine.id}


class _TooLate(Exception):
    """The run has moved on during a fetch."""
