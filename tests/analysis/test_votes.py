"""The vote of several networks, against hand-made answers."""

import numpy as np
import pytest

from nbutils import InputError
from nbutils.analysis.votes import majority_vote, networks_wrong, score_vote, votes_of


def test_networks_vote():
    votes = [np.array(v, dtype=np.uint8) for v in ([1, 7, 9], [1, 7, 3], [2, 8, 5])]
    assert majority_vote(votes).tolist() == [1, 7, 3]
    assert majority_vote(votes).dtype == np.uint8


def test_a_vote_is_scored_beside_the_networks_that_cast_it():
    labels = np.arange(100, dtype=np.uint8) % 10
    predictions = [labels.copy() for _ in range(3)]
    for number, each in enumerate(predictions):
        each[number : 10 * (number + 1) : 10] = 11  # 1, 2 and 3 errors, each network's own
    score = score_vote(labels, predictions)
    assert score.alone == [0.99, 0.98, 0.97]
    assert (score.together, score.images) == (1.0, 100)
    both = [predictions[2], predictions[2], predictions[0]]
    assert score_vote(labels, both).together == 0.97


def test_no_votes_are_refused():
    with pytest.raises(InputError, match="at least one network"):
        score_vote(np.zeros(3, np.uint8), [])


def test_the_vote_of_fewer_networks_counts_each_alike():
    labels = np.zeros(10, np.uint8)
    predictions = [np.where(np.arange(10) < wrong, 1, 0).astype(np.uint8) for wrong in (0, 2, 4)]
    # Of two networks that disagree the smaller class wins, here the right one.
    assert votes_of(1, labels, predictions) == pytest.approx((1.0 + 0.8 + 0.6) / 3)
    assert votes_of(2, labels, predictions) == pytest.approx((1.0 + 0.8 + 1.0) / 3)
    assert votes_of(3, labels, predictions) == pytest.approx(0.8)
    for size in (0, 4):
        with pytest.raises(InputError, match=f"size must be in 1 to 3, got {size}"):
            votes_of(size, labels, predictions)


def test_networks_that_miss_what_the_vote_misses_are_counted():
    labels = np.array([5, 5, 5, 5], np.uint8)
    predictions = [np.array(p, np.uint8) for p in ([5, 5, 4, 7], [5, 3, 4, 8], [5, 5, 5, 5])]
    # The last image gets a vote for each of 5, 7 and 8, of which the smallest is right.
    assert networks_wrong(labels, predictions).tolist() == [2]
    assert networks_wrong(np.array([0, 5, 4, 7], np.uint8), predictions).tolist() == [3, 2]
