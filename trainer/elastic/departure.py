"""Leaving without losing the run's newest state: another node's volume must also hold it."""

import logging
import threading
import time
from collections.abc import Mapping

from trainer.elastic.keys import records_of
from trainer.etcd.client import Entry, EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.protocol.records import Durable, Member, RoundState, view_of
from trainer.timeouts import MemberTimeouts

log = logging.getLogger(__name__)

_pause = threading.Event()  # never set; used to pause between two requests to etcd


def departing(record: RoundState | None) -> frozenset[str]:
    """The members of the last quorum that have returned their samples; the record then has no assignment for them."""
    if record is None or record.committed is None or record.length == 0:
        return frozenset()
    return frozenset(record.committed.members) - record.assignments.keys()


def all_have(final: int, entries: Mapping[str, Entry], saved: bool) -> bool:
    """Whether all members hold the state of round `final`, the run's last; with `saved`, on their disks."""
    view = view_of(entries)
    held = {record.member for record in view.saved.values() if record.round >= final}
    if not saved:
        held = {id for id, member in view.members.items() if member.holds.round >= final}
    return view.members.keys() <= held


def wait_for_a_copy(client: EtcdClient, me: Member, saved: Durable, timeouts: MemberTimeouts) -> None:
    """Wait until another node has saved this node's last saved state, or a later one.

    The others save as soon as they see that a member is leaving. This waits for at most `timeouts.copy`, and not at all
    if there is no other node or all of them are leaving.
    """
    deadline = time.monotonic() + timeouts.copy
    while time.monotonic() < deadline:
        try:
            view = view_of(records_of(client))
        except EtcdError:
            return
        staying = {id for id in view.present if view.members[id].node != me.node}
        elsewhere = [one for one in view.saved.values() if one.member in staying]
        if not staying or any((one.term, one.round) >= (saved.term, saved.round) for one in elsewhere):
            return
        _pause.wait(timeouts.poll)
    log.warning("leaving, although no other node has saved round %d yet", saved.round, extra={"event": True})
