"""Which batch size, accumulation steps and learning rate for a reader's own classifier.

The rule. By McCandlish et al. (2018), section 2.3, B images an update need `1 + B / B_crit` times
the fewest images to get equally far, each batch size at its best rate; they expect `B_crit` to be
near the noise scale. A device processes so many images per second at each size. So the time that
a size needs is, up to a factor,

    (1 + B / noise scale) / images per second

Of the sizes that fit the memory, the smallest whose time is within `NEAR` of the least is advised.
It makes near-full use of the device, unless that would be beyond the noise scale. Gradients are
accumulated only where the size so chosen does not fit the memory as one micro-batch.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from nbutils.advise.own_data import Classifier, batch_norms, read_classifier
from nbutils.advise.trials import (
    Clock,
    Recipe,
    recipe_for,
    trial_costs,
    trial_noise,
    trial_rates,
    typical,
    warm_up,
)
from nbutils.analysis.critical_batch import updates_to_target
from nbutils.analysis.intervals import proportion_interval
from nbutils.analysis.learning_rate import RULES
from nbutils.analysis.summary import last_epochs
from nbutils.errors import InputError
from nbutils.machine import device_name, environment
from nbutils.measure.cost import Factory, format_memory, free_memory, parse_memory
from nbutils.training.setup import resolve_device

NEAR = 1.1
"""Times up to so many times the least count as equal: measured times differ by about as much."""

FEWEST = 3
"""Sizes and rates to choose from, below which the advice is called a guess."""

MARGIN = 0.1
"""Share of the memory budget that is to stay free."""

NOTEBOOK = "12_your_own_classifier"

UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}
"""Seconds in each unit that a time budget may be given in."""

LOOP = '''\
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from nbutils.accumulation.window import accumulate_gradient, windows_of_batches


def train(model, train_data, epochs):
    """`train_data`: a dataset of pairs, an image and its class.{scaling}"""
    model.to("{device}").train()
    optimizer = {optimizer}
    batches = DataLoader(train_data, batch_size={batch_size}, shuffle=True)
    for _ in range(epochs):
        for window in windows_of_batches(batches, accumulation_steps={accumulation_steps}):
            optimizer.zero_grad()
            accumulate_gradient(model, window, lambda batch: losses(model, *batch))
            optimizer.step()


def losses(model, images, labels):
    logits = model(images.to("{device}"))
    return F.cross_entropy(logits, labels.to("{device}"), reduction="none")
'''


@dataclass(frozen=True)
class Advice:
    """What to train with, why, and what it rests on. All values are plain, for JSON.

    Attributes:
        model: Name of the model's factory.
        dataset: Name of the images.
        optimizer: "adam" or "sgd".
        device: Where it was measured.
        batch_size: Images in one forward/backward pass.
        accumulation_steps: Passes per update; 1: do not accumulate.
        effective_batch_size: Images per update.
        effective_batch_size_range: The sizes that the rule would choose at either end of the
            noise scale's interval.
        learning_rate: Of the rates tried that are not told apart from the best, the middle one:
            one short training does not tell which of them is best, and the outer ones are nearer
            to those that are worse.
        learning_rate_range: The lowest and the highest rate that the validation images do not
            tell from it.
        seconds_per_epoch: Of training alone, all training images of the dataset.
        seconds_per_epoch_range: At the highest and the lowest speed measured.
        peak_memory: Bytes that training adds.
        memory_budget: Bytes that it might have added.
        noise_scale: Images: the median along a short training, `None` if not measured or infinite.
        noise_scale_range: The lowest lower end and highest upper end of its intervals; an upper
            end of `None` is infinite.
        warnings: What to beware of.
        reasons: Why this.
        not_checked: What the advice does not rest on.
        code: The loop to paste.
        costs: Rows of `trial_costs`, with `relative_time` by the rule, the least that may be
            advised being 1, and `scaled_rate`: the learning rate by the optimizer's rule, measured
            only at the advised size.
        noise: Rows of `trial_noise`.
        rates: Rows of `trial_rates`.
        seconds_taken: That the measurements took.
        time_budget: Seconds that they might have taken.
        environment: Versions and hardware.
    """

    model: str
    dataset: str
    optimizer: str
    device: str
    batch_size: int
    accumulation_steps: int
    effective_batch_size: int
    effective_batch_size_range: list[int]
    learning_rate: float
    learning_rate_range: list[float]
    seconds_per_epoch: float
    seconds_per_epoch_range: list[float]
    peak_memory: int
    memory_budget: int
    noise_scale: float | None
    noise_scale_range: list[float | None]
    warnings: list[str]
    reasons: list[str]
    not_checked: list[str]
    code: str
    costs: list[dict[str, Any]]
    noise: list[dict[str, Any]]
    rates: list[dict[str, Any]]
    seconds_taken: float
    time_budget: float
    environment: dict[str, Any]

    @property
    def answer(self) -> str:
        """The advice in a few lines."""
        accumulate = (
            f"accumulate {self.accumulation_steps} micro-batches"
            if self.accumulation_steps > 1
            else "1 (do not accumulate)"
        )
        equal = [f"{rate['learning_rate']:g}" for rate in self.rates if rate["within_noise"]]
        rates = f" ({', '.join(equal)} are not told apart)" if len(equal) > 1 else ""
        fast, slow = map(format_seconds, self.seconds_per_epoch_range)
        times = "measured once" if fast == slow else f"{fast} to {slow}"
        sizes = "by speed alone"
        if self.noise:
            sizes = f"{_range(*self.effective_batch_size_range)} by the noise scale's interval"
        return "\n".join(
            [
                f"{self.model} on {self.dataset}, {self.optimizer}, {self.device}:",
                f"  batch size          {self.batch_size}",
                f"  accumulation steps  {accumulate}",
                f"  images per update   {self.effective_batch_size} ({sizes})",
                f"  learning rate       {self.learning_rate:g}{rates}",
                f"  time per epoch      {format_seconds(self.seconds_per_epoch)} ({times})",
                f"  peak memory         {format_memory(self.peak_memory)}",
            ]
        )


def advise(
    model: Factory | str,
    dataset: Any,
    *,
    memory_budget: str | int | None = None,
    time_budget: str | float = "10min",
    optimizer: str = "adam",
    device: str = "auto",
) -> Advice:
    """Measure a classifier, and advise on its batch size, accumulation steps and learning rate.

    Args:
        model: Makes the model; as `read_classifier` takes it.
        dataset: The images; as `read_classifier` takes them.
        memory_budget: What training may add, as bytes or "2GB"; by default what is free.
        time_budget: For the measurements, as seconds or "10min". Reading the images and starting
            the measuring processes come on top. The search for the largest micro-batch, where
            memory is the limit, is made whatever the time.
        optimizer: "adam" or "sgd" (with momentum 0.9).
        device: As in `RunConfig`, but not "mps".

    Raises:
        InputError: An argument cannot be used, the model cannot be trained, or the memory budget
            is too small for one image.
    """
    recipe = recipe_for(optimizer)
    place = resolve_device(device)
    memory = _bytes(memory_budget, str(place))
    seconds = parse_time(time_budget)
    classifier = read_classifier(model, dataset)
    norms = batch_norms(classifier.make(place))
    warm_up(classifier, recipe.optimizer, place)
    clock = Clock(seconds)

    costs, bounded, left_out = trial_costs(
        classifier, recipe.optimizer, place, memory, MARGIN, 0.4 * clock.left
    )
    noise = pd.DataFrame()
    if norms:
        left_out.append("the noise scale: with BatchNorm an image has no gradient of its own")
    else:
        start = choose(costs, math.inf, accumulate=True)
        noise, missed = trial_noise(
            classifier,
            recipe,
            place,
            min(32, start["batch_size"]),
            _speed(costs, 32),
            memory * (1 - MARGIN),
            0.35 * clock.left,
        )
        left_out += missed
    chosen, sizes = _chosen(costs, noise, accumulate=not norms)
    rates, missed = trial_rates(
        classifier,
        recipe,
        place,
        chosen["batch_size"],
        chosen["accumulation_steps"],
        chosen["images_per_second"],
        clock.left,
    )
    left_out += missed
    equal = _equal_rates(rates)
    rate = _middle(equal)
    scale, low, high = typical(noise) if len(noise) else (math.nan,) * 3
    images = classifier.images_per_epoch
    times = relative_time(costs, scale if len(noise) else math.inf)
    rated = costs.assign(
        relative_time=times / times[_open_to_choice(costs, accumulate=not norms)].min(),
        scaled_rate=rate
        * (costs["effective_batch_size"] / chosen["effective_batch_size"]) ** RULES[recipe.rule],
    )
    return Advice(
        model=classifier.model_name,
        dataset=classifier.dataset_name,
        optimizer=optimizer,
        device=str(place),
        batch_size=chosen["batch_size"],
        accumulation_steps=chosen["accumulation_steps"],
        effective_batch_size=chosen["effective_batch_size"],
        effective_batch_size_range=sizes,
        learning_rate=rate,
        learning_rate_range=[float(equal.min()), float(equal.max())],
        seconds_per_epoch=images / chosen["images_per_second"],
        seconds_per_epoch_range=[images / chosen["images_per_second"], images / chosen["slowest"]],
        peak_memory=chosen["peak_memory"],
        memory_budget=memory,
        noise_scale=_finite(scale),
        noise_scale_range=[_finite(low), _finite(high)],
        warnings=_warnings(rated, chosen, norms, high, bounded)
        + _too_little(costs, rates, bounded),
        reasons=_reasons(rated, chosen, scale, low, high, rates, bounded),
        not_checked=left_out + _never_checked(classifier, int(rates["updates"].max()), recipe),
        code=_code(classifier, chosen, rate, recipe, str(place)),
        costs=_rows(rated),
        noise=_rows(noise),
        rates=_rows(rates),
        seconds_taken=seconds - clock.left,
        time_budget=seconds,
        environment=environment(device_name(place)),
    )


def relative_time(costs: pd.DataFrame, noise_scale: float) -> pd.Series:
    """Time to get equally far at each setting of `costs`, the least being 1.

    Args:
        costs: With `effective_batch_size` and `images_per_second`.
        noise_scale: In images; infinite where it is unknown, and then only speed counts.
    """
    times = (1 + costs["effective_batch_size"] / noise_scale) / costs["images_per_second"]
    return times / times.min()


def choose(costs: pd.DataFrame, noise_scale: float, accumulate: bool) -> dict[str, Any]:
    """The row of `costs` that the rule picks.

    Args:
        costs: From `trial_costs`.
        noise_scale: As for `relative_time`.
        accumulate: Whether more images than fit as one micro-batch are open to choice.
    """
    candidates = costs[_open_to_choice(costs, accumulate)]
    near = candidates[relative_time(candidates, noise_scale) <= NEAR]
    return _rows(near.sort_values("effective_batch_size"))[0]


def _open_to_choice(costs: pd.DataFrame, accumulate: bool) -> pd.Series:
    """Which settings may be advised: accumulated ones where that many images do not fit at once."""
    whole = costs["accumulation_steps"] == 1
    too_large = costs["effective_batch_size"] > costs.loc[whole, "batch_size"].max()
    return whole | (too_large & accumulate)


def _chosen(
    costs: pd.DataFrame, noise: pd.DataFrame, accumulate: bool
) -> tuple[dict[str, Any], list[int]]:
    """The setting, and the effective batch sizes chosen at the ends of the noise scale."""
    scales = typical(noise) if len(noise) else (math.inf,) * 3
    settings = [choose(costs, scale or 1e-9, accumulate) for scale in scales]
    sizes = [setting["effective_batch_size"] for setting in settings]
    return settings[0], [min(sizes), max(sizes)]


def _speed(costs: pd.DataFrame, size: int) -> float:
    """Images per second at the batch size next to `size`."""
    whole = _rows(costs[costs["accumulation_steps"] == 1])
    nearest = min(whole, key=lambda row: abs(row["batch_size"] - size))
    return nearest["images_per_second"]


def _equal_rates(rates: pd.DataFrame) -> pd.Series:
    """The learning rates that are not told apart from the best, in order."""
    return rates.loc[rates["within_noise"], "learning_rate"].sort_values()


def _middle(rates: pd.Series) -> float:
    """The middle one of some rates in order; of an even number, the lower of the two."""
    return float(rates.iloc[(len(rates) - 1) // 2])


def _warnings(
    costs: pd.DataFrame, chosen: dict[str, Any], norms: list[str], high: float, bounded: bool
) -> list[str]:
    warnings = []
    if norms:
        warnings.append(
            f"BatchNorm ({_some(norms)}) normalises by the micro-batch, so that accumulated "
            f"micro-batches do not make the update of one large batch: put GroupNorm in its place, "
            f"or do not accumulate (this advice does not)"
        )
    size = chosen["effective_batch_size"]
    if size > high:
        warnings.append(
            f"{size} images an update are beyond the critical size (at most {high:.0f}): more "
            f"images then hardly better the update"
        )
    for wasteful in _rows(_accumulated(costs)):
        if wasteful["relative_speed"] < 1 / NEAR:
            warnings.append(
                f"accumulation only costs time where the batch fits the memory: "
                f"{wasteful['accumulation_steps']} x {wasteful['batch_size']} makes the update of "
                f"one batch of {wasteful['effective_batch_size']} at "
                f"{wasteful['relative_speed']:.2f} times its speed"
            )
    if bounded and chosen["accumulation_steps"] == 1 and size == costs["batch_size"].max():
        warnings.append(
            f"the memory budget sets the batch size: none above {size} was found to fit"
        )
    return warnings


def _too_little(costs: pd.DataFrame, rates: pd.DataFrame, bounded: bool) -> list[str]:
    """What to say where too little was measured, or nothing learnt."""
    if not (rates["outcome"] == "learnt").any():
        return [
            "no learning rate lowered the validation loss: give a longer time budget; if that does "
            "not help, are the images scaled, and do the labels belong to them?"
        ]
    if len(rates) >= FEWEST and (bounded or len(costs) >= FEWEST):
        return []
    return [
        f"a guess: there was time for {_count(costs, 'batch size')} and "
        f"{_count(rates, 'learning rate')} only; give a longer time budget"
    ]


def _count(table: pd.DataFrame, what: str) -> str:
    return f"{len(table)} {what}{'' if len(table) == 1 else 's'}"


def _accumulated(costs: pd.DataFrame) -> pd.DataFrame:
    """Accumulated settings whose update was also made in one pass, and their relative speed."""
    whole = costs[costs["accumulation_steps"] == 1]
    speeds = whole.set_index("effective_batch_size")["images_per_second"]
    parts = costs[costs["accumulation_steps"] > 1]
    speed = parts["images_per_second"] / parts["effective_batch_size"].map(speeds)
    return parts.assign(relative_speed=speed).dropna(subset=["relative_speed"])


def _reasons(
    costs: pd.DataFrame,
    chosen: dict[str, Any],
    scale: float,
    low: float,
    high: float,
    rates: pd.DataFrame,
    bounded: bool,
) -> list[str]:
    size, steps = chosen["effective_batch_size"], chosen["accumulation_steps"]
    fastest = costs["images_per_second"].max()
    reasons = [
        f"at {size} images an update the device makes {chosen['images_per_second']:,.0f} images "
        f"per second (at least {chosen['slowest']:,.0f} in each measurement, "
        f"n = {chosen['measurements']}), {chosen['images_per_second'] / fastest:.0%} of the most "
        f"found at any size",
    ]
    if not math.isnan(scale):
        reasons.append(
            f"the noise scale is about {_images(scale)} ({_images(low)} to {_images(high)}): up to "
            f"there larger batches make better updates nearly in proportion; far beyond it they "
            f"only process more images"
        )
        largest = _rows(costs)[-1]
        if largest["relative_time"] > NEAR:
            reasons.append(
                f"by both, {largest['effective_batch_size']} images an update would take about "
                f"{largest['relative_time']:.1f} times as long as the best size to get equally "
                f"far, with a rate of its own; {size} is the smallest within {NEAR - 1:.0%} of the "
                f"best"
            )
    if steps > 1:
        reasons.append(
            f"accumulate: {size} images do not fit the memory as one micro-batch, and "
            f"{chosen['batch_size']} alone would be slower than {1 / NEAR:.0%} of this"
        )
    else:
        reasons.append(
            f"do not accumulate: {size} images "
            + ("are the most that pays within the memory budget" if bounded else "fit the memory")
            + (
                ""
                if math.isnan(scale)
                else ", and a larger update gets no further in the same time"
            )
        )
    best = rates[rates["best"]].iloc[0]
    diverged = rates.loc[rates["outcome"] == "diverged", "learning_rate"]
    reasons.append(
        f"after {best['updates']} updates at each of {len(rates)} learning rates, "
        f"{best['learning_rate']:g} has the lowest validation loss, {best['validation_loss']:.3g} "
        f"({best['low']:.3g} to {best['high']:.3g}), accuracy {best['validation_accuracy']:.1%}"
        + (f"; from {diverged.min():g} on training diverged" if len(diverged) else "")
    )
    equal = _equal_rates(rates)
    if len(equal) > 1:
        place = "the middle one" if len(equal) % 2 else "the lower of the middle two"
        reasons.append(
            f"{', '.join(f'{rate:g}' for rate in equal)} are not told apart by the validation "
            f"images: {_middle(equal):g} is {place}"
        )
    return reasons


def _never_checked(classifier: Classifier, updates: int, recipe: Recipe) -> list[str]:
    held = len(classifier.train.labels)
    missed = [
        f"a training longer than {updates} updates, in which a rate that falls, or a lower "
        f"one, may be better and the noise scale usually grows",
        "seeds: one start and one order of the images",
        f"other optimizers, weight decay, augmentation; other sizes' rates, given by the "
        f"{recipe.rule} rule, are not measured",
        "reading images from disk: these were in memory",
    ]
    if held < classifier.images_per_epoch:
        missed.append(
            f"all images: {held:,} of {classifier.images_per_epoch:,} were held in memory"
        )
    unseen = classifier.classes - len(classifier.validation.labels.unique())
    if unseen:
        missed.append(f"{unseen} of {classifier.classes} classes, which validation has no image of")
    return missed


def _code(
    classifier: Classifier, chosen: dict[str, Any], rate: float, recipe: Recipe, device: str
) -> str:
    scaling = ""
    if classifier.pixel_mean_and_std:
        mean, std = classifier.pixel_mean_and_std
        scaling = f"\n    Its pixels, from 0 to 1, less {mean:.4f} and divided by {std:.4f}."
    return LOOP.format(
        scaling=scaling,
        device=device,
        optimizer=recipe.call.format(rate=f"{rate:g}"),
        batch_size=chosen["batch_size"],
        accumulation_steps=chosen["accumulation_steps"],
    )


def save_advice(advice: Advice, path: str | Path) -> None:
    """Write `advice` as JSON, its fields as keys."""
    Path(path).write_text(json.dumps(asdict(advice), indent=1, allow_nan=False) + "\n")


def load_advice(path: str | Path) -> Advice:
    """Read what `save_advice` wrote.

    Raises:
        InputError: It is not there or something else.
    """
    try:
        content = json.loads(Path(path).read_text())
        return Advice(**{field.name: content[field.name] for field in fields(Advice)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no advice: {type(error).__name__}: {error}") from error


def write_report(advice: Advice, out: str | Path) -> list[Path]:
    """Write `advice.json`, `report.ipynb` (the notebook, executed) and `report.html`.

    Args:
        advice: From `advise`.
        out: Folder; made where there is none.

    Returns:
        The three paths.
    """
    from nbconvert import HTMLExporter

    from nbutils.studies.notebook import execute_notebook

    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "advice.json", out / "report.ipynb", out / "report.html"]
    save_advice(advice, paths[0])
    described = {
        name: getattr(advice, name) for name in ("model", "dataset", "optimizer", "device")
    }
    execute_notebook(NOTEBOOK, paths[1], {"measured": str(paths[0]), **described})
    page, _ = HTMLExporter().from_filename(str(paths[1]))
    paths[2].write_text(page)
    return paths


@dataclass(frozen=True)
class RecordedOutcome:
    """What became, in a study's runs, of the setting nearest to the advised one.

    Attributes:
        effective_batch_size: Of that setting.
        learning_rate: Of that setting.
        validation_accuracy: Mean over seeds, after the last epoch.
        best_accuracy: The highest of all settings of that optimizer.
        target: The lower end of the interval of the best: accuracies above it are within noise.
        seconds: Until the target; NaN where a seed did not reach it.
        cheapest_seconds: The least of all settings.
    """

    effective_batch_size: int
    learning_rate: float
    validation_accuracy: float
    best_accuracy: float
    target: float
    seconds: float
    cheapest_seconds: float

    @property
    def within_noise(self) -> bool:
        """Whether the accuracy is within noise of the best."""
        return self.validation_accuracy >= self.target

    @property
    def relative_seconds(self) -> float:
        """Time to reach the target, the cheapest setting's being 1."""
        return self.seconds / self.cheapest_seconds


