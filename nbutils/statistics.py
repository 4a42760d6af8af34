"""Intervals around what was measured. scipy does the mathematics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of independent, roughly normal values, such as seeds'.

    Returns:
        Its lower and upper end; both NaN where one value or none says nothing of the spread.
    """
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean = sum(values) / n
    half = stats.sem(values) * stats.t.ppf((1 + confidence) / 2, n - 1)
    return mean - half, mean + half


def proportion_interval(fraction: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of the chance behind `fraction`, a share of `n` independent images."""
    interval = stats.binomtest(round(fraction * n), n).proportion_ci(confidence, method="wilson")
    return interval.low, interval.high
