"""What updates of a task cost, over batch sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import perf_counter

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nbutils.advise.task import Task
from nbutils.advise.trials import window_gradient
from nbutils.errors import InputError
from nbutils.machine import no_progress
from nbutils.measure.cost import Cost, Update, measure_updates
from nbutils.measure.largest_batch import search
from nbutils.measure.memory import format_memory
from nbutils.measure.process import OutOfMemory

USUAL = 128
"""The batch size that most people take."""

SMALLEST, LARGEST = 8, 8192
"""Batch sizes of the cost table, where there are examples and memory for them."""

FEWEST_UPDATES = 4
"""An update takes at most this part of an epoch."""

ACCUMULATED = (2, 4, 8)
"""Accumulation steps tried with the largest micro-batch, where memory is the limit."""

REPEATS = 3
"""Measurements of the cost of each setting, where there is time."""


def update_cost(task: Task, batch_size: int, accumulation_steps: int = 1) -> Cost:
    """The cost of an update of the task, from `measure_updates`."""
    make, losses, make_optimizer = task.make, task.losses, task.recipe.optimizer
    examples = task.data.train.first(batch_size * accumulation_steps)

    def prepare(device: torch.device) -> Callable[[], Update]:
        def start() -> Update:
            model = make(device)
            optimizer = make_optimizer(model.parameters())

            def update(window: Sequence[Tensor]) -> None:
                optimizer.zero_grad()
                window_gradient(model, losses, examples, window, device)
                optimizer.step()

            return update

        return start

    sizes = batch_size, accumulation_steps
    return measure_updates(prepare, examples.number, *sizes, device=str(task.device))


def trial_costs(task: Task, limit: float, seconds: float) -> tuple[pd.DataFrame, bool, list[str]]:
    """Measure what updates cost, over batch sizes that fit `limit` bytes.

    Sizes in steps of 4 are tried, the usual one and its quarter first. If one does not fit, the
    largest that does is searched, and accumulated too. Then come the sizes in between, an update of
    four micro-batches that was also made as one batch, and everything again. The first two and the
    search are made whatever the time.

    Returns one row per setting that fits: `batch_size`, `accumulation_steps`,
    `effective_batch_size`, the largest `peak_memory`, the highest `images_per_second` (other work
    on the machine only slows), and the lowest as `slowest`. Then whether memory was the limit, and
    what was left out. Raises an `InputError` if not even the smallest batch fits.
    """
    end = perf_counter() + seconds
    largest = min(LARGEST, max(2, task.data.train.number // FEWEST_UPDATES))
    costs: list[Cost] = []
    walls: dict[int, float] = {}
    needed: dict[int, int | None] = {}
    bar = tqdm(desc="cost", unit="measurement", leave=False, disable=no_progress())

    def fits(size: int, steps: int = 1) -> bool:
        begun = perf_counter()
        try:
            cost = update_cost(task, size, steps)
        except OutOfMemory:
            needed[size] = None
            return False
        walls[size * steps] = perf_counter() - begun
        needed[size] = cost.peak_memory
        bar.update()
        costs.extend([cost] if cost.peak_memory <= limit else [])
        return cost.peak_memory <= limit

    def peak(size: int) -> int | None:
        fits(size)
        return needed[size]

    left_out, unfit = [], largest + 1
    sizes = [SMALLEST * 4**power for power in range(6) if SMALLEST * 4**power <= largest]
    for size in sorted(sizes or [largest], key=lambda size: abs(math.log(size / USUAL))):
        if size > unfit:
            continue
        if walls and size not in (USUAL, USUAL // 4) and _late(walls, size, end):
            left_out.append(f"batch size {size}, for want of time")
        elif not fits(size):
            unfit = size
    bounded = unfit <= largest
    if bounded and (costs or fits(2 if task.batch_norm else 1)):  # one example has no deviation
        begin = max(cost.batch_size for cost in costs)
        search(peak, {begin: needed[begin]}, int(limit), unfit - 1)
    if not costs:
        raise _too_little(task, limit, *min(needed.items()))
    for size, steps in _plan(costs, bounded, largest):
        if not _late(walls, size * steps, end):
            fits(size, steps)
    bar.close()
    return _table(costs), bounded, left_out


def _late(walls: dict[int, float], size: int, end: float) -> bool:
    """Whether a measurement would end too late, by the time that the next smaller one took."""
    overhead = min(walls.values())
    smaller = max((known for known in walls if known <= size), default=min(walls))
    growing = (walls[smaller] - overhead) * max(1.0, size / smaller)
    return perf_counter() + overhead + growing > end


def _too_little(task: Task, limit: float, size: int, needed: int | None) -> InputError:
    found = "more than there is" if needed is None else format_memory(needed)
    what = f"one {task.noun[:-1]}" if size == 1 else f"{size} {task.noun}"
    return InputError(
        f"memory_budget: {format_memory(limit)} without the margin, too little for {what}, which "
        f"needs {found}"
    )


def _plan(costs: Sequence[Cost], bounded: bool, largest: int) -> list[tuple[int, int]]:
    """What to measure after the first sizes: batch sizes and accumulation steps."""
    whole = sorted(cost.batch_size for cost in costs)
    plan = [(2 * size, 1) for size in whole if 2 * size < whole[-1] and 2 * size not in whole]
    plan += [(size, 4) for size in whole if 4 * size in whole][-1:]
    if bounded:
        top = whole[-1]
        plan = [(top, steps) for steps in ACCUMULATED if top * steps <= largest] + plan
    return plan + (REPEATS - 1) * [*((size, 1) for size in whole), *plan]


def _table(costs: Sequence[Cost]) -> pd.DataFrame:
    table = pd.DataFrame([asdict(cost) for cost in costs])
    return (
        table.groupby(["effective_batch_size", "accumulation_steps", "batch_size"])
        .agg(
            peak_memory=("peak_memory", "max"),
            images_per_second=("images_per_second", "max"),
            slowest=("images_per_second", "min"),
        )
        .reset_index()
    )
