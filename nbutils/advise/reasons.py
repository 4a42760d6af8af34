"""The words of an advice: why this setting, two usual questions, what to beware of, the loop."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import pandas as pd
import torch

from nbutils.advise.entrants import relative_time
from nbutils.advise.measurements import typical
from nbutils.advise.race import Race, time_saved
from nbutils.advise.task import HALF, ClassLosses, Task
from nbutils.advise.trials import Recipe, format_seconds


@dataclass(frozen=True)
class Measured:
    """All that was measured. The attributes are those of `Advice`, as tables."""

    costs: pd.DataFrame
    noise: pd.DataFrame
    rates: pd.DataFrame
    rates_at: int
    bounded: bool
    left_out: list[str]
    race: Race

    @property
    def row(self) -> pd.Series:
        """The row of `costs` of the advised setting."""
        return self.costs[self._winning].iloc[0]

    @property
    def _winning(self) -> pd.Series:
        size, steps = self.race.winner.batch_size, self.race.winner.accumulation_steps
        return (self.costs["batch_size"] == size) & (self.costs["accumulation_steps"] == steps)

    @property
    def relative_times(self) -> pd.Series:
        """Time to get equally far by the formula, the advised setting's being 1."""
        times = relative_time(self.costs, typical(self.noise)[0])
        return times / times[self._winning].iloc[0]

    def saved(self, rival: str) -> tuple[float, float, float]:
        """Share of a raced setting's time that the advised one saves, and its interval."""
        return time_saved(pd.DataFrame(self.race.points), str(self.race.winner), rival)


def reasons(task: Task, measured: Measured) -> list[str]:
    """Why this setting, as sentences in plain English."""
    race, row, noun = measured.race, measured.row, task.noun
    scale, low, high = typical(measured.noise)
    fastest = measured.costs["images_per_second"].max()
    others = [each["setting"] for each in race.settings if each["setting"] != str(race.winner)]
    said = [
        f"Trained for {format_seconds(race.seconds)} each from the same start, {race.winner} had a "
        f"lower validation loss than {_listed(others) or 'no other setting'}.",
        f"At {int(row['effective_batch_size'])} {noun} per update the device trains on "
        f"{row['images_per_second']:,.0f} {noun} per second, "
        f"{row['images_per_second'] / fastest:.0%} of the most at any size.",
    ]
    if math.isfinite(scale):
        said.append(
            f"The noise scale is about {scale:,.0f} {noun} ({low:,.0f} to "
            f"{f'{high:,.0f}' if math.isfinite(high) else 'no upper end found'}): below it, twice "
            f"the {noun} per update nearly halve the updates needed; far above it, they only take "
            f"more time."
        )
        if task.batch_norms:
            said[-1] += " With batch norm this estimate is biased, as small batches differ more."
    rates = measured.rates
    best, diverged = rates[rates["best"]].iloc[0], rates[rates["outcome"] == "diverged"]
    said.append(
        f"Of {len(rates)} learning rates tried at {measured.rates_at} {noun} per update, "
        f"{best['learning_rate']:g} had the lowest validation loss after {best['updates']:.0f} "
        f"updates"
        + (f", and from {diverged['learning_rate'].min():g} on it diverged." * bool(len(diverged)))
        + ("." * (not len(diverged)))
    )
    return said


def questions(task: Task, measured: Measured) -> dict[str, str]:
    """Two questions that everybody asks, each answered with a number."""
    costs, times = measured.costs, measured.relative_times
    whole = costs[costs["accumulation_steps"] == 1]
    size = int(whole["batch_size"].max())
    factor = times[whole.index][whole["batch_size"] == size].iloc[0]
    fits = "fits the memory" if measured.bounded else "was measured (memory allows more)"
    raced = [each for each in measured.race.settings if each["batch_size"] == size]
    raced = [each for each in raced if each["accumulation_steps"] == 1]
    if size == measured.race.winner.batch_size:
        lost = f"Nothing: the advice is the largest batch that {fits}."
    elif raced:
        saved = min(measured.saved(each["setting"])[0] for each in raced)
        lost = f"{size}, the largest that {fits}, needed {1 / (1 - saved):.1f} times the time."
    else:
        lost = (
            f"{size}, the largest that {fits}, would take about {factor:.1f} times as long as the "
            f"advice to get equally far, by its speed and the noise scale"
            + ("." if len(measured.noise) else ", which was assumed, as it was not measured.")
        )
    return {
        "What do I lose if I take the largest batch that fits?": lost,
        "Is accumulation worth it here?": _accumulation(task, measured),
    }


def _accumulation(task: Task, measured: Measured) -> str:
    winner = measured.race.winner
    if task.batch_norms:
        why = (
            "No: batch norm normalises by the micro-batch, so accumulated micro-batches do not "
            "make the update of one large batch."
        )
    elif winner.accumulation_steps > 1:
        why = f"Yes: {winner} won the race."
    else:
        why = "No: the advised update fits the memory."
    for each in measured.race.settings:
        if each["accumulation_steps"] > 1 and each["setting"] != str(winner):
            saved = measured.saved(each["setting"])[0]
            return f"No: in the race {each['setting']} needed {1 / (1 - saved):.2f} times the time."
    costs = measured.costs
    speeds = costs[costs["accumulation_steps"] == 1].set_index("effective_batch_size")
    parts = costs[costs["accumulation_steps"] > 1]
    parts = parts[parts["effective_batch_size"].isin(speeds.index)]
    if parts.empty:
        return f"{why} Its price was not measured, for want of time."
    last = parts.iloc[-1]
    size = int(last["effective_batch_size"])
    speed = last["images_per_second"] / speeds["images_per_second"][size]
    return (
        f"{why} {last['accumulation_steps']:.0f} x {last['batch_size']:.0f} makes the update of "
        f"one batch of {size} at {speed:.2f} times its speed."
    )


