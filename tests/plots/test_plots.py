import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from made_up_runs import runs_of
from matplotlib.colors import rgb_to_hsv, to_rgb

from nbutils import RunConfig, plots
from nbutils.analysis.critical_batch import REGIMES, fit_critical_batch
from nbutils.analysis.learning_rate import rate_map, ridge, scaling_rules
from nbutils.analysis.outcomes import last_epochs

mpl.use("agg")


@pytest.fixture
def ax():
    plots.use_style()
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_accuracy_lines_have_the_colour_of_their_effective_batch_size(ax):
    configs = [RunConfig(batch_size=b) for b in (32, 1024)]
    configs.append(RunConfig(batch_size=128, accumulation_steps=8))
    runs = runs_of(*[(config, [0.9, 0.99, 0.995], 1) for config in configs])
    plots.plot_accuracy(ax, runs, "validation_accuracy")
    lines = {text.get_text(): line for text, line in zip_legend(ax)}
    assert list(lines) == ["32", "1024", "8 x 128 = 1024"]
    colour = {name: to_rgb(line.get_color()) for name, line in lines.items()}
    assert colour["1024"] == colour["8 x 128 = 1024"]
    assert colour["32"] != colour["1024"]
    assert rgb_to_hsv(colour["32"])[2] > rgb_to_hsv(colour["1024"])[2]  # darker is larger
    assert lines["8 x 128 = 1024"].is_dashed()
    assert not lines["1024"].is_dashed()


def zip_legend(ax):
    legend = ax.get_legend()
    return zip(legend.get_texts(), legend.get_lines(), strict=True)


def test_curves_near_one_can_be_told_apart(ax):
    pair = [(RunConfig(seed=0), [0.8, 0.990], 1), (RunConfig(batch_size=32), [0.8, 0.993], 1)]
    plots.plot_accuracy(ax, runs_of(*pair), "validation_accuracy")
    ends = [ax.transData.transform((2, accuracy))[1] for accuracy in (0.990, 0.993)]
    assert abs(ends[1] - ends[0]) > 0.05 * ax.bbox.height
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert "99 %" in labels


@pytest.mark.parametrize(
    "accuracies", [[0.1, 0.3], [0.75, 0.93], [0.6, 0.99], [0.97, 0.997]], ids=str
)
def test_accuracies_have_ticks_that_stand_apart_wherever_they_lie(ax, accuracies):
    plots.plot_accuracy(ax, runs_of((RunConfig(), accuracies, 1)), "validation_accuracy")
    low, high = ax.get_ylim()
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    places = [ax.transData.transform((1, tick))[1] / ax.bbox.height for tick in ticks]
    assert len(places) >= 4
    assert min(np.diff(places)) > 0.099


def test_several_seeds_have_a_band(ax):
    runs = runs_of(*[(RunConfig(seed=s), [0.9 + s / 100], 1) for s in range(3)])
    plots.plot_accuracy(ax, runs, "test_accuracy")
    assert len(ax.collections) == 1


def test_perfect_accuracy_does_not_break_the_axis(ax):
    plots.plot_accuracy(ax, runs_of((RunConfig(), [1.0, 1.0], 1)), "train_accuracy")
    ax.figure.canvas.draw()
    assert all(np.isfinite(ax.get_ylim()))


def test_digits_have_one_row_a_class(ax, digits):
    plots.plot_digits(ax, digits.train, digits.class_names, columns=5)
    assert ax.images[0].get_array().shape == (280, 140)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list("0123456789")


def test_class_balance_has_a_bar_a_class_and_split(ax, digits):
    plots.plot_class_balance(ax, digits)
    heights = [bar.get_height() for bar in ax.patches if bar.get_width() > 0]
    assert heights[:30] == pytest.approx([10.0] * 30)


