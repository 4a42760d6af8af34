"""What a run came to, and what its setting is called."""

import math

import numpy as np
import pandas as pd

from nbutils.training.config import RunConfig

# The outcome of a run is the mean of this many last epochs, since single late epochs jitter: in the
# first five seeds of `batch-size` by 84 % of the variance between seeds of (1024 less 32). The rule
# was chosen after these seeds were known: see `CONFIRMING` in `claims`.
LAST_EPOCHS = 5
METRICS = ["train_loss", "train_accuracy", "validation_accuracy", "test_loss", "test_accuracy"]


def late_epochs(epochs: int) -> int:
    """How many last epochs the outcome of a run takes: `LAST_EPOCHS`, but at most a quarter."""
    return max(1, min(LAST_EPOCHS, epochs // 4))


def last_epochs(runs: pd.DataFrame) -> pd.DataFrame:
    """The row of the last epoch of each run."""
    return runs[runs["epoch"] == runs.groupby("run_id")["epoch"].transform("max")]


def outcomes(runs: pd.DataFrame) -> pd.DataFrame:
    """The last epoch of each run, with `METRICS` the means of its late ones, or NaN if one is."""
    epochs = runs.groupby("run_id")["epoch"].transform("max")
    late = runs[runs["epoch"] > epochs - epochs.map(late_epochs)]
    means = late.groupby("run_id")[METRICS].mean(skipna=False)
    return last_epochs(runs).drop(columns=METRICS).merge(means, on="run_id")[runs.columns]


def setting_name(batch_size: int, accumulation_steps: int) -> str:
    """How a setting is written everywhere: "128", or "8 x 128" (steps x images)."""
    return f"{batch_size}" if accumulation_steps == 1 else f"{accumulation_steps} x {batch_size}"


def varying(runs: pd.DataFrame) -> list[str]:
    """The fields of `RunConfig` that vary, but for batch size, accumulation steps and seed."""
    fields = runs.columns.intersection(RunConfig.field_names())
    others = fields.difference(["batch_size", "accumulation_steps", "seed"], sort=False)
    return [name for name in others if len(runs[name].dropna().unique()) > 1]


def name_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` in the order to be shown, with a column `setting`, such as "8 x 128, norm group"."""
    fields = varying(runs)
    order = ["effective_batch_size", "accumulation_steps", *fields, "seed", "epoch"]
    named = runs.sort_values(order, ignore_index=True)
    setting = named["batch_size"].combine(named["accumulation_steps"], setting_name)
    for field in fields:
        setting += f", {field} " + named[field].map(str)
    return named.assign(setting=setting)


def first_crossing(errors: np.ndarray, target: float) -> float:
    """Epochs until an error after an epoch is at most `target`, or NaN; 1 is an upper bound.

    Between epochs the logarithm of the error falls evenly.
    """
    reached = np.flatnonzero(errors <= target)
    if len(reached) == 0:
        return math.nan
    last = int(reached[0])
    if last == 0:
        return 1.0
    above = math.log(errors[last - 1] / target)
    below = math.log(target / max(errors[last], target / 100))  # an error of 0 has no logarithm
    return last + above / (above + below)
