"""The race that decides: a few settings train from one start for equal time.

**Who races.** By McCandlish et al. (2018), section 2.3, B examples per update need `1 + B / B_crit`
times the fewest examples to get equally far, each batch size at its best rate; they expect `B_crit`
to be near the noise scale. So the time that a size needs is, up to a factor, `(1 + B / noise scale)
/ examples per second`. Of the sizes within `NEAR` of the least time, the one nearest to the usual
size races, since very small batches are delicate in their rate and in batch norm; and another size
far from it, and the usual setting: 128 at the optimizer's usual rate, or the nearest that fits.

**How.** Successive halving: after each round the worse half stops, the rest goes on for as long
again. The lowest validation loss so far judges, smoothed over three looks. Turns are short and
taken in rotation, so that other work on the machine slows all alike; time spent on judging does not
count. Then the winner meets the usual setting from further starts, where there is time.

Source of the halving: Jamieson and Talwalkar (2016), "Non-stochastic best arm identification".
"""

import math
from collections.abc import Sequence
from operator import attrgetter
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from nbutils.advise.measurements import FEWEST_JUDGED, MOST_JUDGED, SHORTEST, USUAL
from nbutils.advise.task import Recipe, Task
from nbutils.advise.trials import Setting, Trial, smooth
from nbutils.analysis.intervals import mean_interval
from nbutils.errors import InputError
from nbutils.machine import no_progress

NEAR = 1.1  # times up to this factor of the least count as equal: they are measured no better
ASSUMED = 128  # the noise scale where it was not measured
SUPPORTED = 1024  # larger updates race only where the noise scale is at least as large
TURNS = 6  # of each setting in the first round, each followed by a look at the validation loss
JUDGING = 0.25  # the share of the time that judging may take
EPOCHS = 30  # of the usual setting at most: what more time tells is left to the reader's training
ENOUGH = 10  # epochs of the usual setting; more of them are worth less than further starts


def relative_time(costs: pd.DataFrame, noise_scale: float) -> pd.Series:
    """Time to get equally far at each setting of `costs`; `ASSUMED` is for a NaN noise scale."""
    scale = ASSUMED if math.isnan(noise_scale) else max(noise_scale, 1e-9)
    return (1 + costs["effective_batch_size"] / scale) / costs["images_per_second"]


def candidates(costs: pd.DataFrame, noise_scale: float, accumulate: bool) -> pd.DataFrame:
    """The settings that may race, by size, with `time`, the least being 1.

    Those that accumulate are among them where that many examples do not fit at once.
    """
    whole = costs["accumulation_steps"] == 1
    too_large = costs["effective_batch_size"] > costs.loc[whole, "batch_size"].max()
    most = SUPPORTED if math.isnan(noise_scale) else max(SUPPORTED, noise_scale)
    allowed = costs[(whole | (too_large & accumulate)) & (costs["effective_batch_size"] <= most)]
    times = relative_time(allowed, noise_scale)
    return allowed.assign(time=times / times.min()).sort_values("effective_batch_size")


def choose(open_to_choice: pd.DataFrame) -> Any:
    """Of the `candidates` near the least time, the one nearest to the usual size."""
    return nearest_usual(open_to_choice[open_to_choice["time"] <= NEAR])


def nearest_usual(costs: pd.DataFrame) -> Any:
    """The row of the size nearest to the usual one, as a named tuple."""
    nearest = np.log(costs["effective_batch_size"] / USUAL).abs().idxmin()
    return next(costs.loc[[nearest]].itertuples())


def entrants(
    open_to_choice: pd.DataFrame, usual: Any, rates: pd.DataFrame, recipe: Recipe, bounded: bool
) -> list[Setting]:
    """Who races: two to four settings, the usual one first.

    The size that `choose` picks races at the best of the `trial_rates` and at the next lower one,
    since rates that win short trials tend to be too high for longer ones. Another size, at least
    four times larger or smaller, races at the best (if smaller) or lower rate times the square root
    of the size; where memory is the limit (`bounded`), it is an accumulated one.
    """
    first, sizes = choose(open_to_choice), open_to_choice["effective_batch_size"]
    learnt = rates[rates["outcome"] == "learnt"].sort_values("validation_loss")
    best = [*learnt["learning_rate"], recipe.usual_rate][0]
    lower = max([rate for rate in recipe.rates if rate < best], default=best)

    def scaled(row: Any) -> float:
        times = row.effective_batch_size / first.effective_batch_size
        return float(f"{(best if times < 1 else lower) * math.sqrt(times):.2g}")

    others = open_to_choice[np.log2(sizes / first.effective_batch_size).abs() >= 2]
    accumulated = open_to_choice[open_to_choice["accumulation_steps"] > 1]
    if bounded and len(accumulated) and first.accumulation_steps == 1:
        others = accumulated
    wanted = [(usual, recipe.usual_rate), (first, best)]
    wanted += [(row, scaled(row)) for row in others.sort_values("time").head(1).itertuples()]
    wanted += [(first, lower), (usual, scaled(usual))]
    settings = [Setting(row.batch_size, row.accumulation_steps, rate) for row, rate in wanted]
    return list(dict.fromkeys(settings))[:4]


