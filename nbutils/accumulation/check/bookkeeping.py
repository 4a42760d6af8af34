"""The rules that need no loss: which backward passes an update used, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nbutils.accumulation.check.findings import Findings
from nbutils.accumulation.check.update import Backward, Update
from nbutils.accumulation.check.watch import Run
from nbutils.accumulation.vectors import close


def micro_batches(run: Run, passes: list[Backward]) -> list[int]:
    """The numbers of the micro-batches in some backward passes, from 0."""
    images = [one.images for one in passes]
    return run.probe.places[torch.cat(images)].unique().tolist() if images else []


def takes_whole_batches(run: Run) -> bool:
    """Whether every backward pass comes from all images of its micro-batches."""
    places = run.probe.places
    for one in (one for update in run.updates for one in update.backwards):
        inside = torch.isin(places, places[one.images].unique()).nonzero().flatten()
        if not torch.equal(inside, one.images):
            return False
    return True


def check_windows(run: Run, findings: Findings) -> None:
    """Two full windows in an epoch: an update after each, and every micro-batch in it."""
    windows = run.probe.epochs * len(run.probe.batches) // run.probe.accumulation_steps
    updates, steps = run.updates, run.probe.accumulation_steps
    if not updates and run.moved:
        findings.add(
            "optimizer",
            "the weights changed, but not by optimizer.step()",
            "call optimizer.step() of the optimizer that the loop is given",
        )
        return
    if any(not update.given for update in updates):
        findings.add(
            "optimizer",
            "the updates were made by an optimizer that the loop made itself",
            "use the optimizer that the loop is given, and its schedule",
        )
    lengths = [len(micro_batches(run, update.backwards)) for update in updates]
    seen = {place for update in updates for place in micro_batches(run, update.backwards)}
    missed = [str(place + 1) for place in range(len(run.probe.batches)) if place not in seen]
    if not updates or (len(updates) != windows and 0 not in lengths and max(lengths) > 1):
        counts = ", ".join(map(str, lengths))
        findings.add(
            "window length",
            f"updates after {counts} micro-batches, not {steps}"
            if updates
            else "no update was made",
            f"call optimizer.step() after every {steps} (accumulation_steps) micro-batches",
        )
    elif len(updates) != windows:
        findings.add(
            "one update",
            f"{len(updates)} updates in {windows} windows of {steps} micro-batches",
            "call optimizer.step() once, after the last micro-batch of the window",
        )
    elif missed:
        findings.add(
            "every image",
            f"micro-batches {', '.join(missed)} of an epoch's {len(run.probe.batches)} had no part "
            "in any update",
            "call backward() on the loss of every micro-batch",
        )
    elif any(length != steps for length in lengths):
        findings.add(
            "window length",
            f"updates after {', '.join(map(str, lengths))} micro-batches, not {steps}",
            f"call optimizer.step() after every {steps} (accumulation_steps) micro-batches",
        )


def check_schedule(run: Run, findings: Findings) -> None:
    """Whether the schedule advances after an update, at most once per update."""
    if len(run.schedule) > len(run.updates):
        findings.add(
            "schedule",
            f"{len(run.schedule)} steps of the schedule for {len(run.updates)} updates",
            "call scheduler.step() once per window, after optimizer.step()",
        )
    elif 0 in run.schedule:
        findings.add(
            "schedule",
            "the schedule was stepped before the first update, so its first rate is skipped",
            "call scheduler.step() after optimizer.step()",
        )


def check_clipping(runs: Mapping[str, Run], findings: Findings) -> None:
    """Whether a large gradient is clipped within a window or before it is unscaled.

    What a loop does to large and to small gradients alike is not clipping.
    """
    for small, large in zip(runs["full"].updates, runs["large"].updates, strict=False):
        if not small.own or not large.own or not torch.equal(small.images, large.images):
            continue
        before, after = small.factors, large.factors
        if before is not None and after is not None and close(after, before):
            continue
        unequal = after is not None and not close(after, after.mean().expand_as(after))
        if unequal or (large.changed_inside and not small.changed_inside):
            findings.add(
                "clipping",
                "the gradient was clipped between the backward passes of one window",
                "clip once, after the last backward pass and before optimizer.step()",
            )
        if large.touched_before_unscaling:
            findings.add(
                "clipping",
                "the gradient was clipped while it was still multiplied by the scaler's factor",
                "call scaler.unscale_(optimizer) before clipping",
            )


def check_whole(update: Update, findings: Findings) -> None:
    """Whether the gradient is that of the window's backward passes, nothing lost, nothing old."""
    factors = update.factors
    if update.carried:
        findings.add(
            "one epoch",
            f"{len(update.carried)} micro-batches of one epoch were in an update of the next",
            "update once more at the end of an epoch, or call optimizer.zero_grad() there",
        )
    elif update.holds_old_gradient:
        findings.add(
            "whole gradient",
            "an update had the gradient of the window before it as well",
            "call optimizer.zero_grad() before the first micro-batch of every window",
        )
    elif not update.gradient.any():
        findings.add(
            "whole gradient",
            "an update had no gradient at all",
            "call optimizer.zero_grad() before the window, not just before optimizer.step()",
        )
    elif factors is not None and (factors == 0).any():
        findings.add(
            "whole gradient",
            "the gradient of earlier micro-batches of the window was lost before the update",
            "call optimizer.zero_grad() before the window, not before each micro-batch",
        )


def note_dropped(run: Run, findings: Findings) -> None:
    """Note it where the micro-batches left over at the end of an epoch are in no update."""
    if not any(update.carried for update in run.updates):
        used = {place for update in run.updates for place in micro_batches(run, update.own)}
        if len(used) < len(run.probe.batches):
            findings.note("The images left over at the end of an epoch are dropped.")
