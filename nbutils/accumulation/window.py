"""Windows, and the gradient of one window summed over its micro-batches.

An update should follow the mean loss of all images in its window. The mean of the micro-batches'
means is not that when micro-batches differ in size, and a division by the configured number of
steps is not that when the window is short. So here each micro-batch adds the *sum* of its images'
losses, divided by the number of images that are really in the window.

A loop of your own, with any model, loss and optimizer:

    for epoch in range(epochs):
        order = torch.randperm(len(images))
        for update, window in enumerate(windows(order, batch_size, accumulation_steps)):
            optimizer.zero_grad()
            loss = accumulate_gradient(model, window, losses, update=update)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()

where `losses(indices)` returns the loss of each image, not reduced. Clipping, the optimizer's
step, weight decay and the schedule come once a window, after its gradient is whole. With a
`torch.amp.GradScaler`, pass `backward=lambda loss: scaler.scale(loss).backward()`, and call
`scaler.unscale_(optimizer)` before clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

MicroBatch = TypeVar("MicroBatch")
LastWindow = Literal["step", "drop"]


def windows(
    order: Tensor,
    batch_size: int,
    accumulation_steps: int,
    last_window: LastWindow = "step",
) -> Iterator[tuple[Tensor, ...]]:
    """Cut one epoch's `order` of the images into windows of micro-batches.

    Args:
        order: Indices of the images, shape (n,), each once, in the order of the epoch.
        batch_size: Images in a micro-batch; the last one of the epoch may be smaller.
        accumulation_steps: Micro-batches in a window; the last window may be short.
        last_window: What becomes of a window with fewer than
            `batch_size * accumulation_steps` images: "step" keeps it, "drop" leaves it out.

    Yields:
        The window of each update: a tuple of index tensors, one a micro-batch.
    """
    effective_batch_size = batch_size * accumulation_steps
    for window in order.split(effective_batch_size):
        if last_window == "step" or len(window) == effective_batch_size:
            yield window.split(batch_size)


def windows_of_batches(
    batches: Iterable[MicroBatch], accumulation_steps: int, last_window: LastWindow = "step"
) -> Iterator[list[MicroBatch]]:
    """Gather what a DataLoader yields into windows; the last one may be short.

    With `last_window="drop"` the DataLoader should have `drop_last=True`, or a smaller last
    micro-batch is taken for a whole one.
    """
    window: list[MicroBatch] = []
    for batch in batches:
        window.append(batch)
        if len(window) == accumulation_steps:
            yield window
            window = []
    if window and last_window == "step":
        yield window


def updates_per_epoch(
    images: int, effective_batch_size: int, last_window: LastWindow = "step"
) -> int:
    """Number of windows that `windows` makes of so many images."""
    full, left_over = divmod(images, effective_batch_size)
    return full + (left_over > 0 and last_window == "step")


def accumulate_gradient(
    model: nn.Module,
    window: Sequence[MicroBatch],
    losses: Callable[[MicroBatch], Tensor],
    *,
    weight: Callable[[MicroBatch], float] | None = None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    update: int | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Add the gradient of the window's mean loss to the parameters' `.grad`.

    Only one micro-batch's activations are in memory at a time. A model in
    `DistributedDataParallel` is synchronised once, in the window's last backward pass, and every
    image of every rank counts the same, also when ranks hold unequal numbers of them.

    Args:
        model: Its parameters get the gradient.
        window: The micro-batches of one update (of one rank).
        losses: The loss of every image of a micro-batch, not reduced, shape (images,).
        weight: The sum of the images' weights in a micro-batch, where `losses` are weighted;
            by default each image weighs 1.
        backward: What starts the backward pass from a loss, for a gradient scaler.
        update: The update's number, for messages.
        check_finite: Whether to look at the losses before returning, which on a GPU waits for
            the passes to end.

    Returns:
        The window's mean loss, detached, shape (): of the images of this rank.

    Raises:
        ValueError: The model has no parameters, the window is empty or weighs nothing, `losses`
            returned anything but one loss an image, or a loss is not finite. The weights are as
            before; the gradient is cleared, so that no part of it can be stepped by mistake.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{_place(update)}the model has no parameters that require a gradient")
    measure = weight or _images
    try:
        weights = [float(measure(micro_batch)) for micro_batch in window]
        divisor, ranks = _over_all_ranks(model, sum(weights))
        if not window or not 0 < divisor < math.inf:
            raise ValueError(f"{_place(update)}the window is empty or weighs nothing")
        loss_sums = []
        for number, micro_batch in enumerate(window, start=1):
            with nullcontext() if number == len(window) else _no_sync(model):
                image_losses = losses(micro_batch)
                if weight is None:
                    _check_shape(image_losses, _images(micro_batch), number, window, update)
                loss_sum = image_losses.sum()
                # DistributedDataParallel takes the mean over ranks, so each counts `ranks` times.
                backward(loss_sum / divisor * ranks)
            loss_sums.append(loss_sum.detach())
        if check_finite:
            _check_finite(loss_sums, update)
    except Exception:
        for parameter in parameters:
            parameter.grad = None
        raise
    return torch.stack(loss_sums).sum() / sum(weights)


def _images(micro_batch: Any) -> int:
    """Images in a micro-batch: a tensor's length, or that of the first tensor in a container."""
    while not isinstance(micro_batch, Tensor):
        values = micro_batch.values() if isinstance(micro_batch, Mapping) else micro_batch
        micro_batch = next(iter(values))
    return len(micro_batch)


def _over_all_ranks(model: nn.Module, weight: float) -> tuple[float, int]:
    """The window's weight summed over all ranks, and their number."""
    if not isinstance(model, DistributedDataParallel):
        return weight, 1
    group = model.process_group
    device = next(model.parameters()).device
    # A rank without images would make the others wait for it in vain: it spoils the sum for all.
    total = torch.tensor(weight if weight > 0 else math.nan, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return total.item(), dist.get_world_size(group)


def _no_sync(model: nn.Module) -> Any:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _check_shape(
    image_losses: Tensor, images: int, number: int, window: Sequence[Any], update: int | None
) -> None:
    if image_losses.shape != (images,):
        raise ValueError(
            f"{_place(update, number, window)}losses have shape {tuple(image_losses.shape)}, but "
            f'there must be one loss an image, ({images},): use reduction="none". A loss that is '
            f"already averaged would weight the images of a small micro-batch too high"
        )


def _check_finite(loss_sums: list[Tensor], update: int | None) -> None:
    finite = torch.stack(loss_sums).isfinite()
    if not finite.all():
        number = int(finite.logical_not().nonzero()[0]) + 1
        raise ValueError(
            f"{_place(update, number, loss_sums)}the loss is {loss_sums[number - 1].item()}; "
            f"the learning rate may be too large, or an input not finite"
        )


def _place(update: int | None, number: int | None = None, window: Sequence[Any] = ()) -> str:
    """The beginning of a message: which update and micro-batch it is about."""
    parts = [] if update is None else [f"update {update}"]
    parts += [] if number is None else [f"micro-batch {number} of {len(window)}"]
    return ", ".join(parts) + ": " if parts else ""