def run_race(task: Task, settings: list[Setting], seconds: float) -> tuple[Setting, pd.DataFrame]:
    """Let the settings of `entrants` race, for `SHORTEST` updates each whatever the time.

    Returns the winner, and a row per look: `setting`, `start`, `seconds` of training, `updates`,
    `validation_loss`.
    """
    racers, begun = [Trial(task, setting) for setting in settings], perf_counter()
    for racer in racers:
        racer.look(MOST_JUDGED)
    if not any(racer.finite for racer in racers):
        raise InputError(
            f"dataset = {task.data.name}: the loss of its validation examples is not finite even "
            f"before training; look for values that are missing or not finite"
        )
    look = (perf_counter() - begun) / len(racers)
    for racer in racers:
        racer.train(SHORTEST // 2)
    rounds = math.ceil(math.log2(len(racers)))
    first, starts = _plan(racers, seconds, rounds)
    judged = int(MOST_JUDGED * JUDGING * first / (TURNS * look))
    most = min(max(judged, FEWEST_JUDGED), MOST_JUDGED)
    bar = tqdm(desc="race", unit="turn", leave=False, disable=no_progress())

    def turns(running: Sequence[Trial], begin: float, end: float) -> None:
        for turn in range(1, TURNS + 1):
            for racer in running:
                racer.go(begin + (end - begin) * turn / TURNS, most)
                bar.update()

    running, end, usual, lowest = racers, 0.0, racers[0], attrgetter("lowest")
    for number in range(rounds):
        begin, end = end, first * 2**number
        turns(running, begin, end)
        running = sorted(running, key=lowest)[: math.ceil(len(running) / 2)]
    turns([usual], usual.seconds, end)
    best = min(running[0], usual, key=lowest)
    rival = min(racers[1:], key=lowest) if best is usual else usual
    duels = [(best, rival)]
    for start in range(1, starts):
        pair = Trial(task, best.setting, start), Trial(task, rival.setting, start)
        for racer in pair:
            racer.look(most)
        turns(pair, 0.0, end)
        duels.append(pair)
        racers += pair
    bar.close()
    points = [point for racer in racers for point in racer.points]
    return _better(duels), pd.DataFrame(points)


def _plan(racers: list[Trial], seconds: float, rounds: int) -> tuple[float, int]:
    """Seconds of the first round for each setting, and the number of starts."""
    per_update = [racer.seconds / racer.updates for racer in racers]
    number = racers[0].task.data.train.number
    epoch = per_update[0] * number / racers[0].setting.effective_batch_size
    end = 2 ** (rounds - 1)
    for starts in (3, 2, 1):
        turns = len(racers) + rounds + end / 2 + 2 * end * (starts - 1)
        first = min(seconds * (1 - JUDGING) / turns, EPOCHS * epoch / end)
        if first * end >= ENOUGH * epoch:
            break
    return max(first, SHORTEST * max(per_update)), starts


def _better(duels: list[tuple[Trial, Trial]]) -> Setting:
    """The winner or its rival, whichever has the lower mean loss over their starts.

    One that makes fewer updates than the other, and fewer than 50 per epoch or than a fifth of the
    other's, wins only by every start of two or more.
    """
    (winner, rival), number = (
        (trial.setting for trial in duels[0]),
        duels[0][0].task.data.train.number,
    )
    ahead = [rival.lowest - winner.lowest for winner, rival in duels]
    times = winner.effective_batch_size / rival.effective_batch_size
    few = times > 1 and (number / winner.effective_batch_size < 50 or times > 5)
    if few and (len(ahead) < 2 or min(ahead) <= 0):
        return rival
    return winner if sum(ahead) >= 0 else rival


def time_saved(points: pd.DataFrame, winner: str, usual: str) -> tuple[float, float, float]:
    """Share of the usual setting's time that the winner saves, and its 95 % interval.

    In each start the lowest loss that both reach is taken, and when each first reached it. The
    share is a geometric mean, NaN if one did not learn; the interval is Student's, of logarithms,
    NaN where there is one start or the settings are the same.
    """
    if winner == usual:
        return 0.0, math.nan, math.nan
    logs = []
    for _, of_start in points.groupby("start"):
        both = [smooth(of_start[of_start["setting"] == name]) for name in (winner, usual)]
        target = max(each["validation_loss"].min() for each in both)
        mine, other = (time_to(each, target) for each in both)
        if 0 < min(mine, other) <= max(mine, other) < math.inf:  # else one did not learn or start
            logs.append(math.log(mine / other))
    mean, (low, high) = np.mean(logs) if logs else math.nan, mean_interval(logs)
    return 1 - math.exp(mean), 1 - math.exp(high), 1 - math.exp(low)


def time_to(points: pd.DataFrame, target: float) -> float:
    """Seconds until the lowest loss so far first is `target`, on straight lines between looks."""
    loss = points["validation_loss"].cummin().dropna().drop_duplicates()
    if not loss.min() <= target:
        return math.inf
    return float(np.interp(-target, -loss, points["seconds"][loss.index]))
