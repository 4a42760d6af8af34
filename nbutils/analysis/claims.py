"""What the runs say on the post's claims, in numbers; `verdicts` puts them in words."""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import pandas as pd

from nbutils.analysis.effects import Answers, Effect, effect, lead, load_answers
from nbutils.analysis.intervals import probability_of_lead
from nbutils.analysis.outcomes import last_epochs, varying
from nbutils.errors import InputError
from nbutils.paths import REFERENCE
from nbutils.studies.record import load_runs

# First seed of `batch-size` that was run after the rules were fixed. Earlier ones suggested the
# rule of `nbutils.analysis.outcomes.LAST_EPOCHS`, so they cannot confirm it.
CONFIRMING = 5
TARGETS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.992, 0.995, 0.998)
SCORES = (0.99257, 0.99442)  # Kaggle's public score of the post's networks: 128, 8 x 128
SCORED = 7_000  # images that the public score counts, by the scores, of Kaggle's 28,000
POSTED_GAIN = SCORES[1] - SCORES[0]
POSTED_RATE = 1e-3  # of `kaggle-split` with and without accumulation: Adam's default
PLAIN = f"128, learning_rate {POSTED_RATE}"  # the setting without accumulation
SCALED_RATE = 2.8e-3  # `POSTED_RATE` times the square root of 8, by the rule for Adam


def can_be_judged(runs: pd.DataFrame) -> bool:
    """Whether `runs` have the settings that the claims compare, all else equal and known."""
    held = set(zip(runs["batch_size"], runs["accumulation_steps"], strict=True))
    known = bool(runs["test_accuracy"].notna().all())
    return {(32, 1), (512, 1), (1024, 1), (128, 8)} <= held and known and not varying(runs)


def split_seeds(answers: Answers, confirming: int) -> dict[str, Answers]:
    """The seeds before `confirming` and those from it on, by their names; the last part judges."""
    parts = {}
    for _, runs in answers.runs.groupby(answers.runs["seed"] >= confirming):
        first, last = runs["seed"].min(), runs["seed"].max()
        name = f"seeds {first} to {last}" if first < last else f"seed {first}"
        parts[name] = replace(answers, runs=runs)
    return parts


def confirmation_table(answers: Answers, confirming: int) -> pd.DataFrame:
    """The effects of claims 1, 2, 4 and 5 in points, one column per part of `split_seeds`."""
    columns = {}
    for name, part in split_seeds(answers, confirming).items():
        sizes = whole_sizes(part)
        columns[name] = {
            f"1: from {sizes[0]} to {sizes[-1]}, by the fitted line": fitted_change(part).written(),
            "2: 1024 minus 512": lead(part, "1024", "512").written(),
            "4: 1024 minus 32": lead(part, "1024", "32").written(),
            "5: 8 x 128 minus 1024": lead(part, "8 x 128", "1024").written(),
        }
    return pd.DataFrame(columns).rename_axis("claim and effect")


def whole_sizes(answers: Answers) -> list[int]:
    """The batch sizes without accumulation."""
    runs = answers.runs
    return sorted(runs.loc[runs["accumulation_steps"] == 1, "batch_size"].unique().tolist())


def fitted_change(answers: Answers) -> Effect:
    """Change of test accuracy from the smallest to the largest batch, by the least-squares line.

    Its slope over the logarithm of the batch size is a weighted sum of accuracies.
    """
    sizes = whole_sizes(answers)
    doublings = np.log2(sizes)
    slopes, _ = np.polyfit(doublings, np.eye(len(sizes)), 1)
    return effect(answers, dict(zip(map(str, sizes), slopes * np.ptp(doublings), strict=True)))


def target_accuracy(runs: pd.DataFrame) -> float | None:
    """The highest of `TARGETS` that every run reaches, and none in its first epoch, if any."""
    first = runs.loc[runs["epoch"] == 1, "validation_accuracy"].max()
    least = runs.groupby("run_id")["validation_accuracy"].max().min()
    return max((target for target in TARGETS if first < target <= least), default=None)


@dataclass(frozen=True)
class KaggleRuns(Answers):
    """The study `kaggle-split`, and the best rate on validation by accumulation steps."""

    tuned: pd.Series


def load_kaggle_runs() -> KaggleRuns:
    """Those of the reference, with the rates that its study `kaggle-tuning` found.

    They are judged after the final epoch, as when the runs of `kaggle-split` were planned.
    """
    final = last_epochs(load_runs(REFERENCE / "kaggle-tuning"))
    means = final.pivot_table("validation_accuracy", "accumulation_steps", "learning_rate")
    return KaggleRuns(**vars(load_answers(REFERENCE / "kaggle-split")), tuned=means.idxmax(axis=1))


def kaggle_gains(kaggle: KaggleRuns) -> dict[str, tuple[Effect, Effect]]:
    """8 x 128 minus 128, at equal epochs and at equal updates, at each pair of rates on record."""
    rates = {
        "same rate": (POSTED_RATE, POSTED_RATE),
        "rate x root of 8": (POSTED_RATE, SCALED_RATE),
        "tuned rates": (kaggle.tuned[1], kaggle.tuned[8]),
    }
    interpolated, gains = _at_equal_updates(kaggle), {}
    for name, (plain, accumulated) in rates.items():
        pair = f"8 x 128, learning_rate {accumulated}", f"128, learning_rate {plain}"
        with suppress(InputError):  # no runs at these rates
            gains[name] = lead(kaggle, *pair), lead(interpolated, *pair)
    return gains


def _at_equal_updates(kaggle: KaggleRuns) -> Answers:
    """The runs of 128 as they were after the updates that 8 x 128 made by each epoch."""
    runs = kaggle.runs.sort_values(["run_id", "epoch"], ignore_index=True)
    accumulated = runs["accumulation_steps"] > 1
    updates = runs[accumulated].groupby("epoch")["updates"].first()
    for _, run in runs[~accumulated].groupby("run_id"):
        accuracies = np.interp(updates, run["updates"], run["test_accuracy"])
        runs.loc[run.index, "test_accuracy"] = accuracies
    return Answers(runs, np.zeros(0, np.uint8), {})


def seed_probability(kaggle: KaggleRuns, part: int, lead: int) -> float:
    """Probability that a `PLAIN` run leads another by `lead` of `part` test images.

    After the final epoch; the mean over all ordered pairs of seeds, or NaN.
    """
    ids = kaggle.by_setting("run_id")[PLAIN].dropna()
    right = [kaggle.late[run_id][-1] == kaggle.labels for run_id in ids]
    won = [(int((a > b).sum()), int((b > a).sum())) for a, b in permutations(right, 2)]
    each = [probability_of_lead(*images, len(kaggle.labels), part, lead) for images in won]
    return float(np.mean(each)) if each else math.nan
