"""Windows, and the gradient of one window summed over its micro-batches.

An update should follow the mean loss of all images in its window. The mean of the micro-batches'
means is not that when micro-batches differ in size, and a division by the configured number of
steps is not that when the window is short. So here each micro-batch adds the *sum* of its images'
losses, divided by the number of images that are really in the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

from torch import Tensor

MicroBatch = TypeVar("MicroBatch")


def windows(
    order: Tensor,
    batch_size: int,
    accumulation_steps: int,
    last_window: Literal["step", "drop"] = "step",
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


def updates_per_epoch(
    images: int,
    effective_batch_size: int,
    last_window: Literal["step", "drop"] = "step",
) -> int:
    """Number of windows that `windows` makes of so many images."""
    full, left_over = divmod(images, effective_batch_size)
    return full + (left_over > 0 and last_window == "step")


def accumulate_gradient(
    window: Sequence[MicroBatch],
    losses: Callable[[MicroBatch], Tensor],
    size: Callable[[MicroBatch], int] = len,  # type: ignore[assignment]
) -> None:
    """Add the gradient of the window's mean loss to the parameters' `.grad`.

    Only one micro-batch's activations are in memory at a time. The caller clears the gradient
    before and makes the update after:

        optimizer.zero_grad()
        accumulate_gradient(window, losses)
        optimizer.step()

    Args:
        window: The micro-batches of one update.
        losses: The loss of every image of a micro-batch, not reduced, shape (images,).
        size: How many images a micro-batch has.

    Raises:
        ValueError: `losses` returned anything but one loss an image; a loss that is already
            averaged would weight the images of a small micro-batch too high.
    """
    images_in_window = sum(size(micro_batch) for micro_batch in window)
    for number, micro_batch in enumerate(window, start=1):
        image_losses = losses(micro_batch)
        if image_losses.shape != (size(micro_batch),):
            raise ValueError(
                f"micro-batch {number} of {len(window)}: losses have shape "
                f"{tuple(image_losses.shape)}, but there must be one loss an image, "
                f'({size(micro_batch)},); use reduction="none"'
            )
        (image_losses.sum() / images_in_window).backward()