def recorded_outcome(advice: Advice, runs: pd.DataFrame) -> RecordedOutcome:
    """Look the advised setting up in a study over batch sizes and learning rates.

    An epoch's seconds are the least of all runs of a size: the rate does not change them, and
    other work on the machine only adds. A target within an epoch is reached where
    `updates_to_target` says.

    Args:
        advice: From `advise`.
        runs: From `load_runs`.

    Raises:
        InputError: No runs have the optimizer.
    """
    runs = runs[runs["optimizer"] == advice.optimizer]
    if runs.empty:
        raise InputError(f"no runs have the optimizer {advice.optimizer!r}")
    setting = ["effective_batch_size", "learning_rate"]
    final = last_epochs(runs)
    accuracy = final.groupby(setting)["validation_accuracy"].mean()
    target, _ = proportion_interval(accuracy.max(), int(final["validation_images"].iloc[0]))
    epoch = (final["seconds"] / final["epoch"]).groupby(final["effective_batch_size"]).min()
    epochs = (
        updates_to_target(runs, target)
        .groupby(setting)["epochs"]
        .agg(lambda epochs: epochs.mean(skipna=False))
    )
    seconds = epochs.mul(epoch, level="effective_batch_size")
    size = int(_nearest(epoch.index, advice.effective_batch_size))
    rate = _nearest(accuracy[size].index, advice.learning_rate)
    return RecordedOutcome(
        effective_batch_size=size,
        learning_rate=rate,
        validation_accuracy=accuracy[size, rate],
        best_accuracy=accuracy.max(),
        target=target,
        seconds=seconds[size, rate],
        cheapest_seconds=seconds.min(),
    )


def _nearest(values: pd.Index, wanted: float) -> float:
    """The value that is off by the smallest factor."""
    return min(values, key=lambda value: abs(math.log(value / wanted)))


def parse_time(text: str | float) -> float:
    """The seconds that a number, or a text like "90s", "10min" or "1.5 h", means.

    Raises:
        InputError: It is no such text, or not more than 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    unit = match and (match[2] or "s")
    if not match or unit not in UNITS or float(match[1]) == 0:
        raise InputError(
            f"time budget {text!r}: it must be a number > 0 and a unit, such as 90s, 10min or 1h"
        )
    return float(match[1]) * UNITS[unit]


def format_seconds(seconds: float) -> str:
    """So many seconds as people read them, to three digits: "1.25 min"."""
    unit = "h" if seconds >= 3600 else "min" if seconds >= 60 else "s"
    return f"{seconds / UNITS[unit]:.3g} {unit}"


def _bytes(budget: str | int | None, device: str) -> int:
    if budget is None:
        return free_memory(device)
    return budget if isinstance(budget, int) else parse_memory(budget)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Plain values; those that are not finite become None."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _images(number: float) -> str:
    return f"{number:,.0f} images" if math.isfinite(number) else "no limit found"


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
