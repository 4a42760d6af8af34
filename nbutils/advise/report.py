"""An advice in words, as a loop to paste, as figures, and as a page of HTML."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib as mpl
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nbutils.advise.task import HALF, ClassLosses, Task
from nbutils.advise.trials import Setting
from nbutils.measure.memory import format_memory
from nbutils.plots.advice import plot_noise, plot_race, plot_rates, plot_sizes
from nbutils.plots.style import use_style

if TYPE_CHECKING:
    from nbutils.advise.advice import Advice

UNITS = {"h": 3600, "min": 60, "s": 1}
"""Seconds in each unit that times are read and written in."""


def format_seconds(seconds: float) -> str:
    """Seconds as people read them, to three digits: "1.25 min"."""
    unit = next((unit for unit, size in UNITS.items() if seconds >= size), "s")
    return f"{seconds / UNITS[unit]:.3g} {unit}"


def template(name: str) -> jinja2.Template:
    """One of the templates beside this file."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nbutils.advise", "."),
        autoescape=name.endswith("html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"seconds": format_seconds, "memory": format_memory}
    return environment.get_template(name)


def words(name: str, advice: Advice, **facts: Any) -> str:
    """A macro of `words.jinja`."""
    return getattr(template("words.jinja").make_module({"a": advice, **facts}), name)()


def sentences(task: Task, advice: Advice, bounded: bool, left_out: list[str]) -> dict[str, Any]:
    """The fields of `Advice` that are words, from its other fields."""

    def lines(name: str) -> list[str]:
        text = words(name, advice, task=task, bounded=bounded, left_out=left_out)
        return [line.strip() for line in text.splitlines() if line.strip()]

    questions = {
        "What do I lose if I take the largest batch that fits?": " ".join(lines("largest")),
        "Is accumulation worth it here?": " ".join(lines("accumulation")),
    }
    names = "reasons", "warnings", "not_checked"
    return {"questions": questions} | {name: lines(name) for name in names}


def loop(task: Task, setting: Setting) -> str:
    """The training loop to paste, as source."""
    own, cast, output = task.losses, "", ""
    if isinstance(own, ClassLosses):
        images = task.data.train.first(2).items[0]
        given = torch.float32 if own.scaling else images.dtype
        cast = str(own.dtype) if given.is_floating_point and given != own.dtype else ""
        output = own.found(task.make(task.device), images.to(task.device))[0]
    return template("loop.py.jinja").render(
        task=task,
        own=own if isinstance(own, ClassLosses) else None,
        device=task.device,
        setting=setting,
        optimizer=task.recipe.call.format(rate=setting.learning_rate),
        cast=cast,
        output=output,
        half=HALF,
        losses=task.losses_name.partition(":"),
    )


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


def html(advice: Advice) -> str:
    """The report, a page that needs no other file."""
    head = "data:image/png;base64,"
    shown = {name: head + base64.b64encode(png).decode() for name, png in pictures(advice).items()}
    return template("report.html.jinja").render(advice=advice, pictures=shown)
