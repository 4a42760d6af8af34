"""Short measurements of a reader's classifier, each within the seconds it is given.

Each tells what it left out, in plain words: a measurement that would not fit the time is not begun.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from nbutils.accumulation.window import accumulate_gradient, windows
from nbutils.advise.own_data import Classifier
from nbutils.analysis.intervals import mean_interval
from nbutils.errors import InputError, suggest
from nbutils.machine import no_progress
from nbutils.measure.cost import (
    Cost,
    OptimizerFactory,
    OutOfMemory,
    format_memory,
    largest_batch_size,
    measure,
)
from nbutils.measure.noise_scale import noise_scale

SMALLEST, LARGEST = 8, 8192
"""Batch sizes of the cost table, where there are images and memory for them."""

FEWEST_UPDATES = 4
"""An effective batch size has at least so many updates in an epoch."""

ACCUMULATED = (2, 4, 8)
"""Accumulation steps tried with the largest micro-batch, where memory is the limit."""

REPEATS = 3
"""Measurements of the cost of each setting, where there is time."""

NOISE_POINTS = 3
"""Measurements of the noise scale, along a short training."""

MICRO_BATCHES = 24
"""Micro-batches of a measurement of the noise scale."""

EPOCHS = 3
"""A trial trains for no longer: what more time tells is left to the reader's own training."""

SHORT, SHORTEST = 30, 10
"""Updates that each rate is tried for: the first number at least, if there is time for one rate to
make them, and the second whatever the time. If there is no time for all rates, fewer are tried."""

FEWEST_JUDGED, MOST_JUDGED = 100, 2000
"""Validation images that rates are judged by."""


