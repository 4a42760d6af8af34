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
    pictures = {name: _png(figure) for name, figure in figures(advice).items()}
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(source)
    return template.render(advice=advice, pictures=pictures)


def figures(advice: Advice) -> dict[str, Figure]:
    """The figures of an advice: "race", "sizes", "rates", and "noise" where it was measured."""
    with mpl.rc_context():
        use_style()
        made: dict[str, Figure] = {}

        def axes(name: str, columns: int = 1) -> Any:
            made[name] = Figure(figsize=(3.6 * columns + 4.2, 3.8), layout="constrained")
            return made[name].subplots(1, columns)

        plot_race(axes("race", 2)[0], pd.DataFrame(advice.race), advice.setting, advice.usual)
        costs, size = pd.DataFrame(advice.costs), advice.effective_batch_size
        plot_sizes(axes("sizes", 3), costs, size, advice.noun)
        rates, same = pd.DataFrame(advice.rates), advice.rates_at == size
        plot_rates(axes("rates"), rates, advice.learning_rate, advice.rates_at, same)
        if advice.noise:
            plot_noise(axes("noise"), pd.DataFrame(advice.noise), advice.noun)
    return made


def _png(figure: Figure) -> str:
    """A figure as the address of an image."""
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
