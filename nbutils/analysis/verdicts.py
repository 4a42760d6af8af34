"""The claims of the blog post, each put to the runs: what they show, and whether it holds.

A verdict follows from 95 % intervals of differences between outcomes, by rules that were fixed
before the runs that it judges, see `claims.CONFIRMING`. It begins with "holds", "fails" or "open"
and always says how large the difference can be. The rules are here, the words in `verdicts.yaml`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from nbutils.analysis import claims
from nbutils.analysis.effects import MARGIN, Answers, Effect, lead, points, prediction_differences
from nbutils.analysis.outcomes import setting_name

TEXTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
HARMFUL = 8  # the largest micro-batch at which BatchNorm is expected to do harm
# Peaks of memory within this ratio count as the same, since the allocator's holes vary as much.
SAME_MEMORY = 1.25  # fixed after first measurements


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
    answers: Answers, normalisation: Answers, kaggle: claims.KaggleRuns, cost: pd.DataFrame
) -> list[Verdict]:
    """The verdicts on all claims, each from the study of that name, `answers` from `batch-size`."""
    others = [norm_verdict(normalisation), *kaggle_verdicts(kaggle), memory_verdict(cost)]
    return [*size_verdicts(answers, claims.CONFIRMING), *others]


def size_verdicts(answers: Answers, confirming: int = 0) -> list[Verdict]:
    """The verdicts on the claims about batch size and accumulation alone, on any dataset.

    By the last part of `claims.split_seeds`. The runs must pass `claims.can_be_judged`.
    """
    judged = list(claims.split_seeds(answers, confirming).values())[-1]
    return [claim(judged) for claim in (_rises, _best, _faster, _generalises, _same)]


def _verdict(key: str, *words: str, **values: Any) -> Verdict:
    """The texts of a key of `verdicts.yaml`, filled in; the verdict is those of `words` in turn."""
    texts = {name: text.format(**values) for name, text in TEXTS[key].items()}
    verdict = "".join(texts[word] for word in words)
    return Verdict(key.partition(" ")[0], texts["claim"], texts["shows"], verdict, texts["details"])


def _word(otherwise: str = "open", **cases: bool | np.bool) -> str:
    """The name of the first case that is true. An interval that is not known makes none true."""
    return next((name.replace("_", " ") for name, true in cases.items() if true), otherwise)


def _listed(named: Mapping[str, object], between: str = "; ") -> str:
    return between.join(f"{name}: {each}" for name, each in named.items())


def _rises(answers: Answers) -> Verdict:
    change, sizes = claims.fitted_change(answers), claims.whole_sizes(answers)
    word = _word(holds=change.low > 0 and not change.negligible, fails=change.high < MARGIN)
    means = answers.by_setting("test_accuracy").mean().map("{:.2%}".format)
    detectable = f"{100 * change.detectable:.2f} points" if change.seeds > 1 else "unknown"
    values = {"smallest": sizes[0], "largest": sizes[-1], "means": _listed(dict(means), ", ")}
    return _verdict("1", word, change=change, detectable=detectable, **values)


def _best(answers: Answers) -> Verdict:
    sizes = [str(size) for size in claims.whole_sizes(answers) if size != 512]
    others = {size: lead(answers, size, "512") for size in sizes}
    near, most = others["1024"], max(gap.high for gap in others.values())
    as_good = [size for size, gap in others.items() if gap.low > -MARGIN]
    margin = _word(holds=near.negligible, fails=near.low >= MARGIN or near.high <= -MARGIN)
    cases = {"as_good": bool(as_good), "best": most < 0, "one_seed": near.seeds < 2}
    named = f"{'are' if len(as_good) > 1 else 'is'} {', '.join(as_good)}"
    values = {"as_good": named, "most": points(most), "others": _listed(others)}
    words = margin, _word("best open", **cases)
    return _verdict("2", *words, near=near, margin=100 * MARGIN, **values)


def _faster(answers: Answers) -> Verdict:
    runs = answers.runs.query("accumulation_steps == 1 and batch_size in (32, 1024)")
    target = claims.target_accuracy(runs)
    if target is None:
        ends = runs.groupby("batch_size")["validation_accuracy"].max()
        return _verdict("3 without target", "open", small=ends[32], large=ends[1024])
    reached = runs[runs["validation_accuracy"] >= target]
    first = reached.groupby(["batch_size", "seed"])[["epoch", "updates"]].min()
    small, large = first.loc[32].align(first.loc[1024], join="inner")
    # 32 may have reached it at any update since the epoch before.
    earliest = small["updates"] * (1 - 1 / small["epoch"])
    fewer = Effect.of_seeds(large["epoch"] - small["epoch"])
    more = Effect.of_seeds(small["epoch"] - large["epoch"])
    in_updates = Effect.of_seeds(earliest - large["updates"]).low > 0
    words = ["one seed"]
    if fewer.seeds > 1:
        in_epochs = _word(holds=fewer.low > 0, fails=fewer.high < 0)
        words = [in_epochs, _word("updates open", in_updates=in_updates)]
    counted = (
        f"32 needs {earliest.mean():,.0f} to {small['updates'].mean():,.0f} updates, 1024 at most "
        f"{large['updates'].mean():,.0f}"
    )
    values = {"small": small["epoch"].mean(), "large": large["epoch"].mean(), "counted": counted}
    return _verdict("3", *words, target=target, fewer=fewer, more=more, **values)


def _generalises(answers: Answers) -> Verdict:
    gap, fit = (lead(answers, "1024", "32", f"{kind}_accuracy") for kind in ("test", "train"))
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
    images = counts.set_index("compared")["mean"].map("{:.0f}".format)
    ends = answers.by_setting("test_accuracy")["1024"].dropna()
    apart = [100 * abs(one - other) for one, other in combinations(ends, 2)]
    words = [_word(holds=gap.negligible, fails=gap.low > 0 or gap.high < 0)]
    words += ["baseline"] if apart else []
    norm = answers.runs["norm"].iloc[0]
    exact = TEXTS["5"]["exact" if norm in ("group", "none") else "inexact"].format(norm=norm)
    values = {"images": _listed(dict(images)), "norm": norm, "exact": exact}
    return _verdict("5", *words, gap=gap, apart=np.mean(apart or [0]), **values)


def norm_verdict(answers: Answers) -> Verdict:
    """The verdict on BatchNorm: one batch against micro-batches of `HARMFUL` images or fewer."""
    batch = replace(answers, runs=answers.runs[answers.runs["norm"] == "batch"])
    sizes = batch.by_setting("batch_size").max().sort_values(ascending=False)
    whole, *cuts = sizes.index
    gaps = {cut: lead(batch, cut, whole) for cut in cuts}
    judged = [cut for cut in cuts if sizes[cut] <= HARMFUL] or cuts
    harmed = [cut for cut in judged if gaps[cut].high < 0 and not gaps[cut].negligible]
    smallest, first_harmed = judged[-1], (harmed or judged)[0]
    word = _word(holds=bool(harmed), fails=gaps[smallest].low > -MARGIN)
    values = {"run": batch.runs.iloc[0], "whole": whole, "gaps": _listed(gaps)}
    values |= {"smallest": smallest, "gap": gaps[smallest]}
    values |= {"harmed": first_harmed, "harm": gaps[first_harmed]}
    return _verdict("6", word, **values)


def kaggle_verdicts(kaggle: claims.KaggleRuns) -> list[Verdict]:
    """The three answers to the claim: is there such a gain, how large is it, is it luck?"""
    gains, images, posted = claims.kaggle_gains(kaggle), len(kaggle.labels), claims.POSTED_GAIN

    def over_rates(place: int, count: str) -> str:
        low = min(gain[place].low for gain in gains.values())
        high = max(gain[place].high for gain in gains.values())
        word = _word(holds=low > 0, fails=high < posted)
        return f"{word} at equal {count}: between {points(low)} and {points(high)} points"

    def luck(part: int) -> str:
        probability = claims.seed_probability(kaggle, part, round(posted * part))
        shown = f"{probability:.0%}" if probability >= 0.005 else "below 0.5%"
        return "unknown" if math.isnan(probability) else shown

    gain, later = gains["same rate"]
    seeds = kaggle.by_setting("run_id")[claims.PLAIN].count()
    evidence = "; ".join(
        f"{name}: {gain} at equal epochs, {later} at equal updates"
        for name, (gain, later) in gains.items()
    )
    values: dict[str, Any] = {"kaggle": kaggle, "claims": claims, "gain": gain, "later": later}
    values |= {"early": over_rates(0, "epochs"), "late": over_rates(1, "updates")}
    values |= {"evidence": evidence, "rates": len(gains), "seeds": seeds}
    values |= {"lead": round(posted * claims.SCORED), "luck": luck(claims.SCORED)}
    values |= {"lead_of_all": round(posted * images), "luck_of_all": luck(images)}
    values |= {"posted": 100 * posted, "images": images}
    word = _word(fails=gain.high < posted, holds=gain.low > 0)
    parts = {"7a": word, "7b": "both", "7c": "open"}
    return [_verdict(number, word, **values) for number, word in parts.items()]


def memory_verdict(cost: pd.DataFrame) -> Verdict:
    """The verdict on memory, from the table of the study `cost`."""
    memory, seconds = (
        cost.pivot_table(name, index="repeat", columns=["batch_size", "accumulation_steps"])
        for name in ("peak_memory", "seconds_per_update")
    )

    def text(values: pd.Series) -> str:
        return f"{values.median():.2f} ({values.min():.2f} to {values.max():.2f})"

    parts, ratios = [], {}
    for both in ((128, 8), (32, 32)):
        small, large = memory[both] / memory[both[0], 1], memory[both] / memory[1024, 1]
        ratios[both] = pd.DataFrame({"small": small, "large": large})
        parts.append(
            f"{setting_name(*both)} takes {text(small)} times the peak memory of {both[0]}, "
            f"{text(large)} times that of 1024, and {text(seconds[both] / seconds[1024, 1])} times "
            "the time of 1024"
        )
    # Of the small batch's memory it may take a little more, of the large one's it must save more.
    judged = pd.concat(ratios, axis=1) * ([1 / SAME_MEMORY, SAME_MEMORY] * 2)
    word = _word(holds=(judged < 1).all(axis=None), fails=(judged >= 1).all().any())
    of_128 = ratios[128, 8]
    values = {**of_128.max(), "ratio": text(of_128["small"]), "n": len(memory)}
    values |= {"parts": "; ".join(parts), "devices": ", ".join(cost["device"].unique())}
    return _verdict("8", word, "bound", **values)