@dataclass(frozen=True)
class Recipe:
    """An optimizer and the rates to try with it.

    Attributes:
        optimizer: Makes it from the parameters, and takes `lr`.
        call: The call that makes it, as source code, with the rate as `{rate}`.
        usual_rate: What is commonly tried first.
        rates: The rates of the search, ascending.
        rule: How the best rate grows with the batch size, a name in `learning_rate.RULES`.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    call: str
    usual_rate: float
    rates: tuple[float, ...]
    rule: str


RECIPES = {
    "adam": Recipe(
        torch.optim.Adam,
        "torch.optim.Adam(model.parameters(), lr={rate})",
        1e-3,
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "square root",
    ),
    "sgd": Recipe(
        partial(torch.optim.SGD, momentum=0.9),
        "torch.optim.SGD(model.parameters(), lr={rate}, momentum=0.9)",
        1e-2,
        (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        "square root",  # the linear rule leaves the ridge of `08_learning_rate`
    ),
}
"""The optimizers that advice is given for."""


def recipe_for(optimizer: str) -> Recipe:
    """The recipe called `optimizer`.

    Raises:
        InputError: There is none.
    """
    if optimizer not in RECIPES:
        raise InputError(f"optimizer = {optimizer!r}; {suggest(optimizer, RECIPES)}")
    return RECIPES[optimizer]


class Clock:
    """So many seconds, from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds left, 0 or more."""
        return max(0.0, self._end - time.perf_counter())


def warm_up(classifier: Classifier, optimizer: OptimizerFactory, device: torch.device) -> None:
    """Do what takes time only once: start the measuring processes, load what optimizers need.

    Raises:
        InputError: The model cannot be sent to the measuring processes, or be trained in them.
    """
    images, labels = classifier.train.images, classifier.train.labels
    with suppress(OutOfMemory):
        measure(classifier.factory, images, labels, 2, 1, device=str(device), optimizer=optimizer)
    optimizer([nn.Parameter(torch.zeros(1))])


def trial_costs(
    classifier: Classifier,
    optimizer: OptimizerFactory,
    device: torch.device,
    memory_budget: int,
    margin: float,
    seconds: float,
) -> tuple[pd.DataFrame, bool, list[str]]:
    """Measure what updates cost, over batch sizes that fit the memory budget.

    Sizes are tried upwards by factors of 4, until one does not fit or the time is over. If one
    does not fit, the largest that does is searched, whatever the time, and measured with more
    accumulation steps too. Then come the sizes in between; a smaller micro-batch accumulated to
    a size that was measured as one; and everything again, up to `REPEATS` times.

    Args:
        classifier: What to train.
        optimizer: Makes the optimizer from the parameters.
        device: Where.
        memory_budget: Bytes that training may add.
        margin: Share of it that is to stay free.
        seconds: Time for all this.

    Returns:
        A row a setting that fits, by effective batch size: `batch_size`, `accumulation_steps`,
        `effective_batch_size`, the largest `peak_memory`, the highest `images_per_second` (other
        work on the machine only slows), the lowest as `slowest`, and `measurements`. Then whether
        memory was the limit. Then what was left out.

    Raises:
        InputError: As `largest_batch_size`.
    """
    limit = memory_budget * (1 - margin)
    clock = Clock(seconds)
    costs: list[Cost] = []
    walls: dict[int, float] = {}
    largest = min(LARGEST, max(1, len(classifier.train.labels) // FEWEST_UPDATES))
    left_out: list[str] = []
    bar = tqdm(desc="cost", unit="measurement", leave=False, disable=no_progress())

    def fits(batch_size: int, steps: int = 1) -> bool:
        begun = time.perf_counter()
        bar.set_postfix_str(f"{steps} x {batch_size}")
        with torch.random.fork_rng():
            cost = measure(
                classifier.factory,
                classifier.train.images,
                classifier.train.labels,
                batch_size,
                steps,
                device=str(device),
                optimizer=optimizer,
            )
        walls[batch_size * steps] = time.perf_counter() - begun
        bar.update()
        if cost.peak_memory <= limit:
            costs.append(cost)
        return cost.peak_memory <= limit

    def in_time(effective_batch_size: int) -> bool:
        return _expected(walls, effective_batch_size) <= clock.left

    def try_size(batch_size: int) -> bool:
        try:
            return fits(batch_size)
        except OutOfMemory:
            return False

    bounded = False
    smallest = min(SMALLEST, largest)
    for size in _powers(smallest, largest, 4):
        if walls and not in_time(size):
            left_out.append(f"batch sizes from {size} on: the time budget did not reach for them")
            break
        if not try_size(size):
            bounded = True
            break
    if bounded:
        found = largest_batch_size(
            classifier.factory,
            classifier.train.images,
            classifier.train.labels,
            memory_budget=memory_budget,
            margin=margin,
            largest=max(1, size - 1),
            device=str(device),
            optimizer=optimizer,
        ).batch_size
        while not try_size(found) and found > 1:  # peaks vary a little
            found -= 1
        for steps in ACCUMULATED:
            if found * steps <= largest and (in_time(found * steps) or steps == ACCUMULATED[0]):
                fits(found, steps)
    measured = [cost.batch_size for cost in costs if cost.accumulation_steps == 1]
    between = [2 * size for size in measured if 2 * size < max(measured)]
    plan = [(size, 1) for size in between if size not in measured]
    # The same update as of a size that was measured, in pieces: the price of accumulation.
    plan += [(size, 4) for size in measured if 4 * size in measured][-1:]
    plan += [(c.batch_size, c.accumulation_steps) for c in costs] * (REPEATS - 1)
    plan += plan[: len(between) + 1] * (REPEATS - 1)
    for size, steps in plan:
        if in_time(size * steps):
            fits(size, steps)
    bar.close()
    return _cost_table(costs), bounded, left_out


def _powers(first: int, last: int, factor: int) -> list[int]:
    count = int(math.log(last / first, factor) + 1e-9)
    return [first * factor**power for power in range(count + 1)]


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


class Trial:
    """A short training of the reader's model, by the loop that the advice hands out."""

    def __init__(
        self,
        classifier: Classifier,
        start: nn.Module,
        optimizer: OptimizerFactory,
        batch_size: int,
        accumulation_steps: int,
    ) -> None:
        self.model = copy.deepcopy(start).train()
        self.device = next(self.model.parameters()).device
        self.train = classifier.train
        self._optimizer = optimizer(self.model.parameters())
        self._windows = self._endless(batch_size, accumulation_steps)

    def _endless(self, batch_size: int, accumulation_steps: int) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            order = torch.randperm(len(self.train.labels), generator=generator)
            yield from windows(order, batch_size, accumulation_steps, "drop")

    def losses(self, chosen: Tensor) -> Tensor:
        """The loss of each of some training images, by index."""
        images = self.train.images[chosen].to(self.device)
        labels = self.train.labels[chosen].to(self.device)
        return F.cross_entropy(self.model(images), labels, reduction="none")

    def update(self) -> bool:
        """Make one update; False, and nothing done, if the loss is not finite."""
        self._optimizer.zero_grad()
        window = next(self._windows)
        loss = accumulate_gradient(self.model, window, self.losses, check_finite=False)
        if not loss.isfinite():
            return False
        self._optimizer.step()
        return True

    def updates(self, number: int) -> int:
        """Make so many updates, or as many as have a finite loss; how many were made."""
        return next((done for done in range(number) if not self.update()), number)


