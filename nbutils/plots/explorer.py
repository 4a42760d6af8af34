"""`Explorer`: a study's curves to play with in JupyterLab."""

from __future__ import annotations

from io import BytesIO
from typing import Any, get_args

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd

from nbutils.analysis.outcomes import name_settings
from nbutils.plots.curves import METRIC_NAMES, Progress, Scale, plot_accuracy


class Explorer(widgets.VBox):
    """Controls that choose which runs are drawn, against what, which metric, and on which scale.

    Attributes:
        figure: What is shown now.

    Args:
        runs: From `load_runs`.
    """

    def __init__(self, runs: pd.DataFrame) -> None:
        self.runs = name_settings(runs)
        settings = self.runs["setting"].unique().tolist()
        self.settings = widgets.SelectMultiple(
            options=settings, value=settings, rows=len(settings), description="settings"
        )
        self.seeds = widgets.SelectMultiple(
            options=sorted(self.runs["seed"].unique().tolist()),
            value=sorted(self.runs["seed"].unique().tolist()),
            description="seeds",
        )
        metrics = [(name, metric) for metric, name in METRIC_NAMES.items()]
        self.metric = widgets.Dropdown(
            options=metrics,
            value="validation_accuracy",
            description="metric",
            layout={"width": "max-content"},
        )
        self.against = widgets.ToggleButtons(options=get_args(Progress), description="against")
        self.scale = widgets.ToggleButtons(options=get_args(Scale), description="scale")
        self.picture = widgets.Image(format="png")
        controls = (self.settings, self.seeds, self.metric, self.against, self.scale)
        for control in controls:
            control.observe(self.draw, names="value")
        choice = widgets.HBox([self.settings, self.seeds])
        super().__init__([choice, self.metric, self.against, self.scale, self.picture])
        self.draw()

    def __repr__(self) -> str:
        """What is shown where there is no live kernel."""
        return "Run this cell in JupyterLab to choose what is drawn."

    def draw(self, *_: Any) -> None:
        """Draw what the controls say, in place of what is shown."""
        chosen = self.runs[
            self.runs["setting"].isin(self.settings.value)
            & self.runs["seed"].isin(self.seeds.value)
        ]
        self.figure, ax = plt.subplots(figsize=(9, 5), layout="constrained")
        plt.close(self.figure)  # it is shown here, and not once more at the end of the cell
        if len(chosen):
            plot_accuracy(ax, chosen, self.metric.value, self.against.value, self.scale.value)
        picture = BytesIO()
        self.figure.savefig(picture, format="png", dpi=100)
        self.picture.value = picture.getvalue()
