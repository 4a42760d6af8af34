import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nbutils import RunConfig
from nbutils.analysis.intervals import (
    chance_of_lead,
    crossed_interval,
    detectable_difference,
    detectable_gain,
    gain_interval,
    mean_interval,
    proportion_interval,
)
from nbutils.analysis.summary import (
    compare_predictions,
    compare_settings,
    describe_study,
    format_table,
    name_settings,
    pick,
    summary_table,
    target_accuracy,
)


def runs_of(*settings):
    """Runs as `load_runs` gives them: (config, validation accuracies by epoch, seconds)."""
    rows = []
    for config, accuracies, seconds in settings:
        for epoch, accuracy in enumerate(accuracies, start=1):
            rows.append(
                {
                    "run_id": config.run_id,
                    **config.to_dict(),
                    "effective_batch_size": config.effective_batch_size,
                    "images_per_epoch": 54_000,
                    "validation_images": 6_000,
                    "test_images": 10_000,
                    "images_per_second": 54_000 * len(accuracies) / seconds,
                    "epoch": epoch,
                    "train_accuracy": accuracy,
                    "validation_accuracy": accuracy,
                    "test_accuracy": accuracy - 0.001,
                    "updates": 10 * epoch,
                    "seconds": seconds * epoch / len(accuracies),
                }
            )
    return pd.DataFrame(rows)


def test_settings_are_named_by_what_varies_and_sorted_by_images_per_update():
    runs = runs_of(
        (RunConfig(batch_size=1024), [0.9], 1),
        (RunConfig(batch_size=128, accumulation_steps=8), [0.9], 1),
        (RunConfig(batch_size=32), [0.9], 1),
        (RunConfig(batch_size=32, seed=1), [0.9], 1),
    )
    assert name_settings(runs)["setting"].tolist() == ["32", "32", "1024", "8 x 128 = 1024"]
    rates = runs_of(*[(RunConfig(learning_rate=rate), [0.9], 1) for rate in (0.01, 0.001)])
    assert name_settings(rates)["setting"].tolist() == [
        "128, learning_rate 0.001",
        "128, learning_rate 0.01",
    ]


def test_the_table():
    runs = runs_of(
        (RunConfig(seed=0), [0.980, 0.991, 0.9905], 30),
        (RunConfig(seed=1), [0.991, 0.990, 0.9925], 60),
        (RunConfig(batch_size=1024), [0.90, 0.95, 0.98], 90),
    )
    table = summary_table(runs)
    first = table.loc["128"]
    assert first["seeds"] == 2
    assert first["validation_accuracy"] == pytest.approx(0.9915)
    assert first["best_validation_accuracy"] == pytest.approx((0.991 + 0.9925) / 2)
    assert first["test_accuracy"] == pytest.approx(0.9905)
    assert first["updates"] == 30
    assert first["seconds"] == pytest.approx(30)
    assert first["seconds_to_target"] == pytest.approx(20)
    assert first["images_per_second"] == pytest.approx(5400)
    assert math.isnan(table.loc["1024", "seconds_to_target"])
    assert format_table(table).loc["1024", "to 99%, s"] == "not reached"
    assert "3 runs" in describe_study(runs)


def test_a_target_that_one_seed_never_reached_is_not_averaged_away():
    runs = runs_of(*[(RunConfig(seed=n), [at], 30) for n, at in enumerate([0.991, 0.98, 0.991])])
    assert math.isnan(summary_table(runs)["seconds_to_target"].item())


def test_the_pick_is_the_cheapest_within_the_noise_of_the_best():
    runs = runs_of(
        (RunConfig(batch_size=32), [0.9800, 0.9950], 300),
        (RunConfig(batch_size=64), [0.9940, 0.9945], 180),  # there after one epoch: 90 s
        (RunConfig(batch_size=128), [0.9900, 0.9940], 100),
        (RunConfig(batch_size=1024), [0.9940, 0.9800], 10),  # was there, but did not end there
    )
    choice = pick(runs)
    low, _ = proportion_interval(0.9950, 6000)
    assert choice.best == "32"
    assert choice.threshold == pytest.approx(low)
    assert choice.costs == {"32": 300, "64": 90, "128": 100}
    assert choice.setting == "64"
    assert choice.ties == ["128"]
    assert "Pick: 64; times within 25% of it, so as good: 128." in str(choice)


