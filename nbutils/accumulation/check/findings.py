"""The rules of accumulation, and a report of those that a loop breaks."""

from __future__ import annotations

from dataclasses import dataclass, field

RULES = {
    "optimizer": "The optimizer that the loop is given makes the updates.",
    "one update": "The optimizer makes one update per window.",
    "window length": "An update comes after every `accumulation_steps` micro-batches.",
    "every image": "Every micro-batch of a full window reaches the gradient.",
    "still weights": "The weights change at the update only, weight decay included.",
    "division": "The gradient of a window is divided by the number of its images.",
    "equal weight": "Every image of a window weighs the same, also in a smaller micro-batch.",
    "short window": "A window with fewer images is divided by what is really in it.",
    "one epoch": "What is left over at the end of an epoch stays out of the next one.",
    "whole gradient": "The gradient is cleared between windows, never inside one.",
    "clipping": "Clipping comes once, on the unscaled gradient of the whole window.",
    "schedule": "The schedule advances after an update, at most once per update.",
    "logged loss": "The logged loss is the mean over images.",
    "batch norm": "The images of a micro-batch do not influence each other.",
}
"""What `check_accumulation` looks at, by the name under which a finding appears."""


@dataclass(frozen=True)
class Finding:
    """A rule that a loop breaks, what was seen, and what to change."""

    rule: str
    seen: str
    change: str

    def __str__(self) -> str:
        return f"Broken: {RULES[self.rule]}\n  Seen: {self.seen}.\n  Change: {self.change}."


@dataclass(frozen=True)
class Report:
    """What `check_accumulation` found; print it.

    Attributes:
        findings: The broken rules, in the order of `RULES`.
        notes: What else the reader should know, such as what cannot be checked.
        complete: Whether every rule about the gradient could be checked.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    complete: bool = True

    @property
    def rules(self) -> list[str]:
        """Names of the broken rules."""
        return [finding.rule for finding in self.findings]

    def __str__(self) -> str:
        right = (
            "This loop breaks no rule of accumulation."
            if self.complete
            else "No broken rule was seen, but not every rule could be checked."
        )
        notes = [f"Note: {note}" for note in self.notes]
        return "\n".join([*([] if self.findings else [right]), *map(str, self.findings), *notes])


@dataclass
class Findings:
    """Collects findings; the first one of a rule is kept, so that no later probe hides it."""

    found: dict[str, Finding] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    complete: bool = True

    def add(self, rule: str, seen: str, change: str) -> None:
        """Add a broken rule, unless it has been found already."""
        self.found.setdefault(rule, Finding(rule, seen, change))

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def cannot_check(self, what: str) -> None:
        """Note what cannot be checked and why."""
        self.complete = False
        self.note(what)

    def report(self) -> Report:
        """All that was found."""
        ordered = tuple(self.found[rule] for rule in RULES if rule in self.found)
        return Report(ordered, tuple(self.notes), self.complete)
