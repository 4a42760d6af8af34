"""The largest micro-batch that can be trained within a memory budget, found by trying."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nbutils.errors import InputError
from nbutils.measure.cost import check_counts, measure
from nbutils.measure.memory import format_memory, resolve_budget
from nbutils.measure.process import Factory, OutOfMemory

TOLERANCE = 1 / 16  # the search ends when the gap is at most this fraction of the size that fits


@dataclass(frozen=True)
class LargestBatch:
    """The largest micro-batch that was tried and fits; memory is in bytes."""

    batch_size: int
    peak_memory: int
    limit: int  # the budget less the margin
    tried: dict[int, int | None]  # the peak of every size, in order; None where memory ran out


def largest_batch_size(
    factory: Factory | str,
    images: Tensor,
    labels: Tensor,
    *,
    memory_budget: int | str | None = None,
    margin: float = 0.1,
    largest: int | None = None,
    device: str = "auto",
    **options: Any,
) -> LargestBatch:
    """Find the largest micro-batch that can be trained within a memory budget.

    A try makes updates of two micro-batches each, whose peak is that of any number of accumulation
    steps. The search starts at one image, or at two if the model cannot be trained on one, as with
    batch norm. If that does not fit, an InputError says what it needs.

    Args, where they are not those of `nbutils.measure.cost.measure`:
        memory_budget: What training may add, as bytes or "2GB"; by default what is free.
        margin: The fraction of the budget that must stay free, in [0, 1).
        largest: Where the search ends, >= 1; by default at the number of images.
    """
    largest = len(images) if largest is None else largest
    check_counts(images=len(images), largest=largest)
    budget = resolve_budget(memory_budget, device)
    if not 0 <= margin < 1:
        raise InputError(f"margin = {margin!r}, but it must be in [0, 1)")
    limit = int(budget * (1 - margin))

    def peak(size: int) -> int | None:
        with suppress(OutOfMemory):
            cost = measure(factory, images, labels, size, 2, updates=1, device=device, **options)
            return cost.peak_memory
        return None

    size = 1
    try:
        needs = peak(size)
    except InputError:  # a lone image has no variance
        size = min(2, largest)
        needs = peak(size)
    if needs is None or needs > limit:
        found = "more than there is" if needs is None else format_memory(needs)
        raise InputError(
            f"memory_budget = {format_memory(budget)}, of which {margin:.0%} must stay free: too "
            f"little for a batch of {size}, which needs {found}"
        )
    tried = search(peak, {size: needs}, limit, largest)
    best = max(size for size, needs in tried.items() if needs is not None and needs <= limit)
    return LargestBatch(best, tried[best], limit, tried)


def search(
    peak: Callable[[int], int | None], tried: dict[int, Any], limit: int, largest: int
) -> dict[int, Any]:
    """Add to `tried` the peaks of sizes, until the largest that fits is known to `TOLERANCE`.

    `tried` has the smallest size, which fits. Sizes are doubled, but not beyond what a line through
    the tries so far says would fit; after one that does not fit, the gap is halved. `peak` returns
    the bytes that a size needs, None if memory runs out.
    """
    (smallest,) = tried
    fitting, unfit = smallest, largest + 1
    while unfit - fitting > max(1, fitting * TOLERANCE):
        size = (fitting + unfit) // 2
        if unfit not in tried:
            size, rise = 2 * fitting, tried[fitting] - tried[smallest]
            if rise > 0:
                beyond = (limit - tried[fitting]) * (fitting - smallest) // rise
                size = min(size, fitting + beyond)
            at_least = fitting + max(1, int(fitting * TOLERANCE))
            size = min(max(size, at_least), unfit - 1)
        tried[size] = needs = peak(size)
        if needs is not None and needs <= limit:
            fitting = size
        else:
            unfit = size
    return tried
