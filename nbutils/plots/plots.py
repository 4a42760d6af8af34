"""The project's figures: plotters draw tidy tables on an `ax`, `save_figure` writes the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from nbutils.analysis.critical_batch import REGIMES, CriticalBatch, regime_borders
from nbutils.analysis.intervals import mean_interval
from nbutils.analysis.summary import last_epochs, name_settings
from nbutils.data.dataset import Dataset, Split

Metric = Literal["train_accuracy", "validation_accuracy", "test_accuracy"]

METRIC_NAMES = {
    "train_accuracy": "training accuracy (as seen during the epoch)",
    "validation_accuracy": "validation accuracy (after the epoch)",
    "test_accuracy": "test accuracy (after the epoch)",
}

Progress = Literal["epoch", "updates", "seconds"]
PROGRESS_NAMES = {
    "epoch": "epoch",
    "updates": "updates",
    "seconds": "seconds of training",
}

Scale = Literal["accuracy", "error"]

BAND_SEEDS = 3
"""Seeds of each setting from which on curves have bands. Student's interval of two seeds is 13
standard errors wide on either side: such bands would hide the curves and say nothing."""

ACCURACY_TICKS = (
    *(0.5, 0.9, 0.99, 0.999, 0.9999),
    *(0.2, 0.8, 0.95, 0.98, 0.995, 0.998, 0.9995),
    *(0.1, 0.7, 0.85, 0.97, 0.985, 0.993, 0.997),
    *(0.3, 0.4, 0.6, 0.75, 0.88, 0.92, 0.94, 0.96),
)
"""What an axis of accuracies may have as ticks, the roundest first: see `_ticks_apart`."""

RED = "#d1495b"
"""What stands out against the palette of the batch sizes."""


def use_style() -> None:
    """Set the house style for the figures that follow."""
    import seaborn as sns

    sns.set_theme(
        context="notebook",
        style="whitegrid",
        rc={
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "svg.hashsalt": "nbutils",
        },
    )


def save_figure(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write `<folder>/<name>.png` and `.svg`, the same bytes each time; return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    figure.savefig(png, bbox_inches="tight", metadata={"Software": None})
    figure.savefig(svg, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return [png, svg]


def batch_size_colours(effective_batch_sizes: Iterable[int]) -> dict[int, tuple[float, ...]]:
    """A colour for each effective batch size, from light (small) to dark (large).

    The palette is viridis, which is even in lightness and safe for colour-blind readers, without
    its palest end.
    """
    sizes = sorted(set(effective_batch_sizes))
    shades = mpl.colormaps["viridis_r"](np.linspace(0.12, 1, len(sizes)))
    return dict(zip(sizes, shades, strict=True))


def plot_accuracy(
    ax: Axes,
    runs: pd.DataFrame,
    metric: Metric,
    against: Progress = "epoch",
    scale: Scale = "accuracy",
) -> None:
    """How a metric develops, a line a setting, with a 95 % band from `BAND_SEEDS` seeds on.

    Colour tells the effective batch size; dashes tell that gradients were accumulated, the
    shorter the more steps.

    Args:
        ax: Where to draw.
        runs: From `load_runs`.
        metric: The column to draw.
        against: The horizontal axis. Seconds are the fastest seed's at each epoch.
        scale: "accuracy", on an axis stretched towards 100 % so that curves near 99 % can be
            told apart; or "error", the percentage of wrong answers on a log axis.
    """
    import seaborn as sns

    runs = name_settings(runs)
    settings = runs.drop_duplicates("setting").set_index("setting")
    colours = batch_size_colours(settings["effective_batch_size"])
    progress = runs.groupby(["setting", "epoch"])[against].transform("min")
    values = runs[metric] if scale == "accuracy" else 100 * (1 - runs[metric])
    sns.lineplot(
        data=runs.assign(progress=progress, value=values),
        x="progress",
        y="value",
        hue="setting",
        style="setting",
        palette=settings["effective_batch_size"].map(colours).to_dict(),
        dashes=settings["accumulation_steps"].map(_dashes).to_dict(),
        errorbar=mean_interval if _fewest_seeds(runs) >= BAND_SEEDS else None,
        err_kws={"alpha": 0.12},
        linewidth=2,
        ax=ax,
    )
    if scale == "accuracy":
        # The limits come from all of these, so that panels side by side have one scale.
        _stretch_towards_one(ax, runs[list(METRIC_NAMES)])
    else:
        ax.set_yscale("log")
        _plain_log_ticks(ax.yaxis, "{:g} %", (1, 2, 5))
    if against == "epoch":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        ax.set_xscale("log")
        _plain_log_ticks(ax.xaxis, "{:,g}", (1, 3))
    ax.set(xlabel=PROGRESS_NAMES[against], ylabel=scale, title=METRIC_NAMES[metric])
    ax.margins(x=0.02)
    ax.legend(title="images per update", loc="upper left", bbox_to_anchor=(1, 1))


def plot_final(ax: Axes, runs: pd.DataFrame, values: pd.Series) -> None:
    """A value of each run's last epoch against the effective batch size: dots, means, intervals.

    Each run is a dot, pale; each setting a mark with the 95 % interval of its mean, a circle
    without accumulation and a diamond with, the larger the more steps.

    Args:
        ax: Where to draw.
        runs: From `load_runs`, their last epochs.
        values: What to draw of each row of `runs`, in its order.
    """
    table = name_settings(runs.assign(value=values))
    colours = batch_size_colours(table["effective_batch_size"])
    for _, group in table.groupby("setting", sort=False):
        size = int(group["effective_batch_size"].iloc[0])
        steps = int(group["accumulation_steps"].iloc[0])
        # Settings of one size stand side by side.
        place = size * 1.09 ** np.log2(steps)
        style: dict[str, Any] = {"color": colours[size], "marker": "o" if steps == 1 else "D"}
        ax.plot([place] * len(group), group["value"], linestyle="", alpha=0.3, ms=4, **style)
        mean, (low, high) = group["value"].mean(), mean_interval(group["value"].tolist())
        ends = [[mean - low], [high - mean]] if len(group) > 1 else None
        mark = 8 if steps == 1 else 4 + np.log2(steps)
        ax.errorbar([place], [mean], yerr=ends, capsize=4, ms=mark, **style)
        # The legend tells marks; colours are told by the axis.
        label = "1 pass per update" if steps == 1 else f"{steps} passes per update"
        if label not in ax.get_legend_handles_labels()[1]:
            ax.plot([], [], label=label, linestyle="", ms=mark, **style | {"color": "0.3"})
    ax.set_xscale("log", base=2)
    _size_ticks(ax, colours)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.2f} %"))
    ax.set(xlabel="images per update", ylabel=None)
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


def plot_normalisations(ax: Axes, runs: pd.DataFrame, metric: str) -> None:
    """Mean and 95 % interval of a metric of the last epoch, a line a kind of normalisation.

    Args:
        ax: Where to draw.
        runs: From `load_runs`; settings with equal effective batch size.
        metric: The column to draw, an accuracy, shown as errors in percent; or a loss.
    """
    import seaborn as sns

    final = last_epochs(runs).sort_values("batch_size", ascending=False)
    accuracy = metric.endswith("accuracy")
    sns.pointplot(
        data=final.assign(
            pieces=final["accumulation_steps"].astype(str)
            + " x "
            + final["batch_size"].astype(str),
            value=100 * (1 - final[metric]) if accuracy else final[metric],
        ),
        x="pieces",
        y="value",
        hue="norm",
        hue_order=["batch", "ghost", "group", "none"],
        palette=["#b8de29", "#29af7f", "#2d708e", "#440154"],
        markers=["o", "s", "D", "^"],
        dodge=0.3,
        errorbar=mean_interval,
        linewidth=1.5,
        ax=ax,
    )
    name = metric.replace("_", " ").replace("accuracy", "error (%)")
    ax.set(xlabel="micro-batches x images in each", ylabel=name)
    ax.legend(title="norm", loc="upper left", bbox_to_anchor=(1, 1))


def plot_ladder(ax: Axes, table: pd.DataFrame, limits: Mapping[str, float]) -> None:
    """Differences of each rung on a log axis, and the limit that each must stay below.

    Args:
        ax: Where to draw.
        table: From `nbutils.accumulation.equivalence.ladder`.
        limits: The limit of each rung.
    """
    import seaborn as sns

    rungs = list(limits)
    values = table[rungs].melt(var_name="rung", value_name="difference", ignore_index=False)
    sns.stripplot(
        data=values.reset_index(),
        x="rung",
        y="difference",
        hue="optimizer",
        order=rungs,
        palette="viridis",
        dodge=True,
        jitter=False,
        alpha=0.7,
        ax=ax,
    )
    for position, rung in enumerate(rungs):
        ax.hlines(limits[rung], position - 0.4, position + 0.4, color="0.4", linestyle="--")
    ax.set(yscale="log", xlabel=None, ylabel="relative difference")
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


def plot_drift(ax: Axes, table: pd.DataFrame) -> None:
    """How the weights of two trainings drift apart, a line a precision and optimizer.

    Args:
        ax: Where to draw.
        table: From `nbutils.accumulation.equivalence.drift`, with columns `precision` and `optimizer`.
    """
    import seaborn as sns

    sns.lineplot(
        data=table,
        x="update",
        y="weights",
        hue="precision",
        style="optimizer",
        palette="viridis",
        ax=ax,
    )
    ax.set(yscale="log", xlabel="updates", ylabel="relative difference of the weights")
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


def plot_damage(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """What each pitfall does to the gradient (left) and to the test error (right).

    Args:
        axes: Two, side by side.
        table: From `nbutils.accumulation.pitfalls.measure_damage`. Bars are means over seeds, with their
            95 % intervals.
    """
    import seaborn as sns

    table = table.assign(error=100 * (1 - table["accuracy"]))
    labels = {
        "gradient_error": "largest relative error of an update's gradient",
        "error": "test error (%)",
    }
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        sns.barplot(data=table, y="loop", x=column, errorbar=mean_interval, color="#2d708e", ax=ax)
        ax.set(ylabel=None, xlabel=label)
    reference = table.loc[table["loop"] == "correct", "error"].mean()
    axes[1].axvline(reference, color="0.4", linestyle="--")
    axes[1].tick_params(labelleft=False)


COSTS = {
    "peak_memory": ("peak memory (MB)", 1e-6),
    "seconds_per_update": ("seconds per update", 1.0),
    "images_per_second": ("images per second", 1.0),
}
"""What `plot_cost` and `plot_cost_map` show: its name on an axis, and the factor to its unit."""


def plot_cost_map(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """A heat map over batch size and accumulation steps: medians, on a log scale of colours.

    Args:
        ax: Where to draw.
        table: From `nbutils.measure.cost.measure_grid`.
        column: One of `COSTS`.
    """
    import seaborn as sns

    name, factor = COSTS[column]
    medians = table.pivot_table(
        index="accumulation_steps", columns="batch_size", values=column, aggfunc="median"
    ).sort_index(ascending=False)
    sns.heatmap(
        medians * factor,
        annot=True,
        fmt=".3g",
        annot_kws={"size": 9},
        norm="log",
        cmap="viridis_r",
        cbar=False,
        linewidths=1,
        ax=ax,
    )
    ax.set(xlabel="micro-batch (images)", ylabel="accumulation steps", title=name)
    ax.grid(False)
    ax.tick_params(axis="y", rotation=0)


def plot_cost(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """A cost against images per update: a thick line without accumulation, one a micro-batch with.

    Points are medians, bars reach from the lowest to the highest measurement.

    Args:
        ax: Where to draw.
        table: From `nbutils.measure.cost.measure_grid`.
        column: One of `COSTS`.
    """
    name, factor = COSTS[column]
    groups = table.assign(value=table[column] * factor).groupby(
        ["batch_size", "accumulation_steps", "effective_batch_size"]
    )["value"]
    points = groups.agg(["median", "min", "max"]).dropna().reset_index()
    micro_batches = points[points["effective_batch_size"] > points["batch_size"]]["batch_size"]
    lines = {f"{size}": points[points["batch_size"] == size] for size in sorted(set(micro_batches))}
    colours = batch_size_colours(map(int, lines))
    whole = points[points["accumulation_steps"] == 1]
    for number, (label, line) in enumerate({"the whole batch": whole, **lines}.items()):
        accumulated = label in lines
        ax.errorbar(
            line["effective_batch_size"] * 1.02**number,  # side by side, so that bars show
            line["median"],
            yerr=[line["median"] - line["min"], line["max"] - line["median"]],
            capsize=3,
            marker="D" if accumulated else "o",
            ms=4 if accumulated else 6,
            linewidth=1.5 if accumulated else 3,
            linestyle="--" if accumulated else "-",
            color=colours[int(label)] if accumulated else "0.25",
            label=label,
        )
    if column == "images_per_second":
        ax.set_ylim(0)
    else:
        ax.set_yscale("log")
        _plain_log_ticks(ax.yaxis, "{:,g}", (1, 2, 5))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(points["effective_batch_size"]))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set(xlabel="images per update", ylabel=name)
    ax.legend(title="images in a pass", loc="upper left", bbox_to_anchor=(1, 1))


def plot_search(ax: Axes, tried: Mapping[int, int | None], limit: int) -> None:
    """The sizes that `nbutils.measure.cost.largest_batch_size` tried, numbered, and the limit.

    Args:
        ax: Where to draw.
        tried: Peak memory in bytes by batch size, in the order of the tries.
        limit: Bytes that fit.
    """
    _, factor = COSTS["peak_memory"]
    for number, (size, peak) in enumerate(tried.items(), start=1):
        if peak is not None:
            fits = peak <= limit
            ax.plot(size, peak * factor, "o" if fits else "x", color="#2d708e" if fits else "0.3")
            ax.annotate(f"{number}", (size, peak * factor), (6, -9), textcoords="offset points")
    ax.axhline(limit * factor, color="0.4", linestyle="--")
    ax.set(xlabel="micro-batch (images)", ylabel=COSTS["peak_memory"][0])


def plot_rate_map(ax: Axes, table: pd.DataFrame) -> None:
    """A heat map of validation accuracy over batch size and learning rate, both axes log.

    Cells say the accuracy in percent, or why there is none; bold ones are within noise of the
    best of their size. Colours follow the logarithm of the error.

    Args:
        ax: Where to draw.
        table: From `nbutils.analysis.learning_rate.rate_map`, the rows of one optimizer.
    """
    grid = table.pivot_table(
        index="learning_rate", columns="effective_batch_size", values="validation_accuracy"
    )
    sizes, rates = grid.columns.to_numpy(float), grid.index.to_numpy(float)
    colours, shades = mpl.colormaps["viridis"], mpl.colors.LogNorm(0.01, 1)
    ax.pcolormesh(
        _log_edges(sizes),
        _log_edges(rates),
        1 - grid.to_numpy(),
        cmap=colours.reversed(),
        norm=shades,
        edgecolor="white",
    )
    for _, row in table.iterrows():
        accuracy, learnt = row["validation_accuracy"], row["outcome"] == "learnt"
        ax.text(
            row["effective_batch_size"],
            row["learning_rate"],
            f"{100 * accuracy:.1f}" if learnt else row["outcome"],
            color="black" if shades(1 - accuracy) < 0.4 else "white",
            fontsize=9 if learnt else 7,
            fontweight="bold" if row["within_noise"] else "normal",
            ha="center",
            va="center",
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    _size_ticks(ax, sizes)
    ax.yaxis.set_major_locator(FixedLocator(list(rates)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(False)
    ax.set(xlabel="images per update", ylabel="learning rate")


def plot_scaling_rules(ax: Axes, ridge: pd.DataFrame, rules: pd.DataFrame) -> None:
    """The rates of lowest training loss, and those of each rule, over `plot_rate_map`.

    Args:
        ax: Where a map was drawn; its limits stay.
        ridge: From `nbutils.analysis.learning_rate.ridge`, the rows of one optimizer.
        rules: From `nbutils.analysis.learning_rate.scaling_rules`, the same.
    """
    limits = ax.get_ylim()
    styles = {"linear": "-", "square root": "--"}
    for rule, line in rules.groupby("rule"):
        x, y = line["effective_batch_size"], line["learning_rate"]
        ax.plot(x, y, color="white", linewidth=5, alpha=0.6)
        ax.plot(x, y, color=RED, linewidth=2, linestyle=styles[str(rule)], label=rule)
    points = ridge["effective_batch_size"], ridge["loss_rate"]
    label = "lowest training loss"
    ax.plot(*points, "o", color=RED, markerfacecolor="none", mew=2, ms=20, label=label)
    ax.set_ylim(limits)
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


def plot_fixed_rates(ax: Axes, table: pd.DataFrame, rates: Sequence[float]) -> None:
    """Error against batch size: the map cut at some heights, and at each size's best rate.

    Bars are 95 % intervals.

    Args:
        ax: Where to draw.
        table: From `nbutils.analysis.learning_rate.rate_map`, the rows of one optimizer.
        rates: Where to cut; rates of the table.
    """
    shades = mpl.colormaps["viridis_r"](np.linspace(0.2, 1, len(rates)))
    cuts = [
        (f"{rate:g}", table[np.isclose(table["learning_rate"], rate)], shade, "-")
        for rate, shade in zip(sorted(rates), shades, strict=True)
    ]
    for label, cut, colour, line in [*cuts, ("best of each size", table[table["best"]], RED, "--")]:
        accuracy = cut["validation_accuracy"]
        ends = 100 * np.array([cut["high"] - accuracy, accuracy - cut["low"]])
        x, y = cut["effective_batch_size"], 100 * (1 - accuracy)
        style: dict[str, Any] = {"marker": "o", "color": colour, "linestyle": line}
        ax.errorbar(x, y, yerr=ends, capsize=3, label=label, **style)
    ax.set(xscale="log", yscale="log", xlabel="images per update", ylabel="validation error")
    _size_ticks(ax, table["effective_batch_size"])
    _plain_log_ticks(ax.yaxis, "{:g} %", (1, 2, 5))
    ax.legend(title="learning rate", loc="upper left", bbox_to_anchor=(1, 1))


def plot_noise_scale(ax: Axes, table: pd.DataFrame) -> None:
    """The noise scale along training, a line a seed with its interval, a colour an optimizer.

    An interval without an upper end reaches to the top of the axis.

    Args:
        ax: Where to draw.
        table: From `nbutils.measure.noise_scale.noise_along_training`.
    """
    finite = table[["low", "value", "high"]].replace([np.inf, 0.0], np.nan)
    top, bottom = 3000.0, 1.0  # where no end of an interval is known
    if finite[["low", "value"]].notna().any(axis=None):
        top, bottom = 3 * np.nanmax(finite), np.nanmin(finite[["low", "value"]]) / 2
    colours = dict(zip(sorted(table["optimizer"].unique()), ("#29af7f", "#440154"), strict=False))
    for (optimizer, seed), group in table.groupby(["optimizer", "seed"]):
        value = group["value"].where(group["value"] < top)
        ax.fill_between(
            group["update"],
            group["low"].clip(lower=bottom),
            group["high"].clip(upper=top),
            color=colours[optimizer],
            alpha=0.12,
        )
        label = optimizer if seed == table["seed"].min() else f"_{optimizer} {seed}"
        ax.plot(group["update"], value, marker="o", ms=4, color=colours[optimizer], label=label)
    ax.set(
        xscale="log",
        yscale="log",
        ylim=(bottom, top),
        xlabel="updates",
        ylabel="noise scale (images)",
    )
    _plain_log_ticks(ax.xaxis, "{:,g}", (1, 3))
    _plain_log_ticks(ax.yaxis, "{:,g}", (1, 3))
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


def plot_updates_to_target(
    ax: Axes, fastest: pd.DataFrame, critical: CriticalBatch, missing: Sequence[int] = ()
) -> None:
    """Updates to a target against batch size, the fitted curve, and the three regimes.

    Dots are runs, open ones those that reached it in their first epoch, where it is an upper
    bound. The shaded band is the 95 % interval of the critical batch size.

    Args:
        ax: Where to draw.
        fastest: From `nbutils.analysis.critical_batch.fastest_rates`, the rows of one optimizer.
        critical: Fitted to them.
        missing: Sizes at which some seed never reached the target at any rate: crosses.
    """
    sizes = np.array(sorted({*fastest["effective_batch_size"], *missing}), dtype=float)
    x = np.geomspace(sizes.min() / 2, sizes.max() * 3, 200)
    least, most = critical.fewest_updates, critical.fewest_images
    ax.axvspan(max(critical.low, x[0]), min(critical.high, x[-1]), color="0.9", zorder=0)
    ax.axvline(critical.value, color="0.5", linewidth=1)
    ax.plot(x, most / x, color="0.5", linestyle=":", label="perfect scaling")
    ax.axhline(least, color="0.5", linestyle="--", label="fewest updates")
    ax.plot(x, least + most / x, color="#440154", label="fit")
    for name, runs, fill in (
        ("runs", fastest[fastest["epochs"] > 1], "#29af7f"),
        ("at most", fastest[fastest["epochs"] <= 1], "white"),
    ):
        points = runs["effective_batch_size"], runs["updates"]
        label = name if len(runs) else None
        ax.plot(*points, "o", color="#29af7f", markerfacecolor=fill, label=label)
    ax.set(xscale="log", yscale="log", xlim=(x[0], x[-1]))
    ax.set(xlabel="images per update", ylabel="updates to the target")
    if len(missing):
        places = list(missing), [0.04] * len(missing)
        style: dict[str, Any] = {
            "color": RED,
            "linestyle": "",
            "transform": ax.get_xaxis_transform(),
        }
        ax.plot(*places, marker="x", label="not reached", **style)
    for border in regime_borders(critical.value):
        ax.axvline(border, color=RED, linewidth=1, linestyle="-.")
    borders = np.clip([x[0], *regime_borders(critical.value), x[-1]], x[0], x[-1])
    for name, left, right in zip(REGIMES, borders, borders[1:], strict=False):
        if right > left:
            place = np.sqrt(left * right), 0.98
            text = name.replace(" ", "\n")
            ax.text(*place, text, transform=ax.get_xaxis_transform(), ha="center", va="top", size=8)
    _size_ticks(ax, sizes)
    _plain_log_ticks(ax.yaxis, "{:,g}", (1, 2, 5))
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


def _log_edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around `centres`, shape (n,), on a log scale; shape (n + 1,)."""
    logs = np.log(centres)
    steps = np.diff(logs) / 2 if len(logs) > 1 else np.array([0.5])
    inner = logs[:-1] + np.diff(logs) / 2
    return np.exp(np.concatenate([[logs[0] - steps[0]], inner, [logs[-1] + steps[-1]]]))


