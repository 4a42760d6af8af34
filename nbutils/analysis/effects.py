"""How much settings differ: paired by seed and by test image, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from nbutils.analysis.intervals import crossed_interval, mean_interval, minimum_detectable_effect
from nbutils.analysis.outcomes import late_epochs, name_settings, outcomes
from nbutils.errors import InputError
from nbutils.studies.record import load_late_predictions, load_runs

MARGIN = 0.001
"""Accuracies that differ by less count as equal: 0.1 points, 10 images of 10,000."""


@dataclass(frozen=True)
class Answers:
    """The runs of a study, and what their networks answered to the test images.

    Attributes:
        runs: From `load_runs`.
        labels: Of the test images, uint8, shape (n,); (0,) where they are unknown.
        late: The predictions of each run after its last epochs, by its id, from
            `load_late_predictions`.
    """

    runs: pd.DataFrame
    labels: np.ndarray
    late: Mapping[str, np.ndarray]

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """One row per run, see `nbutils.analysis.outcomes.outcomes`, with its `setting`."""
        return name_settings(outcomes(self.runs))

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """The final predictions of each run, uint8, shape (n,)."""
        return {run_id: late[-1] for run_id, late in self.late.items()}

    def right(self, run_id: str, epochs: int) -> np.ndarray:
        """In which share of the last epochs that are known a run has each test image right.

        Args:
            run_id: Of the run.
            epochs: How many last epochs to take. Older records know only the final one.
        """
        return (self.late[run_id][-epochs:] == self.labels).mean(axis=0)

    def only(self, chosen: pd.Series) -> Self:
        """The same with the runs of these rows, a mask."""
        return replace(self, runs=self.runs[chosen])

    def by_setting(self, column: str) -> pd.DataFrame:
        """One row per seed, one column per setting: a column of `outcomes`, or NaN."""
        table = self.outcomes
        # pivot_table would lose a setting whose values are all missing.
        wide = table.pivot(index="seed", columns="setting", values=column)  # noqa: PD010
        return wide[list(table["setting"].unique())]


def load_answers(folder: str | Path) -> Answers:
    """Those of a folder of runs, or of a reference."""
    return Answers(load_runs(folder), *load_late_predictions(folder))


@dataclass(frozen=True)
class Effect:
    """A mean difference, with its 95 % interval.

    Attributes:
        mean: As a fraction; of losses, in nats.
        low: Lower end; NaN for fewer than two seeds.
        high: Upper end.
        seeds: Number of seeds that were paired.
        detectable: The minimum detectable effect, at a power of 80 %.
    """

    mean: float
    low: float
    high: float
    seeds: int
    detectable: float = math.nan

    @property
    def negligible(self) -> bool:
        """Whether the whole interval lies within `MARGIN` of zero."""
        return self.low > -MARGIN and self.high < MARGIN

    @property
    def bound(self) -> str:
        """What is known of its size, for a verdict."""
        if math.isnan(self.low):
            return f"{points(self.mean)} points in one seed, no interval"
        return f"between {points(self.low)} and {points(self.high)} points"

    def __str__(self) -> str:
        interval = f"{points(self.low)} to {points(self.high)}, n = {self.seeds}"
        if self.seeds < 2:
            interval = f"n = {self.seeds}: no interval"
        return f"{points(self.mean)} points ({interval})"


def points(fraction: float) -> str:
    """A difference of accuracies in percentage points, such as "+0.12"."""
    return f"{round(100 * fraction, 2) + 0:+.2f}"  # + 0 turns -0.0 into 0.0


def effect(
    answers: Answers,
    ids: pd.DataFrame,
    weights: Mapping[Any, float],
    metric: str = "test_accuracy",
) -> Effect:
    """A weighted sum of the outcomes of some settings, paired by seed.

    The interval of a test accuracy is for other seeds and other images, see `crossed_interval`.
    Its mean and the part of the seeds come from the outcomes, the means over the last epochs. Its
    part of the images comes from the predictions: those of the same epochs in newer records, of
    the final epoch alone in older ones, which kept no others. The interval of any other metric,
    or where labels are unknown, is Student's: for other seeds only.

    Args:
        answers: The runs.
        ids: One row per seed, one column per setting: the id of the run, or NaN.
        weights: Of each setting, such as 1 and -1 for a difference. Seeds that lack one of these
            settings are left out.
        metric: A column of `outcomes`.

    Raises:
        InputError: No seed has all these settings.
    """
    missing = [name for name in weights if name not in ids]
    complete = pd.DataFrame() if missing else ids[list(weights)].dropna()
    if complete.empty:
        raise InputError(f"no seed has runs of all of {', '.join(map(str, weights))}")
    table = answers.outcomes.set_index("run_id")
    per_seed = np.zeros(len(complete))
    for setting, weight in weights.items():
        per_seed += weight * table.loc[complete[setting], metric].to_numpy(float)
    mean, seeds = float(per_seed.mean()), len(per_seed)
    if metric != "test_accuracy" or len(answers.labels) == 0 or seeds < 2:
        return Effect(mean, *mean_interval(per_seed.tolist()), seeds)
    per_image = np.zeros((seeds, len(answers.labels)))
    for setting, weight in weights.items():
        for row, run_id in enumerate(complete[setting]):
            epochs = late_epochs(int(table.loc[run_id, "epoch"]))
            per_image[row] += weight * answers.right(run_id, epochs)
    detectable = minimum_detectable_effect(per_image, per_seed)
    return Effect(mean, *crossed_interval(per_image, per_seed), seeds, detectable)


def lead(answers: Answers, one: str, other: str, metric: str = "test_accuracy") -> Effect:
    """The outcome of one setting less that of another, by their names.

    Raises:
        InputError: No seed has both.
    """
    return effect(answers, answers.by_setting("run_id"), {one: 1, other: -1}, metric)


def prediction_differences(answers: Answers, pairs: list[tuple[str, str]]) -> pd.DataFrame:
    """How many test images two networks predict differently after the final epoch.

    Args:
        answers: The runs.
        pairs: Names of two settings, whose runs of equal seeds are compared; or one name twice:
            then each two seeds of that setting are, the baseline that gives the others a meaning.

    Returns:
        One row per pair that has runs to compare: `compared`, how many `pairs` of networks, and
        over these the `mean`, `fewest` and `most` images predicted differently.
    """
    ids = answers.by_setting("run_id")
    rows = []
    for one, other in pairs:
        if one not in ids or other not in ids:
            continue
        together = ids[[one, other]].dropna()
        networks = zip(together[one], together[other], strict=True)
        both = combinations(ids[one].dropna(), 2) if one == other else networks
        images = [int((answers.late[a][-1] != answers.late[b][-1]).sum()) for a, b in both]
        if images:
            name = f"two seeds of {one}" if one == other else f"{one} and {other}, same seed"
            rows.append((name, len(images), float(np.mean(images)), min(images), max(images)))
    return pd.DataFrame(rows, columns=["compared", "pairs", "mean", "fewest", "most"])
