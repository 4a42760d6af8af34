"""The map of batch size x learning rate, and what it takes to reach a target at each size."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_summary import runs_of

from nbutils import InputError, RunConfig
from nbutils.analysis.critical_batch import (
    agreement,
    describe_agreement,
    fastest_rates,
    fit_critical_batch,
    regime,
    regime_borders,
    target_table,
    updates_to_target,
)
from nbutils.analysis.learning_rate import (
    describe_fixed_rates,
    describe_ridge,
    format_ridge,
    growth,
    lowest_loss_rate,
    rate_map,
    ridge,
    scaling_rules,
)

RATES = (1e-4, 1e-3, 1e-2, 1e-1)


def study(accuracies, **settings):
    """Runs with one epoch each: `accuracies[size]` are those of `RATES`."""
    runs = runs_of(
        *[
            (RunConfig(batch_size=size, learning_rate=rate, **settings), [accuracy], 1)
            for size, row in accuracies.items()
            for rate, accuracy in zip(RATES, row, strict=True)
        ]
    )
    return runs.assign(train_loss=1.0, validation_images=400)


@pytest.fixture
def runs():
    return study({32: [0.5, 0.98, 0.97, 0.1], 128: [0.1, 0.6, 0.98, 0.1]})


def test_the_map_marks_the_best_and_what_noise_does_not_tell_from_it(runs):
    table = rate_map(runs)
    marks = table.set_index(["effective_batch_size", "learning_rate"])
    assert [key for key, best in marks["best"].items() if best] == [(32, 1e-3), (128, 1e-2)]
    assert [key for key, equal in marks["within_noise"].items() if equal] == [
        (32, 1e-3),
        (32, 1e-2),
        (128, 1e-2),
    ]


def test_what_learnt_nothing_is_too_slow_below_the_best_rate_and_diverged_above(runs):
    outcomes = rate_map(runs).query("effective_batch_size == 128")["outcome"].tolist()
    assert outcomes == ["too slow", "learnt", "learnt", "diverged"]


def test_a_loss_that_is_not_finite_has_diverged_whatever_the_accuracy(runs):
    runs.loc[(runs["batch_size"] == 128) & (runs["learning_rate"] < 5e-3), "train_loss"] = math.nan
    outcomes = rate_map(runs).query("effective_batch_size == 128")["outcome"].tolist()
    assert outcomes == ["diverged", "diverged", "learnt", "diverged"]


def test_the_map_takes_the_mean_over_seeds():
    both = pd.concat([study({32: [a, 0.5, 0.5, 0.5]}, seed=s) for s, a in ((0, 0.9), (1, 0.8))])
    table = rate_map(both)
    assert table["seeds"].tolist() == [2] * 4
    assert table["validation_accuracy"].iloc[0] == pytest.approx(0.85)


def test_the_ridge_has_no_end_where_none_was_seen(runs):
    table = ridge(rate_map(runs)).set_index("effective_batch_size")
    assert table["best_rate"].tolist() == [1e-3, 1e-2]
    assert table.loc[32, ["low", "high"]].tolist() == pytest.approx([10**-3.5, 10**-1.5])
    assert table.loc[128, ["low", "high"]].tolist() == pytest.approx([10**-2.5, 10**-1.5])

    rising = ridge(rate_map(study({32: [0.1, 0.2, 0.5, 0.9]})))
    assert rising["high"].isna().all()


def test_the_lowest_loss_is_found_between_the_rates_that_were_tried():
    rates = np.array([1e-4, 1e-3, 3e-3, 1e-1])
    losses = np.exp(np.log(rates / 2e-3) ** 2)
    table = pd.DataFrame({"learning_rate": rates, "train_loss": losses})
    assert lowest_loss_rate(table) == pytest.approx(2e-3)
    assert lowest_loss_rate(table.head(2)) == pytest.approx(1e-3)
    table.loc[2, "train_loss"] = math.nan
    assert 1e-4 < lowest_loss_rate(table) < 1e-2


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_power_of_a_ridge_is_found(power):
    sizes = np.array([32, 64, 128, 1024])
    noise = np.array([1.1, 0.9, 1.1, 0.95])
    rates = 1e-3 * sizes**power * noise
    table = pd.DataFrame({"optimizer": "sgd", "effective_batch_size": sizes, "loss_rate": rates})
    row = growth(table).iloc[0]
    assert row["power"] == pytest.approx(power, abs=0.1)
    assert row["low"] < power < row["high"]


def test_scaling_rules_go_through_the_anchor_and_are_held_to_the_ridge(runs):
    ridge_table = ridge(rate_map(runs)).assign(loss_rate=[1e-3, 1e-2])
    rules = scaling_rules(ridge_table, anchor=32)
    rates = rules.pivot_table(index="rule", columns="effective_batch_size", values="learning_rate")
    assert rates.loc["linear"].tolist() == pytest.approx([1e-3, 4e-3])
    assert rates.loc["square root"].tolist() == pytest.approx([1e-3, 2e-3])
    fits = rules.set_index(["rule", "effective_batch_size"])["fits"]
    assert fits.to_dict() == {
        ("linear", 32): True,
        ("linear", 128): True,
        ("square root", 32): True,
        ("square root", 128): False,
    }
    table = format_ridge(ridge_table, rules).loc["adam"]
    assert table.loc[128].tolist() == [
        "0.01",
        "98.0%",
        "0.0032 to 0.032",
        "0.01",
        "0.004, on it",
        "0.002, off it",
    ]
    with pytest.raises(InputError, match=r"anchor = 64.*\[32, 128\]"):
        scaling_rules(ridge_table, anchor=64)


def test_an_open_end_is_told():
    rising = ridge(rate_map(study({32: [0.1, 0.2, 0.5, 0.9]})))
    table = format_ridge(rising, scaling_rules(rising, 32))
    assert table["within noise"].item() == "0.032 to open"


def test_the_ridge_is_described_by_its_power_and_by_the_rates_that_suit_every_size():
    runs = study(
        {32: [0.5, 0.98, 0.97, 0.1], 64: [0.1, 0.9, 0.98, 0.1], 128: [0.1, 0.6, 0.98, 0.1]}
    )
    lowest = runs["batch_size"].map({32: -3, 64: -2.5, 128: -2})
    runs["train_loss"] = np.exp((np.log10(runs["learning_rate"]) - lowest) ** 2)
    table = rate_map(runs)
    text = describe_ridge(table, scaling_rules(ridge(table), anchor=32))
    assert "to the power of 1.66 (95 % interval 1.66 to 1.66" in text
    assert "at *every* size: 0.01." in text
    assert "linear rule: within noise at 2 of 3 sizes, not at 64." in text
    assert "square root rule: within noise at 1 of 3 sizes, not at 64, 128." in text


def test_a_fixed_rate_favours_small_sizes_when_low_and_large_ones_when_high():
    runs = study({32: [0.9, 0.98, 0.9, 0.1], 128: [0.1, 0.98, 0.98, 0.5]})
    smaller, larger = describe_fixed_rates(rate_map(runs)).splitlines()
    assert smaller == (
        "- **adam**, smaller batches are better at the rates: "
        "0.0001 (best at 32: 90.0%, at 128: 10.0%)."
    )
    assert "the rates: 0.01 (best at 128: 98.0%, at 32: 90.0%), 0.1 (best" in larger


def curves(*curves_of_runs):
    return runs_of(*[(config, accuracies, 1) for config, accuracies in curves_of_runs])


def test_a_target_between_two_epochs_is_interpolated_in_the_logarithm_of_the_error():
    runs = curves(
        (RunConfig(batch_size=32), [0.6, 0.84, 0.96]),  # errors 0.4, 0.16, 0.04
        (RunConfig(batch_size=64), [0.93, 0.95, 0.99]),
        (RunConfig(batch_size=128), [0.5, 0.8, 0.91]),
    )
    table = updates_to_target(runs, 0.92).set_index("effective_batch_size")
    assert table.loc[32, "epochs"] == pytest.approx(2.5)
    assert table.loc[64, "epochs"] == 1
    assert table.loc[128, ["epochs", "updates", "images"]].isna().all()
    per_epoch = runs.query("epoch == 1 and batch_size == 32").iloc[0]
    assert table.loc[32, "updates"] == pytest.approx(2.5 * per_epoch["updates"])
    assert table.loc[32, "images"] == pytest.approx(2.5 * per_epoch["images_per_epoch"])


def test_an_error_of_zero_is_reached():
    table = updates_to_target(curves((RunConfig(), [0.5, 1.0])), 0.9)
    assert 1 < table["epochs"].item() < 2


@pytest.mark.parametrize("target", [0, 1, 95])
def test_a_target_is_a_fraction(target):
    with pytest.raises(InputError, match=f"target = {target}"):
        updates_to_target(curves((RunConfig(), [0.5])), target)


def test_the_fastest_rate_is_one_at_which_every_seed_arrives():
    runs = curves(
        (RunConfig(learning_rate=1e-2, seed=0), [0.5, 0.99, 0.99]),
        (RunConfig(learning_rate=1e-2, seed=1), [0.5, 0.5, 0.5]),
        (RunConfig(learning_rate=1e-3, seed=0), [0.5, 0.5, 0.99]),
        (RunConfig(learning_rate=1e-3, seed=1), [0.5, 0.5, 0.99]),
        (RunConfig(learning_rate=1e-4, seed=0), [0.5, 0.5, 0.95]),
        (RunConfig(learning_rate=1e-4, seed=1), [0.5, 0.5, 0.95]),
    )
    fastest = fastest_rates(updates_to_target(runs, 0.9))
    assert fastest["learning_rate"].tolist() == [1e-3, 1e-3]
    assert fastest["seed"].tolist() == [0, 1]


def reached(sizes, images, epochs=2.0):
    sizes = np.array(sizes, dtype=float)
    return pd.DataFrame(
        {
            "effective_batch_size": sizes,
            "images": images,
            "updates": images / sizes,
            "epochs": epochs,
        }
    )


@given(st.floats(20, 2000), st.floats(1e3, 1e6))
def test_the_fit_finds_the_curve_that_made_the_numbers(critical, fewest):
    sizes = np.array([16, 64, 256, 1024, 4096])
    fit = fit_critical_batch(reached(sizes, fewest * (1 + sizes / critical)))
    assert fit.value == pytest.approx(critical, rel=1e-3)
    assert fit.fewest_images == pytest.approx(fewest, rel=1e-3)
    assert fit.fewest_updates == pytest.approx(fewest / critical, rel=1e-3)
    updates, images = fit.fewest_updates, fit.fewest_images
    at = fewest * (1 + 64 / critical)
    assert (at / 64 / updates - 1) * (at / images - 1) == pytest.approx(1, rel=1e-2)


def test_the_fits_interval_holds_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    sizes = np.repeat([32, 64, 128, 256, 512, 1024], 2)
    inside = []
    for _ in range(150):
        noise = random.lognormal(0, 0.1, len(sizes))
        fit = fit_critical_batch(reached(sizes, 5000 * (1 + sizes / 200) * noise))
        inside.append(fit.low < 200 < fit.high)
    assert 0.88 < np.mean(inside) < 0.995


def test_runs_that_arrive_in_the_first_epoch_do_not_count():
    sizes = np.array([16, 32, 64, 256, 1024])
    table = reached(sizes, 5000 * (1 + sizes / 200), epochs=[1, 1, 2, 2, 2])
    table.loc[:1, "images"] = 50_000
    assert fit_critical_batch(table).value == pytest.approx(200, rel=1e-3)
    with pytest.raises(InputError, match="at 2 batch sizes, but the fit needs 3"):
        fit_critical_batch(table.head(4))


def test_regimes_follow_the_share_of_the_ideal_saving():
    low, high = regime_borders(100)
    assert (low, high) == pytest.approx((25, 400))
    assert regime(low - 1, 100) == "perfect scaling"
    assert regime(low + 1, 100) == regime(high - 1, 100) == "diminishing returns"
    assert regime(high + 1, 100) == "maximal data parallelism"


def test_the_estimate_is_compared_up_to_the_first_measurement_at_the_target():
    noise = pd.DataFrame(
        {
            "optimizer": "sgd",
            "seed": [0, 0, 0, 0, 1],
            "update": [1, 10, 100, 1000, 1],
            "validation_accuracy": [0.1, 0.5, 0.97, 0.9, 0.2],
            "value": [100.0, 200.0, 300.0, 9e9, 50.0],
        }
    )
    sizes = np.array([16, 64, 256, 1024])
    fit = fit_critical_batch(reached(sizes, 5000 * (1 + sizes / 75)))
    row = agreement(noise, 0.96, {"sgd": fit, "adam": fit}).iloc[0]
    assert row[["measurements", "lowest", "median", "highest"]].tolist() == [4, 50, 150, 300]
    assert row["ratio"] == pytest.approx(2, rel=1e-3)
    assert row["agree"]
    assert "They are compatible: range and interval overlap; the median is 2.0 times as large." in (
        describe_agreement(agreement(noise, 0.96, {"sgd": fit}))
    )
    assert not agreement(noise.assign(value=noise["value"] * 1000), 0.96, {"sgd": fit})[
        "agree"
    ].any()


def test_the_table_tells_bounds_and_sizes_that_never_arrive():
    sizes = np.array([16, 64, 256, 1024])
    rows = reached(sizes, 5000 * (1 + sizes / 75), epochs=[1, 2, 2, 2]).assign(learning_rate=0.1)
    fits = {"sgd": fit_critical_batch(rows)}
    table = target_table({"sgd": rows}, fits, [16, 64, 256, 1024, 2048]).loc["sgd"]
    assert table.loc[16, "images"] == "at most 6,067"
    assert table.loc[64, ["learning rate", "updates", "updates, fit"]].tolist() == [
        "0.1",
        "145",
        "145",
    ]
    assert table.loc[2048, "images"] == "not reached"
    assert table["regime"].tolist()[::4] == ["perfect scaling", "maximal data parallelism"]
