"""The claim about bytes on the wire."""

from trainer.protocol.history import Committed, History
from trainer.protocol.proof.notes import Notes

REPEATED = 0.1  # fraction of the bytes received that may be retransmissions where the kernel does not count them
SLACK = 65536  # bytes; in a small round, one lost window or a joiner's handshake is a large part


def traffic(history: History, notes: Notes) -> None:
    """In each round, the members received as many bytes as they sent, apart from retransmissions."""
    if not history.elastic:
        notes.cannot("data parallelism, whose ranks read their counters at different times")
        return
    for (term, round), records in history.rounds.items():
        events = [one for _, one in records]
        if len(events) != len(events[0].members) or any(one.sent is None or one.received is None for one in events):
            notes.cannot("rounds in which not every member recorded its bytes")
            continue
        if any(one.attempt != 1 for one in events):
            notes.cannot("rounds with several attempts, which not all members count equally")
            continue
        notes.judged += 1
        _judge(f"round {round} of term {term}", events, notes)


def _judge(place: str, events: list[Committed], notes: Notes) -> None:
    sent, received = sum(one.sent or 0 for one in events), sum(one.received or 0 for one in events)
    lines = [one.where for one in events]
    if received > sent + SLACK:
        notes.refute(f"in {place}, {received:.0f} bytes were received, but only {sent:.0f} sent", *lines)
    elif all(one.repeated is not None for one in events):
        repeated = sum(one.repeated or 0 for one in events)
        if sent - repeated > received + SLACK:
            text = f"in {place}, {sent:.0f} bytes were sent ({repeated:.0f} of them twice), but {received:.0f} received"
            notes.refute(text, *lines)
    elif sent > received + max(SLACK, REPEATED * received):
        notes.refute(f"in {place}, {sent:.0f} bytes were sent, but only {received:.0f} received", *lines)
