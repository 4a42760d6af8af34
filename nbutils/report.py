"""What the README shows, made from `notebooks/reference/`: its figures and its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from nbutils.advice import load_advice
from nbutils.bench import load, table
from nbutils.config import InputError
from nbutils.ensemble import score_vote
from nbutils.peers import peers_table
from nbutils.records import REFERENCE_FOLDER, load_predictions, load_runs, load_tables
from nbutils.statistics import detectable_difference, mean_interval, proportion_interval
from nbutils.study import execute_notebook
from nbutils.summary import (
    compare_predictions,
    describe_study,
    format_table,
    last_epochs,
    markdown_table,
    pick,
    summary_table,
)
from nbutils.verdicts import (
    POSTED_RATE,
    KaggleRuns,
    by_size,
    effect,
    load_kaggle_runs,
    size_verdicts,
    verdicts,
)

ROOT = REFERENCE_FOLDER.parents[1]
README = ROOT / "README.md"
FIGURES = ROOT / "figures"
FIGURE_NOTEBOOKS = (
    "01_data_and_model",
    "04_summary",
    "07_normalisation",
    "08_learning_rate",
    "09_noise_scale",
    "10_cost",
)


def make_figures() -> list[Path]:
    """Execute the notebooks that draw the figures, and renew the README's numbers.

    Returns:
        The files written.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        for notebook in FIGURE_NOTEBOOKS:
            execute_notebook(notebook, Path(scratch) / "out.ipynb", {"figures": str(FIGURES)})
    README.write_text(renew_blocks(README.read_text()))
    return [*sorted(FIGURES.iterdir()), README]


