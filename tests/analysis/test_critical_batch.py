"""Updates to a target and the critical batch size, on made-up numbers."""

import numpy as np
import pandas as pd
import pytest
from made_up_runs import runs_of

from nbutils import InputError, RunConfig
from nbutils.analysis.critical_batch import (
    REGIMES,
    agreement,
    describe_agreement,
    fastest_rates,
    fit_critical_batch,
    regime_borders,
    target_table,
    updates_to_target,
)

SIZES = np.array([16.0, 64, 256, 1024])


def reached(sizes, images, epochs=2.0):
    columns = {"effective_batch_size": sizes, "images": images, "updates": images / sizes}
    return pd.DataFrame(columns | {"epochs": epochs, "learning_rate": 0.1})


def test_updates_and_images_to_a_target_follow_from_the_epochs():
    runs = runs_of(
        (RunConfig(batch_size=32), [0.6, 0.84, 0.96], 1),  # errors 0.4, 0.16, 0.04
        (RunConfig(batch_size=64), [0.93, 0.95, 0.99], 1),
        (RunConfig(batch_size=128), [0.5, 0.8, 0.91], 1),
    )
    table = updates_to_target(runs, 0.92).set_index("effective_batch_size")
    assert table.loc[32, ["epochs", "updates", "images"]].tolist() == pytest.approx(
        [2.5, 2.5 * 10, 2.5 * 54_000]
    )
    assert table.loc[64, "epochs"] == 1
    assert table.loc[128, ["epochs", "updates", "images"]].isna().all()
    with pytest.raises(InputError, match="target = 92"):
        updates_to_target(runs, 92)


def test_the_fastest_rate_is_one_at_which_every_seed_arrives():
    table = pd.DataFrame({"optimizer": "adam", "effective_batch_size": 32, "seed": [0, 1] * 3})
    table["learning_rate"] = np.repeat([1e-2, 1e-3, 1e-4], 2)
    table["updates"] = [10, np.nan, 30, 40, 50, 60]
    assert fastest_rates(table)["updates"].tolist() == [30, 40]


@pytest.mark.parametrize(("critical", "fewest"), [(20, 1e6), (2000, 5e3)])
def test_the_fit_finds_the_curve_that_made_the_numbers(critical, fewest):
    fit = fit_critical_batch(reached(SIZES, fewest * (1 + SIZES / critical)))
    found = fit.value, fit.fewest_images, fit.fewest_updates
    assert found == pytest.approx((critical, fewest, fewest / critical), rel=1e-3)


def test_the_fits_interval_holds_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    sizes = np.repeat([32, 64, 128, 256, 512, 1024], 2)
    inside = []
    for _ in range(100):
        noise = random.lognormal(0, 0.1, len(sizes))
        fit = fit_critical_batch(reached(sizes, 5000 * (1 + sizes / 200) * noise))
        inside.append(fit.low < 200 < fit.high)
    assert 0.88 < np.mean(inside) < 0.995


def test_runs_that_arrive_in_the_first_epoch_do_not_count():
    table = reached(SIZES, 5000 * (1 + SIZES / 200), epochs=[1, 2, 2, 2])
    table.loc[0, "images"] = 50_000
    assert fit_critical_batch(table).value == pytest.approx(200, rel=1e-3)
    with pytest.raises(InputError, match="at 2 batch sizes, but the fit needs 3"):
        fit_critical_batch(table.head(3))


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
    fit = fit_critical_batch(reached(SIZES, 5000 * (1 + SIZES / 75)))
    table = agreement(noise, 0.96, {"sgd": fit, "adam": fit})
    row = table.iloc[0]
    assert row[["measurements", "lowest", "median", "highest"]].tolist() == [4, 50, 150, 300]
    assert row["ratio"] == pytest.approx(2, rel=1e-3)
    assert table["agree"].tolist() == [True]
    assert describe_agreement(table).endswith(
        "Range and interval overlap: they are compatible. The median is 2 times the fitted size."
    )
    far = agreement(noise.assign(value=noise["value"] * 1000), 0.96, {"sgd": fit})
    assert not far["agree"].any()


def test_the_table_shows_bounds_regimes_and_sizes_that_never_arrive():
    assert regime_borders(100) == pytest.approx((25, 400))
    rows = reached(SIZES, 5000 * (1 + SIZES / 75), epochs=[1, 2, 2, 2])
    fits = {"sgd": fit_critical_batch(rows)}
    table = target_table({"sgd": rows}, fits, [16, 64, 256, 1024, 2048]).loc["sgd"]
    assert table.loc[16, "images"] == "at most 6,067"
    columns = ["learning rate", "updates", "updates, fit"]
    assert table.loc[64, columns].tolist() == ["0.1", "145", "145"]
    assert table.loc[2048, "images"] == "not reached"
    assert table["regime"].tolist() == [REGIMES[place] for place in (0, 1, 1, 2, 2)]
