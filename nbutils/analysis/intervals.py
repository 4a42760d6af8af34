"""Intervals around what was measured, and what could be told apart. scipy does the mathematics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of independent, roughly normal values, such as seeds'.

    Returns:
        Its lower and upper end; both NaN where one value or none says nothing of the spread.
    """
    from scipy import stats

    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean = sum(values) / n
    half = stats.sem(values) * stats.t.ppf((1 + confidence) / 2, n - 1)
    return mean - half, mean + half


def crossed_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a mean over seeds and images, both samples: for other seeds *and* other images.

    Seeds and images are crossed: every seed's networks answer every image. So the mean has two
    errors: Student's interval of the seeds' means covers one, the normal interval of the images'
    means the other. The two half widths are added in quadrature, which makes the interval rather
    too wide, as what seeds and images do together is in both: Owen (2007), "The pigeonhole
    bootstrap", says so of the sum of their variances. It is never narrower than either.

    Args:
        values: Shape (seeds, images); for a comparison, a difference in each place.
        confidence: Of the interval.

    Returns:
        Its lower and upper end; both NaN where one seed says nothing of the spread.
    """
    from scipy import stats

    low, high = mean_interval(values.mean(axis=1).tolist(), confidence)
    of_images = stats.norm.ppf((1 + confidence) / 2) * _image_error(values)
    half = math.hypot((high - low) / 2, of_images)
    return values.mean() - half, values.mean() + half


def _image_error(values: np.ndarray) -> float:
    """Standard error of the mean of values, shape (seeds, images), as the images are a sample."""
    return values.mean(axis=0).std(ddof=1) / math.sqrt(values.shape[1])


def proportion_interval(fraction: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of the chance behind `fraction`, a share of `n` independent images."""
    from scipy import stats

    interval = stats.binomtest(round(fraction * n), n).proportion_ci(confidence, method="wilson")
    return interval.low, interval.high


def gain_interval(gained: int, lost: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of `gained - lost`, from two networks' answers to the same images.

    Only images that one of the two gets right count. If the networks are equally good, each such
    image falls to either with chance 1/2: McNemar's test. The interval is the exact (Clopper and
    Pearson) one of that chance, times the number of such images; it leaves out 0 just where the
    exact test rejects.

    Args:
        gained: Images that only the second network gets right.
        lost: Images that only the first does.
        confidence: Of the interval.
    """
    from scipy import stats

    disagreements = gained + lost
    if disagreements == 0:
        return 0.0, 0.0
    interval = stats.binomtest(gained, disagreements).proportion_ci(confidence, method="exact")
    return (2 * interval.low - 1) * disagreements, (2 * interval.high - 1) * disagreements


def detectable_gain(disagreements: int, power: float = 0.8, confidence: float = 0.95) -> float:
    """Images that one of two networks must be ahead by to be told apart with chance `power`.

    Args:
        disagreements: Images that only one of the two gets right.
        power: Chance to find a true lead of that size.
        confidence: Of the two-sided test.

    Returns:
        The lead in images, by the normal approximation of McNemar's test.
    """
    from scipy import stats

    quantiles = stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power)
    return float(quantiles * math.sqrt(disagreements))


def chance_of_lead(won: int, lost: int, images: int, part: int, lead: int) -> float:
    """Chance that one network leads another by `lead` images or more on a random part.

    Args:
        won: Images of all that only this network gets right.
        lost: Images of all that only the other does.
        images: All images.
        part: How many of them are drawn, without putting back.
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


def detectable_difference(
    differences: np.ndarray, power: float = 0.8, confidence: float = 0.95
) -> float:
    """True mean that so many seeds and images, spread as these, reveal with chance `power`.

    Args:
        differences: Of one setting less another, shape (seeds, images), two seeds or more.
        power: Chance that the interval of the mean leaves out zero, above 1/2.
        confidence: Of that interval, `crossed_interval`'s.

    Returns:
        Its size: what the seeds' part of the interval alone would reveal, by the noncentral t
        distribution, and what the images' part would, added in quadrature.
    """
    from scipy import optimize, stats

    n = len(differences)
    quantile = (1 + confidence) / 2
    threshold = stats.t.ppf(quantile, n - 1)

    # That a mean above zero is found below it has a chance too small to count.
    shift = optimize.brentq(
        lambda shift: stats.nct.sf(threshold, n - 1, shift) - power, 0, 3 * threshold
    )
    of_seeds = shift * stats.sem(differences.mean(axis=1))
    of_images = (stats.norm.ppf(quantile) + stats.norm.ppf(power)) * _image_error(differences)
    return math.hypot(of_seeds, of_images)
