"""The cost of an update and the largest batch, on models whose memory is known."""

import functools
import multiprocessing
import os
import signal
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measured_models import Broken, Hungry, Wide
from torch import nn

from nbutils.errors import InputError
from nbutils.measure import cost, largest_batch, memory
from nbutils.measure.cost import Cost, measure, measure_grid, measure_updates, settings_up_to
from nbutils.measure.largest_batch import TOLERANCE, largest_batch_size
from nbutils.measure.memory import format_memory, parse_memory, resolve_budget
from nbutils.measure.process import OutOfMemory, in_own_process
from nbutils.paths import REFERENCE
from nbutils.studies.reference import load_tables
from nbutils.studies.study import load_study

IMAGES, LABELS = torch.rand(64, 1, 4, 4), torch.arange(64) % 3


def on_cpu(factory, batch_size=1, accumulation_steps=1, **settings):
    settings = {"device": "cpu", "updates": 1} | settings
    return measure(factory, IMAGES, LABELS, batch_size, accumulation_steps, **settings)


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda: torch.empty(2**58), OutOfMemory, "allocate"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), OutOfMemory, "killed"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), InputError, "SIGTERM"),
        (lambda: os._exit(3), InputError, "exit status 3 without a result"),
        (lambda: [][1], InputError, r"IndexError.*test_cost.py, line \d+: .*lambda: \[\]\[1\]"),
    ],
)
def test_each_end_without_a_result_is_its_own_error(work, error, message):
    with pytest.raises(error, match=message):
        in_own_process(work)


def test_the_peak_holds_weights_gradients_and_the_optimizers_state():
    weights = 4 * sum(parameter.numel() for parameter in Wide().parameters())
    adam = on_cpu(Wide).peak_memory
    plain = on_cpu(Wide, optimizer=functools.partial(torch.optim.SGD, lr=0.1)).peak_memory
    # Weights and gradients; Adam has two more numbers per weight, and scratch for a step.
    assert 2 * weights < plain
    assert 4 * weights < adam < 12 * weights
    assert adam - plain > weights


def test_the_peak_follows_the_micro_batch_and_not_the_accumulation():
    cut, large = (on_cpu(Hungry, *s) for s in [(2, 8), (16, 1)])
    assert large.peak_memory > 16 * Hungry.kept
    assert cut.peak_memory < large.peak_memory / 2
    assert (cut.batch_size, cut.accumulation_steps, cut.effective_batch_size) == (2, 8, 16)
    assert cut.images_per_second == pytest.approx(16 / cut.seconds_per_update)
    assert cut.device == "cpu"


def test_the_peak_on_cuda_is_what_is_reserved_beyond_what_was_before(monkeypatch):
    """On stand-ins: no GPU is needed, and none was used."""
    done = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 100)
    device = torch.device("cuda:0")
    assert (memory.begin_peak(device), memory.peak(device)) == (30, 100)
    assert done == ["emptied", "reset"]


def test_what_a_function_defines_can_be_measured_and_nothing_stays_behind():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    width = 3

    class Local(nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1))

    assert on_cpu(lambda: Local(16, width)).seconds_per_update > 0
    assert torch.rand(3).equal(expected)  # the caller's random numbers
    assert multiprocessing.active_children() == []


def test_lazy_layers_and_losses_of_the_readers_own():
    def losses(model, batch):
        logits, _ = model(batch[0])
        return nn.functional.cross_entropy(logits, batch[1], reduction="none")

    assert on_cpu("measured_models:LazyPair", 2, losses=losses).peak_memory >= 0