def test_the_pick_judges_the_mean_over_seeds():
    settings = [(32, [0.995, 0.995]), (64, [0.9999, 0.90])]
    runs = runs_of(
        *[
            (RunConfig(batch_size=size, seed=seed), [accuracy], 1)
            for size, accuracies in settings
            for seed, accuracy in enumerate(accuracies)
        ]
    )
    assert pick(runs).setting == "32"


def test_changes_from_one_batch_to_pieces_are_paired_by_seed():
    pieces = {"batch_size": 128, "accumulation_steps": 8}
    runs = runs_of(
        (RunConfig(batch_size=1024, seed=0), [0.5, 0.90], 1),
        (RunConfig(batch_size=1024, seed=1), [0.5, 0.95], 1),
        (RunConfig(**pieces, seed=0), [0.5, 0.91], 1),
        (RunConfig(**pieces, seed=1), [0.5, 0.96], 1),
    )
    table = compare_settings(runs, ["validation_accuracy"])
    assert table.index.tolist() == [("group", 8, 128)]
    assert table["validation_accuracy"].item() == "+1.00% (+1.00% to +1.00%)"


def predictions_of(*answers):
    """Labels 0, and predictions by run: 0 is right, 1 is wrong."""
    configs = {config.run_id: np.array(list(text), dtype=np.uint8) for config, text in answers}
    return np.zeros(len(answers[0][1]), dtype=np.uint8), configs


def test_gains_are_paired_image_by_image():
    small, large = RunConfig(batch_size=32), RunConfig(batch_size=64)
    runs = runs_of((small, [0.9], 1), (large, [0.9], 1))
    table = compare_predictions(runs, *predictions_of((small, "00011"), (large, "01000")), "32")
    row = table.loc["64"]
    assert (row["seeds"], row["disagreements"], row["gained"]) == (1, 3, 1)
    assert (row["low"], row["high"]) == gain_interval(2, 1)
    assert row["detectable"] == pytest.approx(2.8016 * 3**0.5, rel=1e-4)


def test_gains_are_paired_seed_by_seed():
    configs = [RunConfig(batch_size=b, seed=s) for b in (32, 64) for s in (0, 1)]
    runs = runs_of(*[(config, [0.9], 1) for config in [*configs, RunConfig(batch_size=32, seed=9)]])
    answers = predictions_of(*zip(configs, ["1111", "0011", "0011", "0000"], strict=True))
    answers[1][RunConfig(batch_size=32, seed=9).run_id] = answers[0]
    row = compare_predictions(runs, *answers, "32").loc["64"]
    assert (row["seeds"], row["gained"]) == (2, 2)
    assert (row["low"], row["high"]) == (2, 2)


def test_without_a_common_seed_there_is_no_comparison():
    small, large = RunConfig(batch_size=32), RunConfig(batch_size=64, seed=1)
    answers = predictions_of((small, "00"), (large, "01"))
    both = runs_of((small, [0.9], 1), (large, [0.9], 1))
    alone = runs_of((small, [0.9], 1))
    for runs in (both, alone):
        table = compare_predictions(runs, *answers, "32")
        assert len(table) == 0
        assert "gained" in table


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_interval_of_a_gain_leaves_out_zero_where_mcnemars_test_rejects(gained, lost):
    low, high = gain_interval(gained, lost)
    assert low <= gained - lost <= high
    assert gain_interval(lost, gained) == (pytest.approx(-high), pytest.approx(-low))
    if gained + lost:
        rejects = stats.binomtest(gained, gained + lost).pvalue < 0.05
        assert (low > 0 or high < 0) == rejects


def test_the_detectable_gain_against_simulation():
    # 400 images fall to either network; one is ahead by the lead that should be found in 80 %.
    lead = detectable_gain(400)
    generator = np.random.default_rng(0)
    won, times = np.unique(generator.binomial(400, 0.5 + lead / 800, 2000), return_counts=True)
    told = [gain_interval(int(w), 400 - int(w))[0] > 0 for w in won]
    found = np.average(told, weights=times)
    assert 0.75 < found < 0.85


def test_seeds_that_differ_widen_the_interval():
    close = summary_table(runs_of(*[(RunConfig(seed=s), [0.99], 1) for s in range(3)]))
    apart = summary_table(
        runs_of(*[(RunConfig(seed=s), [a], 1) for s, a in enumerate((0.98, 0.99, 1.0))])
    )
    assert apart["validation_low"].item() < close["validation_low"].item()


