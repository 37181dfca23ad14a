"""Claims about rounds: what was committed, by which members, and the resulting states."""

from trainer.protocol.history import Began, CaughtUp, Committed, Ended, History, Life, ProcessEvent, State
from trainer.protocol.proof.notes import Notes

NO_TERMS = "events without a term, which older versions did not write"


def commits(history: History, notes: Notes) -> None:
    """Each round of a term was committed once: in one attempt, with one member list, one hash and one weight."""
    if not history.has_terms:
        notes.cannot(NO_TERMS)
    if history.absent:
        notes.cannot(f"the records of {', '.join(history.absent)}: their files are not here")
    recorded = {(one.term, one.round): one for one in history.recorded}
    for (term, round), records in history.rounds.items():
        place = f"round {round} of term {term} has several"
        etcd = recorded.get((term, round))
        for name, words in (("attempt", "attempts"), ("members", "member lists"), ("hash", "hashes")):
            values = [(getattr(one, name), one.where) for _, one in records]
            if etcd is not None:
                values.append((getattr(etcd, name), etcd.where))
            notes.same(f"{place} {words}", values)
        weights = [(one.weight, one.where) for _, one in records]
        notes.same(f"{place} weights", [*weights, *([(etcd.weight, etcd.where)] if etcd else [])])

        # Each record of the round is by one of its members, and each member has only one
        by: dict[str, str] = {}
        for life, one in records:
            if one.members and life.member and life.member not in one.members:
                notes.refute(f"{life.member} recorded round {round}, but is not one of its members", one.where)
            if life.member in by:
                notes.refute(f"{life.member} committed round {round} of term {term} twice", by[life.member], one.where)
            by[life.member] = one.where


def members(history: History, notes: Notes) -> None:
    """Every member of a round's quorum took its outer step, unless it was killed first; no work counts twice."""
    lives = {life.member: life for life in history.lives}
    for (term, round), records in history.rounds.items():
        recorded_by = {life.member for life, _ in records}
        for member in records[0][1].members:
            notes.judged += 1
            if member in recorded_by or (life := lives.get(member)) is None:
                continue
            again = next((one for one in life.of(CaughtUp) if one.term == term and one.round >= round), None)
            # A member that has voted and cannot learn the outcome drops its work
            if again is not None and any(again.carried or ()):
                text = f"{member} is a member of round {round} of term {term}, but kept its work for a later round"
                notes.refute(text, records[0][1].where, again.where)
            elif again is None and (later := _went_on(history, life, term, round)):
                if life.gaps:
                    notes.cannot(f"the lost lines of {member}")
                    continue
                text = f"{member} is a member of round {round} of term {term} and continued, but did not record it"
                last = [one.where for one in life.events[-1:]]
                notes.refute(text, records[0][1].where, later, *last)


def _went_on(history: History, life: Life, term: int, round: int) -> str:
    """The record of a process's part in a later round of the term, or of its completing the run; "" if none."""
    following = history.rounds.get((term, round + 1), [])
    lines = [one.where for _, one in following if life.member in one.members]
    lines += [one.where for one in life.of(Committed) if one.term == term and one.round > round]
    if life.end is not None and life.end.status == "complete" and life.end.term == term:
        lines.append(life.end.where)
    return next(iter(lines), "")


def states(history: History, notes: Notes) -> None:
    """Members, checkpoints and the end of the run all have the same state for the same round."""
    if not history.has_terms:
        notes.cannot(NO_TERMS)
    for (term, round), hashes in history.hashes.items():
        notes.same(f"the state after round {round} of term {term} has several hashes", hashes)
    for (term, round), cursors in history.cursors.items():
        notes.same(f"the samples' cursor after round {round} of term {term} differs", cursors)
    ends = [one for _, one in history.of(Ended) if one.status == "complete"]
    notes.same("the run's final state has several hashes", [(one.hash, one.where) for one in ends])
    for life in history.lives:
        _judge_order(life.events, notes)


def _judge_order(events: tuple[ProcessEvent, ...], notes: Notes) -> None:
    """A process never goes back, except with a new term, and takes part in every round unless it records otherwise."""
    before: ProcessEvent | None = None
    for one in events:
        if not isinstance(one, Began | Committed | CaughtUp) or one.term is None:
            continue
        if before is not None and before.term is not None:
            notes.judged += 1
            if one.term < before.term:
                notes.refute(f"a process went back from term {before.term} to {one.term}", before.where, one.where)
            elif one.term == before.term and one.round < before.round:
                notes.refute(f"a process went back from round {before.round} to {one.round}", before.where, one.where)
            elif isinstance(one, Committed) and (one.term, one.round) != (before.term, before.round + 1):
                text = f"a process committed round {one.round} of term {one.term} after round {before.round} of term"
                notes.refute(f"{text} {before.term}, without catching up", before.where, one.where)
        before = one


def terms(history: History, notes: Notes) -> None:
    """Each term began from a state that the run had; no later base contains a state that was rolled back."""
    if not history.has_terms:
        notes.cannot(NO_TERMS)
    rolled_back: dict[State, int] = {}  # states that a later term gave up, and that term
    for number, term in enumerate(history.terms):
        base = history.bases.get(term)
        if number == 0 or base is None:
            if base:
                notes.remarks.append(f"the first term here, {term}, begins after round {base}")
            notes.judged += base == 0  # the initialisation
            continue
        parent = _parent(history, term, base, notes)
        if parent is not None and parent in rolled_back:
            text = f"term {term} began from round {base} of term {parent[0]}, which term {rolled_back[parent]}"
            notes.refute(f"{text} had rolled back", *_lines(history, (term, base)), *_lines(history, parent))
        for earlier in history.rounds:
            if earlier[0] < term and earlier[1] > base:
                rolled_back.setdefault(earlier, term)


def _parent(history: History, term: int, base: int, notes: Notes) -> State | None:
    """The state from which a term began: the last state of an earlier term with its round and hash, if known."""
    candidates = [
        (earlier, base)
        for earlier in reversed(history.terms)
        if earlier < term and ((earlier, base) in history.rounds or history.bases.get(earlier) == base)
    ]
    held = {hash for hash, _ in history.hashes.get((term, base), [])}
    known = {state: {hash for hash, _ in history.hashes[state]} for state in candidates if state in history.hashes}
    matching = [state for state in candidates if held & known.get(state, set())]
    if held and known and not matching:
        if len(known) == len(candidates):
            text = f"term {term} began from a state of round {base} that no earlier term had"
            lines = [line for state in known for line in _lines(history, state)]
            notes.refute(text, *_lines(history, (term, base)), *lines[:2])
        return None
    if not candidates:
        if base > 0:
            notes.cannot(f"the state from which term {term} began, round {base}: it is in no file")
        return None
    notes.judged += 1
    if not held or not known:
        notes.cannot(f"the hash of the state from which term {term} began")
    return (matching or candidates)[0]


def _lines(history: History, state: State) -> list[str]:
    lines = [where for _, where in history.hashes.get(state, [])]
    return lines[:2] or [one.where for _, one in history.rounds.get(state, [])[:2]]
