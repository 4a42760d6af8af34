"""Figures of costs, learning rates and noise: what is drawn equals the table."""

import numpy as np
import pandas as pd
import pytest
from made_up_runs import runs_by_rate

from nbutils import plots
from nbutils.analysis.critical_batch import REGIMES, fit_critical_batch
from nbutils.analysis.learning_rate import rate_map, ridge, scaling_rules


def costs():
    """Memory of the micro-batch, measured twice; one setting ran out of memory."""
    settings = [(2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)] * 2
    table = pd.DataFrame(settings, columns=["batch_size", "accumulation_steps"])
    images = table["batch_size"] * table["accumulation_steps"]
    table["effective_batch_size"], table["repeat"] = images, np.repeat([0, 1], 6)
    table["peak_memory"] = (1e6 * table["batch_size"]).where(table["batch_size"] < 8)
    return table.assign(seconds_per_update=images * (1.0 + table["repeat"]))


def test_cost_has_a_line_for_the_whole_batch_and_one_per_micro_batch(ax):
    plots.plot_cost(ax, costs(), "peak_memory")
    lines = {c.get_label(): c.lines[0].get_ydata().tolist() for c in ax.containers}
    assert list(lines) == ["the whole batch", "passes of 2", "passes of 4"]
    assert lines["the whole batch"] == pytest.approx([2, 4])  # 8 did not fit
    assert lines["passes of 2"] == pytest.approx([2, 2, 2])


def test_a_cost_map_shows_each_median_that_there_is(ax):
    plots.plot_cost_map(ax, costs(), "seconds_per_update")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "2", "4"]
    assert [text.get_text() for text in ax.texts] == ["3", "6", "12", "6", "12", "12"]
    plots.plot_cost_map(ax, costs().assign(seconds_per_update=4572.5), "seconds_per_update")
    assert "4,572" in {text.get_text() for text in ax.texts}


def test_a_search_shows_what_fits_and_what_does_not(ax):
    plots.plot_search(ax, {1: 1_000_000, 4: 9_000_000, 8: None}, 5_000_000)
    limit, *tries = ax.lines
    assert [(line.get_xdata()[0], line.get_marker()) for line in tries] == [(1, "o"), (4, "x")]
    assert limit.get_ydata()[0] == 5


@pytest.fixture
def rates():
    """A map of two sizes and three rates, with one that diverged."""
    accuracies = {32: (0.97, 0.98, 0.1), 128: (0.6, 0.9, 0.98)}
    runs = runs_by_rate(accuracies, (1e-3, 1e-2, 1e-1))
    return rate_map(runs.assign(train_loss=1 / runs["validation_accuracy"]))


def test_the_map_writes_each_accuracy_and_what_diverged_and_lies_under_the_rules(ax, rates):
    plots.plot_rate_map(ax, rates)
    texts = {(text.get_position()): text for text in ax.texts}
    assert texts[128, 1e-2].get_text() == "90.0"
    assert texts[32, 1e-1].get_text() == "diverged"
    assert texts[32, 1e-2].get_fontweight() == "bold"
    assert texts[32, 1e-1].get_fontweight() == "normal"
    (mesh,) = ax.collections
    errors = np.asarray(mesh.get_array())
    assert errors == pytest.approx(np.array([[0.03, 0.4], [0.02, 0.1], [0.9, 0.02]]))
    limits = ax.get_ylim()
    plots.plot_scaling_rules(ax, ridge(rates), scaling_rules(ridge(rates), 32))
    assert ax.get_ylim() == limits
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["linear rule", "square root rule", "lowest training loss"]


def test_cuts_show_errors_with_intervals_and_the_best_of_each_size(ax, rates):
    plots.plot_fixed_rates(ax, rates, [1e-2, 1e-3])
    drawn = {c.get_label(): c.lines[0].get_ydata() for c in ax.containers}
    assert list(drawn) == ["0.001", "0.01", "best of each size"]
    assert drawn["0.001"] == pytest.approx([3, 40])
    assert drawn["best of each size"] == pytest.approx([2, 2])


def test_an_interval_without_an_end_reaches_the_top(ax):
    table = pd.DataFrame(
        {
            "optimizer": ["adam", "adam", "sgd", "sgd"],
            "seed": 0,
            "update": [1, 10, 1, 10],
            "low": [50.0, 80.0, 0.0, 100.0],
            "value": [100.0, 200.0, np.inf, 300.0],
            "high": [200.0, np.inf, np.inf, 900.0],
        }
    )
    plots.plot_noise_scale(ax, table)
    bottom, top = ax.get_ylim()
    assert (bottom, top) == (25, 2700)
    reached = [path.vertices[:, 1].max() for bars in ax.collections for path in bars.get_paths()]
    assert reached == [200, top, top, 900]
    median = {line.get_linestyle(): line.get_ydata().tolist() for line in ax.lines[1::2]}
    assert median["-"] == [100, 200]
    assert np.isnan(median["--"][0])
    assert [text.get_text() for text in ax.texts] == ["adam", "sgd"]


def test_updates_to_a_target_show_bounds_misses_and_regimes(ax):
    runs = pd.DataFrame({"effective_batch_size": [16, 64, 256, 1024], "epochs": [1.0, 2, 2, 2]})
    runs["images"] = 5000 * (1 + runs["effective_batch_size"] / 100)
    runs["updates"] = runs["images"] / runs["effective_batch_size"]
    plots.plot_updates_to_target(ax, runs, fit_critical_batch(runs), [2048])
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["run"].get_xdata().tolist() == [64, 256, 1024]
    assert lines["run, at most"].get_markerfacecolor() == "white"
    assert lines["not reached"].get_xdata() == [2048]
    texts = [text.get_text().replace("\n", " ") for text in ax.texts]
    assert texts == ["fit", "fewest updates", *REGIMES]


@pytest.mark.parametrize(
    ("same", "where"), [(True, "advised"), (False, "advised, at another size")]
)
def test_the_advised_rate_is_marked_beside_the_best_one(ax, same, where):
    loss = pd.Series([0.9, 0.5, 0.4, np.nan])
    rates = pd.DataFrame({"validation_loss": loss, "low": loss - 0.05, "high": loss + 0.05})
    rates["learning_rate"], rates["best"] = [0.001, 0.003, 0.01, 0.03], loss == 0.4
    rates["outcome"] = ["learnt"] * 3 + ["diverged"]
    plots.plot_rates(ax, rates, advised=0.003, rates_at=128, same=same)
    lines = {line.get_label(): list(line.get_xdata()) for line in ax.lines[-3:]}
    assert lines == {where: [0.003, 0.003], "lowest here": [0.01], "diverged": [0.03]}
    assert {text.get_text() for text in ax.get_legend().get_texts()} >= set(lines)
    assert ax.get_title("left") == "Learning rates at 128 per update"