def _size_ticks(ax: Axes, sizes: Iterable[float]) -> None:
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(sizes))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def plot_trial_costs(axes: Sequence[Axes], costs: pd.DataFrame, chosen: int) -> None:
    """Speed (left), and time to get equally far (right), over images per update.

    Bars at the speeds reach down to the slowest measurement.

    Args:
        axes: Two, side by side.
        costs: `Advice.costs` as a table.
        chosen: The effective batch size that is advised.
    """
    whole = costs["accumulation_steps"] == 1
    styles = {
        "one micro-batch": (whole, "#440154", "-"),
        "accumulated": (~whole, "#29af7f", "--"),
    }
    for label, (kind, colour, line) in styles.items():
        part = costs[kind]
        if part.empty:
            continue
        size, speed = part["effective_batch_size"], part["images_per_second"]
        spread = [speed - part["slowest"], 0 * speed]
        axes[0].errorbar(
            size, speed, spread, fmt="o", ls=line, color=colour, capsize=4, label=label
        )
        axes[1].plot(size, part["relative_time"], "o", ls=line, color=colour, label=label)
    axes[0].set(ylabel="images per second", ylim=(0, None))
    axes[1].set(ylabel="time to get equally far", ylim=(0, None))
    for ax in axes:
        ax.set(xscale="log", xlabel="images per update")
        ax.axvline(chosen, color="0.6", linestyle=":", label="advised")
        ax.xaxis.set_major_locator(FixedLocator(sorted(costs["effective_batch_size"].unique())))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter("{:,g}".format))
    axes[1].legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


