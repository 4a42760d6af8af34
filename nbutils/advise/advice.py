"""The advice for a reader's own training: made, kept, and written as a report."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch

from nbutils.advise import race, report
from nbutils.advise.measurements import trial_costs, trial_noise, trial_rates
from nbutils.advise.task import Losses, Task, name_of, read_task
from nbutils.advise.trials import Setting
from nbutils.errors import InputError
from nbutils.machine import device_name, environment
from nbutils.measure.memory import resolve_budget
from nbutils.measure.process import Factory, in_own_process, start_server
from nbutils.training.setup import resolve_device

MARGIN = 0.1  # the share of the memory budget that is to stay free
SHARES = {"costs": 0.25, "noise": 0.1, "rates": 0.2, "race": 0.45}  # of the time for measuring


@dataclass(frozen=True)
class Advice:
    """What to train with, why, and what it rests on: plain values, None for what is not finite."""

    model: str  # name of its factory
    dataset: str
    optimizer: str  # "adam" or "sgd"
    device: str
    noun: str  # what an example is called: "images" or "examples"
    batch_size: int  # examples in one forward/backward pass
    accumulation_steps: int  # 1: do not accumulate
    effective_batch_size: int
    learning_rate: float
    usual: str  # the usual setting
    saved: float | None  # share of its time that the advice saves; negative if it needs more
    saved_range: list[float | None]  # 95 % interval; None with one start
    starts: int  # from which the advised and the usual setting both trained
    seconds_per_epoch: float  # of training alone, on the whole dataset, at the speed of the race
    seconds_per_epoch_range: list[float]  # at the highest and the lowest speed measured
    peak_memory: int  # bytes that training adds
    memory_budget: int  # bytes that it might have added
    noise_scale: float | None  # in examples, the median along a short training
    noise_scale_range: list[float | None]  # the lowest and the highest end of its intervals
    code: str  # the loop to paste
    costs: list[dict[str, Any]]  # of `trial_costs`; `relative_time` to get equally far, the
    # advised being 1; and `share_of_whole`: the speed over that of one batch of the same size
    noise: list[dict[str, Any]]  # of `trial_noise`
    rates: list[dict[str, Any]]  # of `trial_rates`
    rates_at: int  # examples per update at which they were tried
    race: list[dict[str, Any]]  # of `run_race`
    settings: list[dict[str, Any]]  # that raced, and `times` the time that they needed
    seconds_taken: float  # all the waiting
    time_budget: float  # of `seconds_taken`
    environment: dict[str, Any]  # versions and hardware
    warnings: Sequence[str] = ()
    reasons: Sequence[str] = ()
    questions: Mapping[str, str] = field(default_factory=dict)  # two usual ones, with answers
    not_checked: Sequence[str] = ()

    @property
    def setting(self) -> str:
        """The advised setting, as in `race`."""
        return str(Setting(self.batch_size, self.accumulation_steps, self.learning_rate))

    @property
    def headline(self) -> str:
        """The advice in one line."""
        return report.words("headline", self)

    @property
    def answer(self) -> str:
        """The advice in a few lines."""
        return report.words("answer", self)


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
        model, dataset, losses, collate, columns: As `read_task` takes them.
        memory_budget: What training may add, as bytes or "2GB"; by default what is free.
        time_budget: For all of it, as seconds or "10min". However long reading takes, half of it is
            left for measurements and race. What is needed at least, such as a search for the
            largest batch that fits, is made whatever the time.
        optimizer: "adam" or "sgd" (with momentum 0.9).
        device: As in `RunConfig`, but not "mps".

    Raises:
        InputError: An argument cannot be used, the model cannot be trained, or the memory budget
            is too small.
    """
    began, place = perf_counter(), resolve_device(device)
    memory, seconds = resolve_budget(memory_budget, str(place)), parse_time(time_budget)
    start_server()  # it loads while the examples are read
    task = read_task(model, dataset, losses, collate, columns, optimizer, place)
    task.recipe.optimizer([torch.nn.Parameter(torch.zeros(1))])  # the first loads torch's compiler
    in_own_process(perf_counter)  # waits for the server
    left = max(began + seconds - perf_counter(), seconds / 2)
    facts, told = _measured(task, memory * (1 - MARGIN), left)
    facts |= {"model": name_of(model), "dataset": task.data.name, "noun": task.noun}
    facts |= {"optimizer": optimizer, "device": str(place), "memory_budget": memory}
    facts |= {"time_budget": seconds, "environment": environment(device_name(place))}
    advice = Advice(**facts, seconds_taken=perf_counter() - began)
    return replace(advice, **report.sentences(advice, task=task, **told))


