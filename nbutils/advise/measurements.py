"""The noise scale of a task and its learning rates, each within the seconds it is given.

Each says what it left out, in plain words. They choose which settings race; see `race`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nbutils.advise.task import Task, seeded, weighted
from nbutils.advise.trials import Setting, Trial
from nbutils.analysis.intervals import mean_interval
from nbutils.errors import InputError
from nbutils.machine import no_progress
from nbutils.measure.memory import format_memory
from nbutils.measure.noise_scale import NoiseScale, noise_scale, noise_scale_of_batches

MICRO_BATCHES, LARGE_BATCHES, PARTS = 24, 8, 4
"""Micro-batches of a measurement of the noise scale; with batch norm, large batches of 4 each."""

SHORTEST, EPOCHS = 10, 3
"""A rate is tried for 10 updates whatever the time, and for 3 epochs at most."""

FEWEST_JUDGED, MOST_JUDGED = 100, 2000
"""Validation examples that trainings are judged by."""


def trial_noise(
    task: Task,
    batch_size: int,
    images_per_second: float,
    fitting: int,
    limit: float,
    seconds: float,
) -> tuple[pd.DataFrame, list[str]]:
    """Measure the noise scale at three points of a short training at the usual rate.

    Half of the time goes into the training, in updates of `batch_size`, half into the measurements,
    whose batches are no larger than `fitting` and whose gradients take `limit` bytes at most. With
    batch norm whole batches of up to 128 are compared with their quarters.

    Returns one row per measurement: `update` and the fields of `NoiseScale`; and what was left out.
    """
    held = LARGE_BATCHES + 2 if task.batch_norm else MICRO_BATCHES
    trial = Trial(task, Setting(batch_size, 1, task.recipe.usual_rate))
    needed = 2 * held * sum(p.nbytes for p in trial.model.parameters() if p.requires_grad)
    if needed > limit:
        return pd.DataFrame(), [
            f"the noise scale: its gradients need {format_memory(needed)} of memory"
        ]
    images, number = images_per_second * seconds / 2, task.data.train.number
    updates = int(min(images, EPOCHS * number) / batch_size)
    size = min(32, int(images / 3 / MICRO_BATCHES), number // PARTS)
    size = min(size, fitting // PARTS if task.batch_norm else fitting)
    if updates < 3 or size < (16 if task.batch_norm else 1):
        return pd.DataFrame(), ["the noise scale, for want of time"]
    generator, end = torch.Generator().manual_seed(1), perf_counter() + 1.5 * seconds
    rows: list[dict[str, Any]] = []
    missed = ["the noise scale at all points"]
    for point in sorted({max(1, updates // 8), max(2, updates // 2), updates}):
        if perf_counter() > end or not trial.train(point - trial.updates):
            return pd.DataFrame(rows), missed
        try:
            found = _noise_now(trial, size, generator)
        except ValueError as error:  # a gradient that is not finite
            return pd.DataFrame(rows), [f"{missed[0]}: {error}"]
        rows.append({"update": point} | asdict(found))
    return pd.DataFrame(rows), []


def _noise_now(trial: Trial, size: int, generator: torch.Generator) -> NoiseScale:
    """The noise scale of a trial's weights as they are, from examples drawn independently."""
    task, examples = trial.task, trial.task.data.train

    def losses(chosen: Tensor) -> Tensor:
        each, weights = weighted(task.losses(trial.model, examples.batch(chosen, task.device)))
        return each if weights is None else each * weights / weights.mean().detach()

    def draw(batches: int, size: int) -> Sequence[Tensor]:
        return torch.randint(examples.number, (batches * size,), generator=generator).split(size)

    with seeded(task.device, trial.updates):
        if task.batch_norm:
            batches = draw(LARGE_BATCHES, PARTS * size)
            return noise_scale_of_batches(trial.model, batches, losses, lambda b: b.split(size))
        return noise_scale(trial.model, draw(MICRO_BATCHES, size), losses)


def typical(noise: pd.DataFrame) -> tuple[float, float, float]:
    """The median of the noise scales measured, the lowest lower end and the highest upper end."""
    if noise.empty:
        return math.nan, math.nan, math.nan
    return median(noise["value"]), noise["low"].min(), noise["high"].max()


def trial_rates(
    task: Task, batch_size: int, accumulation_steps: int, images_per_second: float, seconds: float
) -> tuple[pd.DataFrame, list[str]]:
    """Train with each rate for equally many updates from one start, and judge on validation.

    The usual rate comes first and takes its share of the time, which gives the number of updates.
    Then come those next to it, so that the outermost are left out if time runs short.

    Returns one row per rate, ascending: `learning_rate`, `updates`, `validation_loss`, its 95 %
    interval `low` and `high`, `validation_accuracy`, `outcome` and `best`; and what was left out.
    The outcome is "diverged" where the loss is not finite, or not below that before training at a
    rate above the best; "too slow" where it is not below it at another; else "learnt". Raises an
    `InputError` if the loss was not finite at any rate.
    """
    recipe, sizes = task.recipe, (batch_size, accumulation_steps)
    share, end, took = seconds / len(recipe.rates), perf_counter() + seconds, 0.0
    judged = int(min(max(share * images_per_second / 2, FEWEST_JUDGED), MOST_JUDGED))
    at_start = Trial(task, Setting(*sizes, 0.0)).judge(judged)[0].mean().item()
    updates = max(SHORTEST, EPOCHS * task.data.train.number // math.prod(sizes))
    order = sorted(recipe.rates, key=lambda rate: abs(math.log(rate / recipe.usual_rate)))
    rows: list[dict[str, float]] = []
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
        low, high = mean_interval(losses.tolist())
        loss = losses.mean().item() if finite else math.nan
        row = {"learning_rate": rate, "updates": updates, "validation_loss": loss, "low": low}
        rows.append(row | {"high": high, "validation_accuracy": accuracy})
        took = max(took, perf_counter() - begun)
    missing = [f"the rate {rate:g}, for want of time" for rate in sorted(order[len(rows) :])]
    table = pd.DataFrame(rows).sort_values("learning_rate", ignore_index=True)
    return _with_outcomes(table, at_start, task), missing


def _with_outcomes(table: pd.DataFrame, at_start: float, task: Task) -> pd.DataFrame:
    loss, rate = (
        table["validation_loss"].replace([math.inf, -math.inf], math.nan),
        table["learning_rate"],
    )
    if loss.isna().all():
        weight = next(task.make(task.device).parameters())
        half = weight.dtype == torch.float16
        raise InputError(
            f"the loss was not finite at any learning rate tried: "
            f"{', '.join(f'{each:g}' for each in rate)}"
            + ("; the weights are float16: train float32 weights under autocast" if half else "")
        )
    best = loss == loss.min()
    outcome = pd.Series("learnt", table.index).mask(loss >= at_start, "too slow")
    too_high = (loss >= at_start) & (rate > rate[best].max())
    return table.assign(outcome=outcome.mask(loss.isna() | too_high, "diverged"), best=best)
