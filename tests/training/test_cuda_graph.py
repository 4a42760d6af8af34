"""CUDA graphs; on the CPU a graph is played by calling again what it would have recorded."""

import gc
import weakref
from dataclasses import replace

import pandas as pd
import pytest
import torch

from nbutils import RunConfig, train, train_many
from nbutils.training import cuda_graph, setup
from nbutils.training import train as training
from nbutils.training.out_of_memory import take_turns

TINY = RunConfig(batch_size=64, epochs=2, device="cpu", precision="float64")  # for speed

SETTINGS = [
    {"norm": "none", "batch_size": 300, "optimizer": "sgd", "momentum": 0.9},
    {"norm": "group", "accumulation_steps": 3, "augment": True},
    {"norm": "batch", "accumulation_steps": 2},
    {"norm": "ghost", "batch_size": 150, "weight_decay": 1e-3},
    {"batch_size": 17, "accumulation_steps": 5, "last_window": "drop"},
]


def history(result):
    return result.history.drop(columns="seconds")


@pytest.fixture
def graphs_on_the_cpu(monkeypatch):
    """Replaces recording by remembering; the list of what was replayed, in order."""
    replays = []

    def record(body, generators):
        def replay():
            replays.append(body)
            body()

        return replay

    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr(setup, "GRAPH_DEVICES", ("cpu",))
    return replays


# 2**-10 is the same in float32, in which a graph reads the learning rate.
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_replays_train_bitwise_as_the_plain_loop(few_digits, graphs_on_the_cpu, settings):
    config = replace(TINY, learning_rate=2**-10, **settings)
    plain = train(config, few_digits, progress=False, cuda_graph=False)
    assert graphs_on_the_cpu == []
    graphed = train(config, few_digits, progress=False)
    pd.testing.assert_frame_equal(history(graphed), history(plain), check_exact=True)
    ours, theirs = graphed.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(graphs_on_the_cpu) == graphed.history["updates"].iloc[-1]


def test_replays_follow_the_schedule(few_digits, graphs_on_the_cpu):
    config = replace(TINY, schedule="one-cycle", learning_rate=2**-8)
    plain = train(config, few_digits, progress=False, cuda_graph=False)
    graphed = train(config, few_digits, progress=False)  # its rates are rounded to float32
    pd.testing.assert_frame_equal(history(graphed), history(plain), rtol=1e-4)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "sgd", "momentum": 0.9}], ids=str)
def test_replays_go_on_from_a_checkpoint(few_digits, graphs_on_the_cpu, tmp_path, optimizer):
    config = replace(TINY, schedule="one-cycle", learning_rate=2**-8, augment=True, **optimizer)
    whole = train(config, few_digits, progress=False)

    def kill(update, _):
        if update == 7:  # in the second epoch
            raise Killed

    options = {"progress": False, "log_folder": tmp_path}
    with pytest.raises(Killed):
        train(config, few_digits, after_update=kill, **options)
    graphs_on_the_cpu.clear()
    resumed = train(config, few_digits, **options)
    assert len(graphs_on_the_cpu) == 5
    pd.testing.assert_frame_equal(history(resumed), history(whole), check_exact=True)


def test_scripts_in_turn_do_not_disturb_each_other(few_digits, graphs_on_the_cpu, monkeypatch):
    """What `train_many` does on a GPU, where the runs share it."""
    configs = [
        replace(TINY, learning_rate=2**-10, seed=1),
        replace(TINY, learning_rate=2**-9, batch_size=50, epochs=3, augment=True),
    ]
    solo = [train(config, few_digits, progress=False, cuda_graph=False) for config in configs]
    scripts = []
    monkeypatch.setattr(training, "take_turns", lambda mine, _: scripts.append(mine[0]) or [None])
    train_many(configs, few_digits, progress=False)
    together = take_turns(scripts, torch.device("cpu"))
    for ours, theirs in zip(together, solo, strict=True):
        pd.testing.assert_frame_equal(history(ours), history(theirs), check_exact=True)


def test_graphs_are_freed_when_training_ends_and_the_rest_with_the_result(few_digits, monkeypatch):
    graphs = []

    class Graph:
        """Stands for a graph, whose memory is freed with it."""

        def __init__(self, body):
            self.body = body
            graphs.append(weakref.ref(self))

        def __call__(self):
            self.body()

    monkeypatch.setattr(cuda_graph, "record", lambda body, generators: Graph(body))
    monkeypatch.setattr(setup, "GRAPH_DEVICES", ("cpu",))
    gc.collect()
    gc.disable()
    try:
        result = train(replace(TINY, schedule="one-cycle"), few_digits, progress=False)
        assert len(graphs) == 2
        assert [graph() for graph in graphs] == [None, None]
        held = weakref.ref(result.model), weakref.ref(result.late_predictions)
        del result
        assert [each() for each in held] == [None, None]
    finally:
        gc.enable()


@pytest.mark.cuda
@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_on_cuda_replays_train_bitwise_as_the_plain_loop(few_digits, settings, schedule):
    config = replace(TINY, device="cuda", schedule=schedule, **settings)
    graphed = train(config, few_digits, progress=False)
    assert graphed.cuda_graph
    plain = train(config, few_digits, progress=False, cuda_graph=False)
    pd.testing.assert_frame_equal(history(graphed), history(plain), check_exact=True)


@pytest.mark.cuda
def test_on_cuda_runs_side_by_side_equal_their_solo_runs(few_digits):
    configs = [replace(TINY, device="cuda", seed=seed) for seed in range(3)]
    together = train_many(configs, few_digits, progress=False)
    for config, result in zip(configs, together, strict=True):
        solo = train(config, few_digits, progress=False)
        pd.testing.assert_frame_equal(history(result), history(solo), check_exact=True)