def trial_noise(
    classifier: Classifier,
    recipe: Recipe,
    device: torch.device,
    batch_size: int,
    images_per_second: float,
    memory_limit: float,
    seconds: float,
) -> tuple[pd.DataFrame, list[str]]:
    """Measure the noise scale along a short training at the usual rate.

    Half of the time goes into the training, half into `NOISE_POINTS` measurements: after an
    eighth of the updates, a half, and all.

    Args:
        classifier: What to train; without batch norm.
        recipe: How.
        device: Where.
        batch_size: Images of an update.
        images_per_second: Of training.
        memory_limit: Bytes that a measurement's gradients may take.
        seconds: Time for all this.

    Returns:
        A row a measurement: `update`, and the fields of `NoiseScale`; and what was left out.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = classifier.make(device)
        gradient = sum(p.numel() * p.element_size() for p in start.parameters() if p.requires_grad)
        micro_batches = min(MICRO_BATCHES, int(memory_limit // (2 * gradient)))
        if micro_batches < 8:
            needed = format_memory(16 * gradient)
            return pd.DataFrame(), [f"the noise scale: its gradients need {needed} of memory"]
        images = images_per_second * seconds / 2
        size = min(64, batch_size, int(images / NOISE_POINTS / micro_batches))
        longest = EPOCHS * len(classifier.train.labels)
        updates = int(min(images, longest) / batch_size)
        if size < 1 or updates < NOISE_POINTS:
            return pd.DataFrame(), ["the noise scale: the time budget did not reach for it"]
        optimizer = partial(recipe.optimizer, lr=recipe.usual_rate)
        trial = Trial(classifier, start, optimizer, batch_size, 1)
        generator = torch.Generator().manual_seed(1)
        clock = Clock(1.5 * seconds)
        rows = []
        points = {max(1, updates // 8), max(2, updates // 2), updates}
        with _progress("noise scale", "update", updates) as bar:
            for update in range(1, updates + 1):
                if not clock.left or not trial.update():
                    break
                if update in points:
                    drawn = (size * micro_batches,)
                    chosen = torch.randint(len(classifier.train.labels), drawn, generator=generator)
                    measured = noise_scale(trial.model, chosen.split(size), trial.losses)
                    rows.append({"update": update, **asdict(measured)})
                bar.update()
    if len(rows) < len(points):
        return pd.DataFrame(rows), ["the noise scale at all points: the training was cut short"]
    return pd.DataFrame(rows), []


def trial_rates(
    classifier: Classifier,
    recipe: Recipe,
    device: torch.device,
    batch_size: int,
    accumulation_steps: int,
    images_per_second: float,
    seconds: float,
) -> tuple[pd.DataFrame, list[str]]:
    """Train with each rate for equally many updates from one start, and judge on validation.

    The usual rate comes first, then those next to it, so that the outermost are left out if time
    runs short. Of two rates the better is told by the images they were both judged on: the mean
    of the differences in loss and its 95 % interval (Student's).

    Args:
        classifier: What to train.
        recipe: The rates, among others.
        device: Where.
        batch_size: Images of a micro-batch.
        accumulation_steps: Of an update.
        images_per_second: Of training.
        seconds: Time for all this.

    Returns:
        A row a rate, ascending: `learning_rate`, `updates`, `validation_loss`, its interval `low`
        and `high`, `validation_accuracy`, `outcome`, `best`, and `within_noise`: whether the images
        do not tell it from the best. The outcome is "diverged" where the loss is not finite, or
        not below that before training at a rate above the best; "too slow" where it is not below
        it at another; else "learnt". Then what was left out.

    Raises:
        InputError: The loss was not finite at any rate.
    """
    effective_batch_size = batch_size * accumulation_steps
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = classifier.make(device)
        # Judging an image takes about a third of training with it: a sixth of a rate's time.
        judged_images = int(seconds / len(recipe.rates) * images_per_second / 2)
        judged_images = min(max(judged_images, FEWEST_JUDGED), MOST_JUDGED)
        begun = time.perf_counter()
        at_start, _ = judge(start, classifier, judged_images)
        judging = time.perf_counter() - begun
        clock = Clock(seconds - judging)
        in_all = 0.9 * clock.left - judging
        share = max(0.0, 0.9 * clock.left / len(recipe.rates) - judging)
        images = min(share * images_per_second, EPOCHS * len(classifier.train.labels))
        updates = max(SHORT, int(images / effective_batch_size))
        possible = int(in_all * images_per_second / effective_batch_size)
        updates = max(SHORTEST, min(updates, possible))
        order = sorted(recipe.rates, key=lambda rate: abs(math.log(rate / recipe.usual_rate)))
        took = 0.0
        judged: dict[float, tuple[int, Tensor, float]] = {}
        with _progress("learning rates", "rate", len(order)) as bar:
            for rate in order:
                if judged and took > clock.left:
                    break
                begun = time.perf_counter()
                torch.manual_seed(0)
                optimizer = partial(recipe.optimizer, lr=rate)
                trial = Trial(classifier, start, optimizer, batch_size, accumulation_steps)
                done = trial.updates(updates)
                judged[rate] = done, *judge(trial.model, classifier, judged_images)
                took = max(took, time.perf_counter() - begun)
                bar.update()
    left_out = []
    if len(judged) < len(order):
        missing = ", ".join(f"{rate:g}" for rate in sorted(set(order) - set(judged)))
        left_out.append(f"learning rates that the time budget did not reach for: {missing}")
    table = _rate_table(judged, updates, at_start.mean().item())
    if table["best"].iloc[0] or table["best"].iloc[-1]:
        left_out.append("rates beyond the best one, which is the outermost that was tried")
    return table, left_out


@contextmanager
def _progress(name: str, unit: str, total: int) -> Iterator[tqdm]:
    """A bar that goes away at the end, also where time is up before all is done."""
    with tqdm(desc=name, unit=unit, total=total, leave=False, disable=no_progress()) as bar:
        yield bar
        bar.total = bar.n  # else a notebook keeps it, in red


def judge(model: nn.Module, classifier: Classifier, most: int) -> tuple[Tensor, float]:
    """Losses of at most so many validation images, shape (n,), and the share of right answers."""
    device = next(model.parameters()).device
    number = min(most, len(classifier.validation.labels))
    chosen = torch.arange(number) * len(classifier.validation.labels) // number
    losses, right = [], 0
    training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in chosen.split(250):
            logits = model(classifier.validation.images[batch].to(device)).double().cpu()
            labels = classifier.validation.labels[batch]
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
            right += int((logits.argmax(1) == labels).sum())
    model.train(training)
    return torch.cat(losses), right / number


def _rate_table(
    judged: dict[float, tuple[int, Tensor, float]], updates: int, at_start: float
) -> pd.DataFrame:
    means = {
        rate: losses.mean().item() if done == updates else math.nan
        for rate, (done, losses, _) in judged.items()
    }
    finite = [rate for rate in judged if math.isfinite(means[rate])]
    if not finite:
        raise InputError(
            f"the loss was not finite at any learning rate tried: "
            f"{', '.join(f'{rate:g}' for rate in sorted(judged))}"
        )
    best = min(finite, key=means.__getitem__)

    def outcome(rate: float) -> str:
        if rate not in finite or (means[rate] >= at_start and rate > best):
            return "diverged"
        return "learnt" if means[rate] < at_start else "too slow"

    rows = []
    for rate in sorted(judged):
        done, losses, accuracy = judged[rate]
        low, high = mean_interval(losses.tolist())
        worse, _ = mean_interval((losses - judged[best][1]).tolist())
        rows.append(
            {
                "learning_rate": rate,
                "updates": done,
                "validation_loss": means[rate],
                "low": low,
                "high": high,
                "validation_accuracy": accuracy,
                "outcome": outcome(rate),
                "best": rate == best,
                "within_noise": rate == best or (outcome(rate) == "learnt" and worse <= 0),
            }
        )
    return pd.DataFrame(rows)


def typical(noise: pd.DataFrame) -> tuple[float, float, float]:
    """The median of the noise scales measured, the lowest lower end and the highest upper end."""
    return median(noise["value"]), noise["low"].min(), noise["high"].max()
