"""An advice in words, as a loop to paste, as figures, and as a page of HTML."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib as mpl
import pandas as pd
import torch
from IPython.core.pylabtools import print_figure
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


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("nbutils.advise", "."),
    autoescape=lambda name: str(name).endswith("html.jinja"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {"seconds": format_seconds, "memory": format_memory}


def words(name: str, advice: Advice, **facts: Any) -> str:
    """A macro of `words.jinja`."""
    template = TEMPLATES.get_template("words.jinja")
    return getattr(template.make_module({"a": advice, **facts}), name)()


def sentences(advice: Advice, **facts: Any) -> dict[str, Any]:
    """The fields of `Advice` that are words, from its other fields and what `words.jinja` needs."""
    lines = {}
    for name in ("largest", "accumulation", "reasons", "warnings", "not_checked"):
        text = words(name, advice, **facts)
        lines[name] = [line.strip() for line in text.splitlines() if line.strip()]
    questions = {
        "What do I lose if I take the largest batch that fits?": " ".join(lines.pop("largest")),
        "Is accumulation worth it here?": " ".join(lines.pop("accumulation")),
    }
    return {"questions": questions, **lines}


def loop(task: Task, setting: Setting) -> str:
    """The training loop to paste, as source."""
    own, cast, output = None, "", ""
    if isinstance(task.losses, ClassLosses):
        own, images = task.losses, task.data.train.items[0][:2]
        given = torch.float32 if own.scaling else images.dtype
        cast = str(own.dtype) if given.is_floating_point and given != own.dtype else ""
        output = own.logits(task.make(task.device), images.to(task.device))[0]
    module, _, name = task.losses_name.partition(":")
    dotted = f"{module}.{name}".split(".")
    is_importable = all(map(str.isidentifier, dotted)) and module not in ("__main__", "builtins")
    root = name.partition(".")[0] if is_importable else ""
    facts = {"task": task, "setting": setting, "own": own, "cast": cast, "output": output}
    names = {"module": module, "name": name, "root": root}
    template = TEMPLATES.get_template("loop.py.jinja")
    return template.render(**facts, **names, device=task.device, half=HALF)


def pictures(advice: Advice) -> dict[str, bytes]:
    """The figures as PNG: "race", "sizes", "rates", and "noise" where it was measured."""
    widths = {"race": 10, "sizes": 14, "rates": 8} | ({"noise": 8} if advice.noise else {})
    size, rates_at, noun = advice.effective_batch_size, advice.rates_at, advice.noun
    race, costs, rates = (pd.DataFrame(t) for t in (advice.race, advice.costs, advice.rates))
    with mpl.rc_context():
        use_style()
        made = {name: Figure((width, 4), layout="constrained") for name, width in widths.items()}
        plot_race(made["race"].subplots(), race, advice.setting, advice.usual)
        plot_sizes(made["sizes"].subplots(1, 3), costs, size, noun)
        rate, same = advice.learning_rate, rates_at == size
        plot_rates(made["rates"].subplots(), rates, rate, rates_at, same)
        if advice.noise:
            plot_noise(made["noise"].subplots(), pd.DataFrame(advice.noise), noun)
        return {name: print_figure(figure, bbox_inches=None) for name, figure in made.items()}


def html(advice: Advice) -> str:
    """The report, a page that needs no other file."""
    shown = {name: base64.b64encode(png).decode() for name, png in pictures(advice).items()}
    return TEMPLATES.get_template("report.html.jinja").render(advice=advice, pictures=shown)
