"""The results of a check: how much it could judge, what is wrong, and what cannot be judged."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["holds", "refuted", "unknown"]

MOST_FINDINGS = 50  # per claim, because a broken run may break it at every line


@dataclass(frozen=True)
class Finding:
    """A contradiction, and the lines (`file:line`) that prove it."""

    text: str
    where: tuple[str, ...] = ()


@dataclass
class Notes:
    """The result of one check.

    Attributes:
        judged: Number of facts that were compared.
        findings: The first MOST_FINDINGS contradictions; `more` is the number of the others.
        unknown: What could not be judged, and why.
        remarks: Remarkable facts that do not refute the claim.
    """

    judged: int = 0
    findings: list[Finding] = field(default_factory=list)
    more: int = 0
    unknown: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def refute(self, text: str, *where: str) -> None:
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(Finding(text, tuple(dict.fromkeys(where))))
        else:
            self.more += 1

    def cannot(self, reason: str) -> None:
        """Record, once, what cannot be judged and why."""
        if reason not in self.unknown:
            self.unknown.append(reason)

    def same(self, what: str, values: Iterable[tuple[object, str]]) -> None:
        """Judge whether all values are equal. Each comes with its line, and None is ignored."""
        first: dict[object, str] = {}
        for value, where in values:
            if value is not None:
                self.judged += 1
                first.setdefault(value, where)
        if len(first) > 1:
            self.refute(f"{what}: {' and '.join(map(_shown, first))}", *first.values())

    @property
    def verdict(self) -> Verdict:
        return "refuted" if self.findings else "holds" if self.judged else "unknown"


def _shown(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
