"""The search for the largest micro-batch."""

import multiprocessing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measured_models import Hungry
from torch import nn

from nbutils.errors import InputError
from nbutils.measure import largest_batch
from nbutils.measure.cost import Cost
from nbutils.measure.largest_batch import TOLERANCE, largest_batch_size
from nbutils.measure.process import OutOfMemory

IMAGES, LABELS = torch.rand(64, 1, 4, 4), torch.arange(64) % 3


def search(peaks, **settings):
    """`largest_batch_size` on a stand-in that needs `peaks(batch_size)` bytes, None: too many."""

    def stand_in(factory, images, labels, batch_size, steps, **_):
        assert steps > 1  # so that gradients accumulate
        if peaks(batch_size) is None:
            raise OutOfMemory("none left")
        return Cost(batch_size, steps, batch_size * steps, peaks(batch_size), 1.0, 1.0, "cpu")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(largest_batch, "measure", stand_in)
        return largest_batch_size(Hungry, IMAGES, LABELS, device="cpu", **settings)


@given(
    fixed=st.integers(0, 10**9),
    per_image=st.integers(0, 10**8),
    noise=st.integers(0, 10**6),
    room=st.integers(0, 10**11),
    margin=st.floats(0, 0.9),
    largest=st.integers(1, 5000),
    smallest=st.sampled_from([1, 2]),
)
def test_it_finds_the_largest_that_fits(fixed, per_image, noise, room, margin, largest, smallest):
    def peaks(batch_size):
        if batch_size < smallest <= largest:
            raise InputError("more than 1 value per channel")
        return fixed + per_image * batch_size + (batch_size * 7919 % 13) * noise // 13

    budget = int((peaks(min(smallest, largest)) + room) / (1 - margin)) + 2
    found = search(peaks, memory_budget=budget, margin=margin, largest=largest)
    assert found.tried[found.batch_size] == found.peak_memory == peaks(found.batch_size)
    assert found.peak_memory <= found.limit <= budget * (1 - margin)
    assert max(found.tried) <= largest
    assert len(found.tried) <= 40
    # No larger size was overlooked by more than the tolerance.
    beyond = found.batch_size + max(1, int(found.batch_size * TOLERANCE)) + 1
    if noise == 0 and beyond <= largest:
        assert peaks(beyond) > found.limit


def test_running_out_of_memory_counts_as_not_fitting():
    found = search(lambda n: None if n > 37 else 1000 * n, memory_budget=10**9, largest=1000)
    assert 35 <= found.batch_size <= 37
    assert None in found.tried.values()


def test_a_budget_too_small_for_the_smallest_batch_says_what_it_needs():
    with pytest.raises(InputError, match=r"10\.00 MB, of which 10% .* of 1, which needs 9\.50 MB"):
        search(lambda n: 9_500_000 * n, memory_budget=10**7)
    with pytest.raises(InputError, match="of 1, which needs more than there is"):
        search(lambda n: None, memory_budget=10**7)


@pytest.mark.parametrize("settings", [{"margin": 1.0}, {"margin": -0.1}, {"largest": 0}])
def test_senseless_settings_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        search(lambda n: n, memory_budget=100, **settings)


def test_it_respects_a_budget_on_this_machine():
    budget = 24_000_000
    found = largest_batch_size(Hungry, IMAGES, LABELS, memory_budget=budget, device="cpu")
    assert found.peak_memory <= found.limit < budget
    assert 2 <= found.batch_size <= budget // Hungry.kept
    # A try exceeds the budget by no more than a step of the search.
    assert max(peak for peak in found.tried.values() if peak) < 2.5 * budget
    assert multiprocessing.active_children() == []


def test_batch_norm_is_searched_from_two_images_and_libraries_may_report_the_shortage():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.BatchNorm1d(9))

        def forward(self, images):
            if len(images) > 4:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED in cublasCreate(handle)")
            return self.layers(images)

    found = largest_batch_size(Short, IMAGES, LABELS, memory_budget=10**9, largest=6, device="cpu")
    assert found.batch_size == 4
    assert found.tried[4] is not None
    assert list(found.tried) == [2, 4, 6, 5]