def test_normalisations_are_drawn_as_errors_in_percent(ax):
    configs = [
        RunConfig(norm=norm, batch_size=b, accumulation_steps=s, seed=seed)
        for norm in ("batch", "ghost", "group", "none")
        for b, s in ((1024, 1), (128, 8))
        for seed in (0, 1)
    ]
    runs = runs_of(*[(config, [0.5, 0.98 + config.seed / 100], 1) for config in configs])
    plots.plot_normalisations(ax, runs, "validation_accuracy")
    assert ax.get_ylabel() == "validation error (%)"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1 x 1024", "8 x 128"]
    assert ax.lines[0].get_ydata()[0] == pytest.approx(1.5)
    assert [text.get_text() for text, _ in zip_legend(ax)] == ["batch", "ghost", "group", "none"]


def test_saved_figures_are_the_same_bytes_each_time(ax, tmp_path):
    contents = []
    for folder in ("one", "two"):
        figure, new_ax = plt.subplots()
        plots.plot_accuracy(new_ax, runs_of((RunConfig(), [0.9, 0.95], 1)), "test_accuracy")
        paths = plots.save_figure(figure, tmp_path / folder, "figure")
        contents.append([path.read_bytes() for path in paths])
        plt.close(figure)
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert contents[0] == contents[1]


def several_seeds():
    sizes = ((32, 1), (1024, 1), (128, 8))
    return runs_of(
        *[
            (RunConfig(batch_size=b, accumulation_steps=s, seed=seed), [0.9, 0.98 + seed / 100], 4)
            for b, s in sizes
            for seed in (0, 1)
        ]
    )


@pytest.mark.parametrize(("against", "expected"), [("updates", [10, 20]), ("seconds", [2, 4])])
def test_curves_can_be_drawn_against_updates_or_seconds(ax, against, expected):
    plots.plot_accuracy(ax, several_seeds(), "validation_accuracy", against)
    assert ax.lines[0].get_xdata().tolist() == expected
    assert ax.get_xscale() == "log"


def test_errors_are_percentages_on_a_log_axis(ax):
    plots.plot_accuracy(ax, several_seeds(), "validation_accuracy", scale="error")
    assert ax.lines[0].get_ydata() == pytest.approx([10.0, 1.5])
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "error")


def test_final_values_show_each_run_and_the_mean_of_each_setting(ax):
    final = last_epochs(several_seeds())
    plots.plot_final(ax, final, final["test_accuracy"])
    dots, means = ax.lines[0].get_ydata(), ax.containers[0].lines[0].get_ydata()
    assert dots == pytest.approx([0.979, 0.989])
    assert means == pytest.approx([0.984])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["1 pass per update", "8 passes per update"]


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


def test_cost_has_a_line_for_the_whole_batch_and_one_a_micro_batch(ax):
    plots.plot_cost(ax, costs(), "peak_memory")
    lines = {c.get_label(): c.lines[0].get_ydata().tolist() for c in ax.containers}
    assert list(lines) == ["the whole batch", "2", "4"]
    assert lines["the whole batch"] == pytest.approx([2, 4])  # 8 did not fit
    assert lines["2"] == pytest.approx([2, 2, 2])


@pytest.mark.parametrize("column", plots.COSTS)
def test_a_cost_map_shows_each_median_that_there_is(ax, column):
    plots.plot_cost_map(ax, costs(), column)
    assert len(ax.texts) == (5 if column == "peak_memory" else 6)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["4", "2", "1"]
    if column == "seconds_per_update":
        assert {text.get_text() for text in ax.texts} == {"3", "6", "12"}


def test_a_search_shows_what_fits_and_what_does_not(ax):
    plots.plot_search(ax, {1: 1_000_000, 4: 9_000_000, 8: None}, 5_000_000)
    *tries, limit = ax.lines
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
    assert labels == ["linear", "square root", "lowest training loss"]


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
    assert ax.collections[0].get_paths()[0].vertices[:, 1].max() == top
    assert np.isnan(ax.lines[1].get_ydata()[0])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["adam", "sgd"]


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
    assert lines["runs"].get_xdata().tolist() == [64, 256, 1024]
    assert lines["at most"].get_markerfacecolor() == "white"
    assert lines["not reached"].get_xdata() == [2048]
    assert [text.get_text().replace("\n", " ") for text in ax.texts] == list(REGIMES)
