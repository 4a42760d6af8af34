"""The rules that need no loss: which backward passes an update used, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch

from nbutils.accumulation.check.findings import Findings
from nbutils.accumulation.check.image_weights import carried, factor_of, own_passes
from nbutils.accumulation.check.watch import Run, Update
from nbutils.accumulation.vectors import close, ratio


def _micro_batches(run: Run, update: Update) -> list[int]:
    """Which micro-batches went into an update."""
    images = [one.images for one in update.backwards]
    return run.probe.places[torch.cat(images)].unique().tolist() if images else []


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
    if any(not update.given for update in updates):
        findings.add(
            "optimizer",
            "the updates were made by an optimizer that the loop made itself",
            "use the optimizer that the loop is given, and its schedule",
        )
    lengths = [len(_micro_batches(run, update)) for update in updates]
    seen = {place for update in updates for place in _micro_batches(run, update)}
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
    """Whether anything but a backward pass changed the gradient within a window."""
    for update in (update for run in runs.values() for update in run.updates):
        own = own_passes(update)
        if not own or ratio(update.gradient, torch.stack([one.added for one in own]).sum(0)):
            continue
        between = any(
            earlier.after is not None
            and later.before.any()
            and not close(later.before, earlier.after)
            for earlier, later in pairwise(own)
        )
        during = any(
            one.after is not None and not close(one.after, one.before + one.added) for one in own
        )
        if between or during:
            findings.add(
                "clipping",
                "the gradient was changed between the backward passes of one window",
                "clip once, after the last backward pass and before optimizer.step()",
            )
    for usual, large in zip(runs["full"].updates, runs["large"].updates, strict=False):
        factors = factor_of(usual), factor_of(large)
        if large.touched_before_unscaling and (
            None in factors or abs((factors[1] or 0) / (factors[0] or 1) - 1) > 1e-3
        ):
            findings.add(
                "clipping",
                "the gradient was clipped while it was still multiplied by the scaler's factor",
                "call scaler.unscale_(optimizer) before clipping",
            )


def check_whole(update: Update, findings: Findings) -> None:
    """Whether the gradient is that of the window's backward passes, nothing lost, nothing old."""
    own = own_passes(update)
    if not own:
        return
    if left_over := carried(update):
        findings.add(
            "one epoch",
            f"{left_over} micro-batches of one epoch were in the first update of the next",
            "update once more at the end of an epoch, or call optimizer.zero_grad() there",
        )
        return
    total = torch.stack([one.added for one in own]).sum(0)
    if own[0].before.any() and own[0].after is not None and not close(update.gradient, total):
        findings.add(
            "whole gradient",
            "an update had the gradient of the window before it as well",
            "call optimizer.zero_grad() before the first micro-batch of every window",
        )
    if not ratio(update.gradient, total) and any(not one.before.any() for one in own[1:]):
        findings.add(
            "whole gradient",
            "an update had the gradient of its last micro-batch only",
            "call optimizer.zero_grad() before the window, not before each micro-batch",
        )


def note_dropped(run: Run, findings: Findings) -> None:
    """Note it where the images left over at the end of an epoch are in no update."""
    passes = [one for update in run.updates for one in own_passes(update)]
    used = {number for one in passes for number in one.images.tolist()}
    if len(used) < len(run.probe.places) and not any(map(carried, run.updates)):
        findings.note("The images left over at the end of an epoch are dropped.")
