"""The race that decides: a few settings train from one start for equal time.

Successive halving: after each round the worse half stops, the rest goes on for as long again. The
lowest validation loss so far judges, smoothed over three looks. Turns are short and taken in
rotation, so that other work on the machine slows all alike; time spent on judging does not count.
Then the winner meets the usual setting from further starts, where there is time.

Source of the halving: Jamieson and Talwalkar (2016), "Non-stochastic best arm identification".
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from nbutils.advise.measurements import MOST_JUDGED, SHORTEST
from nbutils.advise.task import Task
from nbutils.advise.trials import Recipe, Trial, judge
from nbutils.analysis.intervals import mean_interval
from nbutils.machine import no_progress

TURNS = 6
"""Turns of each setting in the first round, each followed by a look at the validation loss."""

JUDGING = 0.25
"""Share of the time that judging may take."""

EPOCHS = 30
"""The usual setting races for no longer: what more time tells is left to the reader's training."""

ENOUGH = 10
"""Epochs of the usual setting. A longer race is worth more than further starts up to there."""


@dataclass(frozen=True)
class Setting:
    """What races.

    Attributes:
        batch_size: Of a micro-batch.
        accumulation_steps: Of an update.
        learning_rate: Of the optimizer.
        images_per_second: As measured.
        usual: Whether it is the setting that most people would take.
    """

    batch_size: int
    accumulation_steps: int
    learning_rate: float
    images_per_second: float
    usual: bool = False

    @property
    def effective_batch_size(self) -> int:
        """Examples per update."""
        return self.batch_size * self.accumulation_steps

    def __str__(self) -> str:
        """As it is written everywhere: "8 x 128 at 0.001"."""
        steps = f"{self.accumulation_steps} x " if self.accumulation_steps > 1 else ""
        return f"{steps}{self.batch_size} at {self.learning_rate:g}"


class _Racer:
    """A setting from one start, and its validation losses so far."""

    def __init__(
        self, task: Task, recipe: Recipe, device: torch.device, setting: Setting, start: int
    ) -> None:
        optimizer = partial(recipe.optimizer, lr=setting.learning_rate)
        sizes = setting.batch_size, setting.accumulation_steps
        self.setting, self.start, self._task, self._device = setting, start, task, device
        self.trial = Trial(task, optimizer, device, *sizes, start)
        self.points: list[dict[str, Any]] = []

    def look(self, most: int) -> None:
        """Note the validation loss."""
        losses, accuracy = judge(self.trial, self._task, self._device, most)
        self.points.append(
            {
                "setting": str(self.setting),
                "start": self.start,
                "seconds": self.trial.seconds,
                "updates": self.trial.done,
                "validation_loss": losses.mean().item(),
                "validation_accuracy": accuracy,
            }
        )

    def go(self, until: float, most: int) -> None:
        """Train until so many seconds of training in all, at least one update, and look."""
        if not self.trial.finite or self.trial.seconds >= until:
            return
        trial, size = self.trial, self.setting.effective_batch_size
        while trial.finite and trial.seconds < until:
            speed = self.setting.images_per_second / size
            if trial.done:
                speed = trial.done / trial.seconds
            trial.train(max(1, round((until - trial.seconds) * speed * 0.9)))
        self.look(most)
        trial.finite &= math.isfinite(self.points[-1]["validation_loss"])

    @property
    def lowest(self) -> float:
        """The lowest validation loss so far."""
        lowest = smooth(pd.DataFrame(self.points))["validation_loss"].min()
        return lowest if math.isfinite(lowest) else math.inf


@dataclass(frozen=True)
class Race:
    """How a race went.

    Attributes:
        winner: The setting that is advised.
        usual: The usual setting.
        points: One row per look at a validation loss: `setting`, `start`, `seconds`, `updates`,
            `validation_loss`, `validation_accuracy`.
        seconds: Of training of the settings that went all the way.
        starts: From which winner and usual setting both trained.
        settings: All that raced, as rows.
    """

    winner: Setting
    usual: Setting
    points: list[dict[str, Any]]
    seconds: float
    starts: int
    settings: list[dict[str, Any]]


