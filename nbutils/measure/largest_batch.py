"""The largest micro-batch that can be trained within a memory budget, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Unpack

from torch import Tensor

from nbutils.errors import InputError
from nbutils.measure.cost import Options, measure
from nbutils.measure.factory import Factory
from nbutils.measure.memory import format_memory, free_memory
from nbutils.measure.process import OutOfMemory

TOLERANCE = 1 / 16
"""The search ends when the gap is no larger than this fraction of the size that fits."""


@dataclass(frozen=True)
class LargestBatch:
    """The result of `largest_batch_size`.

    Attributes:
        batch_size: The largest micro-batch that was tried and fits.
        peak_memory: Bytes that it needed.
        limit: Bytes that it had to stay within: the budget less the margin.
        tried: The peak memory of every size that was tried, in the order of the tries; None where
            memory ran out.
    """

    batch_size: int
    peak_memory: int
    limit: int
    tried: dict[int, int | None]


def largest_batch_size(
    factory: Factory | str,
    images: Tensor,
    labels: Tensor,
    *,
    memory_budget: int | None = None,
    margin: float = 0.1,
    largest: int | None = None,
    **options: Unpack[Options],
) -> LargestBatch:
    """Find the largest micro-batch that can be trained within a memory budget.

    A try makes updates of two micro-batches each. At its peak there are weights, the optimizer's
    state, accumulated gradients and activations, which is what any number of accumulation steps
    needs. The search starts at one image, or at two if the model cannot be trained on one, as with
    batch norm.

    Args:
        factory: As in `measure`, like the arguments that are not named here.
        images: The images.
        labels: Their classes.
        memory_budget: Bytes that training may add; by default what the device has free.
        margin: The fraction of the budget that must stay free, in [0, 1).
        largest: Where the search ends, >= 1; by default at the number of images.
        **options: As in `nbutils.measure.cost.Options`.

    Raises:
        InputError: As `measure`; or the smallest batch does not fit: the message says what it
            needs.
        RuntimeError: As `measure`.
    """
    if not 0 <= margin < 1:
        raise InputError(f"margin = {margin!r}, but it must be a number in [0, 1)")
    largest = len(images) if largest is None else largest
    if largest < 1:
        raise InputError(f"largest = {largest!r}, but it must be a whole number >= 1")
    budget = free_memory(options.get("device", "auto")) if memory_budget is None else memory_budget
    limit = int(budget * (1 - margin))

    def peak(size: int) -> int | None:
        try:
            return measure(factory, images, labels, size, 2, updates=1, **options).peak_memory
        except OutOfMemory:
            return None

    size, needs = _smallest(peak, largest)
    if needs is None or needs > limit:
        found = "more than there is" if needs is None else format_memory(needs)
        raise InputError(
            f"memory_budget = {format_memory(budget)}, of which {margin:.0%} must stay free: too "
            f"little for a batch of {size}, which needs {found}"
        )
    tried = search(peak, {size: needs}, limit, largest)
    fitting = max(size for size, needs in tried.items() if needs is not None and needs <= limit)
    return LargestBatch(fitting, tried[fitting] or 0, limit, tried)


def _smallest(peak: Callable[[int], int | None], largest: int) -> tuple[int, int | None]:
    """The smallest size that can be trained, and its peak."""
    with suppress(InputError):
        return 1, peak(1)
    size = min(2, largest)
    return size, peak(size)


def search(
    peak: Callable[[int], int | None], tried: dict[int, int | None], limit: int, largest: int
) -> dict[int, int | None]:
    """Try sizes until the largest that fits is known to within `TOLERANCE`.

    Sizes are doubled, but not beyond what a line through the tries so far says would fit. After one
    that does not fit, the gap is halved.

    Args:
        peak: Returns the bytes that a size needs, or None if memory runs out.
        tried: The peak of one size that fits, the smallest.
        limit: Bytes that a size may need.
        largest: The largest size to try.

    Returns:
        The peaks of all sizes that were tried, in the order of the tries.
    """
    ((smallest, first),) = tried.items()
    tried, fitting, unfit = dict(tried), smallest, largest + 1
    while unfit - fitting > max(1, fitting * TOLERANCE):
        last = tried[fitting]
        if unfit in tried:
            size = (fitting + unfit) // 2
        else:
            size = 2 * fitting
            if first is not None and last is not None and last > first:
                size = fitting + (limit - last) * (fitting - smallest) // (last - first)
            at_least = fitting + max(1, int(fitting * TOLERANCE))
            size = min(max(min(size, 2 * fitting), at_least), unfit - 1)
        tried[size] = needs = peak(size)
        if needs is not None and needs <= limit:
            fitting = size
        else:
            unfit = size
    return tried
