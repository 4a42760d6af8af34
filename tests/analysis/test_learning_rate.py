"""The map of batch size x learning rate on made-up runs."""

import math

import numpy as np
import pandas as pd
import pytest
from made_up_runs import runs_by_rate

from nbutils import InputError
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


def study(accuracies):
    return runs_by_rate(accuracies, RATES).assign(train_loss=1.0, validation_images=400)


@pytest.fixture
def runs():
    return study({32: [0.5, 0.98, 0.97, 0.1], 128: [0.1, 0.6, 0.98, 0.1]})


def test_the_map_marks_the_best_rate_of_a_size_and_those_within_noise(runs):
    table = rate_map(runs)
    keys = ["effective_batch_size", "learning_rate"]
    assert table.loc[table["best"], keys].to_numpy().tolist() == [[32, 1e-3], [128, 1e-2]]
    equal = table.loc[table["within_noise"], keys].to_numpy().tolist()
    assert equal == [[32, 1e-3], [32, 1e-2], [128, 1e-2]]


def test_what_learnt_nothing_is_too_slow_below_the_best_rate_and_diverged_above(runs):
    large = runs["batch_size"] == 128
    outcomes = rate_map(runs[large])["outcome"].tolist()
    assert outcomes == ["too slow", "learnt", "learnt", "diverged"]
    # A loss that is not finite has diverged, whatever the accuracy.
    runs.loc[runs["learning_rate"] < 5e-3, "train_loss"] = math.nan
    outcomes = rate_map(runs[large])["outcome"].tolist()
    assert outcomes == ["diverged", "diverged", "learnt", "diverged"]


def test_the_map_takes_the_mean_over_seeds():
    runs = pd.concat([study({32: [0.8 + seed / 10] * 4}).assign(seed=seed) for seed in (0, 1)])
    table = rate_map(runs)
    assert (table.loc[0, "seeds"], table.loc[0, "validation_accuracy"]) == (2, pytest.approx(0.85))


def test_the_ridge_has_no_end_where_none_was_seen(runs):
    table = ridge(rate_map(runs)).set_index("effective_batch_size")
    assert table["best_rate"].tolist() == [1e-3, 1e-2]
    assert table.loc[32, ["low", "high"]].tolist() == pytest.approx([10**-3.5, 10**-1.5])
    assert table.loc[128, ["low", "high"]].tolist() == pytest.approx([10**-2.5, 10**-1.5])

    rising = ridge(rate_map(study({32: [0.1, 0.2, 0.5, 0.9]})))
    assert rising["high"].isna().all()
    table = format_ridge(rising, scaling_rules(rising, 32))
    assert table["within noise"].item() == "0.032 to open"


def test_the_lowest_loss_is_found_between_the_rates_that_were_tried():
    rates = np.array([1e-4, 1e-3, 3e-3, 1e-1])
    losses = np.exp(np.log(rates / 2e-3) ** 2)
    table = pd.DataFrame({"learning_rate": rates, "train_loss": losses})
    assert lowest_loss_rate(table) == pytest.approx(2e-3)
    assert lowest_loss_rate(table.head(2)) == pytest.approx(1e-3)
    table.loc[2, "train_loss"] = math.nan
    assert 1e-4 < lowest_loss_rate(table) < 1e-2


def test_the_power_of_a_ridge_is_found_within_its_interval():
    table = pd.DataFrame({"effective_batch_size": [32, 64, 128, 1024]})
    table["loss_rate"] = table["effective_batch_size"] ** 0.5 * [1.1, 0.9, 1.1, 0.95]
    found, low, high = growth(table)
    assert found == pytest.approx(0.5, abs=0.1)
    assert low < 0.5 < high


def test_scaling_rules_go_through_the_anchor_and_are_held_to_the_ridge(runs):
    ridge_table = ridge(rate_map(runs)).assign(loss_rate=[1e-3, 1e-2])
    rules = scaling_rules(ridge_table, anchor=32)
    rates = rules.pivot_table(index="rule", columns="effective_batch_size", values="learning_rate")
    assert rates.loc["linear"].tolist() == pytest.approx([1e-3, 4e-3])
    assert rates.loc["square root"].tolist() == pytest.approx([1e-3, 2e-3])
    assert rules["fits"].tolist() == [True, True, True, False]
    shown = format_ridge(ridge_table, rules).loc["adam"].loc[128].tolist()
    assert shown[:4] == ["0.01", "98.0%", "0.0032 to 0.032", "0.01"]
    assert shown[4:] == ["0.004, within", "0.002, outside"]
    with pytest.raises(InputError, match=r"anchor = 64.*\[32, 128\]"):
        scaling_rules(ridge_table, anchor=64)


def test_the_ridge_is_described_by_its_power_and_by_the_rates_that_suit_every_size():
    runs = study(
        {32: [0.5, 0.98, 0.97, 0.1], 64: [0.1, 0.9, 0.98, 0.1], 128: [0.1, 0.6, 0.98, 0.1]}
    )
    lowest = runs["batch_size"].map({32: -3, 64: -2.5, 128: -2})
    runs["train_loss"] = np.exp((np.log10(runs["learning_rate"]) - lowest) ** 2)
    table = rate_map(runs)
    power, rates, linear, root = describe_ridge(
        table, scaling_rules(ridge(table), anchor=32)
    ).splitlines()
    assert "to the power of 1.66 (95 % interval 1.66 to 1.66)." in power
    assert power.endswith("the interval contains neither.")
    assert rates.endswith("validation accuracy at every size: 0.01.")
    assert linear.endswith("linear rule: within noise at 2 of 3 sizes, not at 64.")
    assert root.endswith("square root rule: within noise at 1 of 3 sizes, not at 64, 128.")


def test_a_fixed_rate_favours_small_sizes_when_low_and_large_ones_when_high():
    runs = study({32: [0.9, 0.98, 0.9, 0.1], 128: [0.1, 0.98, 0.98, 0.5]})
    smaller, larger = describe_fixed_rates(rate_map(runs)).splitlines()
    assert smaller == (
        "- **adam**, small batches are better at 0.0001 (best at 32: 90.0%, at 128: 10.0%)."
    )
    assert "are better at 0.01 (best at 128: 98.0%, at 32: 90.0%), 0.1 (best" in larger
