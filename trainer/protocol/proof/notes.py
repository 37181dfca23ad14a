"""What a check has found: how much it could judge, what is wrong, and what cannot be judged."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["holds", "refuted", "unknown"]

MOST_FINDINGS = 50  # of one claim; a broken run breaks it at every line


@dataclass(frozen=True)
class Finding:
    """A contradiction, and the lines (`file:line`) that make it."""

    text: str
    where: tuple[str, ...] = ()


@dataclass
class Notes:
    """The result of one check.

    Attributes:
        judged: How many facts it has compared.
        findings: What refutes the claim, the first MOST_FINDINGS; `more` is the number of the others.
        unknown: Why something could not be judged.
        remarks: What is worth knowing although it refutes nothing.
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
        """Say once why something cannot be judged."""
        if reason not in self.unknown:
            self.unknown.append(reason)

    def same(self, what: str, values: Iterable[tuple[object, str]]) -> None:
        """Judge whether all values are equal; each comes with its line, and None is no value."""
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
