"""The blog post's claims, each put to the runs: what they show, and whether it holds.

A verdict follows from 95 % intervals by a rule laid down here when one seed's runs were known:
differences count as none when their whole interval lies within `MARGIN`, else as real when it
leaves out zero, and are otherwise not decided. Two parts are of later: the rule on memory,
`SAME_MEMORY`, of after first measurements; and that the intervals cover other test images beside
other seeds, which made them wider, of after three seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nbutils.analysis.intervals import chance_of_lead, crossed_interval, mean_interval
from nbutils.analysis.summary import last_epochs, target_accuracy
from nbutils.errors import InputError
from nbutils.paths import REFERENCE
from nbutils.studies.record import load_predictions, load_runs
from nbutils.training.config import RunConfig

SAME_MEMORY = 1.25
"""Peaks of memory whose ratio is below this count as the same: an allocator's holes vary by about
as much."""

MARGIN = 0.001
"""Accuracies that differ by less count as equal: 10 images of 10,000."""

Setting = tuple[int, int]
"""Batch size and accumulation steps."""

FIXED_RATE = "at one learning rate for all sizes"
UNDECIDED = "not decidable from this"

SCORES = (0.99257, 0.99442)
"""Kaggle's public score of the post's networks, with 128 and with 8 x 128 images an update."""

POSTED_GAIN = SCORES[1] - SCORES[0]
POSTED_RATE = 1e-3
"""Learning rate of `kaggle-split` with and without accumulation: Adam's default."""

SCORED = 7_000
"""Images that the public score counts, to go by the scores: 28,000 are Kaggle's test images."""


@dataclass(frozen=True)
class Answers:
    """A study's runs, and what their networks answered to the test images.

    Attributes:
        runs: From `load_runs`.
        labels: Of the test images, from `load_predictions`.
        predictions: Of each of `runs`, by its id.
    """

    runs: pd.DataFrame
    labels: np.ndarray
    predictions: Mapping[str, np.ndarray]

    def right(self, run_id: str) -> np.ndarray:
        """Which test images a run has right; bool, shape (test images,)."""
        return self.predictions[run_id] == self.labels


def load_answers(folder: str | Path) -> Answers:
    """Those of a study's folder, or of a reference."""
    return Answers(load_runs(folder), *load_predictions(folder))


@dataclass(frozen=True)
class Effect:
    """A mean difference in accuracy with its 95 % interval, for other seeds and other images.

    The ends are NaN where seeds are too few.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    @property
    def negligible(self) -> bool:
        """Whether the whole interval lies within `MARGIN` of zero."""
        return self.low > -MARGIN and self.high < MARGIN

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{100 * self.mean:+.3f} points (n = {self.seeds}: no interval)"
        return (
            f"{100 * self.mean:+.3f} points ({100 * self.low:+.3f} to {100 * self.high:+.3f}, "
            f"n = {self.seeds})"
        )


def differences(answers: Answers, ids: pd.DataFrame, weights: Mapping[Any, float]) -> np.ndarray:
    """A weighted sum of what some settings have right, seed by seed and image by image.

    Args:
        answers: The runs.
        ids: A row a seed, a column a setting: the run's id, or NaN.
        weights: Of each setting, such as 1 and -1 for a difference. Seeds that lack one of these
            settings are left out.

    Returns:
        Shape (seeds, test images); their mean is that weighted sum of the test accuracies.

    Raises:
        InputError: No seed has all these settings.
    """
    complete = ids[list(weights)].dropna()
    if complete.empty:
        raise InputError(f"no seed has runs of all of {', '.join(map(str, weights))}")
    sums = np.zeros((len(complete), len(answers.labels)))
    for setting, weight in weights.items():
        sums += weight * np.stack([answers.right(run_id) for run_id in complete[setting]])
    return sums


def effect(answers: Answers, ids: pd.DataFrame, weights: Mapping[Any, float]) -> Effect:
    """The mean of such `differences`, of the same arguments."""
    values = differences(answers, ids, weights)
    return Effect(values.mean(), *crossed_interval(values), len(values))


def lead(answers: Answers, ids: pd.DataFrame, one: Any, other: Any) -> Effect:
    """The test accuracy of one setting, a column of `ids`, less that of another."""
    return effect(answers, ids, {one: 1, other: -1})


@dataclass(frozen=True)
class KaggleRuns(Answers):
    """The study `kaggle-split`, on Kaggle's split of the digits, and what tuned its rates.

    Attributes:
        tuning: The study `kaggle-tuning`, from `load_runs`; None where it was not made.
    """

    tuning: pd.DataFrame | None

    @property
    def plain(self) -> pd.DataFrame:
        """Its runs of batch size 128 without accumulation at the post's learning rate."""
        steps, rate = self.runs["accumulation_steps"], self.runs["learning_rate"]
        return self.runs[(steps == 1) & (rate == POSTED_RATE)]


