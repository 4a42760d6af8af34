"""`Explorer`: the curves of a study to play with in JupyterLab."""

from __future__ import annotations

import base64
import os
from io import BytesIO
from typing import Any, get_args

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd

from nbutils.analysis.outcomes import name_settings
from nbutils.plots.curves import METRIC_NAMES, Progress, Scale, plot_accuracy


class Explorer(widgets.HBox):
    """Controls for the runs, the axis, the metric and the scale, beside the figure that they draw.

    Where no kernel runs, such as on the web, the figure is shown without the controls.

    Args:
        runs: From `load_runs`.

    Attributes:
        figure: What is shown now.
    """

    def __init__(self, runs: pd.DataFrame) -> None:
        self.runs = name_settings(runs)
        self.settings = _several(self.runs["setting"].unique().tolist(), rows=9)
        self.seeds = _several(sorted(self.runs["seed"].unique().tolist()), rows=5)
        metrics = [(name.partition(" (")[0], metric) for metric, name in METRIC_NAMES.items()]
        wide = {"width": "210px"}
        self.metric = widgets.Dropdown(options=metrics, value="validation_accuracy", layout=wide)
        self.against = widgets.Dropdown(options=get_args(Progress), layout=wide)
        self.scale = widgets.ToggleButtons(options=get_args(Scale), style={"button_width": "100px"})
        fits = {"width": "calc(100% - 240px)", "max_width": "760px", "height": "auto"}
        self.picture = widgets.Image(format="png", layout={**fits, "object_fit": "contain"})
        controls: dict[str, Any] = {
            "settings (Ctrl or Shift and a click chooses several)": self.settings,
            "seeds (likewise)": self.seeds,
            "metric": self.metric,
            "against": self.against,
            "scale": self.scale,
        }
        column = []
        for name, control in controls.items():
            control.observe(self.draw, names="value")
            column += [widgets.HTML(f"<div style='line-height: 1.2'>{name}</div>"), control]
        left = widgets.VBox(column, layout={"width": "230px", "flex": "none"})
        super().__init__([left, self.picture])
        self.draw()

    def __repr__(self) -> str:
        return "Run this cell in JupyterLab to choose what is drawn."

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The controls, and the figure for who cannot show them."""
        data = super()._repr_mimebundle_(**kwargs)
        data["image/png"] = base64.b64encode(self.picture.value).decode()
        if os.environ.get("TQDM_DISABLE"):
            # Nobody is looking: the output is stored, and JupyterLab would look for the controls
            # of a kernel that is gone.
            del data["application/vnd.jupyter.widget-view+json"]
        return data

    def draw(self, *_: Any) -> None:
        """Draw what the controls say, in place of what is shown."""
        chosen = self.runs[
            self.runs["setting"].isin(self.settings.value)
            & self.runs["seed"].isin(self.seeds.value)
        ]
        self.figure, ax = plt.subplots(figsize=(7.6, 5.4), layout="constrained")
        plt.close(self.figure)  # it is shown here, and not once more at the end of the cell
        if len(chosen):
            plot_accuracy(ax, chosen, self.metric.value, self.against.value, self.scale.value)
        else:
            ax.set_axis_off()
            message = "Nothing is chosen:\nchoose one setting and one seed, or more."
            ax.text(0.5, 0.5, message, ha="center", size=14, transform=ax.transAxes)
        picture = BytesIO()
        self.figure.savefig(picture, format="png", dpi=100)
        self.picture.value = picture.getvalue()


def _several(options: list[Any], rows: int) -> widgets.SelectMultiple:
    rows = min(rows, len(options))
    layout = {"width": "210px"}
    return widgets.SelectMultiple(options=options, value=options, rows=rows, layout=layout)
