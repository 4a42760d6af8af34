"""What updates of a task cost, its noise scale, and its learning rates, within given seconds.

They choose which settings race; see `race`. Each also returns what it left out, in plain words.
"""

import math
from contextlib import suppress
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any

import pandas as pd
import scipy.stats  # noqa: F401 - loaded now and not while a measurement is timed
import torch
from tqdm.auto import tqdm

from nbutils.advise.own_data import CPU
from nbutils.advise.task import Task, seeded
from nbutils.advise.trials import Setting, Trial
from nbutils.analysis.intervals import mean_interval
from nbutils.errors import InputError
from nbutils.machine import no_progress
from nbutils.measure.cost import Cost, measure_updates
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
SETTING = ["effective_batch_size", "accumulation_steps", "batch_size"]

MICRO_BATCHES = 24  # of a measurement of the noise scale
LARGE_BATCHES, PARTS = 8, 4  # instead of these with batch norm, each of so many micro-batches

SHORTEST, EPOCHS = 10, 3  # a rate is tried for 10 updates whatever the time, and 3 epochs at most
FEWEST_JUDGED, MOST_JUDGED = 100, 2000  # validation examples that trainings are judged by


def update_cost(task: Task, batch_size: int, accumulation_steps: int = 1) -> Cost:
    """The cost of an update of the task, from `measure_updates`."""
    setting = Setting(batch_size, accumulation_steps, task.recipe.usual_rate)
    number = min(setting.effective_batch_size, task.data.train.number)
    few = task.data.train.take(torch.arange(number))
    part = replace(task, data=task.data._replace(train=few, validation=few))
    sizes, device = (number, *setting[:2]), str(task.device)
    return measure_updates(lambda _: lambda: Trial(part, setting).update, *sizes, device=device)


