"""Updates to a target and the critical batch size, on made-up numbers."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_runs import runs_of

from nbutils import InputError, RunConfig
from nbutils.analysis.critical_batch import (
    agreement,
    describe_agreement,
    fastest_rates,
    fit_critical_batch,
    regime_borders,
    target_table,
    updates_to_target,
)


def curves(*curves_of_runs):
    return runs_of(*[(config, accuracies, 1) for config, accuracies in curves_of_runs])


def test_updates_and_images_to_a_target_follow_from_the_epochs():
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


@settings(max_examples=25)
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
    assert regime_borders(100) == pytest.approx((25, 400))


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
    assert "Range and interval overlap: they are compatible. The median is 2 times" in (
        describe_agreement(agreement(noise, 0.96, {"sgd": fit}))
    )
    assert not agreement(noise.assign(value=noise["value"] * 1000), 0.96, {"sgd": fit})[
        "agree"
    ].any()


def test_the_table_shows_bounds_and_sizes_that_never_arrive():
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