def test_mean_interval_against_a_worked_example():
    # n = 4, mean 5, standard deviation 2, t(0.975, 3) = 3.1824
    low, high = mean_interval([3.0, 5.0, 5.0 - 6**0.5 / 3, 7.0 + 6**0.5 / 3])
    assert (low + high) / 2 == pytest.approx(5)
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (high - low) / 2 == pytest.approx(4.302653 * 1 / 3**0.5, rel=1e-6)
    assert all(math.isnan(end) for end in mean_interval([0.5]))


@given(st.integers(1, 2000), st.data())
def test_wilsons_interval_holds_the_share_and_stays_in_0_to_1(n, data):
    correct = data.draw(st.integers(0, n))
    low, high = proportion_interval(correct / n, n)
    assert 0 <= low <= correct / n + 1e-12
    assert correct / n - 1e-12 <= high <= 1
    assert low < high


def test_the_target_is_the_highest_that_most_runs_reach():
    runs = runs_of(
        *[(RunConfig(seed=seed), [0.5, best], 1) for seed, best in enumerate([0.91, 0.96, 0.98])]
    )
    assert target_accuracy(runs) == 0.95
    assert target_accuracy(runs_of((RunConfig(), [0.1], 1))) == 0.5


@given(st.integers(0, 40), st.integers(0, 40), st.integers(-20, 20))
def test_the_chance_of_a_lead_on_all_images_is_certain(won, lost, lead):
    assert chance_of_lead(won, lost, 100, 100, lead) == pytest.approx(float(won - lost >= lead))


def test_the_chance_of_a_lead_against_drawing():
    won, lost, images, part, lead = 60, 50, 1000, 250, 4
    drawn = np.random.default_rng(0).multivariate_hypergeometric(
        [won, lost, images - won - lost], part, size=200_000
    )
    share = np.mean(drawn[:, 0] - drawn[:, 1] >= lead)
    assert chance_of_lead(won, lost, images, part, lead) == pytest.approx(share, abs=0.005)


def crossed_draws(generator, truth, seeds, images, of_seeds, of_images, of_both, times):
    """Values of shape (times, seeds, images) whose seeds, images and pairs of both vary."""
    return (
        truth
        + generator.normal(0, of_seeds, (times, seeds, 1))
        + generator.normal(0, of_images, (times, 1, images))
        + generator.normal(0, of_both, (times, seeds, images))
    )


@pytest.mark.parametrize(("of_seeds", "of_images"), [(0.1, 0.0), (0.0, 1.0), (0.1, 1.0)])
def test_an_interval_over_seeds_and_images_covers_the_truth(of_seeds, of_images):
    draws = crossed_draws(np.random.default_rng(0), 0.3, 3, 100, of_seeds, of_images, 0.5, 2000)
    ends = np.array([crossed_interval(values) for values in draws])
    covered = np.mean((ends[:, 0] < 0.3) & (ends[:, 1] > 0.3))
    assert covered > 0.945
    assert covered < 0.995


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_where_images_agree_only_seeds_widen_the_interval(means):
    crossed = crossed_interval(np.tile(np.array(means)[:, None], 7))
    assert crossed == pytest.approx(mean_interval(means), abs=1e-12)


def test_it_is_never_narrower_than_that_of_the_seeds():
    values = np.random.default_rng(0).normal(size=(3, 50))
    low, high = crossed_interval(values)
    seeds_low, seeds_high = mean_interval(values.mean(axis=1).tolist())
    assert low < seeds_low
    assert high > seeds_high


def test_one_seed_has_no_interval_over_seeds():
    assert all(map(math.isnan, crossed_interval(np.zeros((1, 5)))))


@pytest.mark.parametrize(("of_seeds", "of_images"), [(0.1, 0.0), (0.02, 1.0)])
def test_the_detectable_difference_against_simulation(of_seeds, of_images):
    generator = np.random.default_rng(0)
    spread = crossed_draws(generator, 0, 5, 100, of_seeds, of_images, 0.0, 1)[0]
    # What is drawn has the spread of that sample, not of what it was drawn from.
    truth = detectable_difference(spread)
    seeds = spread.mean(axis=1).std(ddof=1)
    images = spread.mean(axis=0).std(ddof=1)
    draws = crossed_draws(generator, truth, 5, 100, seeds, images, 0.0, 4000)
    found = np.mean([crossed_interval(values)[0] > 0 for values in draws])
    assert found == pytest.approx(0.8, abs=0.04)
