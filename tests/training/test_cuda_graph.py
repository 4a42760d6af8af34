"""CUDA graphs; on the CPU a graph is played by calling again what it would have recorded."""

import gc
import weakref
from dataclasses import replace

import pandas as pd
import pytest
import torch
from outcomes import assert_same_result, history

from nbutils import RunConfig, train, train_many
from nbutils.training import cuda_graph, setup
from nbutils.training import train as training
from nbutils.training.out_of_memory import take_turns

TINY = RunConfig(batch_size=32, epochs=2, device="cpu", precision="float64")  # for speed

SETTINGS = [
    {"norm": "none", "batch_size": 150, "optimizer": "sgd", "momentum": 0.9},
    {"norm": "group", "accumulation_steps": 3, "augment": True},
    {"norm": "batch", "accumulation_steps": 2},
    {"norm": "ghost", "batch_size": 140, "weight_decay": 1e-3},
    {"batch_size": 9, "accumulation_steps": 5, "last_window": "drop"},
]


@pytest.fixture(scope="module")
def data(few_digits):
    """150 images: five updates of `TINY` in an epoch, the last of 22 images."""
    return few_digits.subset(150)


@pytest.fixture
def replays(monkeypatch):
    """Graphs on the CPU, which remember what they would record; weakrefs to those replayed."""
    played = []

    class Graph:
        def __init__(self, body, _):
            self.body = body

        def __call__(self):
            played.append(weakref.ref(self))
            self.body()

    monkeypatch.setattr(cuda_graph, "record", Graph)
    monkeypatch.setattr(setup, "GRAPH_DEVICES", ("cpu",))
    return played


# 2**-10 is the same in float32, in which a graph reads the learning rate.
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_replays_train_bitwise_as_the_plain_loop(data, replays, settings):
    config = replace(TINY, learning_rate=2**-10, **settings)
    plain = train(config, data, progress=False, cuda_graph=False)
    assert replays == []
    graphed = train(config, data, progress=False)
    assert_same_result(graphed, plain)
    assert len(replays) == graphed.history["updates"].iloc[-1]


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "sgd", "momentum": 0.9}], ids=str)
def test_replays_follow_the_schedule_and_go_on_from_a_checkpoint(
    data, replays, tmp_path, optimizer
):
    config = replace(TINY, schedule="one-cycle", learning_rate=2**-8, augment=True, **optimizer)
    plain = train(config, data, progress=False, cuda_graph=False)
    whole = train(config, data, progress=False)  # its rates are rounded to float32
    pd.testing.assert_frame_equal(history(whole), history(plain), rtol=1e-4)

    def interrupt(update, _):
        if update == 7:  # in the second epoch
            raise KeyboardInterrupt

    options = {"progress": False, "log_folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        train(config, data, after_update=interrupt, **options)
    replays.clear()
    resumed = train(config, data, **options)
    assert len(replays) == 5
    assert_same_result(resumed, whole)


def test_scripts_in_turn_do_not_disturb_each_other(data, replays, monkeypatch):
    """What `train_many` does on a GPU, where the runs share it."""
    configs = [
        replace(TINY, learning_rate=2**-10, seed=1),
        replace(TINY, learning_rate=2**-9, batch_size=50, epochs=3, augment=True),
    ]
    solo = [train(config, data, progress=False, cuda_graph=False) for config in configs]
    scripts = []
    monkeypatch.setattr(training, "take_turns", lambda mine, _: scripts.append(mine[0]) or [None])
    train_many(configs, data, progress=False)
    together = take_turns(scripts, torch.device("cpu"))
    for ours, theirs in zip(together, solo, strict=True):
        assert_same_result(ours, theirs)


def test_graphs_are_freed_when_training_ends_and_the_rest_with_the_result(data, replays):
    gc.collect()
    gc.disable()
    try:
        result = train(replace(TINY, schedule="one-cycle"), data, progress=False)
        assert len(set(map(id, replays))) == 2  # of a full window, and of a short one
        assert {graph() for graph in replays} == {None}
        held = weakref.ref(result.model), weakref.ref(result.late_predictions)
        del result
        assert [each() for each in held] == [None, None]
    finally:
        gc.enable()


@pytest.mark.cuda
@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_on_cuda_replays_train_bitwise_as_the_plain_loop(data, settings, schedule):
    config = replace(TINY, device="cuda", schedule=schedule, **settings)
    graphed = train(config, data, progress=False)
    assert graphed.cuda_graph
    plain = train(config, data, progress=False, cuda_graph=False)
    pd.testing.assert_frame_equal(history(graphed), history(plain), check_exact=True)


@pytest.mark.cuda
def test_on_cuda_runs_side_by_side_equal_their_solo_runs(data):
    configs = [replace(TINY, device="cuda", seed=seed) for seed in range(3)]
    together = train_many(configs, data, progress=False)
    for config, result in zip(configs, together, strict=True):
        solo = train(config, data, progress=False)
        pd.testing.assert_frame_equal(history(result), history(solo), check_exact=True)
