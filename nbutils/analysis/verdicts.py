"""The claims of the blog post, each put to the runs: what they show, and whether it holds."""

from __future__ import annotations

import pandas as pd

from nbutils.analysis.effects import MARGIN, Answers, lead
from nbutils.analysis.kaggle_claim import KaggleRuns, kaggle_verdicts
from nbutils.analysis.outcomes import setting_name
from nbutils.analysis.size_claims import CONFIRMING, size_verdicts
from nbutils.analysis.verdict import Verdict

SAME_MEMORY = 1.25
"""Peaks of memory within this ratio count as the same: the allocator's holes vary as much. Fixed
after first measurements."""


def all_verdicts(
    answers: Answers,
    normalisation: Answers,
    kaggle: KaggleRuns,
    cost: pd.DataFrame,
    confirming: int | None = CONFIRMING,
) -> list[Verdict]:
    """The verdicts on all claims.

    Args:
        answers: Of the study `batch-size`.
        normalisation: Of the study `normalisation`.
        kaggle: Of the study `kaggle-split`, and what tuned its rates.
        cost: The table of the study `cost`, from `nbutils.measure.cost.measure_grid`.
        confirming: As in `size_verdicts`.
    """
    return [
        *size_verdicts(answers, confirming),
        norm_verdict(normalisation),
        *kaggle_verdicts(kaggle),
        memory_verdict(cost),
    ]


def norm_verdict(answers: Answers) -> Verdict:
    """The verdict on BatchNorm under accumulation, from the study `normalisation`."""
    batch = answers.only(answers.runs["norm"] == "batch")
    whole, *cuts = batch.outcomes.sort_values("batch_size", ascending=False)["setting"].unique()
    gaps = {cut: lead(batch, cut, whole) for cut in cuts}
    smallest = cuts[-1]
    harmed = [cut for cut, gap in gaps.items() if gap.high < 0 and not gap.negligible]
    gap = gaps[harmed[0]] if harmed else gaps[smallest]
    if harmed:
        harm = f"harm holds from {harmed[0]} on: {gap.bound}"
    elif gap.low > -MARGIN:
        harm = f"harm fails down to {smallest}: {gap.bound}"
    else:
        harm = f"harm open at {smallest}: {gap.bound}"
    every = "; ".join(f"{cut}: {each}" for cut, each in gaps.items())
    first = batch.outcomes.iloc[0]
    return Verdict(
        "6",
        "BatchNorm works per micro-batch, so accumulation needs GroupNorm.",
        f"BatchNorm, {smallest} less {whole}: {gaps[smallest]}",
        f"holds for the statistics; {harm}",
        f"That BatchNorm takes its statistics per micro-batch is exact (07_normalisation). What "
        f"it costs, after {first['epoch']} epochs at learning rate {first['learning_rate']:g}, "
        f"each less {whole}: {every}.",
    )


def memory_verdict(cost: pd.DataFrame) -> Verdict:
    """The verdict on memory, from the table of the study `cost`."""
    memory, seconds = (
        cost.pivot_table(index="repeat", columns=["batch_size", "accumulation_steps"], values=name)
        for name in ("peak_memory", "seconds_per_update")
    )
    parts, fits, fails, bounds = [], [], [], []
    for batch_size, steps in ((128, 8), (32, 32)):
        cut = batch_size, steps
        small, large = memory[cut] / memory[batch_size, 1], memory[cut] / memory[1024, 1]
        slower = seconds[cut] / seconds[1024, 1]
        parts.append(
            f"{setting_name(*cut)} takes {_ratio(small)} times the peak memory of {batch_size}, "
            f"{_ratio(large)} times that of 1024, and {_ratio(slower)} times the time of 1024"
        )
        bounds.append(
            f"{setting_name(*cut)} at most {small.max():.2f} times {batch_size} and "
            f"{large.max():.2f} times 1024"
        )
        fits.append(small.max() < SAME_MEMORY and large.max() < 1 / SAME_MEMORY)
        fails.append(small.min() >= SAME_MEMORY or large.min() >= 1 / SAME_MEMORY)
    word = "holds" if all(fits) else "fails" if any(fails) else "open"
    small, large = memory[128, 8] / memory[128, 1], memory[128, 8] / memory[1024, 1]
    return Verdict(
        "8",
        "Accumulation fits a large batch into the memory of a small one.",
        f"peak memory of 8 x 128: {_ratio(small)} times that of 128 (n = {len(memory)})",
        f"{word}: {bounds[0]}",
        f"{'; '.join(parts)} (median, lowest to highest of n = {len(memory)}). Measured on: "
        f"{', '.join(cost['device'].unique())}.",
    )


def _ratio(values: pd.Series) -> str:
    return f"{values.median():.2f} ({values.min():.2f} to {values.max():.2f})"
