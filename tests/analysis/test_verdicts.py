"""The claims about normalisation, Kaggle's score and memory, on made-up runs."""

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from made_up_runs import answers_of

from nbutils import InputError, RunConfig
from nbutils.analysis.kaggle_claim import (
    KaggleRuns,
    gain,
    gain_at_equal_updates,
    gain_table,
    kaggle_verdicts,
    load_kaggle_runs,
    seed_probability,
    tuned_rates,
)
from nbutils.analysis.verdict import verdict_table
from nbutils.analysis.verdicts import all_verdicts, memory_verdict, norm_verdict
from nbutils.studies.study import load_study


def costs(memory=lambda batch_size, steps: batch_size, repeats=3):
    """Measurements that need `memory(batch_size, steps)`, give or take a percent."""
    settings = [(32, 1), (128, 1), (1024, 1), (128, 8), (32, 32)]
    rows = [
        {
            "batch_size": batch_size,
            "accumulation_steps": steps,
            "repeat": repeat,
            "peak_memory": memory(batch_size, steps) * (1 + repeat * (1 + (steps > 1)) / 100),
            "seconds_per_update": batch_size * steps,
            "device": "cpu",
        }
        for batch_size, steps in settings
        for repeat in range(repeats)
    ]
    return pd.DataFrame(rows)


def kaggle_runs(gained, spread=2, seeds=5):
    """Seeds of 128 and of 8 x 128, at 1e-3 and at 2e-3, on 28,000 images.

    128 gets 27,800 right after its fourth epoch, give or take `spread`, and 8 x 128 `gained` more.
    After one epoch, as many updates as 8 x 128 makes in all, 128 had 280 fewer.
    """
    rows, late = [], {}
    for steps in (1, 8):
        for rate in (1e-3, 2e-3):
            for seed in range(seeds):
                config = RunConfig(
                    batch_size=128, accumulation_steps=steps, learning_rate=rate, seed=seed
                )
                wrong = 200 - gained * (steps == 8) + spread * ((seed * 7 + steps) % 5 - 2)
                predicted = np.zeros(28_000, np.uint8)
                # Each seed is wrong about images of its own, but for a hundred hard ones.
                predicted[:100] = predicted[100 + 300 * seed :][: wrong - 100] = 1
                late[config.run_id] = predicted[None]
                for epoch in range(1, 5):
                    at = {"run_id": config.run_id, **config.to_dict(), "epoch": epoch}
                    at["effective_batch_size"] = config.effective_batch_size
                    at["updates"] = epoch * (200 if steps == 1 else 50)
                    at["test_accuracy"] = 1 - (wrong + 280 * (epoch == 1)) / 28_000
                    at["validation_accuracy"] = 0.99 + 0.001 * (rate == 2e-3) * (steps == 8)
                    rows.append(at)
    runs = pd.DataFrame(rows)
    return KaggleRuns(runs, np.zeros(28_000, np.uint8), late, runs)


def kaggle_table(kaggle):
    return verdict_table(kaggle_verdicts(kaggle))


def test_there_is_a_row_for_each_claim_with_one_of_three_words_first():
    answers, normalisation = (
        answers_of(lambda size, steps: 0.99, norm=norm) for norm in ("group", "batch")
    )
    table = verdict_table(all_verdicts(answers, normalisation, kaggle_runs(0), costs()))
    assert list(table.index) == ["1", "2", "3", "4", "5", "6", "7a", "7b", "7c", "8"]
    assert table["verdict"].str.match(r"(holds|fails|open)\b").all()
    assert not table.apply(lambda column: column.str.contains("decidable")).any(axis=None)


