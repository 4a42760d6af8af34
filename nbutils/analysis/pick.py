"""Which settings to take: those that are cheap enough, and how stable that answer is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from nbutils.analysis.effects import MARGIN, written_gaps
from nbutils.analysis.intervals import proportion_interval, student_quantile
from nbutils.analysis.outcomes import first_crossing, name_settings, outcomes
from nbutils.errors import InputError

TIE = 1.25  # times within 25 % of the least count as equal: those of one setting differ as much
STABLE = 0.8  # the share of resamples in which a setting must be among the cheapest to be named
RESAMPLES = 1000
FEWEST_SEEDS = 3  # from so many on, a share of resamples means something


@dataclass(frozen=True)
class Pick:
    """The settings to take, and why; see `pick`.

    `table` has one row per setting that has a time: mean `validation_accuracy`; its `difference`
    from the `best` one, paired by seed, with `low` and `high`; `qualifies`; `seconds` of training
    until the mean accuracy first reached `threshold` (the lower end of Wilson's interval of the
    best accuracy), NaN if it did not; and `share`, the resamples in which it is among the cheapest.
    `seeds` are those that all its settings share, `untimed` the settings whose time is not known.
    """

    table: pd.DataFrame
    best: str
    threshold: float
    seeds: int
    untimed: list[str]

    @property
    def stable(self) -> bool:
        """Whether there are enough seeds to say how stable the answer is."""
        return self.seeds >= FEWEST_SEEDS

    @property
    def settings(self) -> list[str]:
        """The settings to take, in their order. None, where none is stably among the cheapest."""
        return list(self.table.index[self.table["share"] >= (STABLE if self.stable else 1)])

    @property
    def answer(self) -> str:
        """One or two sentences: what to take, and how sure that is."""
        *first, last = self.settings or ["none"]
        named = f"{', '.join(first)} or {last}" if first else last
        if not self.stable:
            seeds = "one seed" if self.seeds == 1 else f"{self.seeds} seeds"
            return (
                f"A guess from {seeds}: {named}. Whether other seeds agree is not known; run "
                f"{FEWEST_SEEDS} or more, such as `--set seed=0,1,2,3,4`."
            )
        order = self.table["share"].sort_values(ascending=False, kind="stable")
        shown = order[self.settings] if self.settings else order.head(3)
        shares = ", ".join(f"{name}: {share:.0%}" for name, share in shown.items())
        if not self.settings:
            return (
                f"No setting is reliably among the fastest. In resamples of the {self.seeds} "
                f"seeds the most frequent are {shares}."
            )
        each = "It" if len(self.settings) == 1 else "Each"
        return (
            f"Take {named}. {each} is among the fastest in at least {STABLE:.0%} of "
            f"{RESAMPLES:,} resamples of the {self.seeds} seeds ({shares}); no other setting is."
        )

    def __str__(self) -> str:
        reached = f"{self.threshold:.2%} validation accuracy"
        left_out = f"clearly end more than {100 * MARGIN:.1f} points below the best"
        if self.seeds < 2:
            left_out = "end below it"
        untimed = f" Not timed: {', '.join(self.untimed)}." if self.untimed else ""
        return (
            f"{self.answer}\nThe fastest need at most {TIE - 1:.0%} more training time than the "
            f"least to reach {reached}. That is the lower end of the 95 % interval over images of "
            f"the best setting, {self.best}. Settings that {left_out} are left out.{untimed}"
        )


def pick(runs: pd.DataFrame, seconds: Mapping[str, float] | None = None) -> Pick:
    """The settings that reach a good validation accuracy in the least training time.

    A setting qualifies unless its seeds show that it ends more than `MARGIN` below the best, by the
    95 % interval of the paired difference. Of these, the ones within `TIE` of the least time are
    the cheapest. This is repeated for resamples of the seeds, which name what is among the cheapest
    in `STABLE` of them. Test accuracy plays no part. The rule was chosen on the first five seeds of
    `batch-size`, and is not confirmed on fresh ones alone.

    `seconds` per epoch are as in `summary_table`; InputError where they have no setting of `runs`.
    """
    final, curves = name_settings(outcomes(runs)), name_settings(runs)
    every = [str(setting) for setting in final["setting"].unique()]
    fastest = (final["seconds"] / final["epoch"]).groupby(final["setting"]).min()
    timed = pd.Series(fastest if seconds is None else seconds, dtype=float)
    settings = [setting for setting in every if setting in timed]
    if not settings:
        raise InputError(f"seconds has {', '.join(timed.index)}, but no setting of the runs")
    ends = final.pivot_table(index="seed", columns="setting", values="validation_accuracy")
    ends = ends[settings]
    if ends.dropna().empty:  # no seed has all settings: compare their means, as one seed
        ends, curves = ends.mean().to_frame().T, curves.assign(seed=0)
    ends = ends.dropna()
    by_epoch = curves.pivot_table(
        index="seed", columns=["setting", "epoch"], values="validation_accuracy"
    ).loc[ends.index]
    errors = [1 - by_epoch[setting].to_numpy() for setting in settings]
    cost = timed[settings].to_numpy()
    images = int(runs["validation_images"].iloc[0])
    values = ends.to_numpy()
    columns, threshold = _judge(values, errors, cost, images)
    table = pd.DataFrame(columns, index=pd.Index(settings, name="setting"))
    if len(values) >= FEWEST_SEEDS:
        drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
        judged = (_judge(values[d], [e[d] for e in errors], cost, images)[0] for d in drawn)
        table["share"] = np.mean([each["share"] for each in judged], axis=0)
    untimed = [setting for setting in every if setting not in timed]
    return Pick(table, str(table["validation_accuracy"].idxmax()), threshold, len(values), untimed)


def _judge(
    ends: np.ndarray, errors: list[np.ndarray], cost: np.ndarray, images: int
) -> tuple[dict[str, np.ndarray], float]:
    """The columns of the table of a `Pick` from these seeds alone, and its threshold.

    `ends` are outcomes, shape (seeds, settings); of each setting `errors` are (seeds, epochs), and
    `cost` the seconds per epoch.
    """
    means, seeds = ends.mean(axis=0), len(ends)
    gaps = ends - ends[:, [means.argmax()]]
    difference, half = gaps.mean(axis=0), np.full(len(means), math.nan)
    threshold = proportion_interval(float(means.max()), images)[0]
    qualifies = means >= threshold
    if seeds > 1:
        half = student_quantile(seeds - 1) * gaps.std(axis=0, ddof=1) / math.sqrt(seeds)
        qualifies = difference + half >= -MARGIN
    epochs = np.array([first_crossing(each.mean(axis=0), 1 - threshold) for each in errors])
    seconds = np.where(qualifies, epochs * cost, math.nan)
    table = {
        "validation_accuracy": means,
        "difference": difference,
        "low": difference - half,
        "high": difference + half,
        "qualifies": qualifies,
        "seconds": seconds,
        "share": (seconds <= TIE * np.nanmin(seconds)).astype(float),
    }
    return table, threshold


def format_pick(choice: Pick) -> pd.DataFrame:
    """The table of a `Pick` for reading."""
    table = choice.table
    seconds = table["seconds"].map("{:.0f}".format).mask(table["seconds"].isna(), "never")
    shown = {
        "validation accuracy": table["validation_accuracy"].map("{:.2%}".format),
        f"minus {choice.best}, points (95 %)": written_gaps(table, choice.best, "best"),
        f"s to {choice.threshold:.2%}": seconds.where(table["qualifies"], "ends too low"),
    }
    if choice.stable:
        shown["among the fastest"] = table["share"].map("{:.0%}".format)
    return pd.DataFrame(shown)


def quiet_seconds(path: Path) -> dict[str, float]:
    """Seconds per epoch of each setting, from the JSON rows of `python -m nbutils bench`."""
    return {row["setting"]: float(row["seconds"]) for row in json.loads(path.read_text())}
