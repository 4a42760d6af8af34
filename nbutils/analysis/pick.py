"""Which settings to take: those that are cheap enough, and how stable that answer is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from nbutils.analysis.effects import MARGIN, written_gaps
from nbutils.analysis.intervals import mean_interval, proportion_interval
from nbutils.analysis.outcomes import first_crossing, name_settings, outcomes
from nbutils.errors import InputError

TIE = 1.25  # times within 25 % of the least count as equal: those of one setting differ as much
STABLE = 0.8  # the share of resamples in which a setting must be among the cheapest to be named
RESAMPLES = 1000
FEWEST_SEEDS = 3  # from so many on, a share of resamples means something


@dataclass(frozen=True)
class Pick:
    """The settings to take, and why; see `pick`.

    `table` has one row per setting: mean `validation_accuracy`; its `difference` from that of the
    `best` one, paired by seed, with `low` and `high`; `qualifies`; `seconds` of training until the
    mean accuracy first reached `threshold`, the lower end of Wilson's interval of the best one, or
    NaN; and `share`, the resamples in which it is among the cheapest. `seeds` are those that all
    its settings share, `untimed` the settings whose time is not known and which it lacks.
    """

    table: pd.DataFrame
    best: str
    threshold: float
    seeds: int
    untimed: list[str]

    @property
    def settings(self) -> list[str]:
        """The settings to take, in their order. None, where none is stably among the cheapest."""
        return list(self.table.index[self.table["share"] >= STABLE])

    @property
    def answer(self) -> str:
        """One or two sentences: what to take, and how sure that is."""
        *first, last = self.settings or ["none"]
        named = f"{', '.join(first)} or {last}" if first else last
        if self.seeds < FEWEST_SEEDS:
            seeds = "one seed" if self.seeds == 1 else f"{self.seeds} seeds"
            return (
                f"A guess from {seeds}: {named}. Whether other seeds agree is not known; run "
                f"{FEWEST_SEEDS} or more, such as `--set seed=0,1,2,3,4`."
            )
        share = self.table["share"]
        shown = share[self.settings] if self.settings else share.nlargest(3)
        shares = ", ".join(f"{name}: {share:.0%}" for name, share in shown.items())
        if not self.settings:
            return (
                f"No setting is reliably among the fastest. In resamples of the {self.seeds} "
                f"seeds the most frequent are {shares}."
            )
        return (
            f"Take {named}. {'Each' if first else 'It'} is among the fastest in at least "
            f"{STABLE:.0%} of {RESAMPLES:,} resamples of the {self.seeds} seeds ({shares}); no "
            f"other setting is."
        )

    def __str__(self) -> str:
        left_out = "end below it"
        if self.seeds > 1:
            left_out = f"clearly end more than {100 * MARGIN:.1f} points below the best"
        untimed = f" Not timed: {', '.join(self.untimed)}." if self.untimed else ""
        return (
            f"{self.answer}\nThe fastest need at most {TIE - 1:.0%} more training time than the "
            f"least to reach {self.threshold:.2%} validation accuracy. That is the lower end of "
            f"the 95 % interval over images of the best setting, {self.best}. Settings that "
            f"{left_out} are left out.{untimed}"
        )


def pick(runs: pd.DataFrame, seconds: Mapping[str, float] | None = None) -> Pick:
    """The settings that reach a good validation accuracy in the least training time.

    A setting qualifies unless it ends more than `MARGIN` below the best, by the 95 % interval of
    the difference paired by seed. Of these, the ones within `TIE` of the least time are the
    cheapest. Those that are so in `STABLE` of the resamples of the seeds are named. The rule was
    chosen on the first five seeds of `batch-size`, and is not confirmed on fresh ones alone.

    `seconds` per epoch are as in `summary_table`; InputError where they have no setting of `runs`.
    """
    final = name_settings(outcomes(runs))
    every = final["setting"].unique().tolist()
    fastest = (final["seconds"] / final["epoch"]).groupby(final["setting"]).min()
    timed = pd.Series(fastest if seconds is None else seconds, dtype=float)
    settings = [setting for setting in every if setting in timed]
    if not settings:
        raise InputError(f"seconds has {', '.join(timed.index)}, but no setting of the runs")
    ends = final.pivot_table(index="seed", columns="setting", values="validation_accuracy")
    ends = ends[settings].dropna()
    if ends.empty:  # no seed has all settings: compare their means, as one seed
        return pick(runs.assign(seed=0), seconds)
    curves = name_settings(runs).pivot_table(
        index="seed", columns=["setting", "epoch"], values="validation_accuracy"
    )
    errors = [1 - curves.loc[ends.index, setting].to_numpy() for setting in settings]
    cost = timed[settings].to_numpy()
    images, values = int(runs["validation_images"].iloc[0]), ends.to_numpy()
    columns, threshold = _judge(values, errors, cost, images)
    table = pd.DataFrame(columns, index=pd.Index(settings, name="setting"))
    if len(values) >= FEWEST_SEEDS:
        drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
        judged = (_judge(values[d], [e[d] for e in errors], cost, images)[0] for d in drawn)
        table["share"] = np.mean([each["share"] for each in judged], axis=0)
    best = str(table["validation_accuracy"].idxmax())
    return Pick(table, best, threshold, len(values), [each for each in every if each not in timed])


def _judge(
    ends: np.ndarray, errors: list[np.ndarray], cost: np.ndarray, images: int
) -> tuple[dict[str, np.ndarray], float]:
    """The columns of the table of a `Pick` from these seeds alone, and its threshold.

    `ends` are (seeds, settings), the `errors` of each setting (seeds, epochs), `cost` s/epoch.
    """
    means = ends.mean(axis=0)
    gaps = ends - ends[:, [means.argmax()]]
    low, high = mean_interval(gaps)
    threshold = proportion_interval(float(means.max()), images)[0]
    qualifies = high >= -MARGIN if len(ends) > 1 else means >= threshold
    epochs = np.array([first_crossing(each.mean(axis=0), 1 - threshold) for each in errors])
    seconds = np.where(qualifies, epochs * cost, np.nan)
    table = {
        "validation_accuracy": means,
        "difference": gaps.mean(axis=0),
        "low": low,
        "high": high,
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
    if choice.seeds >= FEWEST_SEEDS:
        shown["among the fastest"] = table["share"].map("{:.0%}".format)
    return pd.DataFrame(shown)


def quiet_seconds(path: Path) -> dict[str, float]:
    """Seconds per epoch of each setting, from the JSON rows of `python -m nbutils bench`."""
    return {row["setting"]: float(row["seconds"]) for row in json.loads(path.read_text())}
