"""The claims of the blog post, each put to the runs: what they show, and whether it holds.

A verdict follows from 95 % intervals of differences between outcomes, by rules that were fixed
before the runs that it judges, see `claims.CONFIRMING`. It begins with "holds", "fails" or "open"
and always says how large the difference can be. The rules are here, the words in `verdicts.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from nbutils.analysis import claims
from nbutils.analysis.claims import KaggleRuns
from nbutils.analysis.effects import MARGIN, Answers, Effect, lead, points, prediction_differences
from nbutils.analysis.intervals import mean_interval
from nbutils.analysis.outcomes import setting_name

HARMFUL = 8  # the largest micro-batch at which BatchNorm is expected to do harm
SAME_MEMORY = 1.25
"""Peaks of memory within this ratio count as the same: the allocator's holes vary as much. Fixed
after first measurements."""


class Verdict(NamedTuple):
    """A claim, one effect that the runs show, the verdict with its bound, and other evidence."""

    number: str
    claim: str
    shows: str
    verdict: str
    details: str


def verdict_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row per claim: `claim`, `these runs show`, `verdict`; indexed by its number."""
    table = pd.DataFrame(verdicts).set_index("number").rename_axis(None)
    return table.drop(columns="details").rename(columns={"shows": "these runs show"})


def verdict_details(verdicts: Sequence[Verdict]) -> str:
    """The details of each claim as a Markdown list."""
    return "\n".join(f"- **Claim {each.number}.** {each.details}" for each in verdicts)


def all_verdicts(
    answers: Answers, normalisation: Answers, kaggle: KaggleRuns, cost: pd.DataFrame
) -> list[Verdict]:
    """The verdicts on all claims, each from the study of that name, `answers` from `batch-size`."""
    return [
        *size_verdicts(answers, claims.CONFIRMING),
        norm_verdict(normalisation),
        *kaggle_verdicts(kaggle),
        memory_verdict(cost),
    ]


def size_verdicts(answers: Answers, confirming: int | None = None) -> list[Verdict]:
    """The verdicts on the claims about batch size and accumulation alone, on any dataset.

    `claims.can_be_judged` tells which studies have what they need. From the seed `confirming` on
    runs were made after the rules were fixed, see `claims.split_seeds`; None judges all seeds.
    """
    judged = list(claims.split_seeds(answers, confirming).values())[-1]
    return [_rises(judged), _best(judged), _faster(judged), _generalises(judged), _same(judged)]


@cache
def _texts() -> dict[str, dict[str, str]]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def _verdict(key: str, *words: str, **values: Any) -> Verdict:
    """The texts of a key of `verdicts.yaml`, filled in; the verdict is those of `words` in turn."""
    texts = {name: text.format(**values) for name, text in _texts()[key].items()}
    verdict = "".join(texts[word] for word in words)
    number = key.partition(" ")[0]
    return Verdict(number, texts["claim"], texts["shows"], verdict, texts["details"])


def _word(otherwise: str = "open", **cases: bool | np.bool) -> str:
    """The name of the first case that is true. An interval that is not known makes none true."""
    return next((name.replace("_", " ") for name, true in cases.items() if true), otherwise)


def _listed(effects: dict[str, Effect]) -> str:
    return "; ".join(f"{name}: {each}" for name, each in effects.items())


def _rises(answers: Answers) -> Verdict:
    change, sizes = claims.fitted_change(answers), claims.whole_sizes(answers)
    means = answers.by_setting("test_accuracy").mean()
    word = _word(holds=change.low > 0 and not change.negligible, fails=change.high < MARGIN)
    listed = ", ".join(f"{setting}: {mean:.2%}" for setting, mean in means.items())
    detectable = f"{100 * change.detectable:.2f} points" if change.seeds > 1 else "unknown"
    values = {"smallest": sizes[0], "largest": sizes[-1], "means": listed}
    return _verdict("1", word, change=change, detectable=detectable, **values)


