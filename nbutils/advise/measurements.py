"""What updates of a task cost, its noise scale, and its learning rates, within given seconds.

They choose which settings race; see `race`. Each also returns what it left out, in plain words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nbutils.advise.task import Task, seeded, weighted
from nbutils.advise.trials import Setting, Trial, window_gradient
from nbutils.analysis.intervals import mean_interval
from nbutils.errors import InputError
from nbutils.machine import no_progress
from nbutils.measure.cost import Cost, Update, measure_updates
from nbutils.measure.largest_batch import search
from nbutils.measure.memory import format_memory
from nbutils.measure.noise_scale import NoiseScale, noise_scale, noise_scale_of_batches
from nbutils.measure.process import OutOfMemory
from nbutils.training.setup import generator_for

USUAL = 128  # the batch size that most people take
SMALLEST, LARGEST = 8, 8192  # batch sizes of the costs, where examples and memory suffice
FEWEST_UPDATES = 4  # per epoch
ACCUMULATED = (2, 4, 8)  # steps tried with the largest micro-batch, where memory is the limit
REPEATS = 3  # measurements of the cost of each setting, where there is time

MICRO_BATCHES = 24  # of a measurement of the noise scale
LARGE_BATCHES, PARTS = 8, 4  # instead of these with batch norm, each of so many micro-batches

SHORTEST, EPOCHS = 10, 3  # a rate is tried for 10 updates whatever the time, and 3 epochs at most
FEWEST_JUDGED, MOST_JUDGED = 100, 2000  # validation examples that trainings are judged by


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

    sizes = examples.number, batch_size, accumulation_steps
    return measure_updates(prepare, *sizes, device=str(task.device))


def trial_costs(task: Task, limit: float, seconds: float) -> tuple[pd.DataFrame, bool, list[str]]:
    """Measure what updates cost, over batch sizes that fit `limit` bytes.

    Sizes in steps of 4 are tried, the usual one and its quarter first, whatever the time. If one
    does not fit, the largest that does is searched, and accumulated too. Then come the sizes in
    between, an update of four micro-batches that was also made as one batch, and everything again.

    Returns one row per setting that fits, with its three sizes, the largest `peak_memory`, the
    highest `images_per_second` (other work on the machine only slows) and the lowest, `slowest`;
    whether memory was the limit; and what was left out.
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
        size, needs = min(needed.items())
        what = f"one {task.noun[:-1]}" if size == 1 else f"{size} {task.noun}"
        raise InputError(
            f"memory_budget: {format_memory(limit)} without the margin, too little for {what}, "
            f"which needs {'more than there is' if needs is None else format_memory(needs)}"
        )
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
    settings = ["effective_batch_size", "accumulation_steps", "batch_size"]
    measured = pd.DataFrame([asdict(cost) for cost in costs]).groupby(settings)
    return measured.agg(
        peak_memory=("peak_memory", "max"),
        images_per_second=("images_per_second", "max"),
        slowest=("images_per_second", "min"),
    ).reset_index()


