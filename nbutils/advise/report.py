"""An advice as a page of HTML: the answer first, then the race, the reasons and the curves."""

from __future__ import annotations

import base64
import io
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib as mpl
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nbutils.plots.advice import plot_noise, plot_race, plot_rates, plot_sizes
from nbutils.plots.style import use_style

if TYPE_CHECKING:
    from nbutils.advise.advice import Advice


def html(advice: Advice) -> str:
    """The report, a page that needs no other file."""
    source = resources.files("nbutils.advise").joinpath("report.html.jinja").read_text("utf-8")
    head = "data:image/png;base64,"
    shown = {name: head + base64.b64encode(png).decode() for name, png in pictures(advice).items()}
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(source)
    return template.render(advice=advice, pictures=shown)


def pictures(advice: Advice) -> dict[str, bytes]:
    """The figures as PNG: "race", "sizes", "rates", and "noise" where it was measured."""
    with mpl.rc_context():
        use_style()
        made: dict[str, Figure] = {}

        def axes(name: str, columns: int = 1, width: float = 8.0) -> Any:
            made[name] = Figure(figsize=(width, 4.0), layout="constrained")
            return made[name].subplots(1, columns)

        plot_race(axes("race", width=10), pd.DataFrame(advice.race), advice.setting, advice.usual)
        costs, size = pd.DataFrame(advice.costs), advice.effective_batch_size
        plot_sizes(axes("sizes", 3, 14), costs, size, advice.noun)
        rates, same = pd.DataFrame(advice.rates), advice.rates_at == size
        plot_rates(axes("rates"), rates, advice.learning_rate, advice.rates_at, same)
        if advice.noise:
            plot_noise(axes("noise"), pd.DataFrame(advice.noise), advice.noun)
        return {name: _png(figure) for name, figure in made.items()}


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()
