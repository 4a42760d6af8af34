"""What a run came to, how settings differ, and the table of a study."""

import math
from dataclasses import replace

import numpy as np
import pytest
from made_up_runs import SIZES, answers_of, runs_of

from nbutils import InputError, RunConfig
from nbutils.analysis.effects import Answers, Effect, effect, lead, prediction_differences
from nbutils.analysis.intervals import crossed_interval
from nbutils.analysis.outcomes import first_crossing, late_epochs, name_settings, outcomes
from nbutils.analysis.summary import (
    compare_settings,
    describe_study,
    format_table,
    markdown_table,
    summary_table,
)


def test_an_outcome_is_the_mean_of_the_last_five_epochs():
    rising = [0.1] * 15 + [0.95, 0.96, 0.97, 0.98, 0.99]
    runs = runs_of((RunConfig(seed=1), rising, 20), (RunConfig(seed=0), [0.5] * 20, 40))
    table = outcomes(runs)
    assert table["validation_accuracy"].tolist() == pytest.approx([0.97, 0.5])
    assert table["test_accuracy"].iloc[0] == pytest.approx(0.969)
    assert table[["seed", "epoch", "updates", "seconds"]].iloc[0].tolist() == [1, 20, 200, 20]

    rising = runs["seed"] == 1
    runs.loc[rising & (runs["epoch"] == 17), "train_loss"] = math.nan
    assert outcomes(runs)["train_loss"].isna().tolist() == [True, False]
    assert [late_epochs(epochs) for epochs in (1, 3, 5, 8, 20, 40)] == [1, 1, 1, 2, 5, 5]


def test_settings_are_named_by_what_varies_and_sorted_by_images_per_update():
    configs = [RunConfig(batch_size=b, accumulation_steps=s) for b, s in ((1024, 1), (128, 8))]
    configs += [RunConfig(batch_size=32, seed=seed) for seed in (0, 1)]
    named = name_settings(runs_of(*[(config, [0.9], 1) for config in configs]))
    assert named["setting"].tolist() == ["32", "32", "1024", "8 x 128"]
    rates = runs_of(*[(RunConfig(learning_rate=rate), [0.9], 1) for rate in (0.01, 0.001)])
    assert name_settings(rates)["setting"].iloc[1] == "128, learning_rate 0.01"
    # Runs from before a setting existed go with those of its default.
    rates = rates.assign(learning_rate=0.001, augment=[None, False])
    assert name_settings(rates)["setting"].tolist() == ["128", "128"]


def test_a_crossing_between_two_epochs_is_interpolated_in_the_logarithm_of_the_error():
    assert first_crossing(np.array([0.4, 0.16, 0.04]), 0.08) == pytest.approx(2.5)
    assert first_crossing(np.array([0.07, 0.05]), 0.08) == 1
    assert math.isnan(first_crossing(np.array([0.5, 0.2]), 0.08))
    assert 1 < first_crossing(np.array([0.5, 0.0]), 0.08) < 2


def test_an_effect_is_paired_by_seed_and_its_interval_covers_seeds_and_images():
    answers = answers_of(lambda size, steps: 0.99 + 0.005 * (size == 64), sizes=SIZES[:2])
    gap = lead(answers, "64", "32")
    assert gap.seeds == 5
    assert gap.mean == pytest.approx(0.005)
    ids = answers.by_setting("run_id")
    right = [[answers.late[run][0] == 0 for run in ids[setting]] for setting in ("64", "32")]
    values = np.subtract(*np.array(right, float))
    assert (gap.low, gap.high, gap.detectable) == pytest.approx(crossed_interval(values))
    assert str(Effect(0.01, 0.005, 0.015, 4)) == "+1.00 points (+0.50 to +1.50, n = 4)"
    assert Effect(-0.00001, -0.0005, 0.0005, 4).bound == "between -0.05 and +0.05 points"


def test_older_records_give_the_image_part_of_the_interval_from_the_final_epoch():
    newer, older = (
        answers_of(lambda size, steps: 0.99, kept=kept, sizes=SIZES[:2]) for kept in (5, 1)
    )
    for run_id in newer.by_setting("run_id")["32"]:
        newer.late[run_id][:4, :300] = 1  # the same images wrong, but for the final epoch
    before, after = lead(older, "32", "64"), lead(newer, "32", "64")
    assert before.mean == after.mean
    assert before.high < after.high