def run_race(
    task: Task, recipe: Recipe, device: torch.device, settings: list[Setting], seconds: float
) -> Race:
    """Let the settings race.

    Args:
        task: What they train.
        recipe: The optimizer.
        device: Where.
        settings: Two to four, the usual one among them.
        seconds: Time for all this. Each setting makes `SHORTEST` updates whatever the time.
    """
    usual = next(setting for setting in settings if setting.usual)
    racers = [_Racer(task, recipe, device, setting, 0) for setting in settings]
    begun = time.perf_counter()
    for racer in racers:
        racer.look(MOST_JUDGED)
    look = (time.perf_counter() - begun) / len(racers)
    rounds = max(1, math.ceil(math.log2(len(racers))))
    first, starts = _plan(task, settings, usual, seconds, rounds)
    most = MOST_JUDGED if TURNS * look < JUDGING * first else _fewer(first, look)
    bar = tqdm(desc="race", unit="turn", leave=False, disable=no_progress())

    def turns(those: list[_Racer], begin: float, end: float) -> None:
        for turn in range(1, TURNS + 1):
            for racer in those:
                racer.go(begin + (end - begin) * turn / TURNS, most)
                bar.update()

    running, end = racers, 0.0
    for number in range(rounds):
        begin, end = end, first * 2**number
        turns(running, begin, end)
        running = sorted(running, key=lambda racer: racer.lowest)[: math.ceil(len(running) / 2)]
    of_usual = next(racer for racer in racers if racer.setting.usual)
    turns([of_usual], of_usual.trial.seconds, end)
    winner = min(running[0], of_usual, key=lambda racer: racer.lowest).setting
    rival = usual if winner != usual else _second(racers, usual)
    pairs = [(winner, rival)]
    for start in range(1, starts):
        pair = [_Racer(task, recipe, device, setting, start) for setting in pairs[0]]
        for racer in pair:
            racer.look(most)
        turns(pair, 0.0, end)
        racers += pair
    bar.close()
    winner = _better(task, racers, winner, rival)
    points = [point for racer in racers for point in racer.points]
    rows = [asdict(setting) | {"setting": str(setting)} for setting in settings]
    return Race(winner, usual, points, end, starts, rows)


def _plan(
    task: Task, settings: list[Setting], usual: Setting, seconds: float, rounds: int
) -> tuple[float, int]:
    """Seconds of the first round for each setting, and the number of starts."""
    slowest = max(each.effective_batch_size / each.images_per_second for each in settings)
    end, epoch = 2 ** (rounds - 1), task.train.number / usual.images_per_second
    for starts in (3, 2, 1):
        turns = len(settings) + rounds + end / 2 + 2 * end * (starts - 1)
        first = min(seconds * (1 - JUDGING) / turns, EPOCHS * epoch / end)
        if first * end >= ENOUGH * epoch:
            break
    return max(first, SHORTEST * slowest), starts


def _fewer(first: float, look: float) -> int:
    """Validation examples that can be judged in the time for it."""
    return max(100, int(MOST_JUDGED * JUDGING * first / (TURNS * look)))


def _second(racers: list[_Racer], usual: Setting) -> Setting:
    others = [racer for racer in racers if racer.setting != usual]
    return min(others, key=lambda racer: racer.lowest).setting if others else usual


def _better(task: Task, racers: list[_Racer], winner: Setting, rival: Setting) -> Setting:
    """The one of lower mean loss over the starts that both trained from.

    One that makes fewer than 50 updates per epoch and a fifth of the other's wins only by every
    start of two or more.
    """
    lowest = {(racer.setting, racer.start): racer.lowest for racer in racers}
    starts = [start for setting, start in lowest if setting == rival and (winner, start) in lowest]
    ahead = [lowest[rival, start] - lowest[winner, start] for start in starts]
    few = task.train.number / winner.effective_batch_size < 50
    few &= winner.effective_batch_size > 5 * rival.effective_batch_size
    if few and (len(ahead) < 2 or min(ahead) <= 0):
        return rival
    return winner if sum(ahead) >= 0 else rival


def time_saved(points: pd.DataFrame, winner: str, usual: str) -> tuple[float, float, float]:
    """Share of the usual setting's time that the winner saves, and its 95 % interval.

    In each start the lowest loss that both reach is taken, and when each first reached it; the
    interval is Student's, of the logarithms of the ratios.

    Args:
        points: `Race.points` as a table.
        winner: Name of the setting.
        usual: Name of the other one.

    Returns:
        The geometric mean; its interval, NaN where there is one start or the settings are the same.
    """
    ratios = []
    for _, of_start in points.groupby("start"):
        mine, other = (smooth(of_start[of_start["setting"] == name]) for name in (winner, usual))
        if mine.empty or other.empty:
            continue
        target = max(mine["validation_loss"].min(), other["validation_loss"].min())
        ratios.append(time_to(mine, target) / time_to(other, target))
    if winner == usual:
        return 0.0, math.nan, math.nan
    logs = [math.log(max(ratio, 1e-3)) for ratio in ratios if math.isfinite(ratio)]
    if not logs:
        return math.nan, math.nan, math.nan
    low, high = mean_interval(logs)
    return 1 - math.exp(sum(logs) / len(logs)), 1 - math.exp(high), 1 - math.exp(low)


def smooth(points: pd.DataFrame) -> pd.DataFrame:
    """With the mean loss of each look and the two before, so that no lucky look decides."""
    losses = points["validation_loss"].astype(float).replace(math.inf, math.nan)
    return points.assign(validation_loss=losses.rolling(3, min_periods=1).mean())


def time_to(points: pd.DataFrame, target: float) -> float:
    """Seconds until the lowest loss so far first is `target`, on straight lines between looks."""
    loss = points["validation_loss"].cummin()
    reached = (loss <= target).to_numpy()
    if not reached.any():
        return math.inf
    at = int(reached.argmax())
    seconds = points["seconds"].to_numpy()
    if at == 0:
        return float(seconds[0])
    before, after = loss.iloc[at - 1], loss.iloc[at]
    share = (before - target) / (before - after)
    return float(seconds[at - 1] + share * (seconds[at] - seconds[at - 1]))
