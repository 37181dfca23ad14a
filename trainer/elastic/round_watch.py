"""The open round's record as this member knows it, waiting for it to change, and patience with etcd."""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from trainer.elastic.keys import records_of, verdict
from trainer.errors import Interrupted, TrainingError
from trainer.etcd.client import Entry, EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.protocol.effects import AwaitRound
from trainer.protocol.records import RoundState, Rules, decode, view_of
from trainer.protocol.rounds import shortage
from trainer.retry import retrying
from trainer.timeouts import MemberTimeouts

if TYPE_CHECKING:
    from trainer.config import TrainingConfig

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Wait:
    """One thread's wait for the record. Times are on the monotonic clock.

    Attributes:
        since: When the wait began, or the run had all it needs.
        logged: When it was logged last.
        revision: The record's revision that the thread has seen.
        warned: Whether a shortage has been reported.
    """

    since: float = field(default_factory=time.monotonic)
    logged: float = field(default_factory=time.monotonic)
    revision: int = 0
    warned: bool = False


class RoundWatch:
    """Follows the key `round`, and waits for etcd and for the other members.

    Args:
        client: The member's.
        ended: Whether this process is to end: every wait then raises `Interrupted`.

    Attributes:
        record: The open round's record as it was last read.
        shortage: Whether the run lacks what it cannot go on without, as seen by a member that waits.
    """

    def __init__(
        self,
        client: EtcdClient,
        config: "TrainingConfig",
        rules: Rules,
        ended: Callable[[], bool],
        timeouts: MemberTimeouts,
    ) -> None:
        self._client, self._rules, self._ended, self._timeouts = client, rules, ended, timeouts
        self._outage_limit, self._rdzv_timeout = config.etcd_outage_limit, config.elastic.rdzv_timeout
        self._condition = threading.Condition()
        self._heard = self._read = time.monotonic()  # when etcd answered last at all, and about the record
        self._revision = 0  # -1: the record is gone
        self.record: RoundState | None = None
        self.shortage = False

    def refresh(self) -> None:
        """Read the record; called on the watch's thread, and periodically while a thread waits."""
        entry = self._client.get("round")
        with self._condition:
            self._heard = self._read = time.monotonic()
            if entry is None:
                if self.record is not None:
                    self._revision = -1
            elif entry.revision > self._revision >= 0:
                self.record, self._revision = decode(RoundState, entry.value), entry.revision
            self._condition.notify_all()

    def entries(self) -> dict[str, Entry]:
        """All entries of the run (see `records_of`)."""
        return self.patiently(lambda: records_of(self._client))

    def await_round(self, effect: AwaitRound, wait: Wait) -> RoundState:
        """Perform the effect.

        Args:
            wait: The state of the wait that the effect belongs to; unless `effect.again`, a new one begins.

        Raises:
            Interrupted: This process is to end.
            TrainingError: The run has ended; etcd has lost the record or is away for too long; a shortage lasts.
        """
        if not effect.again:
            wait.since = wait.logged = time.monotonic()
            wait.warned = self.shortage = False
        waited = not effect.again
        while True:
            with self._condition:
                if self._revision < 0:
                    raise TrainingError("etcd has lost the run's record: start the run again, and it resumes")
                if self.record is not None and (waited or self._revision != wait.revision):
                    wait.revision = self._revision
                    return self.record
                self._condition.wait(self._timeouts.poll)
            waited = True

            # Between two looks: end, read the record in case the watch is silent, and log what is awaited
            if self._ended():
                raise Interrupted
            if time.monotonic() - self._read > self._timeouts.refresh:
                self.patiently(self.refresh)
            if time.monotonic() - wait.logged > self._timeouts.log:
                self._report(effect, wait)

    def pause(self, seconds: float) -> None:
        """Wait for a change of the record, or for this long."""
        with self._condition:
            self._condition.wait(seconds)

    def check_verdict(self) -> None:
        """Raise TrainingError if the run has ended."""
        result = self.patiently(lambda: verdict(self._client))
        if result.terminal:
            raise TrainingError(str(result))

    def patiently(self, operation: Callable[[], T]) -> T:
        """Do something with etcd; while it is unreachable, retry, for up to `etcd_outage_limit`.

        Raises:
            Interrupted: This process is to end.
            TrainingError: etcd refuses the operation, or is away for too long.
        """
        began = time.monotonic()

        def before_retry(error: BaseException) -> None:
            if self._ended():
                raise Interrupted from None
            away = time.monotonic() - max(began, self._heard)  # etcd is not asked during inner steps
            if away > self._outage_limit:
                raise TrainingError(f"etcd was away for {away:.0f} s (etcd_outage_limit): {error}") from None
            log.warning("waiting for etcd: %s", error)

        pause = self._timeouts.retry
        policy = retrying(
            lambda error: isinstance(error, EtcdError) and error.kind == "unreachable",
            patience=math.inf,
            first_pause=pause,
            longest_pause=pause,
            on_retry=before_retry,
        )
        result = policy(operation)
        self._heard = time.monotonic()
        return result

    def _report(self, effect: AwaitRound, wait: Wait) -> None:
        """Log what the thread waits for, and limit the wait if the run lacks what it cannot go on without."""
        wait.logged = now = time.monotonic()
        self.check_verdict()
        lack = shortage(self.record, view_of(self.entries()), self._rules) if effect.needs_nodes else ""
        log.info("waiting for %s%s", effect.reason, lack and f": {lack}")
        self.shortage = bool(lack)
        limit = f"{self._rdzv_timeout:.0f} s"
        if not lack:
            wait.since = now
        elif not wait.warned:
            wait.warned = True
            log.warning("%s: waiting for up to %s", lack, limit, extra={"event": True})
        elif now - wait.since > self._rdzv_timeout:
            raise TrainingError(f"{lack}, for {limit} (elastic.rdzv_timeout); the run can be resumed")
