"""The rules of accumulation, and a report of those that a loop breaks."""

from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

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
CHANGES = {
    "optimizer": "call step() of the optimizer that the loop is given",
    "one update": "call optimizer.step() once, after the last micro-batch of the window",
    "window length": "call optimizer.step() after every `accumulation_steps` micro-batches",
    "every image": "call backward() on the loss of every micro-batch",
    "still weights": "do everything that changes the weights once, right after the window",
    "division": "divide each summed loss once: (loss_sum / images_in_window).backward()",
    "equal weight": 'use reduction="sum", divided once by the number of images in the window',
    "short window": "divide by the number of images that this window really has",
    "one epoch": "update once more at the end of an epoch, or call optimizer.zero_grad() there",
    "whole gradient": "call optimizer.zero_grad() once per window, before its first micro-batch",
    "clipping": "clip once, after the window's last backward pass (with a scaler: after unscale_)",
    "schedule": "call scheduler.step() once per window, after optimizer.step()",
    "logged loss": "log the sum of the images' undivided losses over the number of images",
    "batch norm": "use GroupNorm, or freeze the layer with eval()",
}


@dataclass
class Report:
    """What `check_accumulation` found; print it.

    `seen` tells what was seen, by the broken rule: the first sight, so that no later probe hides
    it. `complete`: whether every rule about the gradient could be checked.
    """

    seen: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    complete: bool = True

    @property
    def rules(self) -> list[str]:
        """Names of the broken rules."""
        return [rule for rule in RULES if rule in self.seen]

    def broken(self, rule: str, seen: str) -> None:
        """Add a broken rule, unless it is there already."""
        self.seen.setdefault(rule, seen)

    def first_of(self, *checks: tuple[str, Any, str]) -> None:
        """Add the first of some (rule, whether it is broken, what was seen) that is broken."""
        for rule, is_broken, seen in checks:
            if is_broken:
                self.broken(rule, seen)
                return

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def cannot_check(self, why: str) -> None:
        """Note that the gradient cannot be checked."""
        self.complete = False
        self.note(f"The gradient cannot be checked: {why}")

    def __str__(self) -> str:
        none = "This loop breaks no rule of accumulation."
        if not self.complete:
            none = "No broken rule was seen, but not every rule could be checked."
        lines = [] if self.rules else [none]
        for rule in self.rules:
            lines += [f"Broken: {RULES[rule]}", f"  Seen: {self.seen[rule]}."]
            lines += [f"  Change: {CHANGES[rule]}."]
        lines += [f"Note: {note}" for note in self.notes]
        width = 95  # characters that fit the page of a notebook
        shape: dict[str, Any] = {"subsequent_indent": "    ", "break_on_hyphens": False}
        return "\n".join(fill(line, width, **shape) for line in lines)
