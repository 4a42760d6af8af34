"""The pick on made-up runs in which the cheapest settings are known."""

import re

import numpy as np
import pytest
from made_up_runs import runs_of

from nbutils import InputError, RunConfig
from nbutils.analysis.intervals import proportion_interval
from nbutils.analysis.pick import format_pick, pick


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Fewer for speed: 1,000 resamples of the seeds take a second."""
    monkeypatch.setattr("nbutils.analysis.pick.RESAMPLES", 100)


SECONDS = {"32": 10.0, "64": 6.0, "128": 5.0, "1024": 4.0}


def study(seeds, late=None):
    """Errors of 32, 64 and 128 (`late` by seed) halve each epoch; 1024 ends 0.5 points below."""
    rows = []
    for seed in range(seeds):
        for size in (32, 64, 128, 1024):
            delay = late[seed] if size == 128 and late else 0
            errors = 0.005 + 0.1 * 0.5 ** (np.arange(20) - delay) + 0.005 * (size == 1024)
            config = RunConfig(batch_size=size, seed=seed)
            rows.append((config, 1 - errors + 1e-5 * (size + seed == 32), 20 * SECONDS[str(size)]))
    return runs_of(*rows)


def test_the_cheapest_settings_are_named_with_their_shares():
    choice = pick(study(5), SECONDS)
    assert choice.settings == ["64", "128"]
    assert choice.best == "32"
    assert choice.threshold == pytest.approx(proportion_interval(0.995, 6000)[0], abs=1e-4)
    assert choice.table.loc["128", ["share", "qualifies"]].tolist() == [1, True]
    assert choice.table.loc["1024", ["share", "qualifies"]].tolist() == [0, False]
    assert str(choice).startswith("Take 64 or 128. Each is among the fastest in at least 80%")
    shown = format_pick(choice)
    assert shown.loc["1024", f"s to {choice.threshold:.2%}"] == "ends too low"
    assert shown["among the fastest"].tolist() == ["0%", "100%", "100%", "0%"]


def test_without_measured_times_the_fastest_seed_counts():
    runs = study(5)
    slow = (runs["batch_size"] == 64) & (runs["seed"] > 0)
    runs.loc[slow, "seconds"] *= 9
    assert pick(runs).settings == pick(runs, SECONDS).settings


def test_a_setting_that_is_cheap_in_half_of_the_resamples_is_not_named():
    runs = study(8, late=[2, 0] * 4).query("batch_size in (64, 128)")
    choice = pick(runs, {"64": 6.0, "128": 6.3})
    assert choice.settings == ["64"]
    assert 0.2 < choice.table.loc["128", "share"] < 0.8


def test_no_setting_is_named_where_none_is_stable():
    runs = study(3, late=[8, 0, 0]).query("batch_size in (32, 128)")
    choice = pick(runs, {"32": 6.5, "128": 5.0})
    assert choice.settings == []
    assert choice.answer.startswith("No setting is reliably among the fastest. In resamples of")


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_are_called_a_guess(seeds):
    choice = pick(study(seeds), SECONDS)
    assert choice.settings == ["64", "128"]
    assert re.match("A guess from (one seed|2 seeds): 64 or 128", choice.answer)
    assert "among the fastest" not in format_pick(choice)


def test_settings_that_share_no_seed_are_compared_as_one_seed():
    runs = study(2)
    apart = runs[(runs["batch_size"] == 64) == (runs["seed"] == 1)]
    assert pick(apart, SECONDS).seeds == 1


def test_settings_without_a_time_are_left_out_by_name_and_so_need_no_seeds():
    runs = study(3).query("batch_size != 1024 or seed == 0")
    choice = pick(runs, {"64": 6.0, "32": 10.0})
    assert (choice.untimed, choice.seeds) == (["128", "1024"], 3)
    assert str(choice).endswith("Not timed: 128, 1024.")
    with pytest.raises(InputError, match="seconds has 16, but no setting of the runs"):
        pick(study(3), {"16": 1.0})