def plot_trial_rates(ax: Axes, rates: pd.DataFrame) -> None:
    """Validation loss after equally many updates at each rate, with 95 % intervals.

    Args:
        ax: Where to draw.
        rates: `Advice.rates` as a table. Rates that diverged are crosses at the top.
    """
    learnt = rates[rates["outcome"] != "diverged"]
    diverged = rates.loc[rates["outcome"] == "diverged", "learning_rate"]
    loss = learnt["validation_loss"]
    spread = [loss - learnt["low"], learnt["high"] - loss]
    ax.errorbar(learnt["learning_rate"], loss, spread, fmt="o-", color="#440154", capsize=4)
    best = learnt[learnt["best"]]
    ax.plot(best["learning_rate"], best["validation_loss"], "o", ms=12, mfc="none", color="#29af7f")
    top = 1.1 * learnt["high"].max()
    ax.plot(diverged, [top] * len(diverged), "x", color="#b5367a", ms=9, clip_on=False)
    if len(diverged):
        ax.annotate(
            "diverged",
            (diverged.min(), top),
            xytext=(-10, 0),
            textcoords="offset points",
            color="#b5367a",
            ha="right",
            va="center",
        )
    ax.set(xscale="log", ylim=(0, 1.05 * top), xlabel="learning rate", ylabel="validation loss")


