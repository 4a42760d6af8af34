"""The cost of an update, on models whose memory is known, and the search for the largest batch."""

import functools
import multiprocessing
import os
import pickle
import signal
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nbutils import cost
from nbutils.errors import InputError
from nbutils.measure.cost import (
    Cost,
    OutOfMemory,
    format_memory,
    largest_batch_size,
    measure,
    measure_grid,
    parse_memory,
    settings_up_to,
)
from nbutils.paths import REFERENCE
from nbutils.studies.reference import load_tables
from nbutils.studies.study import load_study

MEGABYTE = 10**6
IMAGES, LABELS = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
WEIGHTS = 2_000_000  # of `Wide`, in numbers


class Wide(nn.Module):
    """Many weights, few activations: 8 MB of weights."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, WEIGHTS // 32)
        self.outer = nn.Linear(WEIGHTS // 32, 3, bias=False)

    def forward(self, images):
        return self.outer(self.inner(images.flatten(1)))


class Hungry(nn.Module):
    """Keeps 1 MiB of activations an image for its backward pass."""

    kept = 2**20

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, images):
        logits = self.linear(images.flatten(1))
        return logits * logits[:, :1].expand(-1, self.kept // 4).exp().mean(1, keepdim=True)


class Killed(nn.Linear):
    """Dies when it is used."""

    def __init__(self, number=signal.SIGKILL):
        super().__init__(16, 3)
        self.number = number

    def forward(self, images):
        os.kill(os.getpid(), self.number)


class Bottomless(nn.Linear):
    """Asks for more memory than any machine has."""

    def __init__(self):
        super().__init__(16, 3)

    def forward(self, images):
        return torch.empty(2**58)


class Broken(nn.Linear):
    """Its outputs are not numbers."""

    def __init__(self):
        super().__init__(16, 3)

    def forward(self, images):
        return super().forward(images.flatten(1)) * torch.nan


def not_a_model():
    return "model"


def on_cpu(factory, batch_size=1, accumulation_steps=1, **settings):
    return measure(
        factory, IMAGES, LABELS, batch_size, accumulation_steps, device="cpu", **settings
    )


def test_the_peak_holds_weights_gradients_and_the_optimizers_state():
    weights = 4 * sum(parameter.numel() for parameter in Wide().parameters())
    adam = on_cpu(Wide, updates=1).peak_memory
    plain = on_cpu(Wide, optimizer=functools.partial(torch.optim.SGD, lr=0.1), updates=1)
    # Weights and gradients; Adam has two numbers more a weight, and scratch for a step.
    assert 2 * weights < plain.peak_memory
    assert 4 * weights < adam < 12 * weights
    assert adam - plain.peak_memory > weights


def test_the_peak_follows_the_micro_batch_and_not_the_accumulation():
    small, cut, large = (
        on_cpu(Hungry, *s, updates=1).peak_memory for s in [(2, 1), (2, 8), (16, 1)]
    )
    assert large > 16 * Hungry.kept
    # An allocator's holes are some images large, so `cut` and `small` are not held to each other.
    assert small < large / 2
    assert cut < large / 2


def test_a_cost_has_its_times():
    result = on_cpu(Hungry, 2, 3, updates=1)
    assert (result.batch_size, result.accumulation_steps, result.effective_batch_size) == (2, 3, 6)
    assert result.images_per_second == pytest.approx(6 / result.seconds_per_update)
    assert result.seconds_per_update > 0
    assert result.device == "cpu"


def test_a_factory_may_be_named_and_nothing_stays_behind():
    on_cpu("test_cost:Hungry", updates=1)
    assert multiprocessing.active_children() == []


def test_the_measured_process_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    on_cpu(Hungry, updates=1)
    assert torch.rand(3).equal(expected)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (not_a_model, "returned str, not a torch.nn.Module"),
        (Broken, "the loss is nan"),
        (functools.partial(nn.Linear, 17, 3), "RuntimeError"),
        (lambda: Hungry(), "factory = .* must be a function or class at the top of a module"),
        ("test_cost", "must read package.module:name"),
        ("test_cost:missing", "has no attribute 'missing'"),
        ("no_such_module:model", "No module named 'no_such_module'"),
        ("test_cost:MEGABYTE", "must be callable"),
    ],
)
def test_a_bad_factory_is_named_with_its_cause(factory, message):
    with pytest.raises(InputError, match=message):
        on_cpu(factory)


def test_what_a_notebook_defines_is_refused_before_a_process_starts(monkeypatch):
    def model():
        return Hungry()

    model.__module__, model.__qualname__ = "__main__", "model"
    monkeypatch.setattr(sys.modules["__main__"], "model", model, raising=False)
    with pytest.raises(InputError, match="defined in a notebook or script"):
        on_cpu(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 1, "accumulation_steps": True}, "accumulation_steps = True"),
        ({"batch_size": 1, "updates": 1.5}, "updates = 1.5"),
        ({"batch_size": 1, "device": "mps"}, "mps"),
        ({"batch_size": 1, "device": "cuda:99"}, "cuda:99"),
        ({"batch_size": 1, "labels": LABELS[:-1]}, "8 images and 7 labels"),
        ({"batch_size": 1, "labels": LABELS + 3}, "out of bounds"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        measure(Hungry, **({"images": IMAGES, "labels": LABELS, "device": "cpu"} | settings))


def test_memory_that_runs_out_is_told_apart_from_other_ends():
    with pytest.raises(OutOfMemory, match="allocate"):
        on_cpu(Bottomless)
    with pytest.raises(OutOfMemory, match="killed"):
        on_cpu(Killed)
    with pytest.raises(RuntimeError, match="SIGTERM"):
        on_cpu(functools.partial(Killed, signal.SIGTERM))


def test_a_grid_takes_turns_and_keeps_a_row_where_memory_ran_out(monkeypatch):
    calls = []

    def stand_in(factory, images, labels, batch_size, steps, **_):
        calls.append((batch_size, steps))
        if batch_size == 4:
            raise OutOfMemory("none left")
        return Cost(
            batch_size, steps, batch_size * steps, 100, 0.5, batch_size * steps / 0.5, "cpu"
        )

    monkeypatch.setattr(cost, "measure", stand_in)
    settings = settings_up_to([2, 4], 4)
    assert settings == [(2, 1), (2, 2), (4, 1)]
    table = measure_grid(Hungry, IMAGES, LABELS, settings, repeats=2, device="cpu")
    assert calls == settings * 2
    assert table["repeat"].tolist() == [0, 0, 0, 1, 1, 1]
    assert table["effective_batch_size"].tolist() == [2, 4, 4] * 2
    lost = table[table["batch_size"] == 4]
    assert lost[["peak_memory", "seconds_per_update"]].isna().all(axis=None)
    with pytest.raises(InputError, match="repeats = 0"):
        measure_grid(Hungry, IMAGES, LABELS, settings, repeats=0)


@given(st.lists(st.integers(1, 300), min_size=1, unique=True), st.integers(1, 1000))
def test_settings_are_all_that_an_update_may_hold(batch_sizes, images):
    settings = set(settings_up_to(batch_sizes, images))
    powers = [2**power for power in range(11)]
    assert settings == {(b, s) for b in batch_sizes for s in powers if b * s <= images}


def search(peaks, **settings):
    """`largest_batch_size` on a stand-in that needs `peaks(batch_size)` bytes, None: too many."""

    def stand_in(factory, images, labels, batch_size, steps, **_):
        assert steps > 1  # so that gradients accumulate
        if peaks(batch_size) is None:
            raise OutOfMemory("none left")
        return Cost(batch_size, steps, batch_size * steps, peaks(batch_size), 1.0, 1.0, "cpu")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "measure", stand_in)
        return largest_batch_size(Hungry, IMAGES, LABELS, device="cpu", **settings)


@given(
    fixed=st.integers(0, 10**9),
    per_image=st.integers(0, 10**8),
    noise=st.integers(0, 10**6),
    room=st.integers(0, 10**11),
    margin=st.floats(0, 0.9),
    largest=st.integers(1, 5000),
)
def test_the_search_finds_the_largest_that_fits(fixed, per_image, noise, room, margin, largest):
    def peaks(batch_size):
        return fixed + per_image * batch_size + (batch_size * 7919 % 13) * noise // 13

    budget = int((peaks(1) + room) / (1 - margin)) + 2
    found = search(peaks, memory_budget=budget, margin=margin, largest=largest)
    assert found.tried[found.batch_size] == found.peak_memory == peaks(found.batch_size)
    assert found.peak_memory <= found.limit <= budget * (1 - margin)
    assert max(found.tried) <= largest
    assert len(found.tried) <= 40
    # Whatever is larger by more than the tolerance was not overlooked.
    beyond = found.batch_size + max(1, int(found.batch_size * cost.TOLERANCE)) + 1
    if noise == 0 and beyond <= largest:
        assert peaks(beyond) > found.limit


def test_running_out_of_memory_counts_as_not_fitting():
    found = search(lambda n: None if n > 37 else 1000 * n, memory_budget=10**9, largest=1000)
    assert 35 <= found.batch_size <= 37
    assert None in found.tried.values()


def test_a_budget_too_small_for_one_image_says_what_it_needs():
    with pytest.raises(
        InputError, match=r"10\.00 MB, of which 10% .* one image, which needs 9\.50 MB"
    ):
        search(lambda n: 9_500_000 * n, memory_budget=10**7)
    with pytest.raises(InputError, match="one image, which needs more than there is"):
        search(lambda n: None, memory_budget=10**7)


@pytest.mark.parametrize("settings", [{"margin": 1.0}, {"margin": -0.1}, {"largest": 0}])
def test_a_search_refuses_senseless_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        search(lambda n: n, memory_budget=100, **settings)


def test_the_search_respects_an_artificial_budget_on_this_machine():
    budget = 24 * MEGABYTE
    found = largest_batch_size(
        Hungry, IMAGES.repeat(8, 1, 1, 1), LABELS.repeat(8), memory_budget=budget, device="cpu"
    )
    assert found.peak_memory <= found.limit < budget
    assert 2 <= found.batch_size <= budget // Hungry.kept
    # It did not take the machine beyond the budget by more than a step of its search.
    assert max(peak for peak in found.tried.values() if peak) < 2.5 * budget
    assert multiprocessing.active_children() == []


def test_by_default_the_budget_is_the_free_memory():
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert MEGABYTE < cost.free_memory("cpu") <= installed
    assert search(lambda n: n, largest=4).limit <= 0.9 * installed


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500 * 10**6),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        (" 2 gb ", 2 * 10**9),
        ("64kB", 64_000),
        ("64KiB", 65_536),
        ("1TB", 10**12),
        ("12B", 12),
    ],
)
def test_a_memory_budget_is_read(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "2", "GB", "2 gigs", "-2GB", "0GB", "1e3MB", "2,5GB", "nanGB"]
)
def test_a_text_that_is_no_memory_is_named(text):
    with pytest.raises(InputError, match=f"memory {text!r}"):
        parse_memory(text)


@given(st.integers(1, 10**14))
def test_memory_is_written_as_it_is_read(size):
    assert parse_memory(format_memory(size)) == pytest.approx(size, rel=0.006)


class TestPeakOfCuda:
    """The reading of torch's statistics, on stand-ins: no GPU is needed, and none was used."""

    def test_it_is_what_is_reserved_beyond_what_was_before(self, monkeypatch):
        done = []
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
        monkeypatch.setattr(
            torch.cuda, "reset_peak_memory_stats", lambda device: done.append("reset")
        )
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 100)
        device = torch.device("cuda:0")
        assert cost._begin_peak(device) == 30
        assert cost._peak(device) == 100
        assert done == ["emptied", "reset"]

    def test_its_error_counts_as_memory_that_ran_out(self):
        class Sender:
            def send(self, outcome):
                self.outcome = outcome

        class Job:
            def __reduce__(self):
                return _raise_cuda_out_of_memory, ()

        sender = Sender()
        cost._report(sender, pickle.dumps(Job()))
        assert sender.outcome == ("memory", "OutOfMemoryError: CUDA out of memory")


def _raise_cuda_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_reference_is_of_the_study():
    parameters = load_study("cost").parameters
    table = load_tables(REFERENCE / "cost")["cost"]
    settings = settings_up_to(parameters["batch_sizes"], parameters["images_per_update"])
    measured = table[["batch_size", "accumulation_steps"]].apply(tuple, axis=1)
    assert measured.tolist() == settings * parameters["repeats"]
    assert (table["peak_memory"] > 0).all()
