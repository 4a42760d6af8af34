"""Short measurements of a task, each within the seconds it is given: cost, noise scale, rates.

Each says what it left out, in plain words. They choose which settings race; see `race`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nbutils.advise.task import Task, seeded, weighted
from nbutils.advise.trials import Clock, Recipe, Trial, judge, window_gradient
from nbutils.analysis.intervals import mean_interval
from nbutils.errors import InputError
from nbutils.machine import no_progress
from nbutils.measure.cost import Cost, OptimizerFactory, Update, measure_updates
from nbutils.measure.largest_batch import search
from nbutils.measure.memory import format_memory
from nbutils.measure.noise_scale import noise_scale, noise_scale_of_batches
from nbutils.measure.process import OutOfMemory

SMALLEST, LARGEST = 8, 8192
"""Batch sizes of the cost table, where there are examples and memory for them."""

FEWEST_UPDATES = 4
"""An update takes at most this part of an epoch."""

ACCUMULATED = (2, 4, 8)
"""Accumulation steps tried with the largest micro-batch, where memory is the limit."""

REPEATS = 3
"""Measurements of the cost of each setting, where there is time."""

MICRO_BATCHES, LARGE_BATCHES, PARTS = 24, 8, 4
"""Micro-batches of a measurement of the noise scale; with batch norm, large batches of 4 each."""

SHORTEST, EPOCHS = 10, 3
"""A rate is tried for 10 updates whatever the time, and for 3 epochs at most."""

FEWEST_JUDGED, MOST_JUDGED = 100, 2000
"""Validation examples that trainings are judged by."""


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


def trial_costs(
    task: Task,
    optimizer: OptimizerFactory,
    device: torch.device,
    limit: float,
    seconds: float,
) -> tuple[pd.DataFrame, bool, list[str]]:
    """Measure what updates cost, over batch sizes that fit the memory limit.

    Sizes are tried upwards by factors of 4, until one does not fit or the time is over. If one
    does not fit, the largest that does is searched, whatever the time, and is accumulated too. Then
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
        slows), the lowest as `slowest`, and `measurements`. Then whether memory was the limit, and
        what was left out.

    Raises:
        InputError: Not even the smallest batch fits.
    """
    clock, costs, walls = Clock(seconds), list[Cost](), dict[int, float]()
    needed: dict[int, int | None] = {}
    largest = min(LARGEST, max(2, task.train.number // FEWEST_UPDATES))
    bar = tqdm(desc="cost", unit="measurement", leave=False, disable=no_progress())

    def fits(batch_size: int, steps: int = 1) -> bool:
        begun = time.perf_counter()
        bar.set_postfix_str(f"{steps} x {batch_size}")
        try:
            cost = update_cost(task, optimizer, device, batch_size, steps)
        except OutOfMemory:
            needed[batch_size] = None
            return False
        walls[batch_size * steps] = time.perf_counter() - begun
        needed[batch_size] = cost.peak_memory
        bar.update()
        if cost.peak_memory > limit:
            return False
        costs.append(cost)
        return True

    def peak(size: int) -> int | None:
        fits(size)
        return needed[size]

    def in_time(size: int) -> bool:
        return _expected(walls, size) <= clock.left

    bounded, left_out = False, list[str]()
    sizes = [SMALLEST * 4**power for power in range(6) if SMALLEST * 4**power <= largest]
    for size in sizes or [largest]:
        if walls and not in_time(size):
            left_out.append(f"batch sizes from {size} on, for want of time")
            break
        if not fits(size):
            bounded = True
            smallest = 2 if task.batch_norms else 1  # one example has no deviation
            if costs or fits(smallest):
                begin = max(cost.batch_size for cost in costs)
                search(peak, {begin: needed[begin]}, int(limit), size - 1)
            break
    if not costs:
        raise _too_little(task, limit, needed)
    whole = sorted(c.batch_size for c in costs if c.accumulation_steps == 1)
    plan: list[tuple[int, int]] = []
    if bounded:
        plan += [(whole[-1], steps) for steps in ACCUMULATED if whole[-1] * steps <= largest]
    plan += [(2 * size, 1) for size in whole if 2 * size < whole[-1] and 2 * size not in whole]
    plan += [(size, 4) for size in whole if 4 * size in whole][-1:]
    plan += (REPEATS - 1) * [*((c.batch_size, 1) for c in costs), *plan]
    for size, steps in plan:
        if in_time(size * steps):
            fits(size, steps)
    bar.close()
    return _cost_table(costs), bounded, left_out


def _too_little(task: Task, limit: float, needed: dict[int, int | None]) -> InputError:
    size = min(needed)
    found = "more than there is" if needed[size] is None else format_memory(needed[size] or 0)
    what = f"one {task.noun[:-1]}" if size == 1 else f"{size} {task.noun}"
    return InputError(
        f"memory_budget: {format_memory(limit)} without the margin, too little for {what}, which "
        f"needs {found}"
    )


def _expected(walls: dict[int, float], size: int) -> float:
    """Seconds that a measurement will take: those of the next smaller one, in proportion."""
    overhead = min(walls.values())
    smaller = max((known for known in walls if known <= size), default=min(walls))
    return overhead + (walls[smaller] - overhead) * max(1.0, size / smaller)


def _cost_table(costs: Sequence[Cost]) -> pd.DataFrame:
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


def trial_noise(
    task: Task,
    recipe: Recipe,
    device: torch.device,
    batch_size: int,
    images_per_second: float,
    limit: float,
    seconds: float,
) -> tuple[pd.DataFrame, list[str]]:
    """Measure the noise scale at three points of a short training at the usual rate.

    Half of the time goes into the training, half into the measurements. With batch norm whole
    batches of 128 are compared with their quarters.

    Args:
        task: What to train.
        recipe: How.
        device: Where.
        batch_size: Of an update.
        images_per_second: Of training.
        limit: Bytes that the gradients of a measurement may take.
        seconds: Time for all this.

    Returns:
        One row per measurement: `update`, and the fields of `NoiseScale`; and what was left out.
    """
    model = task.make(device)
    gradient = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    held = LARGE_BATCHES + 2 if task.batch_norms else MICRO_BATCHES
    if 2 * held * gradient > limit:
        needed = format_memory(2 * held * gradient)
        return pd.DataFrame(), [f"the noise scale: its gradients need {needed} of memory"]
    images = images_per_second * seconds / 2
    updates = int(min(images, EPOCHS * task.train.number) / batch_size)
    size = min(32, int(images / 3 / MICRO_BATCHES), task.train.number // PARTS)
    if updates < 3 or size < (16 if task.batch_norms else 1):
        return pd.DataFrame(), ["the noise scale, for want of time"]
    trial = Trial(task, partial(recipe.optimizer, lr=recipe.usual_rate), device, batch_size)
    generator, clock = torch.Generator().manual_seed(1), Clock(1.5 * seconds)
    rows: list[dict[str, Any]] = []

    def losses(chosen: Tensor) -> Tensor:
        each, weights = weighted(task.losses(trial.model, task.train.batch(chosen, device)))
        return each if weights is None else each * weights / weights.mean().detach()

    def draw(number: int) -> Sequence[Tensor]:
        total = torch.randint(task.train.number, (number,), generator=generator)
        return total.split(number // (LARGE_BATCHES if task.batch_norms else MICRO_BATCHES))

    for point in sorted({max(1, updates // 8), max(2, updates // 2), updates}):
        if not clock.left or not trial.train(point - trial.done):
            break
        try:
            with seeded(device, point):
                if task.batch_norms:
                    batches = draw(LARGE_BATCHES * PARTS * size)
                    found = noise_scale_of_batches(
                        trial.model, batches, losses, lambda batch: batch.split(size)
                    )
                else:
                    found = noise_scale(trial.model, draw(MICRO_BATCHES * size), losses)
        except ValueError as error:  # a gradient that is not finite
            return pd.DataFrame(rows), [f"the noise scale at all points: {error}"]
        rows.append({"update": point, **asdict(found)})
    return pd.DataFrame(rows), [] if len(rows) == 3 else ["the noise scale at all points"]


def typical(noise: pd.DataFrame) -> tuple[float, float, float]:
    """The median of the noise scales measured, the lowest lower end and the highest upper end."""
    if noise.empty:
        return math.nan, math.nan, math.nan
    return median(noise["value"]), noise["low"].min(), noise["high"].max()


def trial_rates(
    task: Task,
    recipe: Recipe,
    device: torch.device,
    batch_size: int,
    accumulation_steps: int,
    images_per_second: float,
    seconds: float,
) -> tuple[pd.DataFrame, list[str]]:
    """Train with each rate for equally many updates from one start, and judge on validation.

    The usual rate comes first, then those next to it, so that the outermost are left out if time
    runs short.

    Args:
        task: What to train.
        recipe: The rates, among others.
        device: Where.
        batch_size: Of a micro-batch.
        accumulation_steps: Of an update.
        images_per_second: Of training.
        seconds: Time for all this.

    Returns:
        One row per rate, ascending: `learning_rate`, `updates`, `validation_loss`, its 95 %
        interval `low` and `high`, `validation_accuracy`, `outcome` and `best`. The outcome is
        "diverged" where the loss is not finite, or not below that before training at a rate above
        the best; "too slow" where it is not below it at another; else "learnt". Then what was left
        out.

    Raises:
        InputError: The loss was not finite at any rate.
    """
    size = batch_size * accumulation_steps
    images = seconds / len(recipe.rates) * images_per_second
    judged_images = int(min(max(images / 2, FEWEST_JUDGED), MOST_JUDGED))
    setting = device, batch_size, accumulation_steps
    clock, took = Clock(seconds), 0.0
    untrained = Trial(task, partial(recipe.optimizer, lr=0.0), *setting)
    at_start = judge(untrained, task, device, judged_images)[0].mean().item()
    updates = max(SHORTEST, int(min(0.75 * images, EPOCHS * task.train.number) / size))
    order = sorted(recipe.rates, key=lambda rate: abs(math.log(rate / recipe.usual_rate)))
    rows: list[dict[str, Any]] = []
    for rate in tqdm(order, "rates", unit="rate", leave=False, disable=no_progress()):
        if rows and took > clock.left:
            break
        begun = time.perf_counter()
        trial = Trial(task, partial(recipe.optimizer, lr=rate), *setting)
        finite = trial.train(updates)
        losses, accuracy = judge(trial, task, device, judged_images)
        low, high = mean_interval(losses.tolist())
        loss = losses.mean().item() if finite else math.nan
        row = {"learning_rate": rate, "updates": updates, "validation_loss": loss}
        rows.append(row | {"low": low, "high": high, "validation_accuracy": accuracy})
        took = max(took, time.perf_counter() - begun)
    missing = ", ".join(f"{rate:g}" for rate in sorted(order[len(rows) :]))
    table = pd.DataFrame(rows).sort_values("learning_rate", ignore_index=True)
    return _with_outcomes(table, at_start, task), [f"the rates {missing}, for want of time"] * bool(
        missing
    )


def _with_outcomes(table: pd.DataFrame, at_start: float, task: Task) -> pd.DataFrame:
    loss = table["validation_loss"].where(table["validation_loss"].abs() < math.inf)
    if loss.isna().all():
        weight = next(task.make(torch.device("cpu")).parameters())
        hint = f"; the weights are {weight.dtype}: train float32 weights under autocast"
        raise InputError(
            f"the loss was not finite at any learning rate tried: "
            f"{', '.join(f'{rate:g}' for rate in table['learning_rate'])}"
            + (hint if weight.dtype == torch.float16 else "")
        )
    best = loss == loss.min()
    above = table["learning_rate"] > table["learning_rate"][best].max()
    outcome = pd.Series("learnt", table.index).mask(loss >= at_start, "too slow")
    outcome = outcome.mask(loss.isna() | ((loss >= at_start) & above), "diverged")
    return table.assign(outcome=outcome, best=best)