def warnings(task: Task, measured: Measured, saved_low: float) -> list[str]:
    """What to beware of."""
    race, said = measured.race, list(task.notes)
    if not (measured.rates["outcome"] == "learnt").any():
        said.append(
            "no learning rate lowered the validation loss: give a longer time budget; if that does "
            "not help, check that inputs are scaled and that the labels belong to them"
        )
    if race.winner != race.usual and not saved_low > 0:
        said.append(
            f"the race does not show that {race.winner} is faster than {race.usual}: "
            + (
                "the interval includes no difference"
                if race.starts > 1
                else "there was time for one start only"
            )
        )
    edge = measured.rates["best"].iloc[[0, -1]].any() and len(measured.rates) > 1
    if edge and race.winner != race.usual:
        said.append("the best learning rate is the outermost that was tried")
    if measured.bounded and measured.row["batch_size"] == measured.costs["batch_size"].max():
        said.append("the memory budget limits the batch size")
    return said


def not_checked(task: Task, measured: Measured) -> list[str]:
    """What the advice does not rest on."""
    held = task.train.number
    missed = [
        *measured.left_out,
        f"trainings longer than {format_seconds(measured.race.seconds)}, in which a lower or "
        f"falling rate may be better, and in which the noise scale usually grows",
        "other optimizers, weight decay, schedules and augmentation",
        f"reading {task.noun} from disk: they were in memory",
    ]
    if held < task.examples_per_epoch:
        missed.append(f"all {task.noun}: {held:,} of {task.examples_per_epoch:,} were in memory")
    return missed


def loop(task: Task, measured: Measured, recipe: Recipe, device: str) -> str:
    """The training loop to paste, as source."""
    race, images = measured.race, task.images
    own = task.losses if isinstance(task.losses, ClassLosses) else None
    source = resources.files("nbutils.advise").joinpath("loop.py.jinja").read_text("utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return (
        environment.from_string(source)
        .render(
            device=device,
            setting=race.winner,
            optimizer=recipe.call.format(rate=race.winner.learning_rate),
            images=images,
            own=own,
            cast=_cast(task, own),
            half=own is not None and own.dtype in HALF,
            weighted=task.weighted,
            losses=task.losses_name.partition(":"),
            batch_norm=bool(task.batch_norms),
        )
        .rstrip()
        + "\n"
    )


def _cast(task: Task, own: ClassLosses | None) -> str:
    """The type that the loop must cast images to, as source; empty if it need not."""
    if own is None or task.images is None:
        return ""
    given = torch.float32 if own.scaling else task.images.train[0].dtype
    return str(own.dtype) if given.is_floating_point and given != own.dtype else ""


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def from_race(task: Task, measured: Measured) -> dict[str, Any]:
    """The fields of `Advice` that the race decides."""
    race, winner = measured.race, measured.race.winner
    saved, low, high = measured.saved(str(race.usual))
    return {
        "batch_size": winner.batch_size,
        "accumulation_steps": winner.accumulation_steps,
        "effective_batch_size": winner.effective_batch_size,
        "learning_rate": winner.learning_rate,
        "usual": str(race.usual),
        "saved": _finite(saved),
        "saved_range": [_finite(low), _finite(high)],
        "starts": race.starts,
        "warnings": warnings(task, measured, low),
        "reasons": reasons(task, measured),
        "questions": questions(task, measured),
        "not_checked": not_checked(task, measured),
        "race": _rows(pd.DataFrame(race.points)),
        "settings": race.settings,
    }


def from_tables(task: Task, measured: Measured) -> dict[str, Any]:
    """The fields of `Advice` that the measurements tell."""
    row, (scale, low, high) = measured.row, typical(measured.noise)
    raced = next(
        point["updates"] * measured.race.winner.effective_batch_size / point["seconds"]
        for point in reversed(measured.race.points)
        if point["setting"] == str(measured.race.winner)
    )
    speeds = sorted((row["images_per_second"], row["slowest"], raced), reverse=True)
    return {
        "model": task.model_name,
        "dataset": task.dataset_name,
        "noun": task.noun,
        "seconds_per_epoch": task.examples_per_epoch / raced,
        "seconds_per_epoch_range": [task.examples_per_epoch / each for each in speeds[::2]],
        "peak_memory": int(row["peak_memory"]),
        "noise_scale": _finite(scale),
        "noise_scale_range": [_finite(low), _finite(high)],
        "costs": _rows(measured.costs.assign(relative_time=measured.relative_times)),
        "noise": _rows(measured.noise),
        "rates": _rows(measured.rates),
        "rates_at": int(measured.rates_at),
    }


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Plain values; those that are not finite become None."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
