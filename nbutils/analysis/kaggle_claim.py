"""The seventh claim: what accumulation did to the post's Kaggle score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd

from nbutils.analysis.effects import Answers, Effect, effect
from nbutils.analysis.intervals import mean_interval, probability_of_lead
from nbutils.analysis.outcomes import last_epochs, late_epochs
from nbutils.analysis.verdict import Verdict
from nbutils.paths import REFERENCE
from nbutils.studies.record import load_late_predictions, load_runs

SCORES = (0.99257, 0.99442)
"""Kaggle's public score of the post's networks, with 128 and with 8 x 128 images per update."""

POSTED_GAIN = SCORES[1] - SCORES[0]
POSTED_RATE = 1e-3
"""Learning rate of `kaggle-split` with and without accumulation: Adam's default."""

SCALED_RATE = 2.8e-3
"""`POSTED_RATE` times the square root of 8: what the rule for Adam makes of it at 8 x 128."""

SCORED = 7_000
"""Images that the public score counts, by the scores; Kaggle's test images are 28,000."""


@dataclass(frozen=True)
class KaggleRuns(Answers):
    """The study `kaggle-split`, on Kaggle's split of the digits, and what tuned its rates.

    Attributes:
        tuning: The study `kaggle-tuning`, from `load_runs`; None where it was not made.
    """

    tuning: pd.DataFrame | None

    def at(self, steps: int, rate: float) -> pd.DataFrame:
        """The outcomes of batch size 128 with these steps, at this rate to within 2 %."""
        table = self.outcomes
        close = np.isclose(table["learning_rate"], rate, rtol=0.02)
        return table[(table["accumulation_steps"] == steps) & close]

    @property
    def plain(self) -> pd.DataFrame:
        """The outcomes of batch size 128 without accumulation, at the post's learning rate."""
        return self.at(1, POSTED_RATE)


def load_kaggle_runs(folder: Path = REFERENCE) -> KaggleRuns:
    """Those of the reference."""
    split, tuning = folder / "kaggle-split", folder / "kaggle-tuning"
    tuning_runs = load_runs(tuning) if tuning.is_dir() else None
    return KaggleRuns(load_runs(split), *load_late_predictions(split), tuning_runs)


def kaggle_verdicts(kaggle: KaggleRuns) -> list[Verdict]:
    """The three answers to the claim: is there such a gain, how large is it, is it luck?"""
    return [_is_there_a_gain(kaggle), _how_large(kaggle), _is_it_luck(kaggle)]


def _is_there_a_gain(kaggle: KaggleRuns) -> Verdict:
    found = gain(kaggle, POSTED_RATE, POSTED_RATE)
    if found.high < POSTED_GAIN:
        verdict = f"fails: the post's gain is excluded; the difference is {found.bound}"
    elif found.low > 0:
        verdict = f"holds: the gain is {found.bound}"
    else:
        verdict = f"open: {found.bound}"
    return Verdict(
        "7a",
        f"8 x 128 instead of 128 raised the Kaggle score by {100 * POSTED_GAIN:.3f} points.",
        f"8 x 128 less 128, equal epochs, same rate: {found}",
        verdict,
        f"On {len(kaggle.labels):,} test images of MNIST, split as Kaggle splits them.",
    )


def _how_large(kaggle: KaggleRuns) -> Verdict:
    verdict = _at_rate(kaggle, POSTED_RATE)
    if not kaggle.at(8, SCALED_RATE).empty:
        verdict += f" (same rate); {_at_rate(kaggle, SCALED_RATE)} (rate x root of 8)"
    table = gain_table(kaggle)
    rows = [f"{name}: {', '.join(row + ' at ' + table.columns)}" for name, row in table.iterrows()]
    return Verdict(
        "7b",
        "How large is that difference at equal epochs, and at equal updates?",
        f"equal updates, same rate: {gain_at_equal_updates(kaggle, POSTED_RATE, POSTED_RATE)}",
        verdict,
        f"8 x 128 less 128 in points, {'; '.join(rows)}. At equal updates 8 x 128 has seen eight "
        f"times the images; 128 is interpolated between its epochs, and the interval covers other "
        f"seeds only.",
    )


def _at_rate(kaggle: KaggleRuns, rate: float) -> str:
    """Whether there is a gain with 8 x 128 at this rate, at equal epochs and at equal updates."""
    both = {
        "equal epochs": gain(kaggle, POSTED_RATE, rate),
        "equal updates": gain_at_equal_updates(kaggle, POSTED_RATE, rate),
    }
    return "; ".join(
        f"{'holds' if gap.low > 0 else 'fails' if gap.high < 0 else 'open'} at {kind}: {gap.bound}"
        for kind, gap in both.items()
    )


