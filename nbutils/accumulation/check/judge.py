"""`check_accumulation`: says in plain words which rule of accumulation a training loop breaks.

The loop runs on tiny problems, the probes, and is watched. Of every update of every probe it is
asked: did it come after its own window? Did the optimizer use the sum of the window's backward
passes, nothing lost and nothing old? Did every image in that sum have its right weight?
"""

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nbutils.accumulation.batch import couples_images
from nbutils.accumulation.check.image_weights import Loss, check_image_weights, mean_loss
from nbutils.accumulation.check.logged_loss import check_logged_loss
from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, EPOCHS, PROBES, Batch, Probe, cut
from nbutils.accumulation.check.report import Report
from nbutils.accumulation.check.watch import (
    AnySchedule,
    Run,
    StepFunction,
    Update,
    run_loop,
    undisturbed,
)
from nbutils.accumulation.vectors import close, constant


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
            (n, 1, 24, 1), labels int64 of shape (n,), from 0 to 2. Or a
            `nbutils.accumulation.trainers.TrainerLoop`.
        model: A classifier of yours, to look at its BatchNorm layers as well. A copy is used, in
            the mode (train or eval) in which its layers are.
        example: Images and labels that `model` takes, 6 or more.
        loss: The loss that the loop takes, where it is not plain cross-entropy:
            `loss(logits, labels)` returns the mean over the images, or one loss per image.

    Returns:
        A report; print it. `report.rules` is empty where no rule is broken.
    """
    mean_loss(loss)  # refuses a loss that is not a mean
    report = Report()
    if model is not None:
        _check_batch_norm(step_function, model, example, report)
    run_on = getattr(step_function, "run_on", None) or partial(run_loop, step_function)
    _judge({name: run_on(Probe(name)) for name in PROBES}, loss, report)
    return report


def _judge(runs: Mapping[str, Run], loss: Loss | None, report: Report) -> None:
    small = {name: run for name, run in runs.items() if name != "large"}
    every = [update for run in small.values() for update in run.updates]
    _check_clipping(runs["full"], runs["large"], report)
    for run in small.values():  # a loop may leave out updates of large gradients
        steps, updates = len(run.schedule), len(run.updates)
        report.first_of(
            ("schedule", steps > updates, f"{steps} steps of the schedule for {updates} updates"),
            ("schedule", 0 in run.schedule, "the schedule was stepped before the first update"),
        )
    if every and not any(update.backwards for update in every):
        report.cannot_check("no backward pass through model(images) was seen.")
        return
    if not all(map(_takes_whole_batches, small.values())):
        report.cannot_check("the loop mixes images, or takes the loss of some only.")
        return
    _check_windows(runs["full"], report)
    if any(not one.weight.equal(update.own[0].weight) for update in every for one in update.own):
        report.broken("still weights", "they changed between two micro-batches of a window")
    first = {"one update", "window length", "every image", "still weights"}
    if not every or first & set(report.rules):
        report.note("Other rules were not checked: mend this first.")
        return
    for update in every:
        _check_whole(update, report)
    short = runs["short"]
    used = short.micro_batches([one for update in short.updates for one in update.own])
    if len(used) < len(short.probe.batches) and not any(u.carried for u in short.updates):
        report.note("The images left over at the end of an epoch are dropped.")
    check_image_weights(small, loss, report)
    check_logged_loss(small, loss, report)


def _takes_whole_batches(run: Run) -> bool:
    """Whether every backward pass comes from all images of its micro-batches."""
    places = run.probe.places
    passes = [one.images for update in run.updates for one in update.backwards]
    return all(
        places[one].ge(0).all() and torch.isin(places, places[one]).nonzero().flatten().equal(one)
        for one in passes
    )


def _check_windows(run: Run, report: Report) -> None:
    """Two full windows in an epoch: an update after each, and every micro-batch in it."""
    batches, steps, updates = len(run.probe.batches), ACCUMULATION_STEPS, len(run.updates)
    inside = [run.micro_batches(update.backwards) for update in run.updates]
    lengths = [len(places) for places in inside]
    expected, uneven = EPOCHS * batches // steps, set(lengths) != {steps}
    if updates > expected and not uneven:
        report.cannot_check(
            f"it made {updates // EPOCHS} updates of {steps} micro-batches in an epoch of "
            f"{batches}; it must train one epoch."
        )
        return
    if not all(update.given for update in run.updates):
        report.broken("optimizer", "an optimizer that the loop made itself made the updates")
    by_hand = not updates and not run.weight.equal(run.start.to(run.weight))
    several = updates != expected and (0 in lengths or max(lengths, default=0) == 1)
    counted = f"{updates} updates in {expected} windows of {steps} micro-batches"
    wrong = f"updates after {', '.join(map(str, lengths))} micro-batches, not {steps}"
    missed = [str(n + 1) for n in range(batches) if not any(n in places for places in inside)]
    unused = f"micro-batches {', '.join(missed)} of {batches} had no part in any update"
    report.first_of(
        ("optimizer", by_hand, "the weights changed, but not by optimizer.step()"),
        ("window length", not updates, "no update was made"),
        ("one update", several, counted),
        ("window length", updates != expected and uneven, wrong),
        ("every image", missed, unused),
        ("window length", uneven, wrong),
    )


def _check_clipping(small_run: Run, large_run: Run, report: Report) -> None:
    """Whether a large gradient is clipped within a window or before it is unscaled.

    What a loop does to large and to small gradients alike is not clipping.
    """
    for small, large in zip(small_run.updates, large_run.updates, strict=False):
        if not small.own or not large.own or not small.images.equal(large.images):
            continue
        before, after = small.factors, large.factors
        if before is not None and after is not None and close(after, before):
            continue
        unequal = after is not None and not constant(after)
        inside = unequal or (large.changed_inside and not small.changed_inside)
        scaled = not math.isclose(large.kept, small.kept, rel_tol=1e-3)
        report.first_of(
            ("clipping", inside, "it came between the backward passes of one window"),
            ("clipping", scaled, "it came before the scaler's factor was taken out"),
        )


def _check_whole(update: Update, report: Report) -> None:
    """Whether the gradient is that of the window's backward passes, nothing lost, nothing old."""
    carried = f"{len(update.carried)} micro-batches of one epoch were in an update of the next"
    old = "an update had the gradient of the window before it too"
    lost = "the gradient of the window's earlier micro-batches was lost before the update"
    report.first_of(
        ("one epoch", update.carried, carried),
        ("whole gradient", update.has_old, old),
        ("whole gradient", not update.gradient.any(), "an update had no gradient at all"),
        ("whole gradient", update.factors is not None and (update.factors == 0).any(), lost),
    )


