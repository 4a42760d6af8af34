"""The house style: colours, marks, ticks, labels at the ends of lines, and saving a figure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

RED = "#d1495b"
"""The colour of what stands out from the palette of the batch sizes."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
"""Marks of lines that are drawn together, so that they differ without colour too."""

ACCURACY_TICKS = (
    *(0.5, 0.9, 0.99, 0.999, 0.9999),
    *(0.2, 0.8, 0.95, 0.98, 0.995, 0.998, 0.9995),
    *(0.1, 0.7, 0.85, 0.97, 0.985, 0.993, 0.997),
    *(0.3, 0.4, 0.6, 0.75, 0.88, 0.92, 0.94, 0.96),
)
"""Possible ticks of an axis of accuracies, the roundest first; see `stretch_towards_one`."""


def use_style() -> None:
    """Set the house style for the figures that follow."""
    mpl.rcParams.update(
        {
            "font.family": "DejaVu Sans",  # matplotlib brings it along, so it is on every machine
            "figure.dpi": 100,
            "lines.markersize": 5,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.edgecolor": "0.8",
            "axes.labelsize": 12,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": "0.85",
            "legend.frameon": False,
            "legend.fontsize": 11,
        }
    )
    mpl.rc("xtick", labelsize=11, color="0.15")
    mpl.rc("ytick", labelsize=11, color="0.15")
    mpl.rc("xtick.major", size=0)
    mpl.rc("ytick.major", size=0)


def save_figure(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write `<folder>/<name>.svg`, the same bytes on every machine, and return its path.

    Processors differ in the last bits of a coordinate, and matplotlib derives the names of parts
    from coordinates. So numbers are rounded to 6 digits, and names become running numbers.
    """
    path = Path(folder, f"{name}.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "nbutils"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = path.read_text()
    for number, part in enumerate(dict.fromkeys(re.findall(r'id="(\w*[0-9a-f]{10})"', text))):
        text = text.replace(part, f"part{number}")
    path.write_text(re.sub(r'(?<!version)="[^"]*"', _round_numbers, text))
    return path


def _round_numbers(attribute: re.Match[str]) -> str:
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]) + 0:.6g}", attribute[0])


def batch_size_colours(effective_batch_sizes: Iterable[int]) -> dict[int, tuple[float, ...]]:
    """A colour for each effective batch size, from light (small) to dark (large).

    The palette is viridis, which is even in lightness and safe for colour-blind readers, without
    its palest end.
    """
    sizes = sorted(set(effective_batch_sizes))
    shades = mpl.colormaps["viridis_r"](np.linspace(0.2, 1, len(sizes)))
    return dict(zip(sizes, shades, strict=True))


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, float]], colours: Sequence[Any]) -> None:
    """Write the name of each line to the right of the axes, with a thin line to its end.

    Names keep a line's height of distance, as near to their ends as that allows.

    Args:
        ax: Where the lines are; its limits and scales must not change any more.
        ends: The last point of each line, in data coordinates, by name.
        colours: Of the thin lines, in the order of `ends`.
    """
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # limits that are still to be found are found
    to_axes = ax.transData + ax.transAxes.inverted()
    places = [float(np.clip(to_axes.transform(end)[1], 0, 1)) for end in ends.values()]
    gap = 14 / 72 / (ax.bbox.height / ax.figure.dpi)  # a line of text, as a share of the axes
    order = sorted(range(len(places)), key=lambda n: places[n])
    for _ in range(300):
        for below, above in pairwise(order):
            short = max(0.0, gap - (places[above] - places[below]))
            places[below] -= short / 2
            places[above] += short / 2
    for (name, end), place, colour in zip(ends.items(), places, colours, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 1, "shrinkA": 0, "shrinkB": 2}
        ax.annotate(
            name,
            end,
            (1.04, place),
            textcoords="axes fraction",
            va="center",
            size=10.5,
            arrowprops={**line, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def plain_log_ticks(axis: Axis, text: str, steps: tuple[int, ...]) -> None:
    """Ticks at the `steps` of each power of ten, written out by the format `text`."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(lambda value, _: text.format(value))
    axis.set_minor_locator(NullLocator())


def fixed_ticks(axis: Axis, values: Iterable[float]) -> None:
    """Ticks at `values` only, written out."""
    axis.set_major_locator(FixedLocator(sorted(set(values))))
    axis.set_major_formatter(lambda value, _: np.format_float_positional(value, trim="-"))
    axis.set_minor_locator(NullLocator())


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