def renew_blocks(text: str) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- /NAME -->` made anew.

    Raises:
        InputError: The text lacks a block, or has one twice.
    """
    for name, block in _blocks().items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise InputError(f"README.md must have each of {start.strip()} and {end} once")
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}{block}\n{end}{after}"
    return text


def _blocks() -> dict[str, str]:
    runs = load_runs(REFERENCE_FOLDER / "batch-size")
    labels, predictions = load_predictions(REFERENCE_FOLDER / "batch-size")
    cost = load_tables(REFERENCE_FOLDER / "cost")["cost"]
    return {
        "answer": _answer(runs),
        "study": describe_study(runs),
        "table": markdown_table(format_table(summary_table(runs))),
        "claims": markdown_table(
            verdicts(runs, load_runs(REFERENCE_FOLDER / "normalisation"), load_kaggle_runs(), cost)
        ),
        "vote": _vote(load_kaggle_runs()),
        "pick": str(pick(runs)).replace("\n", " "),
        "agreement": _agreement(runs, labels, predictions),
        "trust": _trust(runs, labels, predictions),
        "peers": markdown_table(peers_table()),
        "advice": _advice(),
        "bench": _bench(),
    }


def _answer(runs: pd.DataFrame) -> str:
    """What the study says, in three lines."""
    final = last_epochs(runs)
    test = by_size(final, "test_accuracy")
    means = test.mean()[:, 1]
    gap = effect(test[128, 8] - test[1024, 1])
    bench = {row.setting: row for row in load(REFERENCE_FOLDER / "bench" / "cpu-2-cores.json")}
    choice = pick(runs)
    claim = size_verdicts(runs).loc[1]
    return (
        f"- **Batch size, all else equal:** from {means.index.min()} to {means.index.max()} images "
        f"the final test accuracy lies between {means.min():.2%} and {means.max():.2%}; "
        f'{claim.iloc[1]}. "Larger is more accurate": {claim["verdict"]}.\n'
        f"- **Accumulation:** 8 x 128 makes the update of one batch of 1024, to rounding. After "
        f"{final['epoch'].max()} epochs the test accuracies differ by {gap}. An epoch takes "
        f"{bench['128x8'].seconds:.1f} s, with 1024 in one pass {bench['1024'].seconds:.1f} s "
        f"([how fast](#how-fast)).\n"
        f"- **To pick here:** {choice.setting}. It came within the noise of the best validation "
        f"accuracy, that is to {choice.threshold:.2%}, after "
        f"{choice.costs[choice.setting]:.0f} s of training; the slowest setting that got there "
        f"took {max(choice.costs.values()):.0f} s."
    )


def _trust(runs: pd.DataFrame, labels: np.ndarray, predictions: dict[str, np.ndarray]) -> str:
    """How small a difference these runs could have shown."""
    table = by_size(last_epochs(runs), "test_accuracy")
    others = [setting for setting in table if setting != (128, 1)]
    differences = [(table[setting] - table[128, 1]).dropna().tolist() for setting in others]
    gains = compare_predictions(runs, labels, predictions, baseline="128")
    seeds = f"{len(table)} seed{'s' if len(table) > 1 else ''}"
    text = (
        f"n = {seeds} a setting, {len(labels):,} test images. Two networks of different settings "
        f"and the same seed disagree about {gains['disagreements'].mean():.0f} of them; a lead of "
        f"fewer than {gains['detectable'].mean():.0f} images between one such pair would be found "
        f"less than four times in five."
    )
    if len(table) > 1:
        smallest = max(detectable_difference(each) for each in differences)
        text += (
            f" Over the seeds together, a difference from batch size 128 of less than "
            f"{100 * smallest:.2f} points of test accuracy would, for some setting, be found less "
            f"than four times in five."
        )
    return text


def _agreement(runs: pd.DataFrame, labels: np.ndarray, predictions: dict[str, np.ndarray]) -> str:
    """On how many test images the large batch and its accumulated twin predict otherwise."""

    ids = by_size(last_epochs(runs), "run_id")

    def differing(one: tuple[int, int], other: tuple[int, int]) -> str:
        pairs = ids[[one, other]].dropna().to_numpy()
        images = [int((predictions[a] != predictions[b]).sum()) for a, b in pairs]
        return f"{min(images)} to {max(images)}" if min(images) < max(images) else f"{images[0]}"

    return (
        f"After {runs['epoch'].max()} epochs in float32, the network trained with one batch of "
        f"1024 and the one with 8 x 128 accumulated predict {differing((1024, 1), (128, 8))} of "
        f"{len(labels):,} test images differently (n = {len(ids)} seeds): rounding, grown over the "
        f"updates. For comparison, batches of 512 and 1024 differ on "
        f"{differing((512, 1), (1024, 1))}."
    )


def _vote(kaggle: KaggleRuns) -> str:
    """What several networks of batch 128 reach together, beside what accumulation changes."""
    final = last_epochs(kaggle.runs)
    plain = final[(final["accumulation_steps"] == 1) & (final["learning_rate"] == POSTED_RATE)]
    score = score_vote(kaggle.labels, [kaggle.predictions[run_id] for run_id in plain["run_id"]])
    n, (low, high) = len(score.alone), mean_interval(score.alone)
    vote_low, vote_high = proportion_interval(score.together, score.images)
    return (
        f"What does raise the score is to ask several networks: on the same {score.images:,} "
        f"images, one of batch 128 gets {np.mean(score.alone):.2%} right ({low:.2%} to {high:.2%}, "
        f"mean of n = {n}), and the majority of these {n} gets {score.together:.2%} "
        f"({vote_low:.2%} to {vote_high:.2%}, as the images are a sample)."
    )


def _advice() -> str:
    advice = load_advice(REFERENCE_FOLDER / "advice" / "mnist-5k.json")
    return f"```\n{advice.answer}\n```"


def _bench() -> str:
    """A table for each machine on which `python -m nbutils bench` was recorded."""
    parts = []
    for path in sorted((REFERENCE_FOLDER / "bench").glob("*.json")):
        rows = load(path)
        images, repeats = rows[0].images, rows[0].repeats
        parts.append(
            f"{rows[0].device}; medians of {repeats} pairs of epochs of {images:,} images, scaled "
            f"to a whole epoch, with the lowest and the highest:\n\n{markdown_table(table(rows))}"
        )
    return "\n\n".join(parts)