def parse_time(text: str | float) -> float:
    """The seconds, more than 0, that a number, or a text like "90s" or "1.5 h", means."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|m|min|h|)\s*", str(text).lower())
    seconds = float(match[1]) * {"h": 3600, "m": 60}.get(match[2][:1], 1) if match else 0.0
    if not seconds:
        raise InputError(
            f"time budget {text!r}: it must be a number > 0 and a unit, such as 90s, 10min or 1h"
        )
    return seconds


def _measured(task: Task, limit: float, seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `Advice`; and for its words whether memory was the limit, and what was left out.

    The race has its share of the time even if the other measurements overran theirs.
    """
    end, share = perf_counter() + seconds, {name: part * seconds for name, part in SHARES.items()}
    costs, bounded, left_out = trial_costs(task, limit, share["costs"])
    whole = costs[costs["accumulation_steps"] == 1]
    usual, fitting = race.nearest_usual(whole), int(whole["batch_size"].max())
    noise, no_noise = trial_noise(task, usual, fitting, limit, share["noise"])
    scale = noise["value"].median()
    candidates = race.candidates(costs, scale, not task.batch_norm)
    first = race.choose(candidates)
    time = min(share["rates"], 0.5 * max(0.0, end - perf_counter()))
    rates, no_rates = trial_rates(task, first, time)
    settings = race.entrants(candidates, usual, rates, task.recipe, bounded)
    winner, points = race.run_race(task, settings, max(share["race"], end - perf_counter()))

    names = [str(setting) for setting in settings]
    saved = [race.time_saved(points, str(winner), name) for name in names]
    times = race.relative_time(costs, scale)
    won = (costs[[*Setting._fields[:2]]] == [*winner[:2]]).all(axis=1)
    at_once = whole.set_index("effective_batch_size")["images_per_second"]
    costs = costs.assign(
        relative_time=times / times[won].item(),
        share_of_whole=costs["images_per_second"] / costs["effective_batch_size"].map(at_once),
    )
    cost, last = costs[won].iloc[0], points[points["setting"] == str(winner)].iloc[-1]
    speed = last["updates"] * winner.effective_batch_size / last["seconds"]
    speeds = speed, max(cost["images_per_second"], speed), min(cost["slowest"], speed)
    per_epoch = [task.data.examples_per_epoch / each for each in speeds]
    raced = pd.DataFrame(settings).assign(setting=names, times=[1 / (1 - s[0]) for s in saved])
    facts = winner._asdict() | {
        "effective_batch_size": winner.effective_batch_size,
        "usual": names[0],
        "saved": saved[0][0],
        "saved_range": saved[0][1:],
        "starts": last["start"] + 1,
        "seconds_per_epoch": per_epoch[0],
        "seconds_per_epoch_range": per_epoch[1:],
        "peak_memory": int(cost["peak_memory"]),
        "noise_scale": scale,
        "noise_scale_range": [noise["low"].min(), noise["high"].max()],
        "code": report.loop(task, winner),
        "rates_at": first.effective_batch_size,
    }
    tables = {"costs": costs, "noise": noise, "rates": rates, "race": points, "settings": raced}
    facts |= {name: table.to_dict("records") for name, table in tables.items()}
    plain = json.loads(pd.Series(facts).to_json(double_precision=15))  # None for what is not finite
    return plain, {"bounded": bounded, "left_out": left_out + no_noise + no_rates}


def load_advice(path: str | Path) -> Advice:
    """Read an `advice.json`; an `InputError` if it is not there or something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return Advice(**{field.name: content[field.name] for field in fields(Advice)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no advice: {type(error).__name__}: {error}") from error


def write_report(advice: Advice, out: str | Path) -> list[Path]:
    """Write `advice.json` and `report.html`, which needs no other file, into the folder `out`."""
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "advice.json", out / "report.html"]
    text = json.dumps(asdict(advice), indent=1, allow_nan=False, ensure_ascii=False)
    paths[0].write_text(text + "\n", encoding="utf-8")
    paths[1].write_text(report.html(advice), encoding="utf-8")
    return paths
