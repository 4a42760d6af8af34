"""The claims about batch size, on made-up runs in which the truth is known."""

import math

import pandas as pd
import pytest
from made_up_runs import answers_of

from nbutils.analysis.size_claims import (
    can_be_judged,
    confirmation_table,
    size_verdicts,
    split_seeds,
    target_accuracy,
)
from nbutils.analysis.verdict import verdict_details, verdict_table


def level(size, steps):
    return 0.99


def rising(size, steps):
    return 0.97 + 0.002 * (size * steps).bit_length()


def falling(size, steps):
    return 0.999 - 0.001 * (size * steps).bit_length()


def verdict(number, answers):
    return verdict_table(size_verdicts(answers))["verdict"][str(number)]


@pytest.mark.parametrize(
    ("number", "accuracy", "expected"),
    [
        (1, rising, "holds: accuracy rises by between +"),
        (1, falling, "fails: from 32 to 1024 it changes by between -0."),
        (1, level, "fails: from 32 to 1024 it changes by between -0.0"),
        (2, rising, "fails for the margin: between +0.1"),
        (2, level, "holds for the margin: between -0.0"),
        (4, falling, "holds: it changes by between -0."),
        (4, rising, "fails up to 1024: it changes by between +0."),
        (4, level, "fails up to 1024: it changes by between -0.0"),
        (5, level, "holds: they differ by between -0.0"),
        (5, lambda size, steps: 0.99 - 0.005 * (steps > 1), "fails: they differ by between -0."),
    ],
)
def test_the_truth_is_found_and_carries_its_bound(number, accuracy, expected):
    found = verdict(number, answers_of(accuracy))
    assert found.startswith(expected)
    assert found.count(" points") >= 1


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        (rising, "fails for the best: as good as 512 is 1024"),
        (level, "fails for the best: as good as 512 are 32, 64, 128, 256, 1024"),
        (lambda size, steps: 0.99 + 0.005 * (size == 512), "holds for the best"),
    ],
)
def test_a_size_that_is_not_worse_than_512_keeps_it_from_being_the_best(accuracy, expected):
    assert verdict(2, answers_of(accuracy)).endswith(expected)


@pytest.mark.parametrize("number", [1, 2, 4, 5])
def test_an_open_verdict_says_between_what(number):
    noisy = answers_of(level, seeds=(0, 1, 2), noise=20)
    assert verdict(number, noisy).startswith("open")
    assert "between -" in verdict(number, noisy)


def test_one_seed_decides_nothing():
    table = verdict_table(
        size_verdicts(answers_of(falling, lambda size: 2 + size // 256, seeds=[0]))
    )
    assert table["verdict"].str.startswith("open").all()
    assert table["verdict"].str.contains("one seed").all()


def test_convergence_is_counted_in_epochs_and_in_updates():
    slower = answers_of(level, late_from=lambda size: 3 if size == 32 else 6)
    row = verdict_table(size_verdicts(slower)).loc["3"]
    assert row["these runs show"] == (
        "epochs to 99.2% validation accuracy: 3.0 with 32, 6.0 with 1024 (n = 5)"
    )
    assert row["verdict"] == (
        "holds in epochs: 32 needs 3.0 to 3.0 fewer; the other way round in updates: 32 needs "
        "3,374 to 5,061 updates, 1024 at most 312"
    )
    assert verdict(3, answers_of(level)).startswith("open in epochs: 1024 needs +0.0 to +0.0 more")


def test_a_target_is_reached_by_every_run_and_by_none_in_its_first_epoch():
    runs = answers_of(level).runs
    assert target_accuracy(runs) == 0.992
    first = runs["epoch"] == 1
    early = runs.assign(validation_accuracy=runs["validation_accuracy"].mask(first, 0.992))
    assert target_accuracy(early) is None
    assert verdict(3, answers_of(level, late_from=lambda size: 1)).startswith("open: 32 gets to")


def test_too_few_updates_are_not_taken_for_poor_generalisation():
    answers = answers_of(falling)
    large = answers.runs["batch_size"] == 1024
    answers.runs.loc[large, "train_accuracy"] -= 0.01
    assert verdict(4, answers).startswith("open: 1024 scores lower by between -0.")
    assert verdict(4, answers).endswith("but fits the training images less well too")


def test_the_agreement_stands_beside_that_of_two_seeds():
    verdicts = size_verdicts(answers_of(level))
    assert verdicts[4].verdict.endswith(" points; two seeds of 1024 by 0.02")
    assert "1024 and 8 x 128, same seed: " in verdict_details(verdicts)
    batch = verdict_details(size_verdicts(answers_of(level, norm="batch")))
    assert "With batch norm the two make different updates" in batch


def test_confirming_seeds_are_judged_alone_and_earlier_ones_shown_beside_them():
    earlier, later = answers_of(rising, seeds=range(5)), answers_of(level, seeds=range(5, 10))
    earlier.late.update(later.late)
    runs = pd.concat([earlier.runs, later.runs], ignore_index=True)
    both = type(earlier)(runs, earlier.labels, earlier.late)
    assert verdict_table(size_verdicts(both, confirming=5)).equals(
        verdict_table(size_verdicts(later))
    )
    table = confirmation_table(both, confirming=5)
    assert list(table) == ["seeds 0 to 4", "seeds 5 to 9"]
    assert table.iloc[0, 0].startswith("+1.0")
    assert table.iloc[0, 1].startswith("+0.0")


def test_where_no_fresh_seed_has_all_settings_all_seeds_are_judged_together():
    answers = answers_of(level)
    assert list(split_seeds(answers, confirming=5)) == ["seeds 0 to 4"]
    assert list(split_seeds(answers, confirming=4)) == ["seeds 0 to 4"]
    assert list(split_seeds(answers, confirming=3)) == ["seeds 0 to 2", "seeds 3 to 4"]
    assert list(split_seeds(answers, confirming=0)) == ["seeds 0 to 4"]


def test_the_claims_need_their_settings():
    runs = answers_of(level).runs
    assert can_be_judged(runs)
    assert not can_be_judged(runs.query("batch_size != 512"))
    assert not can_be_judged(runs.assign(test_accuracy=math.nan))  # as Kaggle's images
    # Runs from before a setting existed go with those of its default.
    assert can_be_judged(runs.assign(augment=runs["augment"].where(runs["seed"] > 2)))
    two_rates = [runs.assign(learning_rate=rate) for rate in (1e-3, 1e-2)]
    assert not can_be_judged(pd.concat(two_rates))
