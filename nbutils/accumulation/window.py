"""Windows, and the gradient of one window summed over its micro-batches.

An update should follow the mean loss of all images in its window. So each micro-batch adds the
*sum* of its losses, divided by the number of images in the whole window. Clipping, the optimizer's
step and the schedule's come once per window, when its gradient is complete.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from nbutils.accumulation import batch
from nbutils.accumulation.distributed import Ranks
from nbutils.accumulation.out_of_memory import until_it_fits

MicroBatch = TypeVar("MicroBatch")
LastWindow = Literal["step", "drop"]


def windows(
    order: Tensor, batch_size: int, accumulation_steps: int, last_window: LastWindow = "step"
) -> Iterator[tuple[Tensor, ...]]:
    """Cut one epoch's `order` of image indices, shape (n,), into windows of micro-batches.

    A window is a tuple of `accumulation_steps` index tensors, each of `batch_size` images. The last
    window may be short and its last micro-batch smaller; "drop" leaves it out unless it is full.
    """
    batch.check_counts(batch_size=batch_size, accumulation_steps=accumulation_steps)
    order, size = torch.as_tensor(order), batch_size * accumulation_steps
    updates = updates_per_epoch(len(order), size, last_window)
    return (order[u * size : (u + 1) * size].split(int(batch_size)) for u in range(updates))


def windows_of_batches(
    batches: Iterable[MicroBatch], accumulation_steps: int, last_window: LastWindow = "step"
) -> Iterator[list[MicroBatch]]:
    """Gather the batches of a DataLoader into windows; the last one may be short.

    "drop" leaves out a window of fewer batches. A smaller last batch counts as a whole one, so the
    DataLoader should then have `drop_last=True`.
    """
    batch.check_counts(last_window, accumulation_steps=accumulation_steps)
    rest = iter(batches)
    gathered = iter(lambda: list(islice(rest, accumulation_steps)), [])
    return (w for w in gathered if last_window == "step" or len(w) == accumulation_steps)


def updates_per_epoch(
    images: int, effective_batch_size: int, last_window: LastWindow = "step"
) -> int:
    """The number of windows that `windows` cuts from `images` images."""
    batch.check_counts(last_window, effective_batch_size=effective_batch_size)
    full, left_over = divmod(images, effective_batch_size)
    return full + (left_over > 0 and last_window == "step")


def accumulate_gradient(
    model: nn.Module,
    window: Iterable[MicroBatch],
    losses: Callable[[MicroBatch], Tensor],
    *,
    weight: Callable[[MicroBatch], float | Tensor] | None = None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    update: int | None = None,
    check_finite: bool = True,
    on_oom: Literal["stop", "split"] = "stop",
) -> Tensor:
    """Add the gradient of the window's mean loss to the parameters' `.grad`.

    One micro-batch's activations are in memory at a time. `distributed.py` describes several ranks.

    Args:
        model: The module that `losses` calls; its parameters get the gradient.
        window: The micro-batches of one update, of any type.
        losses: Returns the losses of a micro-batch, not reduced: one per image, shape (images,).
            With `weight` the shape is free, such as one loss per token or pixel.
        weight: Returns the total weight of a micro-batch's losses: the number of tokens with a
            label, or the sum of the class weights. By default each loss weighs 1.
        backward: Starts the backward pass of a loss. With a `torch.amp.GradScaler` pass
            `lambda loss: scaler.scale(loss).backward()`, and unscale before clipping.
        update: The number of the update, for messages.
        check_finite: Whether to check losses and gradients, which waits for the GPU. With your own
            `backward` only losses are checked: a scaler skips updates with infinite gradients.
        on_oom: "split" cuts micro-batches that do not fit the memory; the update stays the same.

    Returns the mean loss of the window (of this rank), detached, shape (); NaN if it weighs 0.

    Raises a `ValueError` or `TypeError` if the window weighs nothing, losses are reduced or not one
    per image, or a loss or gradient is not finite. Gradients are then cleared: none can be stepped.
    """
    batch.check_choice("on_oom", on_oom, "stop", "split")
    attempt = partial(_attempt, model, weight, backward, update, check_finite)
    if on_oom == "split":
        return until_it_fits(attempt, model, batch.listed(window), losses, weight)
    return attempt(window, losses)


def _attempt(
    model: nn.Module,
    weight: batch.Weight | None,
    backward: Callable[[Tensor], Any],
    update: int | None,
    check_finite: bool,
    window: Iterable[Any],
    losses: Callable[[Any], Tensor],
) -> Tensor:
    parameters = batch.trained(model, update)
    earlier: dict[Tensor, Tensor | None] = {}
    try:
        micro_batches, ranks = batch.listed(window), Ranks(model)
        weights = batch.weights_of(micro_batches, weight)
        total = ranks.total_weight(weights, update)
        known, loss_sums = not math.isnan(total), []
        for number, micro_batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with nullcontext() if last else ranks.no_sync():
                each = losses(micro_batch)
                given = weights[number - 1] if weight else None
                where = batch.place(update, number, len(micro_batches))
                batch.check_losses(each, micro_batch, given, where)
                if not known:  # until the last forward pass, divide by an estimate of the total
                    weights[number - 1] = each.numel()
                    batch.set_aside(parameters, each, earlier)
                    total = estimate = max(1, weights[0]) * len(micro_batches) * ranks.number
                    if last:
                        total = ranks.total_weight(weights, update)
                        batch.rescale(earlier, estimate / total)
                loss_sum = each.sum()
                # DistributedDataParallel averages over ranks, so each counts `ranks.number` times.
                backward(loss_sum / total * ranks.number)
            loss_sums.append(loss_sum.detach())
        ranks.average_parameters_outside()
        if check_finite:
            batch.check_finite(loss_sums, model, backward is Tensor.backward, update)
    except BaseException:  # also Ctrl-C
        for parameter in (*parameters, *earlier):
            parameter.grad = None
        raise
    return torch.stack(loss_sums).sum() / sum(weights)
