"""A member's view of the run: the open round's record, waiting for changes, and retries during etcd outages."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
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
    """One thread's wait for the record. Times are on the monotonic clock."""

    since: float = field(default_factory=time.monotonic)  # when it began, or when the run last lacked nothing
    logged: float = field(default_factory=time.monotonic)  # when it was last logged
    revision: int = 0  # of the record that the thread has seen
    warned: bool = False  # whether a shortage has been reported


class RoundWatch:
    """Follows the key `round`, and waits for etcd and for the other members.

    Attributes:
        ended: Whether this process has to end: every wait then raises `Interrupted`.
        record: The open round's record, as last read.
        shortage: Whether this member waits because the run lacks nodes or a state.
    """

    def __init__(
        self, config: "TrainingConfig", rules: Rules, ended: Callable[[], bool], timeouts: MemberTimeouts
    ) -> None:
        self.config, self.ended, self.timeouts, self._rules = config, ended, timeouts, rules
        self._condition = threading.Condition()
        self._heard = self._read = time.monotonic()  # etcd's last answer, and its last answer about the record
        self._revision = 0  # -1: the record is gone
        self.record: RoundState | None = None
        self.shortage = False

    @cached_property
    def client(self) -> EtcdClient:
        """The member's etcd client, created when it joins."""
        return EtcdClient.of(self.config)

    def refresh(self) -> None:
        """Read the record. Called on the watch's thread, and periodically while a thread waits."""
        entry = self.client.get("round")
        with self._condition:
            self._heard = self._read = time.monotonic()
            if entry is None:
                if self.record is not None:
                    self._revision = -1
            elif entry.revision > self._revision >= 0:
                self.record, self._revision = decode(RoundState, entry.value), entry.revision
            self._condition.notify_all()

    def entries(self) -> dict[str, Entry]:
        return self.patiently(lambda: records_of(self.client))

    def await_round(self, effect: AwaitRound, wait: Wait) -> RoundState:
        """Perform the effect. `wait` is the thread's; it is reset unless `effect.again`.

        Raises:
            Interrupted: This process has to end.
            TrainingError: The run has ended; etcd lost the record or is down for too long; a shortage lasts too long.
        """
        if not effect.again:
            wait.since = wait.logged = time.monotonic()
            wait.warned = self.shortage = False
        waited = not effect.again
        while True:
            # Return the record if it has changed
            with self._condition:
                if self._revision < 0:
                    raise TrainingError("etcd has lost the run's record: start the run again, and it resumes")
                if self.record is not None and (waited or self._revision != wait.revision):
                    wait.revision = self._revision
                    return self.record
                self._condition.wait(self.timeouts.poll)
            waited = True

            # Between two checks, end if asked to, read the record in case the watch is silent, and log the wait
            if self.ended():
                raise Interrupted
            if time.monotonic() - self._read > self.timeouts.refresh:
                self.patiently(self.refresh)
            if time.monotonic() - wait.logged > self.timeouts.log:
                self._report(effect, wait)

    def pause(self, seconds: float) -> None:
        """Wait for a change of the record, or for at most this long."""
        with self._condition:
            self._condition.wait(seconds)

    def check_verdict(self) -> None:
        """Raise TrainingError if the run has ended."""
        result = self.patiently(lambda: verdict(self.client))
        if result.terminal:
            raise TrainingError(str(result))

    def patiently(self, operation: Callable[[], T]) -> T:
        """Perform an operation on etcd. While etcd is unreachable, retry for up to `etcd_outage_limit`.

        Raises:
            Interrupted: This process has to end.
            TrainingError: etcd denies the operation, or is down for too long.
        """
        began = time.monotonic()

        def before_retry(error: BaseException) -> None:
            if self.ended():
                raise Interrupted from None
            away = time.monotonic() - max(began, self._heard)  # inner steps send no requests
            if away > self.config.etcd_outage_limit:
                raise TrainingError(f"etcd was down for {away:.0f} s (etcd_outage_limit): {error}") from None
            log.warning("waiting for etcd: %s", error)

        def unreachable(error: BaseException) -> bool:
            return isinstance(error, EtcdError) and error.kind == "unreachable"

        pause = self.timeouts.retry
        result = retrying(unreachable, first_pause=pause, longest_pause=pause, on_retry=before_retry)(operation)
        self._heard = time.monotonic()
        return result

    def _report(self, effect: AwaitRound, wait: Wait) -> None:
        """Log the wait, and enforce its limit if the run lacks nodes or a state."""
        wait.logged = now = time.monotonic()
        self.check_verdict()
        lack = shortage(self.record, view_of(self.entries()), self._rules) if effect.needs_nodes else ""
        log.info("waiting for %s%s", effect.reason, lack and f": {lack}")
        self.shortage = bool(lack)

        # Warn once, and give up after `elastic.rdzv_timeout`
        timeout = self.config.elastic.rdzv_timeout
        if not lack:
            wait.since = now
        elif not wait.warned:
            wait.warned = True
            log.warning("%s: waiting for up to %.0f s", lack, timeout, extra={"event": True})
        elif now - wait.since > timeout:
            raise TrainingError(f"{lack}, for {timeout:.0f} s (elastic.rdzv_timeout); the run can be resumed")
