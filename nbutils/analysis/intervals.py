"""Intervals around measured values, and how large a difference they could have shown.

scipy does the mathematics; it is imported only where it is used, since it takes a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of independent, roughly normal values, one per seed.

    Returns:
        Its lower and upper end; both NaN for fewer than two values, which show no spread.
    """
    if len(values) < 2:
        return math.nan, math.nan
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = error * student_quantile(len(values) - 1, confidence)
    return mean - half, mean + half


@lru_cache
def student_quantile(freedom: int, confidence: float = 0.95) -> float:
    """Half of Student's interval of that many degrees of freedom, in standard errors."""
    from scipy import stats

    return float(stats.t.ppf((1 + confidence) / 2, freedom))


def crossed_interval(
    values: np.ndarray, outcomes: np.ndarray | None = None, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of a mean over seeds and images: for other seeds *and* other images.

    Seeds and images are crossed: the network of each seed answers every image. In the analysis of
    variance of two crossed random effects, the mean has variance `MS_seed / (S I)` from the S
    seeds, which already contains the residual, plus `(MS_image - MS_residual) / (S I)` from the I
    images. Student's half-width of the first part (S - 1 degrees of freedom) and the normal one of
    the second are added in quadrature, so the residual counts once.

    Source: Searle, Casella, McCulloch (1992), "Variance Components", chapter 4.

    Args:
        values: Shape (seeds, images); for a comparison, a difference in each place.
        outcomes: Shape (seeds,): the outcome of each seed, where it is known more precisely than
            as a mean of its `values`. The mean and the part of the seeds then come from these,
            the part of the images from `values`.
        confidence: Of the interval.

    Returns:
        Its lower and upper end; both NaN for fewer than two seeds.
    """
    means = values.mean(axis=1) if outcomes is None else outcomes
    low, high = mean_interval(means.tolist(), confidence)
    of_images = NormalDist().inv_cdf((1 + confidence) / 2) * _image_error(values)
    half = math.hypot((high - low) / 2, of_images)
    return float(means.mean() - half), float(means.mean() + half)


def minimum_detectable_effect(
    values: np.ndarray,
    outcomes: np.ndarray | None = None,
    power: float = 0.8,
    confidence: float = 0.95,
) -> float:
    """The true mean that as many seeds and images, with the same spread, reveal with `power`.

    Args:
        values: As in `crossed_interval`.
        outcomes: As in `crossed_interval`.
        power: Probability that `crossed_interval` leaves out zero, above 1/2.
        confidence: Of that interval.

    Returns:
        Its size: what the part of the seeds alone would reveal, by the noncentral t distribution,
        and what that of the images would, added in quadrature. NaN for fewer than two seeds.
    """
    means = values.mean(axis=1) if outcomes is None else outcomes
    if len(means) < 2:
        return math.nan
    error = float(means.std(ddof=1)) / math.sqrt(len(means))
    of_seeds = _detectable_shift(len(means), power, confidence) * error
    quantiles = NormalDist().inv_cdf((1 + confidence) / 2) + NormalDist().inv_cdf(power)
    return math.hypot(of_seeds, quantiles * _image_error(values))


@lru_cache
def _detectable_shift(n: int, power: float, confidence: float) -> float:
    """The mean of n values, in standard errors, that Student's test finds with `power`."""
    from scipy import optimize, stats

    threshold = student_quantile(n - 1, confidence)
    # The probability to find a mean above zero below it is too small to count.
    return optimize.brentq(
        lambda shift: stats.nct.sf(threshold, n - 1, shift) - power, 0, 3 * threshold
    )


def _image_error(values: np.ndarray) -> float:
    """Standard error of the mean of `values`, shape (seeds, images), from the images alone."""
    seeds, images = values.shape
    if seeds < 2:
        return math.nan
    of_seeds, of_images = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    residuals = values - of_seeds - of_images + values.mean()
    image_square = seeds * float(of_images.var(ddof=1))
    residual_square = float((residuals**2).sum()) / ((seeds - 1) * (images - 1))
    return math.sqrt(max(image_square - residual_square, 0.0) / (seeds * images))


@lru_cache
def proportion_interval(fraction: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of the probability behind `fraction`, a share of `n` independent images."""
    from scipy import stats

    interval = stats.binomtest(round(fraction * n), n).proportion_ci(confidence, method="wilson")
    return interval.low, interval.high


def probability_of_lead(won: int, lost: int, images: int, part: int, lead: int) -> float:
    """Probability that one network leads another by `lead` images or more on a random part.

    Args:
        won: Images of all that only this network gets right.
        lost: Images of all that only the other does.
        images: Number of all images.
        part: How many of them are drawn, without replacement.
        lead: In images.
    """
    from scipy import stats

    if won + lost == 0:
        return float(lead <= 0)
    disagreements = np.arange(won + lost + 1)
    drawn = stats.hypergeom.pmf(disagreements, images, won + lost, part)
    # Of k drawn disagreements w are won: the lead is 2 w - k.
    fewest = np.ceil((lead + disagreements) / 2)
    return float(drawn @ stats.hypergeom.sf(fewest - 1, won + lost, won, disagreements))
