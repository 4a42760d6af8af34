"""The cost of an update, on models whose memory is known."""

import functools
import multiprocessing
import threading

import pytest
import torch
from measured_models import Broken, Hungry, Wide, no_width, not_a_model
from torch import nn

from nbutils.errors import InputError
from nbutils.measure import cost
from nbutils.measure.cost import Cost, measure, measure_grid, measure_updates, settings_up_to
from nbutils.measure.process import OutOfMemory
from nbutils.paths import REFERENCE
from nbutils.studies.reference import load_tables
from nbutils.studies.study import load_study

IMAGES, LABELS = torch.rand(8, 1, 4, 4), torch.arange(8) % 3


def on_cpu(factory, batch_size=1, accumulation_steps=1, **settings):
    return measure(
        factory, IMAGES, LABELS, batch_size, accumulation_steps, device="cpu", **settings
    )


def test_the_peak_holds_weights_gradients_and_the_optimizers_state():
    weights = 4 * sum(parameter.numel() for parameter in Wide().parameters())
    adam = on_cpu(Wide, updates=1).peak_memory
    plain = on_cpu(Wide, optimizer=functools.partial(torch.optim.SGD, lr=0.1), updates=1)
    # Weights and gradients; Adam has two more numbers per weight, and scratch for a step.
    assert 2 * weights < plain.peak_memory
    assert 4 * weights < adam < 12 * weights
    assert adam - plain.peak_memory > weights


def test_the_peak_follows_the_micro_batch_and_not_the_accumulation():
    cut, large = (on_cpu(Hungry, *s, updates=1) for s in [(2, 8), (16, 1)])
    assert large.peak_memory > 16 * Hungry.kept
    assert cut.peak_memory < large.peak_memory / 2
    assert (cut.batch_size, cut.accumulation_steps, cut.effective_batch_size) == (2, 8, 16)
    assert cut.images_per_second == pytest.approx(16 / cut.seconds_per_update)
    assert cut.device == "cpu"


def test_what_a_function_defines_can_be_measured_and_nothing_stays_behind():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    width = 3

    class Local(nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1))

    assert on_cpu(lambda: Local(16, width), updates=1).seconds_per_update > 0
    assert torch.rand(3).equal(expected)  # the caller's random numbers
    assert multiprocessing.active_children() == []


def test_lazy_layers_and_losses_of_the_readers_own():
    def losses(model, batch):
        logits, _ = model(batch[0])
        return nn.functional.cross_entropy(logits, batch[1], reduction="none")

    assert on_cpu("measured_models:lazy_pair", 2, losses=losses, updates=1).peak_memory >= 0


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
        (not_a_model, "returned str, not a torch.nn.Module"),
        (Broken, "the loss is nan"),
        (functools.partial(nn.Linear, 17, 3), "RuntimeError: mat1 and mat2"),
        (
            no_width,
            r"ZeroDivisionError: .*models.py, line \d+: `return nn.Linear\(16, 3 // 0\)`",
        ),
        (functools.partial(nn.Linear, 16, threading.Lock()), "cannot be sent to the measuring"),
        ("measured_models", "must read package.module:name"),
        ("measured_models:missing", "has no attribute 'missing'"),
        ("no_such_module:model", "No module named 'no_such_module'"),
        ("measured_models:WEIGHTS", "must be callable"),
    ],
)
def test_a_bad_factory_is_named_with_its_cause(factory, message):
    with pytest.raises(InputError, match=message):
        on_cpu(factory)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 1, "accumulation_steps": True}, "accumulation_steps = True"),
        ({"batch_size": 1, "updates": 1.5}, "updates = 1.5"),
        ({"batch_size": 1, "device": "cuda:99"}, "cuda:99"),
        ({"batch_size": 1, "labels": LABELS[:-1]}, "8 images and 7 labels"),
        ({"batch_size": 1, "labels": LABELS + 3}, "out of bounds"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        measure(Hungry, **({"images": IMAGES, "labels": LABELS, "device": "cpu"} | settings))


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


def test_the_reference_is_of_the_study():
    parameters = load_study("cost").parameters
    table = load_tables(REFERENCE / "cost")["cost"]
    settings = settings_up_to(parameters["batch_sizes"], parameters["images_per_update"])
    measured = table[["batch_size", "accumulation_steps"]].apply(tuple, axis=1)
    assert measured.tolist() == settings * parameters["repeats"]
    assert (table["peak_memory"] > 0).all()