def _check_batch_norm(
    step_function: StepFunction, model: nn.Module, example: Batch | None, report: Report
) -> None:
    """Run the loop for one window of a reader's model and look at its BatchNorm layers."""
    if not callable(step_function):
        raise ValueError("model: batch norm can be looked at only with a loop that is a function")
    least = 2 * ACCUMULATION_STEPS
    if example is None or len(example[1]) < least:
        raise ValueError(
            f"to look at a model, give an example of its images and labels, at least {least}"
        )
    model = copy.deepcopy(model)
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    coupled: list[nn.Module] = []

    def after_forward(layer: nn.Module, *_: Any) -> None:
        if couples_images(layer):
            coupled.append(layer)

    for layer in layers:
        layer.register_forward_hook(after_forward)
    size = len(example[1]) // ACCUMULATION_STEPS
    images, labels = (torch.as_tensor(part)[: size * ACCUMULATION_STEPS] for part in example)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with undisturbed():
        given = model, optimizer, AnySchedule(optimizer), cut(images, labels, size)
        step_function(*given, ACCUMULATION_STEPS)
    passes = max(map(coupled.count, layers), default=0)
    if passes > 1:
        name = type(coupled[0]).__name__
        seen = f"{name} took its statistics {passes} times in one window, each from {size} images"
        report.broken("batch norm", seen)
    elif not layers:
        report.note("The model has no BatchNorm layer.")
    elif not coupled:
        report.note("The BatchNorm layers of the model are frozen.")
