"""What updates of a task cost, over batch sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nbutils.advise.task import Task
from nbutils.advise.trials import Clock, window_gradient
from nbutils.errors import InputError
from nbutils.machine import no_progress
from nbutils.measure.cost import Cost, OptimizerFactory, Update, measure_updates
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


def update_cost(
    task: Task,
    optimizer: OptimizerFactory,
    device: torch.device,
    batch_size: int,
    accumulation_steps: int = 1,
) -> Cost:
    """The cost of an update of the task, from `measure_updates`."""
    make, examples = task.make, task.train.first(batch_size * accumulation_steps)

    def prepare(device: torch.device) -> Callable[[], Update]:
        def start() -> Update:
            model = make(device)
            made = optimizer(model.parameters())

            def update(window: Sequence[Tensor]) -> None:
                made.zero_grad()
                window_gradient(model, make, examples, window, device)
                made.step()

            return update

        return start

    sizes = batch_size, accumulation_steps
    return measure_updates(prepare, examples.number, *sizes, device=str(device))


class _Measuring:
    """Measurements of costs, and what they needed in time and memory."""

    def __init__(
        self, task: Task, optimizer: OptimizerFactory, device: torch.device, limit: float
    ) -> None:
        self.costs: list[Cost] = []
        self.walls: dict[int, float] = {}
        self.needed: dict[int, int | None] = {}
        self.bar = tqdm(desc="cost", unit="measurement", leave=False, disable=no_progress())
        self._setting, self._limit = (task, optimizer, device), limit

    def fits(self, batch_size: int, steps: int = 1) -> bool:
        """Measure one setting, and keep its cost if it fits."""
        begun = time.perf_counter()
        self.bar.set_postfix_str(f"{steps} x {batch_size}")
        try:
            cost = update_cost(*self._setting, batch_size, steps)
        except OutOfMemory:
            self.needed[batch_size] = None
            return False
        self.walls[batch_size * steps] = time.perf_counter() - begun
        self.needed[batch_size] = cost.peak_memory
        self.bar.update()
        if cost.peak_memory > self._limit:
            return False
        self.costs.append(cost)
        return True

    def peak(self, size: int) -> int | None:
        """The bytes that a size needs."""
        self.fits(size)
        return self.needed[size]

    def expected(self, size: int) -> float:
        """Seconds that a measurement will take: those of the next smaller one, in proportion."""
        overhead = min(self.walls.values())
        smaller = max((known for known in self.walls if known <= size), default=min(self.walls))
        return overhead + (self.walls[smaller] - overhead) * max(1.0, size / smaller)


def trial_costs(
    task: Task,
    optimizer: OptimizerFactory,
    device: torch.device,
    limit: float,
    seconds: float,
) -> tuple[pd.DataFrame, bool, list[str]]:
    """Measure what updates cost, over batch sizes that fit the memory limit.

    Sizes in steps of 4 are tried, the usual one first, then those next to it. If one does not fit,
    the largest that does is searched, whatever the time, and is accumulated too. Then
    come the sizes in between, an update of four micro-batches that was also made as one batch, and
    everything again.

    Args:
        task: What to train.
        optimizer: Makes the optimizer from the parameters.
        device: Where.
        limit: Bytes that training may add.
        seconds: Time for all this.

    Returns:
        One row per setting that fits: `batch_size`, `accumulation_steps`, `effective_batch_size`,
        the largest `peak_memory`, the highest `images_per_second` (other work on the machine only
        slows), the lowest as `slowest`, and `measurements`, 0 where they are assumed. Then whether
        memory was the limit, and what was left out.

    Raises:
        InputError: Not even the smallest batch fits.
    """
    clock, largest = Clock(seconds), min(LARGEST, max(2, task.train.number // FEWEST_UPDATES))
    measuring = _Measuring(task, optimizer, device, limit)
    costs, fits = measuring.costs, measuring.fits

    def in_time(size: int) -> bool:
        return measuring.expected(size) <= clock.left

    left_out: list[str] = []
    sizes = [SMALLEST * 4**power for power in range(6) if SMALLEST * 4**power <= largest]
    unfit = largest + 1
    for size in sorted(sizes or [largest], key=lambda size: (abs(math.log(size / USUAL)), size)):
        if size > unfit:
            continue
        if measuring.walls and not in_time(size):
            left_out.append(f"batch size {size}, for want of time")
        elif not fits(size):
            unfit = size
    bounded = unfit <= largest
    if bounded and (costs or fits(2 if task.batch_norms else 1)):  # one example has no deviation
        begin = max(cost.batch_size for cost in costs)
        first = {begin: measuring.needed[begin]}
        search(measuring.peak, first, int(limit), unfit - 1)
    if not costs:
        raise _too_little(task, limit, measuring.needed)
    for size, steps in _plan(costs, bounded, largest):
        if in_time(size * steps):
            fits(size, steps)
    measuring.bar.close()
    return _with_assumed(cost_table(costs)), bounded, left_out


def _too_little(task: Task, limit: float, needed: dict[int, int | None]) -> InputError:
    size = min(needed)
    found = "more than there is" if needed[size] is None else format_memory(needed[size] or 0)
    what = f"one {task.noun[:-1]}" if size == 1 else f"{size} {task.noun}"
    return InputError(
        f"memory_budget: {format_memory(limit)} without the margin, too little for {what}, which "
        f"needs {found}"
    )


def _plan(costs: Sequence[Cost], bounded: bool, largest: int) -> list[tuple[int, int]]:
    """What to measure after the first sizes: batch sizes and accumulation steps."""
    whole = sorted(c.batch_size for c in costs if c.accumulation_steps == 1)
    plan: list[tuple[int, int]] = []
    if bounded:
        plan += [(whole[-1], steps) for steps in ACCUMULATED if whole[-1] * steps <= largest]
    plan += [(2 * size, 1) for size in whole if 2 * size < whole[-1] and 2 * size not in whole]
    plan += [(size, 4) for size in whole if 4 * size in whole][-1:]
    return plan + (REPEATS - 1) * [*((size, 1) for size in whole), *plan]


def _with_assumed(costs: pd.DataFrame) -> pd.DataFrame:
    """With a quarter of the usual size, if there was no time for it, so that it can race too.

    It surely fits where more do. Its speed is taken for that of the next larger size.
    """
    small, larger = USUAL // 4, costs[costs["batch_size"] > USUAL // 4].head(1)
    if larger.empty or small in set(costs["batch_size"]):
        return costs
    sizes = {"batch_size": small, "accumulation_steps": 1, "effective_batch_size": small}
    return pd.concat([larger.assign(**sizes, measurements=0), costs], ignore_index=True)


def cost_table(costs: Sequence[Cost]) -> pd.DataFrame:
    """One row per setting, as `trial_costs` returns them."""
    table = pd.DataFrame([asdict(cost) for cost in costs])
    return (
        table.groupby(["effective_batch_size", "accumulation_steps", "batch_size"])
        .agg(
            peak_memory=("peak_memory", "max"),
            images_per_second=("images_per_second", "max"),
            slowest=("images_per_second", "min"),
            measurements=("images_per_second", "size"),
        )
        .reset_index()
    )
