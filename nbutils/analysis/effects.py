"""How much settings differ: paired by seed and by test image, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from nbutils.analysis.intervals import crossed_interval, mean_interval
from nbutils.analysis.outcomes import late_epochs, name_settings, outcomes
from nbutils.errors import InputError
from nbutils.studies.record import read_runs

MARGIN = 0.001
"""Accuracies that differ by less count as equal: 0.1 points, 10 images of 10,000."""


@dataclass(frozen=True)
class Answers:
    """The runs of a study, from `load_runs`, and what their networks answered to the test images.

    `labels` are uint8, shape (n,), or (0,) where they are unknown; `late` the predictions of each
    run after its last epochs, uint8, shape (k, n), by its id.
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
    runs = read_runs(folder)
    return Answers(runs.tidy, runs.labels, runs.predictions)


@dataclass(frozen=True)
class Effect:
    """A mean difference, as a fraction, with its 95 % interval: NaN for fewer than two seeds."""

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
        if self.seeds < 2:
            return f"{points(self.mean)} points in one seed, no interval"
        return f"between {points(self.low)} and {points(self.high)} points"

    def __str__(self) -> str:
        known = self.seeds > 1
        interval = f"{points(self.low)} to {points(self.high)}, n = {self.seeds}"
        return f"{points(self.mean)} points ({interval if known else 'n = 1: no interval'})"


def points(fraction: float) -> str:
    """A difference of accuracies in percentage points, such as "+0.12"."""
    return f"{round(100 * fraction, 2) + 0:+.2f}"  # + 0 turns -0.0 into 0.0


def written_gaps(table: pd.DataFrame, reference: str, name: str) -> pd.Series:
    """How a table for reading shows `difference`, `low` and `high` from the row `reference`."""
    mean, low, high = (table[column].map(points) for column in ("difference", "low", "high"))
    interval = (low + " to " + high).mask(table["low"].isna(), "one seed")
    shown = (mean + " (" + interval + ")").mask(table["difference"].isna(), "no seed in common")
    return shown.mask(table.index == reference, name)


def effect(answers: Answers, weights: Mapping[str, float], metric: str = "test_accuracy") -> Effect:
    """A weighted sum of the outcomes of some settings, by name, paired by seed.

    The interval of a test accuracy is that of `crossed_interval`, with the predictions of the late
    epochs that were kept (older records have the final ones alone). That of another metric, or
    where labels are unknown, is Student's, for other seeds only. InputError without a common seed.
    """
    ids = answers.by_setting("run_id").reindex(columns=list(weights)).dropna()
    if ids.empty:
        raise InputError(f"no seed has runs of all of {', '.join(weights)}")
    values = answers.by_setting(metric).loc[ids.index, list(weights)]
    per_seed = values.to_numpy(float) @ np.array(list(weights.values()))
    mean, seeds = float(per_seed.mean()), len(per_seed)
    if metric != "test_accuracy" or len(answers.labels) == 0:
        return Effect(mean, *mean_interval(per_seed), seeds)
    epochs = answers.outcomes.set_index("run_id")["epoch"].map(late_epochs)
    per_image = np.zeros((seeds, len(answers.labels)))
    for setting, weight in weights.items():
        for row, run_id in enumerate(ids[setting]):
            right = answers.late[run_id][-epochs[run_id] :] == answers.labels
            per_image[row] += weight * right.mean(axis=0)
    low, high, detectable = crossed_interval(per_image, per_seed)
    return Effect(mean, low, high, seeds, detectable)


def lead(answers: Answers, one: str, other: str, metric: str = "test_accuracy") -> Effect:
    """The outcome of one setting minus that of another, by their names; see `effect`."""
    return effect(answers, {one: 1, other: -1}, metric)


def prediction_differences(answers: Answers, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """How many test images two networks predict differently after the final epoch.

    Of each pair of settings, runs of equal seeds are compared; of one name twice, each two seeds
    of it. One row per pair that has such runs: `compared`, how many `pairs` of networks, and the
    `mean`, `fewest` and `most` images over them.
    """
    ids = answers.by_setting("run_id")
    rows = []
    for one, other in pairs:
        together = ids.reindex(columns=[one, other]).dropna().to_numpy()
        both = combinations(together[:, 0], 2) if one == other else together
        images = [int((answers.late[a][-1] != answers.late[b][-1]).sum()) for a, b in both]
        if images:
            name = f"two seeds of {one}" if one == other else f"{one} and {other}, same seed"
            rows.append((name, len(images), float(np.mean(images)), min(images), max(images)))
    return pd.DataFrame(rows, columns=["compared", "pairs", "mean", "fewest", "most"])