def load_kaggle_runs(folder: Path = REFERENCE) -> KaggleRuns:
    """Those of the reference."""
    split, tuning = folder / "kaggle-split", folder / "kaggle-tuning"
    tuning_runs = load_runs(tuning) if tuning.is_dir() else None
    return KaggleRuns(load_runs(split), *load_predictions(split), tuning_runs)


def verdicts(
    answers: Answers, normalisation: Answers, kaggle: KaggleRuns, cost: pd.DataFrame
) -> pd.DataFrame:
    """The table of the claims.

    Args:
        answers: Of the study `batch-size`.
        normalisation: Of the study `normalisation`.
        kaggle: Where the post's Kaggle scores are put to the test.
        cost: The table of the study `cost`, from `nbutils.measure.cost.measure_grid`.

    Returns:
        A row a claim, from 1: `claim` as the post has it, `these runs show` the effect with
        interval and number of seeds n, and `verdict`.
    """
    table = [
        (
            "BatchNorm works per micro-batch, so accumulation needs GroupNorm.",
            *_needs_group_norm(normalisation),
        ),
        (
            "8 x 128 instead of 128 raised the Kaggle score from 99.257 % to 99.442 %.",
            *_raises_the_score(kaggle),
        ),
        (
            "Accumulation fits a large batch into the memory of a small one.",
            *_fits_memory(cost),
        ),
    ]
    return _numbered(pd.concat([size_verdicts(answers), _claims(table)]))


def size_verdicts(answers: Answers) -> pd.DataFrame:
    """The rows of the claims about batch size and accumulation alone, of any dataset's runs.

    Args:
        answers: Of a study like `batch-size`.
    """
    runs = answers.runs
    ids = by_size(last_epochs(runs), "run_id")
    table = [
        ("With all else equal, accuracy rises with the batch size.", *_rises(answers, ids)),
        ("512 is within a small margin of 1024, so it is the best choice.", *_best(answers, ids)),
        ("Small batches converge faster.", *_faster(runs)),
        ("Too large a batch generalises worse.", *_generalises(answers, ids)),
        (
            "8 x 128 accumulated has the net effect of 1024.",
            *_same(answers, ids),
        ),
    ]
    return _numbered(_claims(table))


def can_be_judged(runs: pd.DataFrame) -> bool:
    """Whether `runs` have the settings that `size_verdicts` compares, all else equal and known."""
    held = set(zip(runs["batch_size"], runs["accumulation_steps"], strict=True))
    varied = {"batch_size", "accumulation_steps", "seed"}
    fixed = runs[[name for name in RunConfig.field_names() if name not in varied]]
    equal = len(fixed.drop_duplicates()) == 1
    known = bool(runs["test_accuracy"].notna().all())
    return {(32, 1), (512, 1), (1024, 1), (128, 8)} <= held and equal and known


