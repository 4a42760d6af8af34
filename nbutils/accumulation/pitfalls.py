"""The ways accumulation goes wrong: training loops as people write them, each with one mistake.

Every loop trains one epoch, with the signature that `nbutils.check_accumulation` takes. The line
with the mistake is marked. They are here to be looked at and caught, not to be used.
"""

# mypy: disallow-untyped-defs=False
# The loops are shown to readers, who know what the arguments are.

from __future__ import annotations

import copy
import inspect
import warnings

import pandas as pd
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from nbutils.accumulation.check import check_accumulation, gradient_errors
from nbutils.accumulation.equivalence import small_cnn
from nbutils.accumulation.window import accumulate_gradient, windows_of_batches
from nbutils.data.dataset import Dataset


def correct(model, optimizer, scheduler, batches, accumulation_steps):
    """As it should be."""
    logged = []
    for window in windows_of_batches(batches, accumulation_steps):
        optimizer.zero_grad()
        loss = accumulate_gradient(
            model,
            window,
            lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        )
        optimizer.step()
        scheduler.step()
        logged.append(loss.item())
    return logged


def classic(model, optimizer, scheduler, batches, accumulation_steps):
    """The loop of most tutorials; it breaks two rules at once."""
    for number, (images, labels) in enumerate(batches, start=1):
        loss = F.cross_entropy(model(images), labels) / accumulation_steps
        loss.backward()
        if number % accumulation_steps == 0 or number == len(batches):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def mean_of_means(model, optimizer, scheduler, batches, accumulation_steps):
    """The mean of the micro-batches' means, though the last one is smaller."""
    for window in windows_of_batches(batches, accumulation_steps):
        optimizer.zero_grad()
        for images, labels in window:
            loss = F.cross_entropy(model(images), labels)
            (loss / len(window)).backward()  # wrong: an image of a small one weighs more
        optimizer.step()
        scheduler.step()


def full_factor(model, optimizer, scheduler, batches, accumulation_steps):
    """The short last window is divided as if it were full."""
    effective_batch_size = accumulation_steps * len(batches[0][1])
    for window in windows_of_batches(batches, accumulation_steps):
        optimizer.zero_grad()
        for images, labels in window:
            loss_sum = F.cross_entropy(model(images), labels, reduction="sum")
            (loss_sum / effective_batch_size).backward()  # wrong where fewer images are left
        optimizer.step()
        scheduler.step()


def no_division(model, optimizer, scheduler, batches, accumulation_steps):
    """The micro-batches' gradients are added up and never divided."""
    for window in windows_of_batches(batches, accumulation_steps):
        optimizer.zero_grad()
        images_in_window = sum(len(labels) for _, labels in window)
        for images, labels in window:
            loss_sum = F.cross_entropy(model(images), labels, reduction="sum")
            (loss_sum / images_in_window * len(window)).backward()  # wrong: the sum of the means
        optimizer.step()
        scheduler.step()


def carry_over(model, optimizer, scheduler, batches, accumulation_steps):
    """What is left at the end of an epoch goes into the first update of the next."""
    for window in windows_of_batches(batches, accumulation_steps):
        images_in_window = sum(len(labels) for _, labels in window)
        for images, labels in window:
            loss_sum = F.cross_entropy(model(images), labels, reduction="sum")
            (loss_sum / images_in_window).backward()
        if len(window) == accumulation_steps:  # wrong: a short one is not cleared either
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def zero_grad_inside(model, optimizer, scheduler, batches, accumulation_steps):
    """The gradient is cleared before each micro-batch, so only the last one counts."""
    for window in windows_of_batches(batches, accumulation_steps):
        images_in_window = sum(len(labels) for _, labels in window)
        for images, labels in window:
            optimizer.zero_grad()  # wrong: it belongs before the window
            loss_sum = F.cross_entropy(model(images), labels, reduction="sum")
            (loss_sum / images_in_window).backward()
        optimizer.step()
        scheduler.step()


def clip_inside(model, optimizer, scheduler, batches, accumulation_steps):
    """The gradient is clipped after each micro-batch."""
    for window in windows_of_batches(batches, accumulation_steps):
        optimizer.zero_grad()
        images_in_window = sum(len(labels) for _, labels in window)
        for images, labels in window:
            loss_sum = F.cross_entropy(model(images), labels, reduction="sum")
            (loss_sum / images_in_window).backward()
            clip_grad_norm_(model.parameters(), 0.2)  # wrong: the sum is not whole
        optimizer.step()
        scheduler.step()