def trial_costs(task: Task, limit: float, seconds: float) -> tuple[pd.DataFrame, bool, list[str]]:
    """Measure what updates cost, over batch sizes that fit `limit` bytes.

    Sizes in steps of 4 are tried, the usual one and its quarter first, whatever the time. If one
    does not fit, the largest that does is searched, and accumulated too. Then come the sizes in
    between, an update of four micro-batches that was also made as one batch, and everything again.

    Returns one row per `SETTING` that fits: the largest `peak_memory`, the highest
    `images_per_second` (other work on the machine only slows) and the lowest, `slowest`; whether
    memory was the limit; and what was left out.
    """
    end = perf_counter() + seconds
    largest = min(LARGEST, max(2, task.data.train.number // FEWEST_UPDATES))
    costs: list[Cost] = []  # of what fits
    walls: dict[int, float] = {}  # what measuring took, by examples per update
    needed: dict[int, Any] = {}  # bytes, by batch size; infinite where memory ran out
    bar = tqdm(desc="cost", unit="measurement", leave=False, disable=no_progress())

    def peak(size: int, steps: int = 1) -> Any:
        begun, needed[size] = perf_counter(), math.inf
        with suppress(OutOfMemory):
            cost = update_cost(task, size, steps)
            walls[size * steps], needed[size] = perf_counter() - begun, cost.peak_memory
            costs.extend([cost] if cost.peak_memory <= limit else [])
            bar.update()
        return needed[size]

    left_out, unfit = [], largest + 1
    sizes = [SMALLEST * 4**power for power in range(6) if SMALLEST * 4**power <= largest]
    for size in sorted(sizes or [largest], key=lambda size: abs(math.log(size / USUAL))):
        whatever_the_time = not walls or size in (USUAL, USUAL // 4)
        if size < unfit and not whatever_the_time and _late(walls, size, end):
            left_out.append(f"batch size {size}, for want of time")
        elif size < unfit and peak(size) > limit:
            unfit = size
    bounded = unfit <= largest
    if bounded and not costs:
        peak(2 if task.batch_norm else 1)  # one example has no deviation
    if not costs:
        size, needs = min(needed.items())
        what = f"one {task.noun[:-1]}" if size == 1 else f"{size} {task.noun}"
        raise InputError(
            f"memory_budget: {format_memory(limit)} without the margin, too little for {what}, "
            f"which needs {format_memory(needs) if needs < math.inf else 'more than there is'}"
        )
    if bounded:
        begin = max(cost.batch_size for cost in costs)
        search(peak, {begin: needed[begin]}, int(limit), unfit - 1)
    for size, steps in _plan(sorted(cost.batch_size for cost in costs), bounded, largest):
        if not _late(walls, size * steps, end):
            peak(size, steps)
    bar.close()
    of_settings = pd.DataFrame(costs).groupby(SETTING, as_index=False)
    speed, memory = "images_per_second", "peak_memory"
    table = of_settings.agg(
        **{memory: (memory, "max"), speed: (speed, "max"), "slowest": (speed, "min")}
    )
    return table, bounded, left_out


def _late(walls: dict[int, float], size: int, end: float) -> bool:
    """Whether a measurement would end too late, by the time that the next smaller one took."""
    overhead = min(walls.values())
    smaller = max((known for known in walls if known <= size), default=min(walls))
    growing = (walls[smaller] - overhead) * max(1.0, size / smaller)
    return perf_counter() + overhead + growing > end


def _plan(whole: list[int], bounded: bool, largest: int) -> list[tuple[int, int]]:
    """What to measure after the batch sizes `whole`: batch sizes and accumulation steps."""
    plan = [(2 * size, 1) for size in whole if 2 * size < whole[-1] and 2 * size not in whole]
    plan += [(size, 4) for size in whole if 4 * size in whole][-1:]
    if bounded:
        top = whole[-1]
        plan = [(top, steps) for steps in ACCUMULATED if top * steps <= largest] + plan
    return plan + (REPEATS - 1) * [*((size, 1) for size in whole), *plan]


def trial_noise(
    task: Task, usual: Any, fitting: int, limit: float, seconds: float
) -> tuple[pd.DataFrame, list[str]]:
    """Measure the noise scale at three points of a short training at the usual rate.

    Half of the time goes into the training, at the speed of the row `usual` of the costs, half into
    the measurements, whose batches are no larger than `fitting` and whose gradients take `limit`
    bytes at most. With batch norm whole batches of up to 128 are compared with their quarters.

    Returns one row per measurement: `update` and the fields of `NoiseScale`; and what was left out.
    """
    batches, parts, fewest = MICRO_BATCHES, 1, 1
    if task.batch_norm:
        batches, parts, fewest = LARGE_BATCHES, PARTS, 16
    trial = Trial(task, Setting(min(32, usual.batch_size), 1, task.recipe.usual_rate))
    gradient = sum(p.nbytes for p in trial.model.parameters() if p.requires_grad)
    needed = 2 * (batches + 2 * task.batch_norm) * gradient
    images, number = usual.images_per_second * seconds / 2, task.data.train.number
    updates = int(min(images, EPOCHS * number) / trial.setting.batch_size)
    size = min(32, int(images / 3 / MICRO_BATCHES), number // PARTS, fitting // parts)
    missed, rows = "", []
    if needed > limit:
        missed = f": its gradients need {format_memory(needed)} of memory"
    elif updates < 3 or size < fewest:
        missed = ", for want of time"
    generator = generator_for(CPU, 0, "examples of the noise scale")
    end = perf_counter() + 1.5 * seconds
    for point in sorted({max(1, updates // 8), max(2, updates // 2), updates}):
        if missed or perf_counter() > end or not trial.train(point - trial.updates):
            missed = missed or " at all points"
            break
        drawn = torch.randint(number, (batches * parts * size,), generator=generator)
        given = trial.model, drawn.split(parts * size), trial.losses
        try:
            with seeded(task.device, "noise scale", point):
                if task.batch_norm:
                    found = noise_scale_of_batches(*given, lambda batch: batch.split(size))
                else:
                    found = noise_scale(*given)
        except InputError as error:  # a gradient that is not finite
            missed = f" at all points: {error}"
            break
        rows.append({"update": point} | asdict(found))
    table = pd.DataFrame(rows, columns=["update", *NoiseScale.__annotations__])
    return table, [f"the noise scale{missed}"] if missed else []


def trial_rates(task: Task, cost: Any, seconds: float) -> tuple[pd.DataFrame, list[str]]:
    """Train with each rate for equally many updates from one start, and judge on validation.

    `cost` is the row of the costs of the setting to train with. The usual rate comes first and
    takes its share of the time, which gives the number of updates. The outermost are left out if
    time runs short.

    Returns one row per rate, ascending: `learning_rate`, `updates`, `validation_loss`, its 95 %
    interval `low` and `high`, `outcome` and `best`; and what was left out. Where the loss is not
    below that before training, the outcome is "diverged" at rates above the best or if it is not
    finite, else "too slow"; elsewhere "learnt".
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
        losses = trial.judge(judged)[0].numpy()
        loss = losses.mean() if finite else math.nan
        rows.append((rate, updates, loss, *mean_interval(losses)))
        took = max(took, perf_counter() - begun)
    missing = [f"the rate {rate:g}, for want of time" for rate in sorted(order[len(rows) :])]
    columns = "learning_rate", "updates", "validation_loss", "low", "high"
    table = pd.DataFrame(sorted(rows), columns=columns).replace(math.inf, math.nan)
    tried, loss = table["learning_rate"], table["validation_loss"]
    if loss.isna().all():
        half = next(trial.model.parameters()).dtype == torch.float16
        raise InputError(
            f"the loss was not finite at any learning rate tried: {', '.join(map(str, tried))}"
            + ("; the weights are float16: train float32 weights under autocast" if half else "")
        )
    best, worse = loss == loss.min(), loss >= at_start
    diverged = loss.isna() | (worse & (tried > tried[best].max()))
    outcome = pd.Series("learnt", table.index).mask(worse, "too slow").mask(diverged, "diverged")
    return table.assign(outcome=outcome, best=best), missing