def _claims(rows: list[tuple[str, str, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["claim", "these runs show", "verdict"])


def _numbered(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index(pd.RangeIndex(1, len(table) + 1))


def by_size(final: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row a seed, a column a setting (batch size, accumulation steps): `metric`, or NaN."""
    settings = ["batch_size", "accumulation_steps"]
    # pivot_table would lose a setting whose values are all missing.
    table = final.pivot(index="seed", columns=settings, values=metric)  # noqa: PD010
    return table.sort_index(axis=1)


def _rises(answers: Answers, ids: pd.DataFrame) -> tuple[str, str]:
    whole = [(size, steps) for size, steps in _settings(ids) if steps == 1]
    doublings = np.log2([size for size, _ in whole])
    # The slope of the least-squares line is a weighted sum of the accuracies.
    apart = doublings - doublings.mean()
    slope = effect(answers, ids, dict(zip(whole, apart / (apart**2).sum(), strict=True)))
    shown = f"per doubling of the batch size, test accuracy changes by {slope}"
    across = doublings.max() - doublings.min()
    if max(abs(slope.low), abs(slope.high)) * across < MARGIN:
        return shown, "fails: it does not change"
    if slope.decided:
        return shown, "holds, " + FIXED_RATE if slope.low > 0 else "fails: it falls, " + FIXED_RATE
    return shown, UNDECIDED


def _best(answers: Answers, ids: pd.DataFrame) -> tuple[str, str]:
    near = lead(answers, ids, (1024, 1), (512, 1))
    others = [setting for setting in _settings(ids) if setting != (512, 1)]
    ahead = [s for s in others if lead(answers, ids, s, (512, 1)).low > 0]
    shown = f"1024 less 512: {near}"
    if not (near.decided or near.negligible):
        return shown, UNDECIDED
    first = "differs, by how much is open"
    if near.negligible:
        first = "within 0.1 points"
    elif near.low >= MARGIN or near.high <= -MARGIN:
        first = "not within 0.1 points"
    if ahead:
        names = ", ".join(_name(*setting) for setting in ahead)
        return shown, f"fails: {first}, but {names} is ahead of 512"
    return shown, f"{first}; best choice not decidable: no size is ahead of 512 by more than chance"


def _faster(runs: pd.DataFrame) -> tuple[str, str]:
    target = target_accuracy(runs)
    # Of each run, when it first had the accuracy; missing where it never did.
    units = runs[["epoch", "updates"]].where(runs["validation_accuracy"] >= target)
    keys = ["seed", "batch_size", "accumulation_steps"]
    first = runs.assign(**units).groupby(keys, as_index=False)[["epoch", "updates"]].min()
    epochs, updates = by_size(first, "epoch"), by_size(first, "updates")
    if epochs[[(32, 1), (1024, 1)]].isna().any(axis=None):
        return f"not every run of 32 and of 1024 got to {target:.0%} validation accuracy", UNDECIDED
    gap = epochs[1024, 1] - epochs[32, 1]
    low, high = mean_interval(gap.tolist())
    # 32 may have had it at any update since the epoch before.
    earliest = updates[32, 1] * (1 - 1 / epochs[32, 1])
    interval = f"difference {low:+.1f} to {high:+.1f}, n = {len(gap)}"
    shown = (
        f"to {target:.0%} validation accuracy, judged after each epoch, 32 and 1024 need "
        f"{epochs[32, 1].mean():.1f} and {epochs[1024, 1].mean():.1f} epochs "
        f"({interval if len(gap) > 1 else 'n = 1: no interval'}); in updates, 32 needs "
        f"{earliest.mean():,.0f} to {updates[32, 1].mean():,.0f}, and 1024 at most "
        f"{updates[1024, 1].mean():,.0f}"
    )
    if not low > 0:
        return shown, UNDECIDED
    if mean_interval((updates[1024, 1] - earliest).tolist())[1] < 0:
        return shown, "holds only if counted in epochs; in updates the large batch is faster"
    return shown, f"holds, counted in epochs; counted in updates {UNDECIDED}"


def _generalises(answers: Answers, ids: pd.DataFrame) -> tuple[str, str]:
    gap = lead(answers, ids, (1024, 1), (32, 1))
    shown = f"test accuracy of 1024 less that of 32: {gap}"
    if gap.low > 0 or gap.negligible:
        return shown, "fails, up to 1024"
    if gap.high < 0:
        return shown, "holds, " + FIXED_RATE + "; whether it does at tuned rates is not tested here"
    return shown, UNDECIDED


def _same(answers: Answers, ids: pd.DataFrame) -> tuple[str, str]:
    gap = lead(answers, ids, (128, 8), (1024, 1))
    norm = answers.runs["norm"].iloc[0]
    shown = f"8 x 128 less 1024, after {answers.runs['epoch'].max()} epochs: {gap}"
    if gap.decided and not gap.negligible:
        return shown, "fails"
    names = {"group": "GroupNorm", "none": "no normalisation"}
    if norm in names:
        exact = "the updates are equal to rounding (05_equivalence)"
        return shown, f"holds with {names[norm]}: {exact}"
    return shown, "holds, within 0.1 points" if gap.negligible else UNDECIDED


def _needs_group_norm(answers: Answers) -> tuple[str, str]:
    final = last_epochs(answers.runs)
    final = final[final["norm"] == "batch"]
    ids = by_size(final, "run_id")
    whole, *_, cut = _settings(ids)
    gap = lead(answers, ids, cut, whole)
    shown = (
        f"BatchNorm, {_name(*cut)} less {_name(*whole)}, after {final['epoch'].max()} epochs at "
        f"learning rate {final['learning_rate'].iloc[0]:g}: {gap}"
    )
    first = "per micro-batch: holds, exactly (07_normalisation)"
    if gap.negligible or gap.low > 0:
        return shown, f"{first}; GroupNorm is not needed here"
    if gap.high < 0:
        return shown, f"{first}; harmful here"
    return shown, f"{first}; whether it harms is not decidable from this"


def _raises_the_score(kaggle: KaggleRuns) -> tuple[str, str]:
    as_posted = _gain(kaggle, {1: POSTED_RATE, 8: POSTED_RATE})
    images = len(kaggle.labels)
    posted, posted_of_all = (round(POSTED_GAIN * part) for part in (SCORED, images))
    chance = seed_chance(kaggle, SCORED, posted)
    chance_of_all = seed_chance(kaggle, images, posted_of_all)
    final = last_epochs(kaggle.runs)
    updates = final.groupby("accumulation_steps")["updates"].max()
    at_tuned_rates = ""
    verdict = f"{_judged(as_posted)} (at one learning rate)"
    if kaggle.tuning is not None:
        rates = tuned_rates(kaggle.tuning)
        tuned = _gain(kaggle, rates)
        at_tuned_rates = f"; at rates tuned on validation ({rates[1]:g} and {rates[8]:g}) {tuned}"
        verdict += f"; {_judged(tuned)} (at tuned rates)"
    shown = (
        f"8 x 128 less 128, on {images:,} test images of MNIST dealt as Kaggle deals them, after "
        f"{final['epoch'].max()} epochs ({updates[8]:,} updates against {updates[1]:,}): "
        f"{as_posted}, that is {as_posted.mean * images:+.0f} images, at one learning "
        f"rate{at_tuned_rates}. The post's gain is {posted} of {SCORED:,} images from one run "
        f"each: of two runs of batch 128 that differ only in the seed, the second is ahead of the "
        f"first by that much {_chance(chance)}, and by as large a share of all {images:,} "
        f"({posted_of_all} images) {_chance(chance_of_all)}"
    )
    return shown, verdict


def _judged(gain: Effect) -> str:
    """Whether there is a gain like the post's."""
    if gain.negligible:
        return "fails: there is no such gain"
    if gain.high < 0:
        return "fails: in equal epochs 8 x 128 scores lower"
    if gain.low > 0:
        as_large = gain.low <= POSTED_GAIN <= gain.high
        return f"holds: there is a gain, {'of' if as_large else 'but not of'} that size"
    if gain.high < POSTED_GAIN:
        return "fails: a gain of that size is ruled out; whether there is any is open"
    return UNDECIDED


def _chance(value: float) -> str:
    if math.isnan(value):
        return "with a chance that one seed does not tell"
    return f"with chance {value:.0%}" if value >= 0.005 else "with a chance below 0.5%"


def tuned_rates(tuning: pd.DataFrame) -> dict[int, float]:
    """The learning rate of best mean final validation accuracy, by accumulation steps."""
    final = last_epochs(tuning)
    means = final.groupby(["accumulation_steps", "learning_rate"])["validation_accuracy"].mean()
    best = means.groupby("accumulation_steps").idxmax()
    return {int(steps): float(rate) for steps, rate in best}


def _gain(kaggle: KaggleRuns, rates: Mapping[int, float]) -> Effect:
    """Test accuracy with 8 accumulation steps less that with 1, seed by seed.

    Raises:
        InputError: There are no runs at one of the rates.
    """
    final = last_epochs(kaggle.runs)
    ids = {
        steps: final[
            (final["accumulation_steps"] == steps) & (final["learning_rate"] == rates[steps])
        ].set_index("seed")["run_id"]
        for steps in (1, 8)
    }
    for steps, held in ids.items():
        if held.empty:
            raise InputError(
                f"kaggle-split has no runs of {_name(128, steps)} at the learning rate "
                f"{rates[steps]:g}"
            )
    return lead(kaggle, pd.DataFrame(ids), 8, 1)


def seed_chance(kaggle: KaggleRuns, part: int, lead: int) -> float:
    """Chance that a run leads another of its own setting by `lead` of `part` random test images.

    The setting is that of `KaggleRuns.plain`; the mean over all ordered pairs of its seeds; NaN
    where there is but one.
    """
    right = [kaggle.right(run_id) for run_id in kaggle.plain["run_id"].unique()]
    chances = [
        chance_of_lead(int((a & ~b).sum()), int((b & ~a).sum()), len(kaggle.labels), part, lead)
        for a, b in permutations(right, 2)
    ]
    return float(np.mean(chances)) if chances else math.nan


def _settings(table: pd.DataFrame) -> list[Setting]:
    """The columns of `by_size`, by images per update."""
    sizes, steps = (map(int, table.columns.get_level_values(level)) for level in (0, 1))
    return sorted(zip(sizes, steps, strict=True), key=lambda s: (s[0] * s[1], s[1]))


def _name(batch_size: int, steps: int) -> str:
    return f"{batch_size}" if steps == 1 else f"{steps} x {batch_size}"


def _fits_memory(cost: pd.DataFrame) -> tuple[str, str]:
    memory = by_repeat(cost, "peak_memory")
    seconds = by_repeat(cost, "seconds_per_update")
    parts, fits, fails = [], [], []
    for micro_batch, steps in ((128, 8), (32, 32)):
        cut = micro_batch, steps
        of_small = memory[cut] / memory[micro_batch, 1]
        of_large = memory[cut] / memory[1024, 1]
        parts.append(
            f"{_name(*cut)} takes {_ratio(of_small)} times the peak memory of {micro_batch}, "
            f"{_ratio(of_large)} times that of 1024, and {_ratio(seconds[cut] / seconds[1024, 1])} "
            f"times the time of 1024"
        )
        fits.append(of_small.max() < SAME_MEMORY and of_large.max() < 1 / SAME_MEMORY)
        fails.append(of_small.min() >= SAME_MEMORY or of_large.min() >= 1 / SAME_MEMORY)
    spread = f"median, lowest to highest of n = {len(memory)}"
    verdict = "holds" if all(fits) else "fails" if any(fails) else "not decidable from this"
    places = ", ".join(cost["device"].unique())
    return f"{'; '.join(parts)} ({spread})", f"{verdict}; measured on: {places}"


def by_repeat(cost: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row a repeat, a column a setting (batch size, accumulation steps): `column`."""
    return cost.pivot_table(
        index="repeat", columns=["batch_size", "accumulation_steps"], values=column
    )


def _ratio(values: pd.Series) -> str:
    return f"{values.median():.2f} ({values.min():.2f} to {values.max():.2f})"
