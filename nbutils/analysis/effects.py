"""How much settings differ: paired by seed and by test image, each with its interval."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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

MARGIN = 0.001  # accuracies that differ by less count as equal: 10 images of 10,000


@dataclass(frozen=True)
class Answers:
    """The runs of a study, from `load_runs`, and what their networks answered to the test images.

    `labels` are uint8, shape (n,), or (0,) where they are unknown; `late` the predictions of each
    run after its `late_epochs` (older records: after the final one), uint8, shape (k, n), by id.
    """

    runs: pd.DataFrame
    labels: np.ndarray
    late: Mapping[str, np.ndarray]

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """One row per run: its outcome, with its `setting`."""
        return name_settings(outcomes(self.runs))

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """The final predictions of each run, uint8, shape (n,)."""
        return {run_id: late[-1] for run_id, late in self.late.items()}

    def by_setting(self, column: str) -> pd.DataFrame:
        """One row per seed, one column per setting: a column of `outcomes`, or NaN."""
        # pivot_table would lose a setting whose values are all missing.
        wide = self.outcomes.pivot(index="seed", columns="setting", values=column)  # noqa: PD010
        return wide[self.outcomes["setting"].unique()]


def load_answers(folder: str | Path) -> Answers:
    """Those of a folder of runs, or of a reference."""
    runs = read_runs(folder)
    epochs = runs.tidy.groupby("run_id")["epochs"].first().map(late_epochs)
    late = {run_id: each[-epochs[run_id] :] for run_id, each in runs.predictions.items()}
    return Answers(runs.tidy, runs.labels, late)


def points(fraction: float) -> str:
    """A difference of accuracies in percentage points, such as "+0.12"."""
    return f"{round(100 * fraction, 2) + 0:+.2f}"  # + 0 turns -0.0 into 0.0


@dataclass(frozen=True)
class Effect:
    """A mean difference with its 95 % interval, NaN for one seed; of accuracies, as fractions."""

    mean: float
    low: float
    high: float
    seeds: int
    detectable: float = math.nan

    @classmethod
    def of_seeds(cls, values: Sequence[float] | np.ndarray | pd.Series) -> Self:
        """That of independent values, one per seed, with Student's interval."""
        return cls(float(np.mean(values)), *mean_interval(values), len(values))

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

    def written(self, number: Callable[[float], str] = points, unit: str = "") -> str:
        """Mean, interval and seeds, each value as `number` writes it."""
        interval = f"{number(self.low)} to {number(self.high)}, n = {self.seeds}"
        return f"{number(self.mean)}{unit} ({interval if self.seeds > 1 else 'n = 1: no interval'})"

    def __str__(self) -> str:
        return self.written(unit=" points")


def written_gaps(table: pd.DataFrame, reference: str, name: str) -> pd.Series:
    """How a table for reading shows `difference`, `low` and `high` from the row `reference`."""
    mean, low, high = (table[column].map(points) for column in ("difference", "low", "high"))
    interval = (low + " to " + high).mask(table["low"].isna(), "one seed")
    shown = (mean + " (" + interval + ")").mask(table["difference"].isna(), "no seed in common")
    return shown.mask(table.index == reference, name)


def effect(answers: Answers, weights: Mapping[str, float], metric: str = "test_accuracy") -> Effect:
    """A weighted sum of the outcomes of some settings, by name, paired by seed.

    The interval is that of `crossed_interval` for a test accuracy with known labels, else Student's
    for other seeds only. InputError without a common seed.
    """
    ids = answers.by_setting("run_id").reindex(columns=list(weights)).dropna()
    if ids.empty:
        raise InputError(f"no seed has runs of all of {', '.join(weights)}")
    values = answers.by_setting(metric).loc[ids.index, list(weights)]
    per_seed = values.to_numpy(float) @ np.array(list(weights.values()))
    if metric != "test_accuracy" or len(answers.labels) == 0:
        return Effect.of_seeds(per_seed)
    per_image = np.zeros((len(ids), len(answers.labels)))
    for setting, weight in weights.items():
        right = [(answers.late[run_id] == answers.labels).mean(axis=0) for run_id in ids[setting]]
        per_image += weight * np.stack(right)
    low, high, detectable = crossed_interval(per_image, per_seed)
    return Effect(float(per_seed.mean()), low, high, len(ids), detectable)


def lead(answers: Answers, one: str, other: str, metric: str = "test_accuracy") -> Effect:
    """The outcome of one setting minus that of another; see `effect`."""
    return effect(answers, {one: 1, other: -1}, metric)


def prediction_differences(answers: Answers, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """How many test images two networks predict differently after the final epoch.

    Of two settings, runs of equal seeds are compared; of one name twice, each two seeds of it. One
    row per pair that has such runs: `compared`, how many `pairs` of networks, and the `mean`,
    `fewest` and `most` images over them.
    """
    ids, final, rows = answers.by_setting("run_id"), answers.predictions, []
    for one, other in pairs:
        together = ids.reindex(columns=[one, other]).dropna().to_numpy()
        both = combinations(together[:, 0], 2) if one == other else together
        images = [int((final[a] != final[b]).sum()) for a, b in both]
        if images:
            name = f"two seeds of {one}" if one == other else f"{one} and {other}, same seed"
            rows.append((name, len(images), np.mean(images), min(images), max(images)))
    return pd.DataFrame(rows, columns=["compared", "pairs", "mean", "fewest", "most"])
