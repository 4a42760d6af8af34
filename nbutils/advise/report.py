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


def format_seconds(seconds: float) -> str:
    """Seconds as people read them, to three digits: "1.25 min"."""
    for unit, size in {"h": 3600, "min": 60}.items():
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


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
    module, _, name = task.losses_name.partition(":")
    dotted = f"{module}.{name}".split(".")
    is_importable = all(map(str.isidentifier, dotted)) and module not in ("__main__", "builtins")
    return template("loop.py.jinja").render(
        task=task,
        own=own if isinstance(own, ClassLosses) else None,
        device=task.device,
        setting=setting,
        cast=cast,
        output=output,
        half=HALF,
        module=module,
        name=name,
        root=name.partition(".")[0] if is_importable else "",
    )


def pictures(advice: Advice) -> dict[str, bytes]:
    """The figures as PNG: "race", "sizes", "rates", and "noise" where it was measured."""
    made: dict[str, Figure] = {}

    def axes(name: str, columns: int = 1, width: float = 8.0) -> Any:
        made[name] = Figure(figsize=(width, 4.0), layout="constrained")
        return made[name].subplots(1, columns)

    with mpl.rc_context():
        use_style()
        plot_race(axes("race", width=10), pd.DataFrame(advice.race), advice.setting, advice.usual)
        costs, size = pd.DataFrame(advice.costs), advice.effective_batch_size
        plot_sizes(axes("sizes", 3, 14), costs, size, advice.noun)
        rates, same = pd.DataFrame(advice.rates), advice.rates_at == size
        plot_rates(axes("rates"), rates, advice.learning_rate, advice.rates_at, same)
        if advice.noise:
            plot_noise(axes("noise"), pd.DataFrame(advice.noise), advice.noun)
        files = {name: io.BytesIO() for name in made}
        for name, figure in made.items():
            FigureCanvasAgg(figure).print_png(files[name])
        return {name: file.getvalue() for name, file in files.items()}


def html(advice: Advice) -> str:
    """The report, a page that needs no other file."""
    head = "data:image/png;base64,"
    shown = {name: head + base64.b64encode(png).decode() for name, png in pictures(advice).items()}
    return template("report.html.jinja").render(advice=advice, pictures=shown)
