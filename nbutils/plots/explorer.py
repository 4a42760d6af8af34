"""Figures to play with in JupyterLab: `Explorer` and `LiveCurves`."""

import base64
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, get_args

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from nbutils.analysis.outcomes import name_settings
from nbutils.plots import style
from nbutils.plots.curves import METRIC_NAMES, Progress, Scale, plot_accuracy

WIDE = {"width": "210px"}


class Playground(widgets.HBox):
    """Controls, by the text above each, beside the `figure` that the subclass's `_plot` draws."""

    _plot: Callable[[Axes], None]

    def __init__(self, controls: dict[str, Any]) -> None:
        fits = {"width": "calc(100% - 240px)", "max_width": "760px", "height": "auto"}
        self.picture = widgets.Image(format="png", layout={**fits, "object_fit": "contain"})
        column = []
        for name, control in controls.items():
            column += [widgets.HTML(f"<div style='line-height: 1.2'>{name}</div>"), control]
        left = widgets.VBox(column, layout={"width": "230px", "flex": "none"})
        super().__init__([left, self.picture])
        self._draw()

    def __repr__(self) -> str:
        return "Run this cell in JupyterLab to choose what is drawn."

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The controls, and the figure for who cannot show them, such as pages on the web."""
        data = super()._repr_mimebundle_(**kwargs)
        data["image/png"] = base64.b64encode(self.picture.value).decode()
        if os.environ.get("TQDM_DISABLE"):
            # The output is stored: JupyterLab would look for the controls of a kernel that is gone.
            del data["application/vnd.jupyter.widget-view+json"]
        return data

    def _draw(self, *_: Any) -> None:
        self.figure, ax = plt.subplots(figsize=(7.6, 5.4), layout="constrained")
        plt.close(self.figure)  # it is shown here, and not once more at the end of the cell
        self._plot(ax)
        picture = BytesIO()
        self.figure.savefig(picture, format="png", dpi=100)
        self.picture.value = picture.getvalue()


class Explorer(Playground):
    """The curves of the runs of `load_runs`: which runs, axis, metric and scale is to choose."""

    def __init__(self, runs: pd.DataFrame) -> None:
        def several(options: list[Any], most: int) -> widgets.SelectMultiple:
            rows = min(most, len(options))
            return widgets.SelectMultiple(options=options, value=options, rows=rows, layout=WIDE)

        self.runs = name_settings(runs)
        settings, seeds = self.runs["setting"].unique(), self.runs["seed"].unique()
        metrics = [(name.partition(" (")[0], metric) for metric, name in METRIC_NAMES.items()]
        wide = {"button_width": "100px"}
        controls = {
            "settings (Ctrl or Shift and a click chooses several)": several(list(settings), 9),
            "seeds (likewise)": several(sorted(seeds.tolist()), 10),
            "metric": widgets.Dropdown(options=metrics, value="validation_accuracy", layout=WIDE),
            "against": widgets.Dropdown(options=get_args(Progress), layout=WIDE),
            "scale": widgets.ToggleButtons(options=get_args(Scale), style=wide),
        }
        self.settings, self.seeds, self.metric, self.against, self.scale = controls.values()
        super().__init__(controls)
        for control in controls.values():
            control.observe(self._draw, names="value")

    def _plot(self, ax: Axes) -> None:
        settings, seeds = self.settings.value, self.seeds.value
        chosen = self.runs[self.runs["setting"].isin(settings) & self.runs["seed"].isin(seeds)]
        if len(chosen):
            plot_accuracy(ax, chosen, self.metric.value, self.against.value, self.scale.value)
        else:
            ax.set_axis_off()
            message = "Nothing is chosen:\nchoose one setting and one seed, or more."
            ax.text(0.5, 0.5, message, ha="center", size=14, transform=ax.transAxes)


class LiveCurves(Playground):
    """A slider for the batch size, and a button that trains and adds a curve to the earlier ones.

    `train(batch_size)` returns columns `seconds` and `accuracy`. Of `sizes`, `first` is trained at
    once.
    """

    def __init__(
        self, train: Callable[[int], pd.DataFrame], sizes: Sequence[int], first: int
    ) -> None:
        self.train, self.curves = train, {first: train(first)}
        self.size = widgets.SelectionSlider(options=sizes, value=first, layout=WIDE)
        self.button = widgets.Button(description="Train", button_style="primary")
        self.button.on_click(self._add)
        super().__init__({"batch size": self.size, "": self.button})

    def _add(self, *_: Any) -> None:
        self.button.disabled = True
        try:
            self.curves[self.size.value] = self.train(self.size.value)
            self._draw()
        finally:
            self.button.disabled = False

    def _plot(self, ax: Axes) -> None:
        colours = style.batch_size_colours(self.size.options)
        for size, curve in sorted(self.curves.items()):
            ax.plot(curve["seconds"], curve["accuracy"], color=colours[size], label=f"{size}")
        style.stretch_towards_one(ax, pd.concat(self.curves)["accuracy"].to_numpy())
        ax.set(xlabel="seconds of training", ylabel="validation accuracy")
        ax.set_title("Which batch size learns most in the time?")
        style.label_ends(ax)