def scheduler_inside(model, optimizer, scheduler, batches, accumulation_steps):
    """The schedule advances with each micro-batch, so it ends too early."""
    for window in windows_of_batches(batches, accumulation_steps):
        optimizer.zero_grad()
        images_in_window = sum(len(labels) for _, labels in window)
        for images, labels in window:
            loss_sum = F.cross_entropy(model(images), labels, reduction="sum")
            (loss_sum / images_in_window).backward()
            scheduler.step()  # wrong: it belongs after the update
        optimizer.step()


def optimizer_inside(model, optimizer, scheduler, batches, accumulation_steps):
    """The optimizer steps after each micro-batch: more updates, each from fewer images."""
    for window in windows_of_batches(batches, accumulation_steps):
        optimizer.zero_grad()
        images_in_window = sum(len(labels) for _, labels in window)
        for images, labels in window:
            loss_sum = F.cross_entropy(model(images), labels, reduction="sum")
            (loss_sum / images_in_window).backward()
            optimizer.step()  # wrong: it belongs after the window
        scheduler.step()


def weight_decay_inside(model, optimizer, scheduler, batches, accumulation_steps):
    """Weight decay is applied with each micro-batch."""
    for window in windows_of_batches(batches, accumulation_steps):
        optimizer.zero_grad()
        images_in_window = sum(len(labels) for _, labels in window)
        for images, labels in window:
            loss_sum = F.cross_entropy(model(images), labels, reduction="sum")
            (loss_sum / images_in_window).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 - 1e-2)  # wrong: the weights move inside the window
        optimizer.step()
        scheduler.step()


def logged_loss_divided(model, optimizer, scheduler, batches, accumulation_steps):
    """The training is right, but the loss that is logged was divided for the gradient."""
    logged = []
    for window in windows_of_batches(batches, accumulation_steps):
        optimizer.zero_grad()
        images_in_window = sum(len(labels) for _, labels in window)
        for images, labels in window:
            loss = F.cross_entropy(model(images), labels, reduction="sum") / images_in_window
            loss.backward()
            logged.append(loss.item())  # wrong: a micro-batch's share, shown as its mean
        optimizer.step()
        scheduler.step()
    return logged


PITFALLS = {
    mean_of_means: "equal weight",
    full_factor: "short window",
    no_division: "division",
    carry_over: "one epoch",
    zero_grad_inside: "whole gradient",
    clip_inside: "clipping",
    scheduler_inside: "schedule",
    optimizer_inside: "one update",
    weight_decay_inside: "still weights",
    logged_loss_divided: "logged loss",
}
"""Each loop with one mistake, and the rule of `nbutils.accumulation.check.RULES` that it breaks."""


def describe(loop) -> str:
    """Markdown: a loop's source, and what `check_accumulation` says of it."""
    source = inspect.getsource(loop).rstrip()
    return f"```python\n{source}\n```\n\n```\n{check_accumulation(loop)}\n```"


def measure_damage(data: Dataset, seeds: int = 3, epochs: int = 4) -> pd.DataFrame:
    """What each pitfall does to the gradient and to the accuracy.

    A small network is trained on 1,190 images in micro-batches of 16, 8 to a window, so that the
    last window has 3, and its last one 6 images; by SGD with momentum at a rate that falls to zero.

    Returns:
        A row a loop and seed: `loop`, `seed`, `gradient_error` (largest of two epochs' updates,
        at the initial weights, relative to the true gradient) and `accuracy` on the test images.
    """
    cpu, images = torch.device("cpu"), 1_190
    chosen = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(0))
    inputs = data.normalised(data.train.images[chosen[:images]], cpu, torch.float32)
    labels = data.train.labels[chosen[:images]]
    test_inputs = data.normalised(data.test.images, cpu, torch.float32)
    batches = list(zip(inputs.split(16), labels.split(16), strict=True))
    updates = epochs * -(-len(batches) // 8)
    rows = []
    for seed in range(seeds):
        for loop in [correct, *PITFALLS]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = small_cnn("group")
            errors = gradient_errors(loop, copy.deepcopy(model), batches, 8, epochs=2)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: max(0.0, 1 - step / updates)
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                for _ in range(epochs):
                    loop(model, optimizer, scheduler, batches, 8)
            with torch.no_grad():
                right = model(test_inputs).argmax(1) == data.test.labels
            rows.append(
                {
                    "loop": loop.__name__.replace("_", " "),
                    "seed": seed,
                    "gradient_error": max(errors),
                    "accuracy": right.float().mean().item(),
                }
            )
    return pd.DataFrame(rows)
