"""The noise scale of a task and its learning rates, each within the seconds it is given.

Each says what it left out, in plain words. They choose which settings race; see `race`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nbutils.advise.task import Task, seeded, weighted
from nbutils.advise.trials import Clock, Recipe, Trial, judge
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
    recipe: Recipe,
    device: torch.device,
    batch_size: int,
    images_per_second: float,
    fitting: int,
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
        fitting: The largest batch that is known to fit the memory.
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
    size = min(size, fitting // PARTS if task.batch_norms else fitting)
    if updates < 3 or size < (16 if task.batch_norms else 1):
        return pd.DataFrame(), ["the noise scale, for want of time"]
    trial = Trial(task, partial(recipe.optimizer, lr=recipe.usual_rate), device, batch_size)
    generator, clock = torch.Generator().manual_seed(1), Clock(1.5 * seconds)
    rows: list[dict[str, Any]] = []
    for point in sorted({max(1, updates // 8), max(2, updates // 2), updates}):
        if not clock.left or not trial.train(point - trial.done):
            break
        try:
            found = _noise_now(trial, task, device, size, generator)
        except ValueError as error:  # a gradient that is not finite
            return pd.DataFrame(rows), [f"the noise scale at all points: {error}"]
        rows.append({"update": point, **asdict(found)})
    return pd.DataFrame(rows), [] if len(rows) == 3 else ["the noise scale at all points"]


def _noise_now(
    trial: Trial, task: Task, device: torch.device, size: int, generator: torch.Generator
) -> NoiseScale:
    """The noise scale of a trial's weights as they are, from examples drawn independently."""

    def losses(chosen: Tensor) -> Tensor:
        each, weights = weighted(task.losses(trial.model, task.train.batch(chosen, device)))
        return each if weights is None else each * weights / weights.mean().detach()

    def draw(batches: int, size: int) -> Sequence[Tensor]:
        number = (batches * size,)
        return torch.randint(task.train.number, number, generator=generator).split(size)

    with seeded(device, trial.done):
        if task.batch_norms:
            batches = draw(LARGE_BATCHES, PARTS * size)
            return noise_scale_of_batches(trial.model, batches, losses, lambda b: b.split(size))
        return noise_scale(trial.model, draw(MICRO_BATCHES, size), losses)


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

    The usual rate comes first and takes its share of the time, which gives the number of updates.
    Then come those next to it, so that the outermost are left out if time runs short.

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
    share = seconds / len(recipe.rates)
    judged_images = int(min(max(share * images_per_second / 2, FEWEST_JUDGED), MOST_JUDGED))
    setting, clock, took = (device, batch_size, accumulation_steps), Clock(seconds), 0.0
    untrained = Trial(task, partial(recipe.optimizer, lr=0.0), *setting)
    at_start = judge(untrained, task, device, judged_images)[0].mean().item()
    updates = max(SHORTEST, EPOCHS * task.train.number // size)
    order = sorted(recipe.rates, key=lambda rate: abs(math.log(rate / recipe.usual_rate)))
    rows: list[dict[str, Any]] = []
    for rate in tqdm(order, "rates", unit="rate", leave=False, disable=no_progress()):
        if rows and took > clock.left:
            break
        begun = time.perf_counter()
        trial = Trial(task, partial(recipe.optimizer, lr=rate), *setting)
        while not rows and trial.done < updates and trial.seconds < 0.7 * share:
            trial.train(max(1, SHORTEST // 2))
        updates = updates if rows else max(SHORTEST, trial.done)
        finite = trial.train(updates - trial.done)
        losses, accuracy = judge(trial, task, device, judged_images)
        low, high = mean_interval(losses.tolist())
        loss = losses.mean().item() if finite else math.nan
        row = {"learning_rate": rate, "updates": updates, "validation_loss": loss, "low": low}
        rows.append(row | {"high": high, "validation_accuracy": accuracy})
        took = max(took, time.perf_counter() - begun)
    missing = [f"the rate {rate:g}, for want of time" for rate in sorted(order[len(rows) :])]
    table = pd.DataFrame(rows).sort_values("learning_rate", ignore_index=True)
    return _with_outcomes(table, at_start, task), missing


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