@pytest.mark.parametrize(
    ("harm", "noise", "expected"),
    [
        (0.0, 1, "harm fails down to 8 x 128: between -0.0"),
        (0.004, 1, "harm holds from 8 x 128 on: between -0.5"),
        (0.0, 30, "harm open at 8 x 128: between -"),
    ],
)
def test_what_small_micro_batches_do_to_batch_norm(harm, noise, expected):
    answers = answers_of(lambda size, steps: 0.99 - harm * (steps == 8), noise=noise, norm="batch")
    large = answers.runs["effective_batch_size"] == 1024
    found = norm_verdict(answers.only(large)).verdict
    assert found.startswith(f"holds for the statistics; {expected}")


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (lambda size, steps: size, "holds: 8 x 128 at most 1.02 times 128 and 0.13 times 1024"),
        (lambda size, steps: 4200 + size, "fails"),  # the weights outweigh the activations
        (lambda size, steps: size * steps, "fails"),
        (lambda size, steps: size * (1.24 if steps > 1 else 1), "open: 8 x 128 at most 1.26"),
    ],
)
def test_whether_accumulation_fits_a_large_batch_into_little_memory(memory, expected):
    assert memory_verdict(costs(memory)).verdict.startswith(expected)


@pytest.mark.parametrize(
    ("gained", "spread", "expected"),
    [
        (0, 2, "fails: the post's gain is excluded; the difference is between -0."),
        (-40, 2, "fails: the post's gain is excluded; the difference is between -0."),
        (52, 2, "holds: the gain is between +0.1"),
        (35, 30, "open: between -0."),
    ],
)
def test_whether_there_is_a_gain_like_the_posts(gained, spread, expected):
    assert kaggle_table(kaggle_runs(gained, spread))["verdict"]["7a"].startswith(expected)


def test_the_difference_is_told_at_equal_epochs_and_at_equal_updates():
    kaggle = kaggle_runs(-28)
    assert gain(kaggle, 1e-3, 1e-3).mean == pytest.approx(-28 / 28_000)
    # At its 200 updates 128 was after its first epoch, with 280 more images wrong.
    assert gain_at_equal_updates(kaggle, 1e-3, 1e-3).mean == pytest.approx(252 / 28_000)
    row = kaggle_table(kaggle).loc["7b"]
    assert row["verdict"].startswith("fails at equal epochs: between -0.1")
    assert "; holds at equal updates: between +0." in row["verdict"]
    table = gain_table(kaggle)
    assert table.loc["rate x root of 8, 0.0028"].tolist() == ["not recorded", "not recorded"]
    assert table.loc["tuned rates, 0.001 and 0.002", "equal epochs"].startswith("-0.10 (")


def test_runs_at_the_scaled_rate_are_shown_once_they_are_recorded():
    kaggle = kaggle_runs(0)
    rates = kaggle.runs["learning_rate"].replace(2e-3, 1e-3 * 8**0.5)
    scaled = replace(kaggle, runs=kaggle.runs.assign(learning_rate=rates), tuning=None)
    table = gain_table(scaled)
    assert table.loc["rate x root of 8, 0.0028", "equal epochs"].startswith("+0.00 (")
    assert len(table) == 2
    assert kaggle_table(scaled)["verdict"]["7b"].endswith(" points (rate x root of 8)")


def test_a_gain_needs_a_seed_with_both():
    kaggle = kaggle_runs(0)
    with pytest.raises(InputError, match="no seed has runs of all of 8, 1"):
        gain(kaggle, 1e-3, 0.5)


def test_seeds_alone_lead_as_often_as_their_pairs_do():
    kaggle = kaggle_runs(0, spread=10)
    right = [200 + 10 * ((seed * 7 + 1) % 5 - 2) for seed in range(5)]
    share = np.mean([a - b >= 20 for a, b in permutations(right, 2)])
    assert seed_probability(kaggle, 28_000, 20) == pytest.approx(share)
    one = kaggle_runs(0, seeds=1)
    assert math.isnan(seed_probability(one, 7_000, 13))
    assert kaggle_table(one)["verdict"]["7c"].endswith("with probability unknown")


def test_the_tuned_rates_are_within_those_tried_and_planned_for_ten_seeds():
    tuning = load_kaggle_runs().tuning
    runs = [run.config for run in load_study("kaggle-split").runs]
    for steps, rate in tuned_rates(tuning).items():
        tried = tuning.loc[tuning["accumulation_steps"] == steps, "learning_rate"]
        assert tried.min() < rate < tried.max()
        planned = [r.seed for r in runs if (r.accumulation_steps, r.learning_rate) == (steps, rate)]
        assert len(planned) >= 10
