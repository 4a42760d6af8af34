"""Verdicts on made-up runs in which the truth is known."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from nbutils import InputError, RunConfig
from nbutils.analysis.verdicts import (
    Answers,
    Effect,
    KaggleRuns,
    can_be_judged,
    effect,
    load_kaggle_runs,
    seed_chance,
    size_verdicts,
    tuned_rates,
    verdicts,
)
from nbutils.studies.study import load_study

IMAGES = 100_000
SIZES = ((32, 1), (64, 1), (128, 1), (256, 1), (512, 1), (1024, 1), (128, 8))
NOISE = (-0.0002, 0.0001, 0.0003, -0.0001, -0.0001)  # of five seeds, mean 0


def study(accuracy, epochs_needed=lambda size: 1, seeds=5, norm="group"):
    """Runs whose final accuracy is `accuracy(batch_size, steps)`, give or take the seed.

    The last images are the ones they have wrong, so two runs differ in no more than they must.
    """
    rows, predictions = [], {}
    labels = np.zeros(IMAGES, dtype=np.uint8)
    for batch_size, steps in SIZES:
        for seed in range(seeds):
            # The seeds' noise differs between settings: each is shifted along.
            noise = NOISE[(seed + batch_size.bit_length() + steps) % len(NOISE)]
            final = accuracy(batch_size, steps) + noise
            late = epochs_needed(batch_size) + seed % 2
            run_id = f"{norm}-{batch_size}-{steps}-{seed}"
            predictions[run_id] = labels.copy()
            predictions[run_id][round(final * IMAGES) :] = 1
            for epoch in range(1, 9):
                at = final if epoch == 8 else 0.991 if epoch >= late else 0.98
                rows.append(
                    {
                        "run_id": run_id,
                        **RunConfig(
                            batch_size=batch_size, accumulation_steps=steps, seed=seed, norm=norm
                        ).to_dict(),
                        "epoch": epoch,
                        "updates": epoch * 54_000 // (batch_size * steps),
                        "validation_accuracy": at,
                        "test_accuracy": at,
                    }
                )
    return Answers(pd.DataFrame(rows), labels, predictions)


def only(answers, query):
    """Those of some runs."""
    return replace(answers, runs=answers.runs.query(query))


def costs(memory=lambda batch_size, steps: batch_size, repeats=3):
    """Measurements that need `memory(batch_size, steps)`, give or take a percent."""
    rows = [
        {
            "batch_size": batch_size,
            "accumulation_steps": steps,
            "repeat": repeat,
            "peak_memory": memory(batch_size, steps) * (1 + repeat / 100),
            "seconds_per_update": batch_size * steps,
            "device": "cpu",
        }
        for batch_size, steps in (*SIZES, (32, 32))
        for repeat in range(repeats)
    ]
    return pd.DataFrame(rows)


def kaggle_runs(gain, spread=2, seeds=5):
    """Five seeds of 128 and of 8 x 128, at 1e-3 and at 2e-3, on 28,000 images.

    Seeds of 128 get 27,800 right, give or take `spread`; accumulation `gain` images more.
    """
    labels = np.zeros(28_000, dtype=np.uint8)
    rows, predictions = [], {}
    for steps in (1, 8):
        for rate in (1e-3, 2e-3):
            for seed in range(seeds):
                run_id = f"{steps}-{rate}-{seed}"
                wrong = 200 - gain * (steps == 8) + spread * ((seed * 7 + steps) % 5 - 2)
                # Each seed is wrong about images of its own, but for a hundred hard ones.
                own = 100 + 300 * seed + np.arange(wrong - 100)
                predicted = labels.copy()
                predicted[np.concatenate([np.arange(100), own])] = 1
                predictions[run_id] = predicted
                rows.append(
                    {
                        "run_id": run_id,
                        "batch_size": 128,
                        "accumulation_steps": steps,
                        "learning_rate": rate,
                        "seed": seed,
                        "epoch": 1,
                        "updates": 5920 // steps,
                        "validation_accuracy": 0.99 + (rate == 2e-3) * (steps == 8) * 0.001,
                        "test_accuracy": 1 - wrong / 28_000,
                    }
                )
    runs = pd.DataFrame(rows)
    return KaggleRuns(runs, labels, predictions, runs)


def verdict(number, runs, normalisation=None, kaggle=None):
    if normalisation is None:
        normalisation = study(lambda size, steps: 0.99, norm="batch")
    return verdicts(runs, normalisation, kaggle or kaggle_runs(0), costs())["verdict"][number]


def size_verdict(number, runs):
    return size_verdicts(runs)["verdict"][number]


def rising(size, steps):
    return 0.97 + 0.002 * (size * steps).bit_length()


def falling(size, steps):
    return 0.999 - 0.001 * (size * steps).bit_length()


def level(size, steps):
    return 0.99


def test_an_effect_has_an_interval_from_two_seeds_on():
    answers = study(lambda size, steps: 0.99 + 0.005 * (size == 64))
    ids = pd.DataFrame({size: [f"group-{size}-1-{seed}" for seed in (0, 1)] for size in (32, 64)})
    both = effect(answers, ids, {64: 1, 32: -1})
    assert both.seeds == 2
    assert both.low < both.mean < both.high
    ids.loc[1, 32] = None
    one = effect(answers, ids, {64: 1, 32: -1})
    assert str(one).endswith(" points (n = 1: no interval)")
    assert one.mean == pytest.approx(0.005, abs=0.0006)
    with pytest.raises(InputError, match="no seed has runs of all of 64, 32"):
        effect(answers, ids.iloc[1:], {64: 1, 32: -1})
    assert str(Effect(0.01, 0.005, 0.015, 4)) == "+1.000 points (+0.500 to +1.500, n = 4)"


@pytest.mark.parametrize(
    ("number", "accuracy", "expected"),
    [
        (1, rising, "holds"),
        (1, falling, "fails: it falls"),
        (1, level, "fails: it does not change"),
        (2, level, "within 0.1 points; best choice not decidable"),
        (2, rising, "fails: not within 0.1 points, but 1024, 8 x 128 is ahead"),
        (4, falling, "holds"),
        (4, rising, "fails"),
        (4, level, "fails"),
        (5, level, "holds with GroupNorm"),
        (5, lambda size, steps: 0.99 - 0.005 * (steps > 1), "fails"),
    ],
)
def test_the_truth_is_found(number, accuracy, expected):
    assert size_verdict(number, study(accuracy)).startswith(expected)


def test_the_claims_need_their_settings():
    runs = study(level).runs
    assert can_be_judged(runs)
    assert not can_be_judged(runs.query("batch_size != 512"))
    unknown = runs.assign(test_accuracy=math.nan)  # as Kaggle's images
    assert not can_be_judged(unknown)
    two_rates = [runs.assign(learning_rate=rate) for rate in (1e-3, 1e-2)]
    assert not can_be_judged(pd.concat(two_rates))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_one_seed_decides_nothing(number):
    assert "not decidable" in size_verdict(number, study(falling, seeds=1))


def test_convergence_is_counted_in_epochs_and_in_updates():
    slower = study(level, epochs_needed=lambda size: 2 + size // 256)
    assert size_verdict(3, slower).startswith("holds only if counted in epochs")
    assert size_verdict(3, study(level)) == "not decidable from this"


def test_an_accuracy_reached_within_the_first_epoch_tells_no_updates():
    slower = study(level, epochs_needed=lambda size: 1 + size // 256)
    row = size_verdicts(only(slower, "seed % 2 == 0")).loc[3]
    assert row["verdict"] == "holds, counted in epochs; counted in updates not decidable from this"
    assert "in updates, 32 needs 0 to 1,687, and 1024 at most 263" in row["these runs show"]


def test_sizes_that_never_get_there_decide_nothing():
    row = size_verdicts(study(level, epochs_needed=lambda size: size // 100)).loc[3]
    assert row["verdict"] == "not decidable from this"
    assert row["these runs show"].startswith("not every run of 32 and of 1024 got to 99%")


def test_only_a_norm_without_neighbours_makes_updates_equal():
    batch = study(level, norm="batch")
    assert size_verdict(5, batch) == "holds, within 0.1 points"
    assert "equal to rounding" in size_verdict(5, study(level, norm="none"))


@pytest.mark.parametrize(
    ("harm", "expected"), [(0.0, "GroupNorm is not needed here"), (0.004, "harmful here")]
)
def test_what_small_pieces_do_to_batch_norm(harm, expected):
    normalisation = study(lambda size, steps: 0.99 - harm * (steps == 8), norm="batch")
    group = study(rising, norm="group")
    normalisation = replace(
        normalisation,
        runs=pd.concat([normalisation.runs, group.runs]),
        predictions=normalisation.predictions | group.predictions,
    )
    normalisation = only(normalisation, "batch_size * accumulation_steps == 1024")
    found = verdict(6, study(level), normalisation)
    assert expected in found


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (lambda size, steps: size, "holds"),
        (lambda size, steps: 4200 + size, "fails"),  # the weights outweigh the activations
        (lambda size, steps: size * steps, "fails"),
        (lambda size, steps: size * (1.24 if steps > 1 else 1), "not decidable"),
    ],
)
def test_whether_accumulation_fits_a_large_batch_into_little_memory(memory, expected):
    noisy = costs(memory)
    # Accumulated settings vary by a percent more a repeat than the others.
    cut = noisy["accumulation_steps"] > 1
    noisy.loc[cut, "peak_memory"] *= 1 + noisy["repeat"] / 100
    runs, normalisation = study(level), study(level, norm="batch")
    row = verdicts(runs, normalisation, kaggle_runs(0), noisy).loc[8]
    assert row["verdict"].startswith(expected)
    assert row["verdict"].endswith("measured on: cpu")
    assert "n = 3" in row["these runs show"]


def test_there_is_a_row_a_claim():
    table = verdicts(study(level), study(level, norm="batch"), kaggle_runs(0), costs())
    assert list(table.index) == list(range(1, 9))
    assert list(table.columns) == ["claim", "these runs show", "verdict"]


def test_a_certain_effect_too_small_to_matter_counts_as_none():
    tiny = study(lambda size, steps: 0.99 + 1e-9 * size)
    certain = Effect(0.0002, 0.0001, 0.0003, 3)
    assert certain.decided
    assert certain.negligible
    assert size_verdict(1, tiny).startswith("fails: it does not change")
    falling_a_little = study(lambda size, steps: 0.99 - (0.0005 if size == 1024 else 0.0))
    assert size_verdict(4, falling_a_little) == "fails, up to 1024"


def test_the_claims_on_batch_size_are_the_same_for_any_dataset():
    runs = study(falling)
    first = verdicts(runs, study(level, norm="batch"), kaggle_runs(0), costs()).loc[1:5]
    pd.testing.assert_frame_equal(size_verdicts(runs), first)


@pytest.mark.parametrize(
    ("gain", "spread", "expected"),
    [
        (0, 2, "fails: there is no such gain"),
        (52, 2, "holds: there is a gain, of that size"),
        (80, 2, "holds: there is a gain, but not of that size"),
        (-40, 2, "fails: in equal epochs 8 x 128 scores lower"),
        (20, 8, "fails: a gain of that size is ruled out; whether there is any is open"),
        (35, 30, "not decidable"),
    ],
)
def test_the_kaggle_claim(gain, spread, expected):
    assert verdict(7, study(level), kaggle=kaggle_runs(gain, spread)).startswith(expected)


def test_rates_are_tuned_on_validation_for_each_setting():
    kaggle = kaggle_runs(0)
    assert tuned_rates(kaggle.tuning) == {1: 1e-3, 8: 2e-3}


def test_the_chance_of_a_lead_by_seeds_alone_on_all_images_is_that_of_their_pairs():
    kaggle = kaggle_runs(0, spread=10)
    right = [200 + 10 * ((seed * 7 + 1) % 5 - 2) for seed in range(5)]
    pairs = list(combinations(right, 2))
    leads = [abs(a - b) >= 20 for a, b in pairs]
    assert seed_chance(kaggle, 28_000, 20) == pytest.approx(sum(leads) / len(pairs) / 2)


def test_the_kaggle_claim_says_whether_rates_were_tuned():
    tuned = kaggle_runs(0)
    normalisation = study(level, norm="batch")
    both, one = [
        verdicts(study(level), normalisation, kaggle, costs()).loc[7]
        for kaggle in (tuned, replace(tuned, tuning=None))
    ]
    assert "at rates tuned on validation (0.001 and 0.002) +0.000 points" in both["these runs show"]
    assert both["verdict"] == (
        "fails: there is no such gain (at one learning rate); "
        "fails: there is no such gain (at tuned rates)"
    )
    assert "tuned" not in one["these runs show"]
    assert one["verdict"] == "fails: there is no such gain (at one learning rate)"


def test_a_tuned_rate_that_was_not_run_is_an_error():
    kaggle = kaggle_runs(0)
    posted = kaggle.runs[kaggle.runs["learning_rate"] == 1e-3]
    with pytest.raises(InputError, match=r"no runs of 8 x 128 at the learning rate 0\.002"):
        verdict(7, study(level), kaggle=replace(kaggle, runs=posted))


def test_one_seed_tells_no_chance():
    kaggle = kaggle_runs(0, seeds=1)
    assert math.isnan(seed_chance(kaggle, 7_000, 13))
    shown = verdicts(study(level), study(level, norm="batch"), kaggle, costs())
    assert "with a chance that one seed does not tell" in shown["these runs show"][7]


def test_the_tuned_rates_are_within_those_tried_and_planned_for_ten_seeds():
    tuning = load_kaggle_runs().tuning
    runs = [run.config for run in load_study("kaggle-split").runs]
    for steps, rate in tuned_rates(tuning).items():
        tried = tuning.loc[tuning["accumulation_steps"] == steps, "learning_rate"]
        assert tried.min() < rate < tried.max()
        planned = [r.seed for r in runs if (r.accumulation_steps, r.learning_rate) == (steps, rate)]
        assert len(planned) >= 10