def _best(answers: Answers) -> Verdict:
    sizes = [str(size) for size in claims.whole_sizes(answers) if size != 512]
    others = {size: lead(answers, size, "512") for size in sizes}
    near = others["1024"]
    as_good = [size for size, gap in others.items() if gap.low > -MARGIN]
    words = [
        _word(holds=near.negligible, fails=near.low >= MARGIN or near.high <= -MARGIN),
        _word(
            "best open",
            as_good=len(as_good) > 0,
            best=all(gap.high < 0 for gap in others.values()),
            one_seed=near.seeds < 2,
        ),
    ]
    most = points(max(gap.high for gap in others.values()))
    listed = f"{'are' if len(as_good) > 1 else 'is'} {', '.join(as_good)}"
    values = {"as_good": listed, "most": most, "others": _listed(others)}
    return _verdict("2", *words, near=near, margin=100 * MARGIN, **values)


def _faster(answers: Answers) -> Verdict:
    pair = (answers.runs["accumulation_steps"] == 1) & answers.runs["batch_size"].isin([32, 1024])
    runs = answers.runs[pair]
    target = claims.target_accuracy(runs)
    if target is None:
        ends = runs.groupby("batch_size")["validation_accuracy"].max()
        return _verdict("3 without target", "open", small=ends[32], large=ends[1024])
    reached = runs[runs["validation_accuracy"] >= target]
    first = reached.pivot_table(
        index="seed", columns="batch_size", values=["epoch", "updates"], aggfunc="min"
    ).dropna()
    epochs, updates = first["epoch"], first["updates"]
    gap = epochs[1024] - epochs[32]
    low, high = mean_interval(gap.to_numpy())
    # 32 may have reached it at any update since the epoch before.
    earliest = updates[32] * (1 - 1 / epochs[32])
    fewer, _ = mean_interval((earliest - updates[1024]).to_numpy())
    counted = (
        f"32 needs {earliest.mean():,.0f} to {updates[32].mean():,.0f} updates, 1024 at most "
        f"{updates[1024].mean():,.0f}"
    )
    words = ["one seed"]
    if len(gap) > 1:
        in_updates = _word("updates open", in_updates=fewer > 0)
        words = [_word(holds=low > 0, fails=high < 0), in_updates]
    values = {"small": epochs[32].mean(), "large": epochs[1024].mean(), "gap": gap.mean()}
    values |= {"low": low, "high": high, "more_low": -high, "more_high": -low}
    return _verdict("3", *words, target=target, n=len(gap), counted=counted, **values)


def _generalises(answers: Answers) -> Verdict:
    gap = lead(answers, "1024", "32")
    fit = lead(answers, "1024", "32", "train_accuracy")
    lower = gap.high < 0
    word = _word(fails=gap.low > -MARGIN, fits_less=lower and fit.high < 0, holds=lower)
    train, test = (
        answers.by_setting(f"{kind}_loss")[["32", "1024"]].mean().tolist()
        for kind in ("train", "test")
    )
    values = {"least": -100 * gap.high, "most": -100 * gap.low, "train": train, "test": test}
    return _verdict("4", word, gap=gap, fit=fit, **values)


def _same(answers: Answers) -> Verdict:
    gap = lead(answers, "8 x 128", "1024")
    counts = prediction_differences(answers, [("1024", "8 x 128"), ("1024", "1024")])
    images = "; ".join(f"{row.compared}: {row.mean:.0f}" for row in counts.itertuples())
    ends = answers.by_setting("test_accuracy")["1024"].dropna()
    apart = [100 * abs(one - other) for one, other in combinations(ends, 2)]
    words = [_word(holds=gap.negligible, fails=gap.low > 0 or gap.high < 0)]
    words += ["baseline"] if apart else []
    norm = str(answers.runs["norm"].iloc[0])
    exact = _texts()["5"]["exact" if norm in ("group", "none") else "inexact"].format(norm=norm)
    values = {"images": images, "norm": norm, "exact": exact}
    return _verdict("5", *words, gap=gap, apart=float(np.mean(apart or [0])), **values)


