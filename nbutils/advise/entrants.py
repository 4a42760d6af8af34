"""Who races: the settings that the measurements promise most of, and the usual one.

By McCandlish et al. (2018), section 2.3, B examples per update need `1 + B / B_crit` times the
fewest examples to get equally far, each batch size at its best rate; they expect `B_crit` to be
near the noise scale. A device processes a number of examples per second at each size. So the time
that a size needs is, up to a factor,

    (1 + B / noise scale) / examples per second

The smallest size within `NEAR` of the least time races, another size far from it, and the usual
setting: 128 at the optimizer's usual rate, or the nearest that fits.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from nbutils.advise.costs import USUAL
from nbutils.advise.race import Setting
from nbutils.advise.trials import Recipe

NEAR = 1.1
"""Times up to this factor of the least count as equal: measured times differ by about as much."""

ASSUMED = 128
"""The noise scale that is assumed where it was not measured."""

SUPPORTED = 1024
"""Larger updates race only where the noise scale is at least as large."""


def relative_time(costs: pd.DataFrame, noise_scale: float) -> pd.Series:
    """Time to get equally far at each setting of `costs`, the least being 1.

    Args:
        costs: With `effective_batch_size` and `images_per_second`.
        noise_scale: In examples; where it is NaN, `ASSUMED` takes its place.
    """
    scale = ASSUMED if math.isnan(noise_scale) else max(noise_scale, 1e-9)
    times = (1 + costs["effective_batch_size"] / scale) / costs["images_per_second"]
    return times / times.min()


def open_to_choice(costs: pd.DataFrame, noise_scale: float, accumulate: bool) -> pd.DataFrame:
    """The settings that may race: accumulated ones where that many examples do not fit at once."""
    whole = costs["accumulation_steps"] == 1
    too_large = costs["effective_batch_size"] > costs.loc[whole, "batch_size"].max()
    most = SUPPORTED if math.isnan(noise_scale) else max(SUPPORTED, noise_scale)
    allowed = (whole | (too_large & accumulate)) & (costs["effective_batch_size"] <= most)
    return costs[allowed].sort_values("effective_batch_size")


def choose(costs: pd.DataFrame, noise_scale: float, accumulate: bool) -> dict[str, Any]:
    """The smallest setting of near the least time, as a row of `costs`.

    Args:
        costs: From `trial_costs`.
        noise_scale: As for `relative_time`.
        accumulate: Whether more examples than fit as one micro-batch are open to choice.
    """
    candidates = open_to_choice(costs, noise_scale, accumulate)
    near = candidates[relative_time(candidates, noise_scale) <= NEAR]
    return _first(near)


def usual_row(costs: pd.DataFrame) -> dict[str, Any]:
    """The row of the batch size nearest to the usual one."""
    whole = costs[costs["accumulation_steps"] == 1]
    distance = whole["batch_size"].map(lambda size: abs(math.log(size / USUAL)))
    return _first(whole[distance == distance.min()])


def _first(table: pd.DataFrame) -> dict[str, Any]:
    return {str(name): value for name, value in table.to_dict("records")[0].items()}


def entrants(
    costs: pd.DataFrame,
    noise_scale: float,
    rates: pd.DataFrame,
    recipe: Recipe,
    accumulate: bool,
    bounded: bool,
) -> list[Setting]:
    """Who races, two to four settings.

    The usual setting; the size of the least time by the formula, at the best and the next best of
    the rates tried; and another size, at least four times larger or smaller, at the lower of those
    rates scaled by the square root of the size: rates that win short trials tend to be too high for
    longer ones. Where memory is the limit, that other size is an accumulated one, so that the race
    tells what accumulation is worth.

    Args:
        costs: From `trial_costs`.
        noise_scale: As for `relative_time`.
        rates: From `trial_rates`, at the size that `choose` picks.
        recipe: The optimizer.
        accumulate: As for `choose`.
        bounded: Whether memory is the limit.
    """
    first, usual = choose(costs, noise_scale, accumulate), usual_row(costs)
    learnt = rates[rates["outcome"] == "learnt"].sort_values("validation_loss")
    usually = recipe.rates.index(recipe.usual_rate)
    best = [*learnt["learning_rate"]]
    best += [rate for rate in recipe.rates[usually : usually + 2] if rate not in best]

    def scaled(row: dict[str, Any]) -> float:
        factor = math.sqrt(row["effective_batch_size"] / first["effective_batch_size"])
        return float(f"{min(best[:2]) * factor:.2g}")

    candidates = open_to_choice(costs, noise_scale, accumulate)
    candidates = candidates.assign(time=relative_time(candidates, noise_scale))
    apart = (candidates["effective_batch_size"] / first["effective_batch_size"]).map(math.log)
    others = candidates[apart.abs() >= math.log(4) - 1e-9]
    accumulated = candidates[candidates["accumulation_steps"] > 1]
    if bounded and len(accumulated) and first["accumulation_steps"] == 1:
        others = accumulated
    wanted = [(usual, recipe.usual_rate), (first, best[0])]
    if len(others):
        other = _first(others.sort_values("time"))
        wanted.append((other, scaled(other)))
    wanted += [(first, rate) for rate in best[1:2]] + [(usual, scaled(usual))]
    settings: dict[tuple[Any, ...], Setting] = {}
    for row, rate in wanted:
        sizes = int(row["batch_size"]), int(row["accumulation_steps"])
        setting = Setting(*sizes, rate, row["images_per_second"], not settings)
        settings.setdefault((*sizes, rate), setting)
    return list(settings.values())[:4]
