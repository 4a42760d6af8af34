"""What the README shows, made from `notebooks/reference/`: its figures and its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from nbutils.advise.advice import load_advice
from nbutils.analysis.intervals import detectable_difference, mean_interval, proportion_interval
from nbutils.analysis.summary import (
    Pick,
    compare_predictions,
    describe_study,
    format_table,
    last_epochs,
    markdown_table,
    pick,
    summary_table,
)
from nbutils.analysis.verdicts import (
    Answers,
    KaggleRuns,
    by_size,
    differences,
    lead,
    load_answers,
    load_kaggle_runs,
    size_verdicts,
    verdicts,
)
from nbutils.analysis.votes import VoteScore, score_vote
from nbutils.errors import InputError
from nbutils.paths import REFERENCE
from nbutils.report.bench import load, table
from nbutils.report.libraries import peers_table
from nbutils.studies.reference import load_tables
from nbutils.studies.notebook import execute_notebook

ROOT = REFERENCE.parents[1]
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

OTHER_DATASET = "fashion-mnist"
"""The reference study that repeats `batch-size` on another dataset."""

ENSEMBLE = "kaggle-ensemble"
"""The reference study whose networks are trained to score high, and to vote."""

AIM_ALONE, AIM_TOGETHER = 0.995, 0.9975
"""The scores that the study of the ensemble was to reach, by one network and by all of them."""


def make_figures() -> list[Path]:
    """Execute the notebooks that draw the figures, and renew the README's numbers.

    Returns:
        The files written.
    """
    import tempfile

    other = {"runs": str(REFERENCE / OTHER_DATASET), "figures": str(FIGURES / OTHER_DATASET)}
    with tempfile.TemporaryDirectory() as scratch:
        for notebook in FIGURE_NOTEBOOKS:
            execute_notebook(notebook, Path(scratch) / "out.ipynb", {"figures": str(FIGURES)})
        execute_notebook("04_summary", Path(scratch) / "out.ipynb", other)
    README.write_text(renew_blocks(README.read_text()))
    return [*sorted(path for path in FIGURES.rglob("*") if path.is_file()), README]


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
    answers = load_answers(REFERENCE / "batch-size")
    normalisation = load_answers(REFERENCE / "normalisation")
    runs, kaggle = answers.runs, load_kaggle_runs()
    cost = load_tables(REFERENCE / "cost")["cost"]
    return {
        "answer": _answer(answers),
        "study": f"{describe_study(runs)} {_made_by(runs)}",
        "table": markdown_table(format_table(summary_table(runs))),
        "claims": markdown_table(verdicts(answers, normalisation, kaggle, cost)),
        "other": _other_dataset(answers),
        "vote": _vote(kaggle),
        "pick": str(pick(runs)).replace("\n", " "),
        "agreement": _agreement(answers),
        "trust": _trust(answers),
        "peers": markdown_table(peers_table()),
        "advice": _advice(pick(runs)),
        "bench": _bench(),
    }


def _answer(answers: Answers) -> str:
    """What the study says, in three lines."""
    runs = answers.runs
    final = last_epochs(runs)
    means = by_size(final, "test_accuracy").mean()[:, 1]
    gap = lead(answers, by_size(final, "run_id"), (128, 8), (1024, 1))
    bench = {row.setting: row for row in load(REFERENCE / "bench" / "cpu-2-cores.json")}
    choice = pick(runs)
    alike = f"; as good, as times go: {' and '.join(choice.ties)}" if choice.ties else ""
    among = [choice.costs[setting] for setting in (choice.setting, *choice.ties)]
    times = " to ".join(dict.fromkeys(f"{cost:.0f}" for cost in (min(among), max(among))))
    claim = size_verdicts(answers).loc[1]
    return (
        f"- **Batch size, all else equal:** from {means.index.min()} to {means.index.max()} images "
        f"the final test accuracy lies between {means.min():.2%} and {means.max():.2%}; "
        f'{claim.iloc[1]}. "Larger is more accurate": {claim["verdict"]}.\n'
        f"- **Accumulation:** 8 x 128 makes the update of one batch of 1024, to rounding. After "
        f"{final['epoch'].max()} epochs the test accuracy with 8 x 128 less that with 1024 is "
        f"{gap}. An epoch takes {bench['128x8'].seconds:.1f} s, with 1024 in one pass "
        f"{bench['1024'].seconds:.1f} s ([how fast](#how-fast)).\n"
        f"- **To pick here:** {choice.setting}{alike}. The validation accuracy came within the "
        f"noise of the best, that is to {choice.threshold:.2%}, after {times} s of training; the "
        f"slowest setting that got there took {max(choice.costs.values()):.0f} s."
    )


def _other_dataset(answers: Answers) -> str:
    """What the same study says of other images, beside the verdicts on those of `answers`."""
    others = load_answers(REFERENCE / OTHER_DATASET)
    claims = size_verdicts(others)
    claims[f"on `{answers.runs['dataset'].iloc[0]}`"] = size_verdicts(answers)["verdict"]
    choice = str(pick(others.runs)).replace("\n", " ")
    parts = [describe_study(others.runs), markdown_table(claims), choice, _trust(others)]
    return "\n\n".join(parts)


def _trust(answers: Answers) -> str:
    """How small a difference these runs could have shown."""
    ids = by_size(last_epochs(answers.runs), "run_id")
    gains = compare_predictions(answers.runs, answers.labels, answers.predictions, baseline="128")
    seeds = f"{len(ids)} seed{'s' if len(ids) > 1 else ''}"
    text = (
        f"n = {seeds} a setting, {len(answers.labels):,} test images. On average "
        f"{gains['disagreements'].mean():.0f} of them are right with a network of batch size 128 "
        f"and wrong with one of another setting and the same seed, or the reverse; a true lead of "
        f"fewer than {gains['detectable'].mean():.0f} images between one such pair would be found "
        f"less than four times in five."
    )
    others = [setting for setting in ids if setting != (128, 1)]
    gaps = [differences(answers, ids, {setting: 1, (128, 1): -1}) for setting in others]
    if smallest := [detectable_difference(gap) for gap in gaps if len(gap) > 1]:
        text += (
            f" Over the seeds together, the smallest true difference from batch size 128 that "
            f"would be found so often is {100 * min(smallest):.2f} to {100 * max(smallest):.2f} "
            f"points of test accuracy, depending on the setting; with so few seeds these limits "
            f"are rough themselves."
        )
    return text


def _agreement(answers: Answers) -> str:
    """On how many test images the large batch and its accumulated twin predict otherwise."""
    runs, predictions = answers.runs, answers.predictions
    ids = by_size(last_epochs(runs), "run_id")

    def differing(one: tuple[int, int], other: tuple[int, int]) -> str:
        pairs = ids[[one, other]].dropna().to_numpy()
        images = [int((predictions[a] != predictions[b]).sum()) for a, b in pairs]
        return f"{min(images)} to {max(images)}" if min(images) < max(images) else f"{images[0]}"

    return (
        f"After {runs['epoch'].max()} epochs in float32, the network trained with one batch of "
        f"1024 and the one with 8 x 128 accumulated predict {differing((1024, 1), (128, 8))} of "
        f"{len(answers.labels):,} test images differently (n = {len(ids)} seeds): rounding, grown "
        f"over the updates. For comparison, batches of 512 and 1024 differ on "
        f"{differing((512, 1), (1024, 1))}."
    )


def _vote(kaggle: KaggleRuns) -> str:
    """What several networks of batch 128 reach together, beside what accumulation changes."""
    plain = last_epochs(kaggle.plain)
    score = _scored(kaggle, plain)
    trained = load_answers(REFERENCE / ENSEMBLE)
    ends = last_epochs(trained.runs)
    better, config = _scored(trained, ends), ends.iloc[0]
    return (
        f"What does raise the score is to ask several networks, and to train them longer on images "
        f"that are rotated, shifted and zoomed at random. On the same {score.images:,} images:\n\n"
        f"- as above, {plain['epoch'].iloc[0]} epochs: {_alone_and_together(score)};\n"
        f"- with augmentation, {config['epoch']} epochs, dropout {config['dropout']:g} and a "
        f"{config['schedule']} rate up to {config['learning_rate']:g}: "
        f"{_alone_and_together(better)}. The aims were {AIM_ALONE:.2%} alone "
        f"({_aim(np.mean(better.alone), AIM_ALONE)}) and {AIM_TOGETHER:.2%} together "
        f"({_aim(better.together, AIM_TOGETHER)}). `python -m nbutils run {ENSEMBLE} --jobs 2` "
        f"makes these; {_training_took(trained.runs)}"
    )


def _scored(answers: Answers, final: pd.DataFrame) -> VoteScore:
    """The vote of the runs whose last epochs are `final`."""
    return score_vote(answers.labels, [answers.predictions[run_id] for run_id in final["run_id"]])


def _alone_and_together(score: VoteScore) -> str:
    n, (low, high) = len(score.alone), mean_interval(score.alone)
    vote_low, vote_high = proportion_interval(score.together, score.images)
    return (
        f"one network of batch 128 gets {np.mean(score.alone):.2%} right ({low:.2%} to "
        f"{high:.2%}, mean of n = {n}; the best of them {max(score.alone):.2%}), and the majority "
        f"of these {n} gets {score.together:.2%} ({vote_low:.2%} to {vote_high:.2%}, as the "
        f"images are a sample)"
    )


def _aim(reached: float | np.floating, aim: float) -> str:
    missing = aim - reached
    return "reached" if missing <= 0 else f"missed by {100 * missing:.2f} points"


def _made_by(runs: pd.DataFrame) -> str:
    """The command that makes these runs, and how long they trained."""
    seeds = ",".join(map(str, sorted(runs["seed"].unique())))
    return (
        f"`python -m nbutils run batch-size --dataset {runs['dataset'].iloc[0]} --set seed={seeds} "
        f"--jobs 2` makes them; {_training_took(runs)}"
    )


def _training_took(runs: pd.DataFrame) -> str:
    hours = last_epochs(runs)["seconds"].sum() / 3600
    return f"their training took {hours:.1f} hours, summed over the runs."


def _advice(study: Pick) -> str:
    """The recorded advice on few images, and how that on all of them compares with the study."""
    few, all_images = (
        load_advice(REFERENCE / "advice" / f"{name}.json") for name in ("mnist-5k", "mnist")
    )
    return (
        f"```\n{few.answer}\n```\n\nOn `{all_images.dataset}` it advises "
        f"{all_images.effective_batch_size} images per update at the rate "
        f"{all_images.learning_rate:g}, while the study above picks "
        f"{' or '.join([study.setting, *study.ties])}. The two ask different things: the advice, "
        f"which size gets equally far in the least time, each at a rate of its own, by short "
        f"measurements; the study, at one rate for all, by whole trainings. Between neighbouring "
        f"sizes both are nearly flat, and two runs of `advise` may differ by a factor of two."
    )


def _bench() -> str:
    """A table for each machine on which `python -m nbutils bench` was recorded."""
    parts = []
    for path in sorted((REFERENCE / "bench").glob("*.json")):
        rows = load(path)
        images, repeats = rows[0].images, rows[0].repeats
        parts.append(
            f"{rows[0].device}; medians of {repeats} pairs of epochs of {images:,} images, scaled "
            f"to a whole epoch, with the lowest and the highest:\n\n{markdown_table(table(rows))}"
        )
    return "\n\n".join(parts)
