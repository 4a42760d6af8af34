"""The majority vote of networks, whose predictions, and the labels, are uint8, shape (n,) each."""

from collections.abc import Sequence

import numpy as np
import scipy


def majority_vote(predictions: Sequence[np.ndarray]) -> np.ndarray:
    """The class that most networks give each image; the smallest of those with equal votes."""
    return scipy.stats.mode(np.stack(predictions)).mode


def votes_of(size: int, labels: np.ndarray, predictions: Sequence[np.ndarray]) -> float:
    """The mean accuracy of the votes of each network with the `size - 1` next ones, in a circle."""
    around = [*predictions, *predictions]
    votes = [majority_vote(around[start : start + size]) for start in range(len(predictions))]
    return float(np.mean([vote == labels for vote in votes]))


def networks_wrong(labels: np.ndarray, predictions: Sequence[np.ndarray]) -> np.ndarray:
    """How many of the networks are wrong on each image that their majority gets wrong."""
    wrong = np.sum([each != labels for each in predictions], axis=0)
    return wrong[majority_vote(predictions) != labels]
