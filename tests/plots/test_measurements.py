"""Figures of costs, learning rates and noise: what is drawn equals the table."""

import numpy as np
import pandas as pd
import pytest
from made_up_runs import runs_of

from nbutils import RunConfig, plots
from nbutils.analysis.critical_batch import REGIMES, fit_critical_batch
from nbutils.analysis.learning_rate import rate_map, ridge, scaling_rules


def costs():
    """Memory of the micro-batch, measured twice; one setting ran out of memory."""
    rows = [
        {
            "batch_size": batch_size,
            "accumulation_steps": steps,
            "effective_batch_size": batch_size * steps,
            "peak_memory": np.nan if batch_size == 8 else batch_size * 1e6 + repeat,
            "seconds_per_update": batch_size * steps * (1.0 + repeat),
            "images_per_second": 1 / (1.0 + repeat),
            "repeat": repeat,
        }
        for batch_size, steps in [(2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]
        for repeat in range(2)
    ]
    return pd.DataFrame(rows)


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


def test_a_search_shows_what_fits_and_what_does_not(ax):
    plots.plot_search(ax, {1: 1_000_000, 4: 9_000_000, 8: None}, 5_000_000)
    limit, *tries = ax.lines
    assert [(line.get_xdata()[0], line.get_marker()) for line in tries] == [(1, "o"), (4, "x")]
    assert limit.get_ydata()[0] == 5


@pytest.fixture
def rates():
    """A map of two sizes and three rates, with one that diverged."""
    sizes, tried = (32, 128), (1e-3, 1e-2, 1e-1)
    accuracies = {32: (0.97, 0.98, 0.1), 128: (0.6, 0.9, 0.98)}
    runs = runs_of(
        *[
            (RunConfig(batch_size=size, learning_rate=rate), [accuracy], 1)
            for size in sizes
            for rate, accuracy in zip(tried, accuracies[size], strict=True)
        ]
    )
    return rate_map(runs.assign(train_loss=1 / runs["validation_accuracy"]))


def test_the_map_writes_each_accuracy_and_what_diverged(ax, rates):
    plots.plot_rate_map(ax, rates)
    texts = {(text.get_position()): text for text in ax.texts}
    assert texts[128, 1e-2].get_text() == "90.0"
    assert texts[32, 1e-1].get_text() == "diverged"
    assert texts[32, 1e-2].get_fontweight() == "bold"
    assert texts[32, 1e-1].get_fontweight() == "normal"
    (mesh,) = ax.collections
    errors = np.asarray(mesh.get_array())
    assert errors == pytest.approx(np.array([[0.03, 0.4], [0.02, 0.1], [0.9, 0.02]]))


def test_rules_are_drawn_over_the_map_and_leave_its_limits(ax, rates):
    plots.plot_rate_map(ax, rates)
    limits = ax.get_ylim()
    table = ridge(rates)
    plots.plot_scaling_rules(ax, table, scaling_rules(table, 32))
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
    sizes = np.array([16, 64, 256, 1024])
    images = 5000 * (1 + sizes / 100)
    runs = pd.DataFrame(
        {
            "effective_batch_size": sizes,
            "images": images,
            "updates": images / sizes,
            "epochs": [1.0, 2, 2, 2],
        }
    )
    plots.plot_updates_to_target(ax, runs, fit_critical_batch(runs), [2048])
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["run"].get_xdata().tolist() == [64, 256, 1024]
    assert lines["run, at most"].get_markerfacecolor() == "white"
    assert lines["not reached"].get_xdata() == [2048]
    texts = [text.get_text().replace("\n", " ") for text in ax.texts]
    assert texts == [*REGIMES, "fit", "fewest updates"]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend[:2] == ["perfect scaling", "run"]


@pytest.mark.parametrize(
    ("same", "where"), [(True, "advised"), (False, "advised, at another size")]
)
def test_the_advised_rate_is_marked_beside_the_best_one(ax, same, where):
    tried = {
        "learning_rate": [0.001, 0.003, 0.01, 0.03],
        "validation_loss": [0.9, 0.5, 0.4, np.nan],
    }
    rates = pd.DataFrame(tried).assign(best=[False, False, True, False], outcome="learnt")
    rates["low"], rates["high"] = rates["validation_loss"] - 0.05, rates["validation_loss"] + 0.05
    rates.loc[3, "outcome"] = "diverged"
    plots.plot_rates(ax, rates, advised=0.003, rates_at=128, same=same)
    lines = {line.get_label(): line.get_xdata() for line in ax.lines}
    assert list(lines[where]) == [0.003, 0.003]
    assert list(lines["lowest here"]) == [0.01]
    assert list(lines["diverged"]) == [0.03]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {where, "lowest here", "diverged"} <= set(legend)
    assert ax.get_title("left") == "Learning rates at 128 per update"