def trial_noise(
    task: Task, usual: Any, fitting: int, limit: float, seconds: float
) -> tuple[pd.DataFrame, list[str]]:
    """Measure the noise scale at three points of a short training at the usual rate.

    Half of the time goes into the training, in updates of at most 32 examples at the speed of the
    row `usual` of the costs, half into the measurements, whose batches are no larger than `fitting`
    and whose gradients take `limit` bytes at most. With batch norm whole batches of up to 128 are
    compared with their quarters.

    Returns one row per measurement: `update` and the fields of `NoiseScale`; and what was left out.
    """
    held = LARGE_BATCHES + 2 if task.batch_norm else MICRO_BATCHES
    trial = Trial(task, Setting(min(32, usual.batch_size), 1, task.recipe.usual_rate))
    needed = 2 * held * sum(p.nbytes for p in trial.model.parameters() if p.requires_grad)
    images, number = usual.images_per_second * seconds / 2, task.data.train.number
    updates = int(min(images, EPOCHS * number) / trial.setting.batch_size)
    size = min(32, int(images / 3 / MICRO_BATCHES), number // PARTS)
    size = min(size, fitting // PARTS if task.batch_norm else fitting)
    points, missed = sorted({max(1, updates // 8), max(2, updates // 2), updates}), []
    if needed > limit:
        missed = [f"the noise scale: its gradients need {format_memory(needed)} of memory"]
    elif updates < 3 or size < (16 if task.batch_norm else 1):
        missed = ["the noise scale, for want of time"]
    rows: list[dict[str, Any]] = []
    generator = generator_for(torch.device("cpu"), 0, "examples of the noise scale")
    end = perf_counter() + 1.5 * seconds
    for point in [] if missed else points:
        if perf_counter() > end or not trial.train(point - trial.updates):
            missed = ["the noise scale at all points"]
            break
        try:
            rows.append({"update": point} | asdict(_noise_now(trial, size, generator)))
        except InputError as error:  # a gradient that is not finite
            missed = [f"the noise scale at all points: {error}"]
            break
    return pd.DataFrame(rows, columns=["update", *NoiseScale.__annotations__]), missed


def _noise_now(trial: Trial, size: int, generator: torch.Generator) -> NoiseScale:
    """The noise scale of a trial's weights as they are, from examples drawn independently."""
    task, examples = trial.task, trial.task.data.train

    def losses(chosen: Tensor) -> Tensor:
        each, weights = weighted(task.losses(trial.model, examples.batch(chosen, task.device)))
        return each if weights is None else each * weights / weights.mean().detach()

    def draw(batches: int, size: int) -> Sequence[Tensor]:
        return torch.randint(examples.number, (batches * size,), generator=generator).split(size)

    with seeded(task.device, "noise scale", trial.updates):
        if task.batch_norm:
            batches = draw(LARGE_BATCHES, PARTS * size)
            return noise_scale_of_batches(trial.model, batches, losses, lambda b: b.split(size))
        return noise_scale(trial.model, draw(MICRO_BATCHES, size), losses)


def trial_rates(task: Task, cost: Any, seconds: float) -> tuple[pd.DataFrame, list[str]]:
    """Train with each rate for equally many updates from one start, and judge on validation.

    `cost` is the row of the costs of the setting to train with. The usual rate comes first and
    takes its share of the time, which gives the number of updates. Then come those next to it, so
    that the outermost are left out if time runs short.

    Returns one row per rate, ascending: `learning_rate`, `updates`, `validation_loss`, its 95 %
    interval `low` and `high`, `validation_accuracy`, `outcome` and `best`; and what was left out.
    The outcome is "diverged" where the loss is not finite, or not below that before training at a
    rate above the best; "too slow" where it is not below it at another; else "learnt". Raises an
    `InputError` if the loss was not finite at any rate.
    """
    recipe, sizes = task.recipe, (cost.batch_size, cost.accumulation_steps)
    share, end, took = seconds / len(recipe.rates), perf_counter() + seconds, 0.0
    judged = int(min(max(share * cost.images_per_second / 2, FEWEST_JUDGED), MOST_JUDGED))
    at_start = Trial(task, Setting(*sizes, 0.0)).judge(judged)[0].mean().item()
    updates = max(SHORTEST, EPOCHS * task.data.train.number // math.prod(sizes))
    order = sorted(recipe.rates, key=lambda rate: abs(math.log(rate / recipe.usual_rate)))
    rows: list[tuple[float, ...]] = []
    for rate in tqdm(order, "rates", unit="rate", leave=False, disable=no_progress()):
        begun = perf_counter()
        if rows and begun + took > end:
            break
        trial = Trial(task, Setting(*sizes, rate))
        while not rows and trial.updates < updates and trial.seconds < 0.7 * share:
            trial.train(SHORTEST // 2)
        updates = updates if rows else max(SHORTEST, trial.updates)
        finite = trial.train(updates - trial.updates)
        losses, accuracy = trial.judge(judged)
        loss = losses.mean().item() if finite else math.nan
        rows.append((rate, updates, loss, *mean_interval(losses.tolist()), accuracy))
        took = max(took, perf_counter() - begun)
    missing = [f"the rate {rate:g}, for want of time" for rate in sorted(order[len(rows) :])]
    columns = "learning_rate", "updates", "validation_loss", "low", "high", "validation_accuracy"
    return _with_outcomes(pd.DataFrame(sorted(rows), columns=columns), at_start, task), missing


def _with_outcomes(table: pd.DataFrame, at_start: float, task: Task) -> pd.DataFrame:
    rate, loss = table["learning_rate"], table["validation_loss"].replace(math.inf, math.nan)
    if loss.isna().all():
        half = next(task.make(task.device).parameters()).dtype == torch.float16
        raise InputError(
            f"the loss was not finite at any learning rate tried: "
            f"{', '.join(f'{each:g}' for each in rate)}"
            + ("; the weights are float16: train float32 weights under autocast" if half else "")
        )
    best, worse = loss == loss.min(), loss >= at_start
    diverged = loss.isna() | (worse & (rate > rate[best].max()))
    outcome = pd.Series("learnt", table.index).mask(worse, "too slow").mask(diverged, "diverged")
    return table.assign(outcome=outcome, best=best)
