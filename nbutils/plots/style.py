"""The house style: colours, ticks, axes, and how a figure is saved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

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
    NullFormatter,
    NullLocator,
)

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


def plain_log_ticks(axis: Axis, text: str, steps: tuple[int, ...]) -> None:
    """Ticks at the `steps` of each power of ten, written out."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text.format(value)))
    axis.set_minor_locator(NullLocator())


def size_ticks(ax: Axes, sizes: Iterable[float]) -> None:
    """Ticks of the horizontal axis at the batch sizes themselves."""
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(sizes))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def stretch_towards_one(ax: Axes, accuracies: pd.DataFrame) -> None:
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
