"""The advice for a reader's own training: made, kept, and written as a report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nbutils.advise import reasons
from nbutils.advise.costs import cost_table, trial_costs, update_cost
from nbutils.advise.entrants import choose, entrants, usual_row
from nbutils.advise.measurements import trial_noise, trial_rates, typical
from nbutils.advise.race import Race, Setting, run_race
from nbutils.advise.reasons import Measured
from nbutils.advise.task import Losses, Task, read_task
from nbutils.advise.trials import Clock, Recipe, format_seconds, parse_time, recipe_for
from nbutils.analysis.intervals import mean_interval
from nbutils.errors import InputError
from nbutils.machine import device_name, environment
from nbutils.measure.cost import Cost
from nbutils.measure.factory import Factory
from nbutils.measure.memory import format_memory, free_memory, parse_memory
from nbutils.measure.process import OutOfMemory
from nbutils.training.setup import resolve_device

MARGIN = 0.1
"""Share of the memory budget that is to stay free."""

SHARES = {"costs": 0.25, "noise": 0.1, "rates": 0.2, "race": 0.45}
"""Of the time budget. The race has its share even if the others overran theirs."""


@dataclass(frozen=True)
class Advice:
    """What to train with, why, and what it rests on. All values are plain, for JSON.

    Attributes:
        model: Name of the model's factory.
        dataset: Name of the dataset.
        optimizer: "adam" or "sgd".
        device: Where it was measured.
        noun: What an example is called: "images" or "examples".
        batch_size: Examples in one forward/backward pass.
        accumulation_steps: Passes per update; 1: do not accumulate.
        effective_batch_size: Examples per update.
        learning_rate: Of the setting that won the race.
        usual: The usual setting, as in `race`.
        saved: Share of its time that the advice saves; negative if it needs more.
        saved_range: 95 % interval of `saved`; None with one start.
        starts: From which the advised and the usual setting both trained.
        seconds_per_epoch: Of training alone, with the whole dataset, at the speed of the race.
        seconds_per_epoch_range: At the highest and the lowest speed measured.
        peak_memory: Bytes that training adds.
        memory_budget: Bytes that it might have added.
        noise_scale: In examples, the median along a short training. None if not measured or
            infinite.
        noise_scale_range: The lowest lower and the highest upper end of its intervals. An upper end
            of None is infinite.
        warnings: What to beware of.
        reasons: Why this, as sentences.
        questions: Two usual questions, each with its answer.
        not_checked: What the advice does not rest on.
        code: The loop to paste.
        costs: Rows of `trial_costs`, with `relative_time` by the formula, the advised being 1.
        noise: Rows of `trial_noise`.
        rates: Rows of `trial_rates`.
        rates_at: The examples per update at which the rates were tried.
        race: Rows of `Race.points`.
        settings: Rows of `Race.settings`.
        seconds_taken: All the waiting.
        time_budget: Seconds that the measurements might have taken.
        environment: Versions and hardware.
    """

    model: str
    dataset: str
    optimizer: str
    device: str
    noun: str
    batch_size: int
    accumulation_steps: int
    effective_batch_size: int
    learning_rate: float
    usual: str
    saved: float | None
    saved_range: list[float | None]
    starts: int
    seconds_per_epoch: float
    seconds_per_epoch_range: list[float]
    peak_memory: int
    memory_budget: int
    noise_scale: float | None
    noise_scale_range: list[float | None]
    warnings: list[str]
    reasons: list[str]
    questions: dict[str, str]
    not_checked: list[str]
    code: str
    costs: list[dict[str, Any]]
    noise: list[dict[str, Any]]
    rates: list[dict[str, Any]]
    rates_at: int
    race: list[dict[str, Any]]
    settings: list[dict[str, Any]]
    seconds_taken: float
    time_budget: float
    environment: dict[str, Any]

    @property
    def setting(self) -> str:
        """The advised setting, as in `race`."""
        sizes = self.batch_size, self.accumulation_steps
        return str(Setting(*sizes, self.learning_rate, 1.0))

    @property
    def headline(self) -> str:
        """The advice in one line."""
        steps = self.accumulation_steps
        accumulate = f"{steps} accumulation steps" if steps > 1 else "no accumulation"
        return (
            f"Train with batch size {self.batch_size}, {accumulate} and learning rate "
            f"{self.learning_rate:g}."
        )

    @property
    def saving(self) -> str:
        """How much time the advice saves against the usual setting, and how sure that is."""
        if self.setting == self.usual:
            return "the same: no other setting that raced was faster"
        if self.saved is None:
            return "not known: one of the two did not learn"
        less = "less" if self.saved >= 0 else "more"
        starts = f"{self.starts} starts" if self.starts > 1 else "1 start, so no interval"
        low, high = self.saved_range
        if low is not None and high is not None:
            starts = f"{low:.0%} to {high:.0%}, {starts}"
        return f"{abs(self.saved):.0%} {less} time to the same validation loss ({starts})"

    @property
    def answer(self) -> str:
        """The advice in a few lines."""
        low, high = map(format_seconds, self.seconds_per_epoch_range)
        times = f"{format_seconds(self.seconds_per_epoch)} ({low} to {high})"
        return "\n".join(
            [
                self.headline,
                f"  for               {self.model} on {self.dataset}, {self.optimizer}, "
                f"{self.device}",
                f"  against {self.usual:<9} {self.saving}",
                f"  time per epoch    {times}",
                f"  peak memory       {format_memory(self.peak_memory)}",
            ]
        )


def advise(
    model: Factory | str,
    dataset: Any,
    losses: Losses | str | None = None,
    collate: Callable[[list[Any]], Any] | str | None = None,
    *,
    columns: Sequence[str] | None = None,
    memory_budget: str | int | None = None,
    time_budget: str | float = "10min",
    optimizer: str = "adam",
    device: str = "auto",
) -> Advice:
    """Measure a training, race a few settings, and advise on sizes and learning rate.

    Args:
        model: Makes the model; as `read_task` takes it, like the next four.
        dataset: The examples.
        losses: `losses(model, batch)`; by default the cross-entropy of a classifier of images.
        collate: Makes a batch of items.
        columns: Keys of image and label.
        memory_budget: What training may add, as bytes or "2GB"; by default what is free.
        time_budget: For measurements and race, as seconds or "10min". Reading the examples and
            starting the measuring processes come on top. What is needed at least, such as a search
            for the largest batch that fits, is made whatever the time.
        optimizer: "adam" or "sgd" (with momentum 0.9).
        device: As in `RunConfig`, but not "mps".

    Raises:
        InputError: An argument cannot be used, the model cannot be trained, or the memory budget
            is too small.
    """
    began = time.perf_counter()
    recipe, place = recipe_for(optimizer), resolve_device(device)
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"device = {device!r}, but cost is measured on 'cpu' and 'cuda' only")
    budget = memory_budget if isinstance(memory_budget, int) else None
    if isinstance(memory_budget, str):
        budget = parse_memory(memory_budget)
    memory = budget or free_memory(str(place))
    seconds = parse_time(time_budget)
    task = read_task(model, dataset, losses, collate, columns)
    with suppress(OutOfMemory):  # what takes long only once: starting the measuring processes
        update_cost(task, recipe.optimizer, place, 2)
    recipe.optimizer([torch.nn.Parameter(torch.zeros(1))])  # the first loads torch's compiler
    mean_interval([0.0, 1.0])  # loads scipy
    measured = _measured(task, recipe, place, memory * (1 - MARGIN), seconds)
    return Advice(
        optimizer=optimizer,
        device=str(place),
        memory_budget=memory,
        **reasons.from_race(task, measured),
        **reasons.from_tables(task, measured),
        code=reasons.loop(task, measured, recipe, str(place)),
        seconds_taken=time.perf_counter() - began,
        time_budget=seconds,
        environment=environment(device_name(place)),
    )


def _measured(
    task: Task, recipe: Recipe, place: torch.device, limit: float, seconds: float
) -> Measured:
    """Everything in turn: costs, noise scale, rates, race."""
    clock = Clock(seconds)
    costs, bounded, left_out = trial_costs(
        task, recipe.optimizer, place, limit, SHARES["costs"] * seconds
    )
    usual, accumulate = usual_row(costs), not task.batch_norms
    share = SHARES["noise"] * seconds
    sizes = min(32, usual["batch_size"]), usual["images_per_second"]
    fitting = int(costs["batch_size"].max())
    noise, missed = trial_noise(task, recipe, place, *sizes, fitting, limit, share)
    left_out += missed
    scale = typical(noise)[0]
    first = choose(costs, scale, accumulate)
    sizes = first["batch_size"], first["accumulation_steps"]
    share = min(SHARES["rates"] * seconds, 0.5 * clock.left)
    rates, missed = trial_rates(task, recipe, place, *sizes, first["images_per_second"], share)
    left_out += missed
    settings = entrants(costs, scale, rates, recipe, accumulate, bounded)
    share = max(clock.left, SHARES["race"] * seconds)
    race = run_race(task, recipe, place, settings, share)
    costs = _confirmed(
        costs, race, lambda *sizes: update_cost(task, recipe.optimizer, place, *sizes)
    )
    return Measured(costs, noise, rates, first["effective_batch_size"], bounded, left_out, race)


def _confirmed(costs: pd.DataFrame, race: Race, measure: Callable[..., Cost]) -> pd.DataFrame:
    """The costs without assumed rows; the winner's is measured if need be."""
    known = costs[costs["measurements"] > 0]
    sizes = race.winner.batch_size, race.winner.accumulation_steps
    if sizes in set(zip(known["batch_size"], known["accumulation_steps"], strict=True)):
        return known
    table = pd.concat([known, cost_table([measure(*sizes)])], ignore_index=True)
    return table.sort_values("effective_batch_size", ignore_index=True)


def save_advice(advice: Advice, path: str | Path) -> None:
    """Write `advice` as JSON, its fields as keys."""
    text = json.dumps(asdict(advice), indent=1, allow_nan=False, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def load_advice(path: str | Path) -> Advice:
    """Read what `save_advice` wrote.

    Raises:
        InputError: It is not there or something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return Advice(**{field.name: content[field.name] for field in fields(Advice)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no advice: {type(error).__name__}: {error}") from error


def write_report(advice: Advice, out: str | Path) -> list[Path]:
    """Write `advice.json` and `report.html`, a page with figures that needs no other file.

    Args:
        advice: From `advise`.
        out: Folder; made where there is none.

    Returns:
        The two paths.
    """
    from nbutils.advise.report import html

    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "advice.json", out / "report.html"]
    save_advice(advice, paths[0])
    paths[1].write_text(html(advice), encoding="utf-8")
    return paths