def test_seeds_that_lack_a_setting_are_left_out_and_one_seed_has_no_interval():
    answers = answers_of(lambda size, steps: 0.99, seeds=(0, 1), sizes=SIZES[:2])
    runs = answers.runs
    one = replace(answers, runs=runs[(runs["batch_size"] != 32) | (runs["seed"] == 0)])
    assert str(lead(one, "64", "32")).endswith(" points (n = 1: no interval)")
    with pytest.raises(InputError, match="no seed has runs of all of 64, 2048"):
        effect(one, {"64": 1, "2048": -1})


def test_predictions_are_compared_with_two_seeds_of_one_setting_as_the_baseline():
    answers = answers_of(lambda size, steps: 0.99, seeds=(0, 1, 2), noise=0)
    for seed, run_id in enumerate(answers.by_setting("run_id")["1024"]):
        answers.late[run_id][-1, : 10 * seed] = 1
    table = prediction_differences(answers, [("1024", "8 x 128"), ("1024", "1024"), ("1", "2")])
    assert table.to_numpy().tolist() == [
        ["1024 and 8 x 128, same seed", 3, 10.0, 0, 20],
        ["two seeds of 1024", 3, pytest.approx(40 / 3), 10, 20],
    ]


def test_the_table_pairs_each_setting_with_128():
    answers = answers_of(lambda size, steps: 0.99 + 0.005 * (size == 64), seeds=(0, 1, 2))
    table = summary_table(answers, seconds={"64": 7.0})
    assert table.loc["64", "difference"] == pytest.approx(lead(answers, "64", "128").mean)
    shown = format_table(table)
    assert list(shown) == [
        *("seeds", "test accuracy", "minus 128, points (95 %)", "s/epoch", "updates/epoch")
    ]
    assert shown.loc["128", "minus 128, points (95 %)"] == "baseline"
    assert shown.loc[["64", "1024"], "s/epoch"].tolist() == ["7.0", ""]
    assert shown.loc["8 x 128", "updates/epoch"] == "52"
    assert markdown_table(shown).splitlines()[0].startswith("| setting | seeds | test accuracy |")
    own = format_table(summary_table(answers))
    assert own.loc["1024", "s/epoch"] == "3.0"  # of the fastest seed: 60 s in 20 epochs


def test_one_seed_settings_without_common_seeds_and_unknown_labels_say_so():
    runs = runs_of(
        (RunConfig(batch_size=32, seed=0), [0.9] * 4, 1),
        (RunConfig(batch_size=64, seed=0), [0.95] * 4, 1),
        (RunConfig(batch_size=256, seed=1), [0.9] * 4, 1),
    ).assign(test_accuracy=math.nan)
    shown = format_table(summary_table(Answers(runs, np.zeros(0, np.uint8), {})))
    assert shown["validation accuracy"].tolist() == ["90.00%", "95.00%", "90.00%"]
    assert shown["minus 32, points (95 %)"].tolist() == [
        *("baseline", "+5.00 (one seed)", "no seed in common")
    ]


def test_changes_from_one_batch_to_micro_batches_are_paired_by_seed():
    runs = []
    for norm, steps, gain in (
        ("batch", 1, 0),
        ("batch", 8, 0.02),
        ("group", 1, 0),
        ("group", 8, 0),
    ):
        size = {"batch_size": 1024 // steps, "accumulation_steps": steps}
        for seed, end in ((0, 0.90), (1, 0.95)):
            runs.append((RunConfig(norm=norm, seed=seed, **size), [end + gain], 1))
    table = compare_settings(runs_of(*runs), ["validation_accuracy"])
    assert table["validation accuracy, points"].to_dict() == {
        ("batch", "8 x 128"): "+2.00 (+2.00 to +2.00, n = 2)",
        ("group", "8 x 128"): "+0.00 (+0.00 to +0.00, n = 2)",
    }


def test_a_study_is_described_by_what_all_runs_share():
    runs = runs_of(*[(RunConfig(norm=norm), [0.9], 1) for norm in ("batch", "group")])
    text = describe_study(runs)
    assert "**2 runs** on `mnist-5k`: 2 settings, 1 seed, 20 epochs" in text
    assert text.endswith("The same in all: optimizer adam, learning rate 0.001, dropout 0.4.")