def plot_history(ax: Axes, history: pd.DataFrame) -> None:
    """Training, validation and, where it is known, test accuracy of one run against epoch."""
    import seaborn as sns

    names = {name: title.partition(" (")[0] for name, title in METRIC_NAMES.items()}
    curves = history.melt("epoch", list(names), "split", "accuracy").replace({"split": names})
    curves = curves.dropna()
    sns.lineplot(
        data=curves,
        x="epoch",
        y="accuracy",
        hue="split",
        style="split",
        markers=True,
        palette="viridis",
        ax=ax,
    )
    accuracies = history[list(METRIC_NAMES)]
    _stretch_towards_one(ax, accuracies)
    ax.set_ylim(bottom=max(0.01, 1 - 1.1 * (1 - accuracies.min().min())))  # no point is cut off
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(title=None)


def _fewest_seeds(runs: pd.DataFrame) -> int:
    return int(runs.groupby("setting")["seed"].nunique().min())


def _dashes(accumulation_steps: int) -> tuple[float, float] | str:
    if accumulation_steps == 1:
        return ""
    length = max(1.0, 6 - np.log2(accumulation_steps))
    return (length, length / 2)


def _plain_log_ticks(axis: Axis, text: str, steps: tuple[int, ...]) -> None:
    """Ticks at the `steps` of each power of ten, written out."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text.format(value)))
    axis.set_minor_locator(NullLocator())


def _stretch_towards_one(ax: Axes, accuracies: pd.DataFrame) -> None:
    """A logit axis for `accuracies`, with percentages at its ticks."""
    values = accuracies.to_numpy()
    low = max(0.05, float(np.nanquantile(values, 0.02)))  # NaN: unknown
    high = float(values.max(initial=0.5, where=values < 1))
    ax.set_ylim(low, 1 - (1 - high) / 1.4)  # before the scale, which warns of data all at 1
    ax.set_yscale("logit", nonpositive="clip")
    ax.yaxis.set_major_locator(FixedLocator(_ticks_apart(*ax.get_ylim())))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _ticks_apart(low: float, high: float) -> list[float]:
    """Those of `ACCURACY_TICKS` that stand a tenth of a logit axis or more from rounder ones."""
    from scipy.special import logit

    bottom, *places, top = logit([low, *ACCURACY_TICKS, high])
    kept: dict[float, float] = {}
    for tick, place in zip(ACCURACY_TICKS, places, strict=True):
        if low <= tick <= high and all(
            abs(place - p) >= (top - bottom) / 10 for p in kept.values()
        ):
            kept[tick] = place
    return sorted(kept)


def plot_digits(ax: Axes, images: Split, class_names: tuple[str, ...], columns: int = 16) -> None:
    """The first images of each class, one row a class."""
    import seaborn as sns

    rows = []
    for label in range(len(class_names)):
        examples = images.images[images.labels == label][:columns, 0]
        rows.append(np.concatenate(list(examples.numpy()), axis=1))
    height = images.images.shape[-2]
    ax.imshow(np.concatenate(rows), cmap="gray_r", interpolation="nearest")
    ax.set_yticks([height * (row + 0.5) for row in range(len(rows))], labels=list(class_names))
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.grid(False)
    sns.despine(ax=ax, left=True, bottom=True)


def plot_class_balance(ax: Axes, data: Dataset) -> None:
    """The share of each class in each split whose classes are known, in percent."""
    import seaborn as sns

    named = {"train": data.train, "validation": data.validation, "test": data.test}
    splits = {f"{name} ({len(split.labels):,} images)": split for name, split in named.items()}
    splits = {name: split for name, split in splits.items() if len(split.labels)}
    table = pd.DataFrame(
        {
            "class": [data.class_names[label] for label in split.labels.tolist()],
            "split": name,
        }
        for name, split in splits.items()
    ).explode("class", ignore_index=True)
    shares = (
        table.groupby("split", sort=False)["class"]
        .value_counts(normalize=True)
        .mul(100)
        .rename("share")
        .reset_index()
    )
    sns.barplot(
        data=shares,
        x="class",
        y="share",
        hue="split",
        hue_order=list(splits),
        order=data.class_names,
        ax=ax,
        palette=["#31688e", "#35b779", "#c8c8c8"][: len(splits)],
    )
    ax.set(xlabel="class", ylabel="share of the images (%)")
    ax.legend(title=None, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.12))