def norm_verdict(answers: Answers) -> Verdict:
    """The verdict on BatchNorm under accumulation, from the study `normalisation`.

    It compares one batch with micro-batches of `HARMFUL` images or fewer, where there are any.
    """
    batch = answers.only(answers.runs["norm"] == "batch")
    sizes = batch.by_setting("batch_size").max().sort_values(ascending=False)
    whole, *cuts = sizes.index
    gaps = {cut: lead(batch, cut, whole) for cut in cuts}
    judged = [cut for cut in cuts if sizes[cut] <= HARMFUL] or cuts
    smallest = judged[-1]
    harmed = [cut for cut in judged if gaps[cut].high < 0 and not gaps[cut].negligible]
    harmed_from = (harmed or judged)[0]
    first = batch.runs.iloc[0]
    values = {"whole": whole, "epochs": first["epochs"], "rate": first["learning_rate"]}
    values |= {"smallest": smallest, "gap": gaps[smallest], "gaps": _listed(gaps)}
    values |= {"harmed": harmed_from, "harm": gaps[harmed_from]}
    word = _word(holds=len(harmed) > 0, fails=gaps[smallest].low > -MARGIN)
    return _verdict("6", word, **values)


def kaggle_verdicts(kaggle: KaggleRuns) -> list[Verdict]:
    """The three answers to the claim: is there such a gain, how large is it, is it luck?"""
    gains, images, posted = claims.kaggle_gains(kaggle), len(kaggle.labels), claims.POSTED_GAIN

    def over_rates(place: int, count: str) -> str:
        low = min(gain[place].low for gain in gains.values())
        high = max(gain[place].high for gain in gains.values())
        word = _word(holds=low > 0, fails=high < posted)
        return f"{word} at equal {count}: between {points(low)} and {points(high)} points"

    evidence = "; ".join(
        f"{name}: {gain} at equal epochs, {later} at equal updates"
        for name, (gain, later) in gains.items()
    )
    gain, later = gains["same rate"]
    values: dict[str, Any] = {"kaggle": kaggle, "claims": claims, "gain": gain, "later": later}
    values |= {"early": over_rates(0, "epochs"), "late": over_rates(1, "updates")}
    values |= {"evidence": evidence, "rates": len(gains)}
    values |= {"posted": 100 * posted, "images": images, "seeds": len(kaggle.plain)}
    for name, part in (("", claims.SCORED), ("_of_all", images)):
        values[f"lead{name}"] = lead_of_part = round(posted * part)
        luck = claims.seed_probability(kaggle, part, lead_of_part)
        shown = f"{luck:.0%}" if luck >= 0.005 else "below 0.5%"
        values[f"luck{name}"] = "unknown" if math.isnan(luck) else shown
    word = _word(fails=gain.high < posted, holds=gain.low > 0)
    parts = (("7a", word), ("7b", "both"), ("7c", "open"))
    return [_verdict(number, word, **values) for number, word in parts]


def memory_verdict(cost: pd.DataFrame) -> Verdict:
    """The verdict on memory, from the table of the study `cost`."""
    memory, seconds = (
        cost.pivot_table(index="repeat", columns=["batch_size", "accumulation_steps"], values=name)
        for name in ("peak_memory", "seconds_per_update")
    )
    parts, ratios = [], {}
    for size, steps in ((128, 8), (32, 32)):
        small, large = (memory[size, steps] / memory[other, 1] for other in (size, 1024))
        ratios[size] = pd.DataFrame({"small": small, "large": large})
        slower = seconds[size, steps] / seconds[1024, 1]
        parts.append(
            f"{setting_name(size, steps)} takes {_ratio(small)} times the peak memory of {size}, "
            f"{_ratio(large)} times that of 1024, and {_ratio(slower)} times the time of 1024"
        )
    # Of the small batch's memory it may take a little more, of the large one's it must save more.
    judged = pd.concat(ratios, axis=1) * ([1 / SAME_MEMORY, SAME_MEMORY] * 2)
    word = _word(holds=(judged < 1).all(axis=None), fails=(judged >= 1).all().any())
    values = {**ratios[128].max(), "ratio": _ratio(ratios[128]["small"]), "n": len(memory)}
    values |= {"parts": "; ".join(parts), "devices": ", ".join(cost["device"].unique())}
    return _verdict("8", word, "bound", **values)


def _ratio(values: pd.Series) -> str:
    return f"{values.median():.2f} ({values.min():.2f} to {values.max():.2f})"
