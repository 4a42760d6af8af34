"""The house style: colours, marks, intervals, ticks, names at the ends of lines, saved figures."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator

RED, BLUE, PURPLE, GREEN = "#d1495b", "#2d708e", "#440154", "#29af7f"  # all but red of viridis
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
ACCUMULATED = (0, (4, 1.5))  # the dashes of accumulated settings
ACCURACY_TICKS = (
    *(0.5, 0.9, 0.99, 0.999, 0.9999),
    *(0.2, 0.8, 0.95, 0.98, 0.995, 0.998, 0.9995),
    *(0.1, 0.7, 0.85, 0.97, 0.985, 0.993, 0.997),
    *(0.3, 0.4, 0.6, 0.75, 0.88, 0.92, 0.94, 0.96),
)
"""Possible ticks of an axis of accuracies, the roundest first."""


def use_style() -> None:
    """Set the house style for the figures that follow."""
    mpl.style.use("nbutils.plots.house")


def save_figure(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write `<folder>/<name>.svg`, the same bytes on every machine, and return its path.

    So numbers are rounded to 6 digits, and parts, whose names are random, are numbered.
    """
    path = Path(folder, f"{name}.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = path.read_text()
    for number, part in enumerate(dict.fromkeys(re.findall(r'id="(\w*[0-9a-f]{10})"', text))):
        text = text.replace(part, f"part{number}")
    path.write_text(re.sub(r'(?<!version)="[^"]*"', _round_numbers, text))
    return path


def _round_numbers(attribute: re.Match[str]) -> str:
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]) + 0:.6g}", attribute[0])


def shades(number: int, start: float = 0.2, end: float = 1.0) -> np.ndarray:
    """`number` colours from light to dark."""
    return mpl.colormaps["viridis_r"](np.linspace(start, end, number))


def batch_size_colours(effective_batch_sizes: Iterable[int]) -> dict[int, np.ndarray]:
    """A colour for each size, from light (small) to dark (large)."""
    sizes = sorted(set(effective_batch_sizes))
    return dict(zip(sizes, shades(len(sizes)), strict=True))


def cycle_looks(ax: Axes, colours: Any, **looks: Sequence[Any]) -> None:
    """Give the lines to come these colours, a mark each, and `looks`, such as `linestyle`."""
    marks = np.resize(MARKERS, len(colours)).tolist()
    ax.set_prop_cycle(color=list(colours), marker=marks, **looks)


def errorbar(ax: Axes, x: Any, table: pd.DataFrame, **look: Any) -> None:
    """A line of the column `value`, with bars from `low` to `high` where these columns are."""
    value = table["value"]
    reach = [value - table["low"], table["high"] - value] if "low" in table else None
    ax.errorbar(x, value, reach, **look)


def label_ends(ax: Axes) -> None:
    """Write the name of each labelled line beside its end, without overlap.

    The limits and scales of the axes must not change afterwards.
    """
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # fixes what is still automatic
    labels = []
    for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
        line: Any = handle[0] if isinstance(handle, ErrorbarContainer) else handle
        points = line.get_xydata()
        for end in points[np.isfinite(points).all(axis=1)][-1:]:
            data = line.get_transform()
            place = 1.04, np.clip((data + ax.transAxes.inverted()).transform(end)[1], 0, 1)
            arrow = {"arrowstyle": "-", "linewidth": 1, "shrinkA": 0, "shrinkB": 2}
            arrow |= {"relpos": (0, 0.5), "color": line.get_color()}
            look: dict[str, Any] = {"annotation_clip": False, "size": 10.5, "va": "center"}
            labels.append(ax.annotate(name, end, place, data, "axes fraction", arrow, **look))
    labels.sort(key=lambda label: label.get_position()[1])
    gap = 14 / 72 / (ax.bbox.height / ax.figure.dpi)  # a line of text, as a share of the axes
    for _ in range(300):
        for below, above in pairwise(labels):
            low, high = below.get_position()[1], above.get_position()[1]
            short = max(0.0, gap - (high - low))
            below.set_y(low - short / 2)
            above.set_y(high + short / 2)


def legend_beside(ax: Axes, **settings: Any) -> None:
    """The legend, to the right of the axes."""
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), **settings)


def plain_log_ticks(axis: Axis, text: str, *steps: int) -> None:
    """Ticks at the `steps` of each power of ten, written out by the format `text`."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(lambda value, _: text.format(value))
    axis.minorticks_off()


def fixed_ticks(axis: Axis, values: Iterable[float]) -> None:
    """Ticks at `values` only, written out."""
    axis.set_major_locator(FixedLocator(sorted(set(values))))
    axis.set_major_formatter(lambda value, _: np.format_float_positional(value, trim="-"))
    axis.minorticks_off()


def stretch_towards_one(ax: Axes, accuracies: np.ndarray) -> None:
    """A logit axis for `accuracies`, with percentages at ticks a tenth of its height apart."""
    low = max(0.05, float(np.nanquantile(accuracies, 0.02)))  # NaN: unknown
    high = float(accuracies.max(initial=0.5, where=accuracies < 1))
    low, high = min(low, high - 1e-4), 1 - (1 - high) / 1.4
    ax.set_ylim(low, high)  # before the scale, which warns of data all at 1
    ax.set_yscale("logit", nonpositive="clip")

    def place(accuracy: float) -> float:
        return float(np.log(accuracy / (1 - accuracy)))

    ticks: list[float] = []
    apart = (place(high) - place(low)) / 10
    for tick in ACCURACY_TICKS:
        if low <= tick <= high and all(abs(place(tick) - place(t)) >= apart for t in ticks):
            ticks.append(tick)
    fixed_ticks(ax.yaxis, ticks)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value * 100:g} %")
