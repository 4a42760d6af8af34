"""Curves, their ends, and the outcomes of runs."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from made_up_runs import runs_of
from matplotlib.colors import rgb_to_hsv, to_rgb
from matplotlib.text import Text

from nbutils import RunConfig, plots
from nbutils.plots.style import label_ends


def study(seeds=3):
    return runs_of(
        *[
            (RunConfig(batch_size=b, accumulation_steps=s, seed=seed), [0.9, 0.98 + seed / 200], 4)
            for b, s in ((32, 1), (1024, 1), (128, 8))
            for seed in range(seeds)
        ]
    )


def test_lines_differ_by_colour_mark_and_dashes(ax):
    plots.plot_accuracy(ax, study(), "validation_accuracy")
    lines = {bars.get_label(): bars.lines[0] for bars in ax.containers}
    assert list(lines) == ["32", "1024", "8 x 128"]
    assert len({line.get_marker() for line in lines.values()}) == 3
    colour = {name: to_rgb(line.get_color()) for name, line in lines.items()}
    assert colour["1024"] == colour["8 x 128"]
    assert rgb_to_hsv(colour["32"])[2] > rgb_to_hsv(colour["1024"])[2]  # darker is larger
    assert lines["8 x 128"].is_dashed()
    assert not lines["1024"].is_dashed()
    assert lines["32"].get_ydata() == pytest.approx([0.9, 0.985])
    assert ax.get_xticks()[0] == 1
    assert len(ax.collections) == 3  # intervals


@pytest.mark.parametrize(("against", "expected"), [("updates", [10, 20]), ("seconds", [2, 4])])
def test_errors_against_updates_or_seconds_without_intervals_of_two_seeds(ax, against, expected):
    plots.plot_accuracy(ax, study(seeds=2), "validation_accuracy", against, "error")
    line = ax.containers[0].lines[0]
    assert line.get_xdata().tolist() == expected
    assert line.get_ydata() == pytest.approx([10.0, 1.75])
    assert not ax.collections
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylabel()) == ("log", "log", "error")
    assert ax.get_title("left") == "validation error (after the epoch)"


@pytest.mark.parametrize("accuracies", [[0.1, 0.3], [0.6, 0.99], [0.97, 0.997]], ids=str)
def test_accuracies_have_ticks_that_stand_apart_wherever_they_lie(ax, accuracies):
    plots.plot_accuracy(ax, runs_of((RunConfig(), accuracies, 1)), "validation_accuracy")
    low, high = ax.get_ylim()
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    places = [ax.transData.transform((1, tick))[1] / ax.bbox.height for tick in ticks]
    assert len(places) >= 4
    assert min(np.diff(places)) > 0.099


def overlaps(ax):
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without their thin lines
    return [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


@pytest.mark.parametrize("ends", [[0.5] * 9, [0.1, 0.5, 0.51, 0.52, 0.9], [1.0, 1.0, 0.0]])
def test_names_at_the_ends_of_lines_do_not_overlap(ax, ends):
    ax.figure.set_layout_engine("constrained")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    for number, end in enumerate(ends):
        ax.plot([0, 1, 2], [0, end, np.nan], label=str(number))
    label_ends(ax)
    assert [text.xy[1] for text in ax.texts] == ends
    assert overlaps(ax) == []
    places = [text.xyann[1] for text in ax.texts]
    assert [places[n] for n in np.argsort(ends, kind="stable")] == sorted(places)


def history(accuracies, updates):
    table = {"epoch": [1, 2], "updates": [updates, 2 * updates], "validation_accuracy": accuracies}
    return pd.DataFrame(table | {"train_accuracy": 0.9, "test_accuracy": np.nan})


def test_a_history_leaves_out_what_is_unknown(ax):
    plots.plot_history(ax, history([0.91, 0.95], 8))
    assert [text.get_text() for text in ax.texts] == ["training", "validation"]
    assert ax.lines[1].get_ydata().tolist() == [0.91, 0.95]


def test_an_overlay_draws_what_accumulates_thin_over_what_is_thick(ax):
    runs = {"128": history([0.9, 0.95], 8), "1024": history([0.7, 0.8], 1)}
    plots.plot_overlay(ax, runs | {"8 x 128": runs["1024"]}, "updates")
    _, large, accumulated = ax.lines
    assert large.get_xdata().tolist() == accumulated.get_xdata().tolist() == [1, 2]
    assert large.get_linewidth() > accumulated.get_linewidth()
    assert accumulated.get_zorder() > large.get_zorder()


def test_final_values_show_each_run_and_the_mean_of_each_setting(ax):
    final = study().query("epoch == 2")
    plots.plot_final(ax, final, final["test_accuracy"])
    assert ax.lines[0].get_ydata() == pytest.approx([0.979, 0.984, 0.989])
    assert ax.containers[0].lines[0].get_ydata() == pytest.approx([0.984])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["32", "1024", "8 x 128"]


def test_normalisations_are_drawn_as_errors_in_percent(ax):
    configs = [
        RunConfig(norm=norm, batch_size=b, accumulation_steps=1024 // b, seed=seed)
        for norm, sizes in (("batch", (1024, 128, 8)), ("ghost", (1024, 128)), ("none", (1024,)))
        for b in sizes
        for seed in (0, 1)
    ]
    runs = runs_of(*[(config, [0.5, 0.98 + config.seed / 100], 1) for config in configs])
    plots.plot_normalisations(ax, runs, "validation_accuracy")
    assert ax.get_ylabel() == "validation error (%)"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1024", "8 x 128", "128 x 8"]
    assert ax.containers[0].lines[0].get_ydata() == pytest.approx([1.5, 1.5, 1.5])
    assert [text.get_text() for text in ax.texts] == ["batch", "ghost", "none"]
    assert overlaps(ax) == []
