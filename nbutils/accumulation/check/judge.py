"""`check_accumulation`: says in plain words which rule of accumulation a training loop breaks.

The loop runs on tiny problems, the probes, and is watched. Three questions are then asked of every
update of every probe. Did it come after its own window? Did the optimizer use the sum of the
window's backward passes, nothing lost and nothing old? Did every image in that sum have its right
weight?
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from nbutils.accumulation.check.batch_norm import check_batch_norm
from nbutils.accumulation.check.bookkeeping import (
    check_clipping,
    check_schedule,
    check_whole,
    check_windows,
    note_dropped,
    takes_whole_batches,
)
from nbutils.accumulation.check.findings import Findings, Report
from nbutils.accumulation.check.image_weights import (
    Loss,
    check_image_weights,
    mean_loss,
)
from nbutils.accumulation.check.logged_loss import check_logged_loss
from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, PROBES, Batch, make_probe
from nbutils.accumulation.check.watch import Run, StepFunction, run_loop


def check_accumulation(
    step_function: StepFunction,
    model: nn.Module | None = None,
    example: Batch | None = None,
    *,
    loss: Loss | None = None,
) -> Report:
    """Which rules of accumulation a training loop breaks.

    The loop must call `model(images)`, `backward()` and `optimizer.step()`, and may call
    `scheduler.step()`. Losses that it returns (one number, one per update, or one per
    micro-batch, also in a tuple or dict beside other numbers) are checked as the logged loss.

    Args:
        step_function: Trains one epoch; called as `step_function(model, optimizer, scheduler,
            batches, accumulation_steps)`. `batches` is a list of (images, labels) with a
            `dataset`, `batch_size` and length, as a DataLoader has. Images are float64 of shape
            (n, 1, 24, 1), labels int64 of shape (n,), from 0 to 2.
        model: A classifier of yours, to look at its BatchNorm layers as well. A copy is used, in
            the mode (train or eval) in which its layers are.
        example: Images and labels that `model` takes, 6 or more.
        loss: The loss that the loop takes, where it is not plain cross-entropy:
            `loss(logits, labels)` returns the mean over the images, or one loss per image.

    Returns:
        A report; print it. `report.rules` is empty where no rule is broken.

    Raises:
        ValueError: `model` comes without an `example`, the example has fewer than 6 images, or
            `loss` returns neither a mean nor one loss per image.
    """
    if model is not None and not callable(step_function):
        raise ValueError("model: batch norm can be looked at only with a loop that is a function")
    if model is not None and example is None:
        raise ValueError("to look at a model, an example of its images and labels is needed")
    if example is not None and len(example[1]) < 2 * ACCUMULATION_STEPS:
        raise ValueError(
            f"the example must have at least {2 * ACCUMULATION_STEPS} images; it has "
            f"{len(example[1])}"
        )
    mean_loss(loss)  # refuses a loss that is not a mean
    findings = Findings()
    if model is not None and example is not None:
        check_batch_norm(step_function, model, example, findings)
    run_on = getattr(step_function, "run_on", None) or partial(run_loop, step_function)
    runs = {name: run_on(make_probe(name)) for name in PROBES}
    return judge(runs, loss, findings)


def judge(
    runs: Mapping[str, Run], loss: Loss | None = None, findings: Findings | None = None
) -> Report:
    """Which rules the watched runs break.

    Args:
        runs: One for each name in `PROBES`, from `run_loop` or `watch`.
        loss: As in `check_accumulation`.
        findings: What was found before.
    """
    findings = findings or Findings()
    small = {name: run for name, run in runs.items() if name != "large"}
    every = [update for run in small.values() for update in run.updates]
    check_clipping(runs, findings)
    for run in runs.values():
        check_schedule(run, findings)
    if every and not any(update.backwards for update in every):
        findings.cannot_check(
            "The gradient cannot be checked: no backward pass through model(images) was seen."
        )
        return findings.report()
    if not all(takes_whole_batches(run) for run in small.values()):
        findings.cannot_check(
            "The gradient cannot be checked: the loop mixes images, or takes the loss of some only."
        )
        return findings.report()
    check_windows(runs["full"], findings)
    if any(not torch.equal(p.weight, update.weight) for update in every for p in update.own):
        findings.add(
            "still weights",
            "they changed between two micro-batches of a window",
            "do everything that changes the weights once, right after the window",
        )
    first = {"one update", "window length", "every image", "still weights"}
    if not every or first & set(findings.found):
        findings.note("Other rules can be checked only once an update follows its own window.")
        return findings.report()
    for update in every:
        check_whole(update, findings)
    note_dropped(runs["short"], findings)
    check_image_weights(small, loss, findings)
    check_logged_loss(small, loss, findings)
    return findings.report()
