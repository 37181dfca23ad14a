"""A message that cannot be decoded fails an attempt, or the replay of a mean, but never the worker."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.members import connected, member, names
from trainer.config import TrainingConfig
from trainer.diloco import Fragment, GlobalState, Nesterov
from trainer.diloco.codecs import Codec, make
from trainer.diloco.collective import weighted_mean
from trainer.diloco.quorum import Reduced
from trainer.elastic.attempt import Attempts, Exchange
from trainer.elastic.catch_up import Replica
from trainer.elastic.joining import rules_of
from trainer.elastic.round_watch import RoundWatch
from trainer.protocol.member import MemberMachine
from trainer.protocol.records import Cursor, RoundState, State, Vote
from trainer.timeouts import MemberTimeouts
from trainer.transport.transport import Transport

SIZE = 64 * 64
CONFIG = TrainingConfig.from_flat({"etcd_endpoints": ["127.0.0.1:1"]})  # never contacted
RULES = rules_of(CONFIG, MemberTimeouts())
MEMBERS = tuple(names(2))
RECORD = RoundState(
    1, 1, 1, "reduce", MEMBERS, MEMBERS, State(0, 0, Cursor(), ""), Cursor(), length=1, assignments={}, committed=None
)


def codec_of(name: str) -> Codec:
    return make(name, topk=128, values="int8").of([torch.Size((64, 64))])


def watch() -> RoundWatch:
    return RoundWatch(CONFIG, RULES, lambda: False, MemberTimeouts())


def ignored(start: int, mean: Tensor) -> None: ...


def garbage(codec: Codec, rows: int) -> Tensor:
    return torch.full((rows, codec.row), 0xFF, dtype=torch.uint8)


@pytest.mark.parametrize("name", ["sparse", "demo"])
def test_an_attempt_with_a_message_that_cannot_be_decoded_fails_and_the_next_one_counts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, broken, values = codec_of(name), codec_of(name), torch.ones(SIZE)
    monkeypatch.setattr(broken, "encode", lambda blocks: garbage(codec, len(blocks)))
    monkeypatch.setattr(broken, "decode", lambda rows, out: out.zero_())

    def run(transport: Transport, codec: Codec, number: int) -> Reduced:
        attempt, failed = (1, 1, number), True
        try:
            reduced = weighted_mean(transport.group(MEMBERS, attempt), values, 1.0, codec, ignored)
            failed = False
        finally:
            transport.finish(MEMBERS, attempt, failed)
        return reduced

    with connected(2) as (one, other), ThreadPoolExecutor(1) as pool:
        attempts = Attempts(watch(), one)
        exchange = Exchange(values, 1.0, Fragment(0, 0, SIZE, codec), ignored)
        wrong = pool.submit(run, other, broken, 1)
        assert attempts.reduce(RECORD, exchange) is None
        with suppress(OSError):  # the other learns that the attempt has failed, if it is still in it
            wrong.result()
        right = pool.submit(run, other, codec, 2)
        vote = attempts.reduce(replace(RECORD, attempt=2), exchange)
        assert isinstance(vote, Vote) and vote.hash == right.result().hash


class Fetched(Replica):
    """A replica to which a donor sends a certain mean."""

    rows: Tensor

    def _donors(self) -> dict[str, tuple[str, ...]]:
        return {}

    def _fetch(self, *_: Any, **__: Any) -> Any:
        return {"weight": 1.0, "steps": 4, "fragment": 0, "coded": {"0": 1.0}}, {"0": self.rows.view(-1)}


@pytest.mark.parametrize("name", ["sparse", "demo"])
def test_a_mean_that_cannot_be_decoded_is_not_replayed(name: str) -> None:
    codec = codec_of(name)
    state = GlobalState(torch.ones(SIZE), Nesterov(), [Fragment(0, 0, SIZE, codec)])
    before, record = state.hash(), replace(RECORD, round=2, base=State(1, 4, Cursor(), ""))
    with member(0) as transport, ThreadPoolExecutor(1) as pool:
        replica = Fetched(watch(), state, MemberMachine(transport.id, RULES), pool, transport)
        replica.start_catching_up()
        replica.rows = garbage(codec.mean, 1)
        assert replica.replay(record, 1) == 0 and state.hash() == before  # the full state is fetched next
        replica.rows = codec.mean.encode(torch.ones(1, SIZE))[:, :-1].contiguous()
        assert replica.replay(record, 1) == 0 and state.hash() == before
        replica.rows = codec.mean.encode(torch.ones(1, SIZE))
        assert replica.replay(record, 1) == 1 and state.hash() != before


def test_a_mean_of_one_member_whose_parameters_replaced_the_state_is_not_kept() -> None:
    """θ − (θ − θᵢ) is θᵢ except for rounding."""
    codec = make("fp32", topk=0, values="int8").of([torch.Size((64, 64))])
    reduced = Reduced(1.0, ((1.0, torch.ones(SIZE)),), "")
    with member(0) as transport, ThreadPoolExecutor(1) as pool:
        for lr, lone, kept in ((1.0, True, 0), (1.0, False, 1), (0.7, True, 1)):
            state = GlobalState(torch.ones(SIZE), Nesterov(lr, 0.0), [Fragment(0, 0, SIZE, codec)])
            replica = Replica(watch(), state, MemberMachine(transport.id, RULES), pool, transport)
            replica.keep_mean(1, replace(reduced, lone=lone), 4, state.fragments[0])
            assert len(replica._means) == kept
