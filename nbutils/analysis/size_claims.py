"""The post's first five claims, about batch size and accumulation alone, on any dataset.

A verdict follows from 95 % intervals of differences between outcomes, by rules that were fixed
before the runs that it judges, see `CONFIRMING`. It begins with "holds", "fails" or "open" and
always says how large the difference can be. Differences count as none if the whole interval lies
within `nbutils.analysis.effects.MARGIN`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from nbutils.analysis.effects import (
    MARGIN,
    Answers,
    Effect,
    effect,
    lead,
    points,
    prediction_differences,
)
from nbutils.analysis.intervals import mean_interval
from nbutils.analysis.verdict import Verdict
from nbutils.training.config import RunConfig

CONFIRMING = 5
"""First seed of `batch-size` that was run after the rules were fixed. Earlier ones suggested the
rule of `nbutils.analysis.outcomes.LAST_EPOCHS`, so they cannot confirm it."""

TARGETS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.992, 0.995, 0.998)
"""Validation accuracies whose first reaching is timed; see `target_accuracy`."""


def size_verdicts(answers: Answers, confirming: int | None = None) -> list[Verdict]:
    """The verdicts on the claims about batch size and accumulation alone, on any dataset.

    Args:
        answers: Of a study like `batch-size`, see `can_be_judged`.
        confirming: The first seed that was run after the rules were fixed. Where two or more such
            seeds have all settings, they alone are judged; see `confirmation_table` for the
            earlier ones. None judges all seeds.
    """
    judged = list(split_seeds(answers, confirming).values())[-1]
    return [_rises(judged), _best(judged), _faster(judged), _generalises(judged), _same(judged)]


def split_seeds(answers: Answers, confirming: int | None) -> dict[str, Answers]:
    """The seeds before `confirming`, and those from it on, by their names.

    All seeds together where fewer than two seeds from `confirming` on have all settings, and the
    later ones alone where no earlier seed has.
    """
    complete = answers.by_setting("run_id").dropna().index
    if confirming is None or (complete >= confirming).sum() < 2:
        return {_seed_range(answers.runs["seed"]): answers}
    later = answers.runs["seed"] >= confirming
    parts = [answers.only(~later)] if (complete < confirming).any() else []
    return {_seed_range(part.runs["seed"]): part for part in (*parts, answers.only(later))}


def _seed_range(seeds: pd.Series) -> str:
    first, last = seeds.min(), seeds.max()
    return f"seeds {first} to {last}" if first < last else f"seed {first}"


def confirmation_table(answers: Answers, confirming: int = CONFIRMING) -> pd.DataFrame:
    """The effects of claims 1, 2, 4 and 5 in points, earlier seeds beside the confirming ones.

    Returns:
        One row per effect, one column per part of `split_seeds`.
    """
    columns = {}
    for name, part in split_seeds(answers, confirming).items():
        sizes = _whole_sizes(part)
        columns[name] = {
            f"1: from {sizes[0]} to {sizes[-1]}, by the fitted line": str(fitted_change(part)),
            "2: 1024 less 512": str(lead(part, "1024", "512")),
            "4: 1024 less 32": str(lead(part, "1024", "32")),
            "5: 8 x 128 less 1024": str(lead(part, "8 x 128", "1024")),
        }
    table = pd.DataFrame(columns).rename_axis("claim and effect")
    return table.map(lambda text: text.replace(" points", ""))


def can_be_judged(runs: pd.DataFrame) -> bool:
    """Whether `runs` have the settings that `size_verdicts` compares, all else equal and known."""
    held = set(zip(runs["batch_size"], runs["accumulation_steps"], strict=True))
    varied = {"batch_size", "accumulation_steps", "seed"}
    fixed = [name for name in RunConfig.field_names() if name not in varied and name in runs]
    equal = all(len(runs[name].dropna().unique()) <= 1 for name in fixed)
    known = bool(runs["test_accuracy"].notna().all())
    return {(32, 1), (512, 1), (1024, 1), (128, 8)} <= held and equal and known


def target_accuracy(runs: pd.DataFrame) -> float | None:
    """The highest of `TARGETS` that every run reaches, and none before its second epoch.

    What is reached within the first epoch does not show after how many updates. None where no
    target is such.
    """
    first = runs.loc[runs["epoch"] == 1, "validation_accuracy"].max()
    least = runs.groupby("run_id")["validation_accuracy"].max().min()
    return max((target for target in TARGETS if first < target <= least), default=None)


def _whole_sizes(answers: Answers) -> list[int]:
    """The batch sizes without accumulation."""
    runs = answers.runs
    return sorted({int(size) for size in runs.loc[runs["accumulation_steps"] == 1, "batch_size"]})


def _means(answers: Answers, metric: str) -> str:
    means = answers.by_setting(metric).mean()
    return ", ".join(f"{setting}: {mean:.2%}" for setting, mean in means.items())


def fitted_change(answers: Answers) -> Effect:
    """Change of test accuracy from the smallest batch to the largest, by the least-squares line.

    The line is over the logarithm of the batch size; its slope is a weighted sum of accuracies.
    """
    sizes = _whole_sizes(answers)
    doublings = np.log2(sizes)
    apart = doublings - doublings.mean()
    weights = apart / (apart**2).sum() * (doublings.max() - doublings.min())
    ids = answers.by_setting("run_id")
    return effect(answers, ids, dict(zip(map(str, sizes), weights, strict=True)))


def _rises(answers: Answers) -> Verdict:
    change, sizes = fitted_change(answers), _whole_sizes(answers)
    if change.low > 0 and not change.negligible:
        word = "holds: accuracy rises by"
    elif change.high < MARGIN:
        word = f"fails: from {sizes[0]} to {sizes[-1]} it changes by"
    else:
        word = "open:"
    detectable = f"{100 * change.detectable:.2f} points" if change.seeds > 1 else "unknown"
    return Verdict(
        "1",
        "With all else equal, accuracy rises with the batch size.",
        f"from {sizes[0]} to {sizes[-1]} images: {change}",
        f"{word} {change.bound}",
        f"The change is that of a least-squares line over the logarithm of the batch size. Mean "
        f"test accuracies: {_means(answers, 'test_accuracy')}. Minimum detectable change, found "
        f"with a probability of 80 %: {detectable}.",
    )


def _best(answers: Answers) -> Verdict:
    near = lead(answers, "1024", "512")
    others = {s: lead(answers, s, "512") for s in map(str, _whole_sizes(answers)) if s != "512"}
    as_good = [setting for setting, gap in others.items() if gap.low > -MARGIN]
    if near.negligible:
        margin = f"holds for the margin: {near.bound}"
    elif near.low >= MARGIN or near.high <= -MARGIN:
        margin = f"fails for the margin: {near.bound}"
    else:
        margin = f"open for the margin: {near.bound}"
    if as_good:
        best = f"fails for the best: as good as 512 {_are(as_good)}"
    elif all(gap.high < 0 for gap in others.values()):
        best = "holds for the best"
    elif near.seeds < 2:
        best = "open for the best"
    else:
        most = max(gap.high for gap in others.values())
        best = f"open for the best: others lead by at most {points(most)} points"
    leads = "; ".join(f"{setting}: {gap}" for setting, gap in others.items())
    return Verdict(
        "2",
        "512 is within a small margin of 1024, so it is the best choice.",
        f"1024 less 512: {near}",
        f"{margin}; {best}",
        f"A margin of {100 * MARGIN:.1f} points counts as small, and a size is as good as 512 if "
        f"its interval lies above -{100 * MARGIN:.1f} points. Each less 512: {leads}.",
    )


def _are(names: list[str]) -> str:
    return f"is {names[0]}" if len(names) == 1 else f"are {', '.join(names)}"


def _faster(answers: Answers) -> Verdict:
    claim = "3", "Small batches converge faster."
    pair = (answers.runs["accumulation_steps"] == 1) & answers.runs["batch_size"].isin([32, 1024])
    runs = answers.runs[pair]
    target = target_accuracy(runs)
    if target is None:
        ends = runs.groupby("batch_size")["validation_accuracy"].max()
        bound = f"32 gets to {ends[32]:.1%} and 1024 to {ends[1024]:.1%}"
        return Verdict(
            *claim, bound, f"open: {bound}, with no target between", "No target can be compared."
        )
    reached = runs[runs["validation_accuracy"] >= target]
    first = reached.pivot_table(
        index="seed", columns="batch_size", values=["epoch", "updates"], aggfunc="min"
    ).dropna()
    epochs, updates = first["epoch"], first["updates"]
    gap = epochs[1024] - epochs[32]
    low, high = mean_interval(gap.tolist())
    # 32 may have reached it at any update since the epoch before.
    earliest = updates[32] * (1 - 1 / epochs[32])
    fewer = float(mean_interval((earliest - updates[1024]).tolist())[0])
    counted = (
        f"32 needs {earliest.mean():,.0f} to {updates[32].mean():,.0f} updates, 1024 at most "
        f"{updates[1024].mean():,.0f}"
    )
    if len(gap) < 2:
        verdict = f"open: {gap.iloc[0]:+.0f} epochs in one seed, no interval; {counted}"
    elif low > 0:
        verdict = f"holds in epochs: 32 needs {low:.1f} to {high:.1f} fewer"
    elif high < 0:
        verdict = f"fails: 32 needs {-high:.1f} to {-low:.1f} epochs more"
    else:
        verdict = f"open in epochs: 1024 needs {low:+.1f} to {high:+.1f} more"
    if fewer > 0:
        verdict += f"; the other way round in updates: {counted}"
    elif len(gap) > 1:
        verdict += f"; open in updates: {counted}"
    return Verdict(
        *claim,
        f"epochs to {target:.1%} validation accuracy: {epochs[32].mean():.1f} with 32, "
        f"{epochs[1024].mean():.1f} with 1024 (n = {len(gap)})",
        verdict,
        f"{target:.1%} is the highest of the targets that every run of 32 and 1024 reaches, and "
        f"none in its first epoch. Accuracy is judged after each epoch, so updates are known to "
        f"within one epoch: {counted}.",
    )


def _generalises(answers: Answers) -> Verdict:
    gap = lead(answers, "1024", "32")
    fit = lead(answers, "1024", "32", "train_accuracy")
    losses = {kind: answers.by_setting(f"{kind}_loss").mean() for kind in ("train", "test")}
    if gap.low > -MARGIN:
        verdict = f"fails up to 1024: it changes by {gap.bound}"
    elif gap.high < 0 and fit.high < 0:
        verdict = (
            f"open: 1024 scores lower by {gap.bound}, but fits the training images less well too"
        )
    elif gap.high < 0:
        verdict = f"holds: it changes by {gap.bound}"
    else:
        verdict = f"open: {gap.bound}"
    return Verdict(
        "4",
        "Too large a batch generalises worse.",
        f"1024 less 32: {gap}",
        verdict,
        f"Beside it, training accuracy as seen during the epochs, 1024 less 32: {fit}. Mean "
        f"training loss: {losses['train']['32']:.4f} with 32, {losses['train']['1024']:.4f} with "
        f"1024; test loss: {losses['test']['32']:.4f} and {losses['test']['1024']:.4f}. A lower "
        f"training accuracy would mean too few updates rather than poor generalisation.",
    )


def _same(answers: Answers) -> Verdict:
    gap = lead(answers, "8 x 128", "1024")
    counts = prediction_differences(answers, [("1024", "8 x 128"), ("1024", "1024")])
    ends = answers.by_setting("test_accuracy")["1024"].dropna().to_numpy()
    apart = np.abs(ends[:, None] - ends)[np.triu_indices(len(ends), 1)]
    baseline = f"; two seeds of 1024 by {100 * apart.mean():.2f}" if len(apart) else ""
    if gap.negligible:
        verdict = f"holds: they differ by {gap.bound}{baseline}"
    elif gap.low > 0 or gap.high < 0:
        verdict = f"fails: they differ by {gap.bound}{baseline}"
    else:
        verdict = f"open: {gap.bound}{baseline}"
    images = "; ".join(f"{row.compared}: {row.mean:.0f}" for row in counts.itertuples(index=False))
    norm = str(answers.runs["norm"].iloc[0])
    exact = (
        "Each update is equal to rounding (05_equivalence)."
        if norm in ("group", "none")
        else f"With {norm} norm the two make different updates (07_normalisation)."
    )
    return Verdict(
        "5",
        "8 x 128 accumulated has the net effect of 1024.",
        f"8 x 128 less 1024: {gap}",
        verdict,
        f"Test images predicted differently after the last epoch, on average: {images}. The "
        f"difference of two seeds is the mean over all pairs. {exact}",
    )