def test_any_training_can_be_measured():
    def prepare(device):
        data = torch.rand(5, 4, device=device)

        def start():
            weight = torch.zeros(4, device=device)

            def update(window):
                assert [len(chosen) for chosen in window] in ([3, 3], [2])
                assert all(chosen.max() < 5 for chosen in window)
                weight.add_(sum(data[chosen].sum(0) for chosen in window))

            return update

        return start

    found = measure_updates(prepare, 5, 3, 2, device="cpu", updates=1)
    assert found.effective_batch_size == 6


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: "model", "returned str, not a torch.nn.Module"),
        (Broken, "the loss is nan"),
        (functools.partial(nn.Linear, 17, 3), "RuntimeError: mat1 and mat2"),
        (functools.partial(nn.Linear, 16, threading.Lock()), "cannot be sent to the measuring"),
        ("measured_models", "must read package.module:name"),
        ("measured_models:missing", "has no attribute 'missing'"),
        ("measured_models:__doc__", "must be a function"),
    ],
)
def test_a_bad_factory_is_named_with_its_cause(factory, message):
    with pytest.raises(InputError, match=message):
        on_cpu(factory)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"accumulation_steps": True}, "accumulation_steps = True"),
        ({"updates": 0}, "updates = 0, but it must be a whole number >= 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        on_cpu(Hungry, **settings)


def cost_of(batch_size, steps, peak):
    return Cost(batch_size, steps, batch_size * steps, peak, 1.0, 1.0, "cpu")


def test_a_grid_takes_turns_and_keeps_a_row_where_memory_ran_out(monkeypatch):
    calls = []

    def stand_in(factory, images, labels, batch_size, steps, **_):
        calls.append((batch_size, steps))
        if batch_size == 4:
            raise OutOfMemory("none left")
        return cost_of(batch_size, steps, 100)

    monkeypatch.setattr(cost, "measure", stand_in)
    settings = settings_up_to([2, 4], 4)
    assert settings == [(2, 1), (2, 2), (4, 1)]
    table = measure_grid(Hungry, IMAGES, LABELS, settings, repeats=2, device="cpu")
    assert calls == settings * 2
    assert table["repeat"].tolist() == [0, 0, 0, 1, 1, 1]
    assert table["effective_batch_size"].tolist() == [2, 4, 4] * 2
    lost = table[table["batch_size"] == 4]
    assert lost[["peak_memory", "seconds_per_update"]].isna().all(axis=None)


def test_the_reference_is_of_the_study():
    parameters = load_study("cost").parameters
    table = load_tables(REFERENCE / "cost")["cost"]
    settings = settings_up_to(parameters["batch_sizes"], parameters["images_per_update"])
    measured = table[["batch_size", "accumulation_steps"]].apply(tuple, axis=1)
    assert measured.tolist() == settings * parameters["repeats"]
    assert (table["peak_memory"] > 0).all()


def search(peaks, **settings):
    """`largest_batch_size` on a stand-in that needs `peaks(batch_size)` bytes, None: too many."""

    def stand_in(factory, images, labels, batch_size, steps, **_):
        assert steps > 1  # so that gradients accumulate
        if peaks(batch_size) is None:
            raise OutOfMemory("none left")
        return cost_of(batch_size, steps, peaks(batch_size))

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


@pytest.mark.parametrize(
    ("peaks", "largest", "message"),
    [
        (lambda n: 9_500_000, 9, r"10\.00 MB, of which 10% .* of 1, which needs 9\.50 MB"),
        (lambda n: None, 9, "of 1, which needs more than there is"),
        (lambda n: n, 0, "largest = 0, but it must be a whole number >= 1"),
    ],
)
def test_a_search_that_cannot_end_well_is_refused(peaks, largest, message):
    with pytest.raises(InputError, match=message):
        search(peaks, memory_budget=10**7, largest=largest)


def test_it_respects_a_budget_on_this_machine():
    budget = 24_000_000  # what the allocator keeps varies by some megabytes
    found = largest_batch_size(Hungry, IMAGES, LABELS, memory_budget=budget, device="cpu")
    assert found.peak_memory <= found.limit < budget
    assert 1 <= found.batch_size <= budget // Hungry.kept


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
    assert list(found.tried) == [2, 4, 6, 5]


def test_without_a_budget_it_is_the_free_memory_which_is_less_than_what_is_installed():
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 10**6 < resolve_budget(None, "cpu") <= installed


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 500 * 10**6), ("1.5GiB", 3 * 2**29), (" 2 gb ", 2 * 10**9), ("12B", 12)],
)
def test_a_memory_budget_is_read(text, size):
    assert parse_memory(text) == size
    assert parse_memory(format_memory(size)) == pytest.approx(size, rel=0.006)


@pytest.mark.parametrize("text", ["", "2", "GB", "2 gigs", "-2GB", "0.4B", "1e3MB", "2,5GB"])
def test_a_text_that_is_no_memory_is_named(text):
    with pytest.raises(InputError, match=f"memory {text!r}"):
        parse_memory(text)
