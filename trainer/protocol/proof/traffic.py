"""The claim about bytes on the wire."""

from trainer.protocol.history import Committed, History
from trainer.protocol.proof.notes import Notes

REPEATED = 0.1  # of the bytes received: retransmissions that are believed where the kernel has not counted them
SLACK = 65536  # bytes: of a round so small that one lost window, or a handshake with a joiner, is much of it


def traffic(history: History, notes: Notes) -> None:
    """In a round, its members received the bytes that they sent, less what the kernel sent again."""
    if not history.elastic:
        notes.cannot("data parallelism, whose ranks read their counters at different times")
        return
    for (term, round), told in history.rounds.items():
        events = [one for _, one in told]
        if len(events) != len(events[0].members) or any(one.sent is None or one.received is None for one in events):
            notes.cannot("rounds of which not every member has told its bytes")
            continue
        if any(one.attempt != 1 for one in events):
            notes.cannot("rounds of several attempts, of which not all members count the same ones")
            continue
        notes.judged += 1
        _judge(f"round {round} of term {term}", events, notes)


def _judge(place: str, events: list[Committed], notes: Notes) -> None:
    sent, received = sum(one.sent or 0 for one in events), sum(one.received or 0 for one in events)
    lines = [one.where for one in events]
    if received > sent + SLACK:
        notes.refute(f"in {place}, {received:.0f} bytes were received, and only {sent:.0f} sent", *lines)
    elif all(one.repeated is not None for one in events):
        repeated = sum(one.repeated or 0 for one in events)
        if sent - repeated > received + SLACK:
            text = f"in {place}, {sent:.0f} bytes were sent, {repeated:.0f} of them again, and {received:.0f} received"
            notes.refute(text, *lines)
    elif sent > received + max(SLACK, REPEATED * received):
        notes.refute(f"in {place}, {sent:.0f} bytes were sent, and only {received:.0f} received", *lines)
