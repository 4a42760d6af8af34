"""95 % intervals around measured values."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pandas as pd
import scipy  # it imports its parts, which takes up to a second, on their first use

POWER = 0.8  # the probability with which an effect of the minimum detectable size is found
NORMAL = NormalDist().inv_cdf(0.975)


def student_quantile(freedom: int) -> float:
    """Half of Student's interval of that many degrees of freedom, in standard errors."""
    return float(scipy.special.stdtrit(freedom, 0.975))


def mean_interval(values: Sequence[float] | np.ndarray | pd.Series) -> tuple[float, float]:
    """Student's interval of the mean over the first axis, one value per seed; NaN for one seed."""
    if len(values) < 2:
        return math.nan, math.nan
    array = np.asarray(values, float)
    error = array.std(axis=0, ddof=1) / math.sqrt(len(array))
    mean, half = array.mean(axis=0), error * student_quantile(len(array) - 1)
    return mean - half, mean + half


def crossed_interval(
    values: np.ndarray, outcomes: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Ends of the interval of a mean for other seeds *and* other images; minimum detectable effect.

    `values`, shape (seeds, images), have two crossed random effects. The variance of their mean is
    `MS_seed / (S I)`, which contains the residual, plus `(MS_image - MS_residual) / (S I)`, each
    with its own half-width (Student's, normal), added in quadrature. Source: Searle, Casella,
    McCulloch (1992), "Variance Components", chapter 4. `outcomes`, shape (seeds,), replace the
    means of `values` over images. Such intervals exclude zero with probability `POWER` if the true
    mean is the minimum detectable effect. One seed: NaN.
    """
    seeds, images = values.shape
    if seeds < 2:
        return math.nan, math.nan, math.nan
    means = values.mean(axis=1) if outcomes is None else outcomes
    centred = values - values.mean(axis=1, keepdims=True)
    image_square = seeds * centred.mean(axis=0).var(ddof=1)
    residual_square = centred.var(axis=0, ddof=1).sum() / (images - 1)
    image_error = math.sqrt(max(image_square - residual_square, 0.0) / (seeds * images))
    seed_error, threshold = means.std(ddof=1) / math.sqrt(seeds), student_quantile(seeds - 1)
    half = math.hypot(threshold * seed_error, NORMAL * image_error)
    of_seeds = scipy.special.nctdtrinc(seeds - 1, 1 - POWER, threshold) * seed_error
    detectable = math.hypot(of_seeds, (NORMAL + NormalDist().inv_cdf(POWER)) * image_error)
    return means.mean() - half, means.mean() + half, detectable


def proportion_interval(fraction: float, n: int) -> tuple[float, float]:
    """Wilson's interval of the probability behind `fraction`, a share of `n` independent images."""
    found = scipy.stats.binomtest(round(fraction * n), n).proportion_ci(method="wilson")
    return found.low, found.high


def probability_of_lead(won: int, lost: int, images: int, part: int, lead: int) -> float:
    """Probability of a lead of `lead` images or more on `part` random ones of all `images`.

    Of these only the one network gets `won` right, and only the other `lost`.
    """
    if won + lost == 0:
        return float(lead <= 0)
    drawn = np.arange(won + lost + 1)
    # Of the drawn disagreements w are won: the lead is 2 w - drawn.
    fewest = np.ceil((lead + drawn) / 2)
    leads = scipy.stats.hypergeom.sf(fewest - 1, won + lost, won, drawn)
    return float(scipy.stats.hypergeom.pmf(drawn, images, won + lost, part) @ leads)