def _is_it_luck(kaggle: KaggleRuns) -> Verdict:
    images, seeds = len(kaggle.labels), kaggle.plain["seed"].nunique()
    posted, of_all = round(POSTED_GAIN * SCORED), round(POSTED_GAIN * images)
    probability = _percent(seed_probability(kaggle, SCORED, posted))
    return Verdict(
        "7c",
        "How often do two seeds of one setting differ by as much?",
        f"a lead of {posted} of {SCORED:,} images by the seed alone: probability {probability} "
        f"(n = {seeds})",
        f"open from one run each: the seed alone does as much with probability {probability}",
        f"The post's gain is {posted} of the {SCORED:,} images that the public score counts, from "
        f"one run each. A lead of the same share of all {images:,} images, {of_all}, has "
        f"probability {_percent(seed_probability(kaggle, images, of_all))}. Both are means over "
        f"all ordered pairs of {seeds} seeds of 128.",
    )


def gain_table(kaggle: KaggleRuns) -> pd.DataFrame:
    """8 x 128 less 128 in points, at equal epochs and at equal updates, for each pair of rates.

    Returns:
        One row per pair of rates: the same, scaled by the square root of 8, and tuned on
        validation; "not recorded" where runs are missing.
    """
    rates = {
        f"same rate, {POSTED_RATE:g}": (POSTED_RATE, POSTED_RATE),
        f"rate x root of 8, {SCALED_RATE:g}": (POSTED_RATE, SCALED_RATE),
    }
    if kaggle.tuning is not None:
        tuned = tuned_rates(kaggle.tuning)
        rates[f"tuned rates, {tuned[1]:g} and {tuned[8]:g}"] = tuned[1], tuned[8]
    rows = {}
    for name, (plain, accumulated) in rates.items():
        if kaggle.at(1, plain).empty or kaggle.at(8, accumulated).empty:
            rows[name] = ["not recorded", "not recorded"]
            continue
        both = (gain(kaggle, plain, accumulated), gain_at_equal_updates(kaggle, plain, accumulated))
        rows[name] = [str(each).replace(" points", "") for each in both]
    columns = ["equal epochs", "equal updates"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("rates")


def gain(kaggle: KaggleRuns, plain: float, accumulated: float) -> Effect:
    """Test accuracy of 8 x 128 less that of 128, each at its learning rate, paired by seed.

    Raises:
        InputError: No seed has runs of both.
    """
    ids = {8: kaggle.at(8, accumulated), 1: kaggle.at(1, plain)}
    paired = pd.DataFrame({steps: rows.set_index("seed")["run_id"] for steps, rows in ids.items()})
    return effect(kaggle, paired, {8: 1, 1: -1})


def gain_at_equal_updates(kaggle: KaggleRuns, plain: float, accumulated: float) -> Effect:
    """As `gain`, but 128 is taken after as many updates as 8 x 128 made.

    Its accuracy in between two epochs is interpolated in a straight line. Predictions in the
    middle of training are not recorded, so the interval is Student's, over seeds only.
    """
    histories = dict(iter(kaggle.runs.sort_values("epoch").groupby("run_id")))
    ends = dict(kaggle.at(1, plain)[["seed", "run_id"]].to_numpy())
    gaps = []
    for seed, run_id in kaggle.at(8, accumulated)[["seed", "run_id"]].to_numpy():
        if seed in ends:
            long, early = histories[run_id], histories[ends[seed]]
            late = long.tail(late_epochs(len(long)))
            at = np.interp(late["updates"], early["updates"], early["test_accuracy"])
            gaps.append(float((late["test_accuracy"] - at).mean()))
    return Effect(float(np.mean(gaps)), *mean_interval(gaps), len(gaps))


def tuned_rates(tuning: pd.DataFrame) -> dict[int, float]:
    """The learning rate of the best mean validation accuracy, by accumulation steps.

    Judged after the final epoch, as it was when the runs of `kaggle-split` were planned.
    """
    final = last_epochs(tuning)
    means = final.groupby(["accumulation_steps", "learning_rate"])["validation_accuracy"].mean()
    best = means.groupby("accumulation_steps").idxmax()
    return {int(steps): float(rate) for steps, rate in best}


def seed_probability(kaggle: KaggleRuns, part: int, lead: int) -> float:
    """Probability that a run leads another of its own setting by `lead` of `part` test images.

    The setting is that of `KaggleRuns.plain`, after the final epoch, as one would submit it; the
    mean over all ordered pairs of its seeds; NaN where there is only one.

    Args:
        kaggle: The runs.
        part: Test images that are drawn at random.
        lead: In images, of these.
    """
    right = [kaggle.late[run_id][-1] == kaggle.labels for run_id in kaggle.plain["run_id"]]
    each = [
        probability_of_lead(
            int((a & ~b).sum()), int((b & ~a).sum()), len(kaggle.labels), part, lead
        )
        for a, b in permutations(right, 2)
    ]
    return float(np.mean(each)) if each else math.nan


def _percent(probability: float) -> str:
    if math.isnan(probability):
        return "unknown"
    return f"{probability:.0%}" if probability >= 0.005 else "below 0.5%"
