"""Links that have carried a lot of data are replaced when the record changes, but not during a collective."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.members import PATIENCE, connected, reduce, swap, wait_for
from trainer.elastic.attempt import Attempts
from trainer.transport.link import ROUNDS
from trainer.transport.transport import Transport


def attempts(here: Transport, there: Transport) -> Attempts:
    """The attempts of a member that finds another one in etcd and in the record of the open round."""
    entries = {f"members/{there.id}": SimpleNamespace(value={"endpoints": there.endpoints})}
    watch: Any = SimpleNamespace(
        client=SimpleNamespace(list=lambda prefix: entries),
        config=SimpleNamespace(sync_threads=1, collective_timeout=PATIENCE),
        timeouts=None,
        record=SimpleNamespace(expected=(here.id, there.id), assignments={}, phase="gather"),
    )
    return Attempts(watch, here)


def test_a_worn_link_is_made_anew_when_the_record_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(2, streams=2) as (one, other):
        swap(one, other)
        first, own = one._links[other.id, ROUNDS], attempts(one, other)
        own.connect_new()
        assert own._connecting.ident is None and first.up  # there is nothing to do
        monkeypatch.setattr("trainer.transport.link.WORN_BYTES", 100_000)
        own._watch.record.phase = "reduce"
        own.connect_new()
        assert own._connecting.ident is None and first.up  # it is in use
        own._watch.record.phase = "gather"
        own.connect_new()
        wait_for(lambda: bool(first.reason) and not one.lacking([other.id]) and not other.without_link([one.id]))
        assert first.reason == "is being re-established"
        monkeypatch.undo()
        reduce([one, other], (1, 2, 1))
