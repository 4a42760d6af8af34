"""Every fast path is held to the eager loop."""

from contextlib import contextmanager
from dataclasses import replace

import pandas as pd
import pytest
import torch

from nbutils import InputError, RunConfig, train, train_many, training
from nbutils import cuda_graph as cuda_graph_module
from nbutils.training.model import DigitCNN
from nbutils.training.pieces import PIECE, Pieces
from nbutils.training.train import resolve_engine

TINY = RunConfig(batch_size=64, epochs=2, device="cpu", precision="float64")  # shrunken for speed
CPU = torch.device("cpu")


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def comparable(result):
    return result.history.drop(columns="seconds")


def assert_same_training(ours, eager, tolerance):
    pairs = zip(ours.model.state_dict().values(), eager.model.state_dict().values(), strict=True)
    for a, b in pairs:
        assert torch.dist(a.double(), b.double()) <= tolerance * (1 + b.double().norm())
    pd.testing.assert_frame_equal(comparable(ours), comparable(eager), rtol=10 * tolerance)


SETTINGS = [
    {},
    {"norm": "none", "batch_size": 300, "optimizer": "sgd", "momentum": 0.9},
    {"norm": "group", "accumulation_steps": 3, "augment": True},
    {"norm": "batch", "accumulation_steps": 2},
    {"norm": "ghost", "batch_size": 150},
    {"batch_size": 7, "accumulation_steps": 5, "schedule": "one-cycle"},
    {"last_window": "drop", "weight_decay": 1e-3},
    {"batch_size": 1, "accumulation_steps": 299},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_pieces_train_as_the_eager_loop(few_digits, settings, cores):
    config = replace(TINY, **settings)
    eager = train(config, few_digits, progress=False, engine="eager")
    with threads(cores):
        ours = train(config, few_digits, progress=False)
        assert torch.get_num_threads() == cores
    assert (ours.engine, eager.engine) == ("pieces", "eager")
    # Batch norm undoes the bias before it, whose gradient is rounding, which Adam scales up.
    rounding = config.norm in ("batch", "ghost")
    assert_same_training(ours, eager, tolerance=1e-6 if rounding else 1e-10)


def test_pieces_repeat_bitwise_for_a_number_of_threads(few_digits):
    config = replace(TINY, precision="float32", batch_size=150)
    with threads(2):
        first, second = (train(config, few_digits, progress=False) for _ in range(2))
    pd.testing.assert_frame_equal(comparable(first), comparable(second), check_exact=True)


@pytest.mark.parametrize("cores", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [[1], [5], [PIECE], [PIECE + 1], [1024], [32] * 32, [128, 3]])
def test_pieces_cover_the_window_in_its_order(cores, sizes):
    window = torch.arange(sum(sizes)).split(sizes)
    with Pieces(DigitCNN(), separable=True, threads=cores) as pieces:
        cut = pieces._cut(window)
    assert torch.equal(torch.cat(cut), torch.arange(sum(sizes)))
    assert all(0 < len(piece) <= PIECE for piece in cut)
    assert len(cut) >= min(cores, sum(sizes))


def test_batch_norm_is_never_cut():
    window = (torch.arange(1000), torch.arange(1000, 1500))
    with Pieces(DigitCNN("batch"), separable=False, threads=4) as pieces:
        assert [len(piece) for piece in pieces._cut(window)] == [1000, 500]


def test_an_error_in_a_worker_reaches_the_caller(few_digits):
    images, labels = torch.rand(8, 1, 28, 28), torch.tensor([0] * 7 + [10])  # no such class
    with (
        Pieces(DigitCNN(), separable=True, threads=2) as pieces,
        pytest.raises(IndexError, match="Target 10 is out of bounds"),
    ):
        pieces.gradient((torch.arange(8),), images, labels)


@pytest.fixture
def graphs_on_the_cpu(monkeypatch):
    """CUDA graphs, played by calling again what would have been recorded; counts the replays."""
    replays = []

    def record(body, generators):
        def replay():
            replays.append(body)
            body()

        return replay

    monkeypatch.setattr(cuda_graph_module, "record", record)
    monkeypatch.setattr(training, "resolve_engine", lambda engine, *_: engine)
    return replays


# 2 ** -10 is the same in float32, in which a graph reads the learning rate.
@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.get("schedule") is None], ids=str)
def test_an_epoch_of_replays_trains_bitwise_as_the_eager_loop(
    few_digits, graphs_on_the_cpu, settings
):
    config = replace(TINY, learning_rate=2**-10, **settings)
    eager = train(config, few_digits, progress=False, engine="eager")
    assert graphs_on_the_cpu == []
    graphed = train(config, few_digits, progress=False, engine="cuda-graph")
    pd.testing.assert_frame_equal(comparable(graphed), comparable(eager), check_exact=True)
    for a, b in zip(
        graphed.model.state_dict().values(), eager.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert len(graphs_on_the_cpu) == graphed.history["updates"].iloc[-1]
    windows_of_different_size = 1 if config.last_window == "drop" else 2
    assert len(set(graphs_on_the_cpu)) in (1, windows_of_different_size)


def test_replays_follow_the_schedule(few_digits, graphs_on_the_cpu):
    config = replace(TINY, schedule="one-cycle", learning_rate=2**-8)
    eager = train(config, few_digits, progress=False, engine="eager")
    graphed = train(config, few_digits, progress=False, engine="cuda-graph")
    assert_same_training(graphed, eager, tolerance=1e-5)  # its rates are rounded to float32


def test_graphs_are_recorded_before_training_only(few_digits, graphs_on_the_cpu):
    model = DigitCNN()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.rand(2, 1, 28, 28)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="the optimizer has made steps"):
        cuda_graph_module.GraphedEpoch(
            lambda window: None, lambda order: iter([(order,)]), 4, model, optimizer, []
        )


def test_train_many_gives_each_its_solo_result(few_digits):
    configs = [
        replace(TINY, seed=1),
        replace(TINY, batch_size=100, accumulation_steps=2, epochs=1),
        replace(TINY, norm="batch", augment=True, epochs=3),
    ]
    together = train_many(configs, few_digits, progress=False)
    assert [result.config for result in together] == configs
    for config, result in zip(configs, together, strict=True):
        solo = train(config, few_digits, progress=False)
        pd.testing.assert_frame_equal(comparable(result), comparable(solo), check_exact=True)
    assert train_many([], few_digits) == []


def test_updates_in_turn_do_not_disturb_each_other(few_digits, graphs_on_the_cpu):
    """What train_many does on a GPU, where the runs share it."""
    configs = [
        replace(TINY, learning_rate=2**-10, seed=1),
        replace(TINY, learning_rate=2**-9, batch_size=20, epochs=3, augment=True),
    ]
    together = training._train_together(
        training._prepared(configs, few_digits, "cuda-graph", "stop"), progress=False
    )
    for config, result in zip(configs, together, strict=True):
        solo = train(config, few_digits, progress=False, engine="eager")
        pd.testing.assert_frame_equal(comparable(result), comparable(solo), check_exact=True)


def test_what_auto_chooses():
    config = RunConfig()
    assert resolve_engine("auto", config, CPU) == "pieces"
    assert resolve_engine("auto", replace(config, precision="bfloat16"), CPU) == "eager"
    assert resolve_engine("auto", config, torch.device("cuda")) == "cuda-graph"
    assert resolve_engine("auto", config, torch.device("mps")) == "eager"
    assert resolve_engine("eager", config, torch.device("cuda")) == "eager"


@pytest.mark.parametrize(
    ("engine", "settings", "message"),
    [
        ("fast", {}, "no engine 'fast'; allowed: auto, eager, pieces, cuda-graph"),
        ("cuda-graph", {}, "'cuda-graph', but it does not run on 'cpu' in float64; use 'auto'"),
        ("pieces", {"precision": "bfloat16"}, "'pieces', but it does not run on 'cpu' in bfloat16"),
    ],
)
def test_an_engine_that_does_not_run_here_is_refused(few_digits, engine, settings, message):
    with pytest.raises(InputError, match=message):
        train(replace(TINY, **settings), few_digits, engine=engine)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_on_cuda_replayed_graphs_train_as_the_eager_loop(few_digits, settings):
    config = replace(TINY, device="cuda", **settings)
    graphed = train(config, few_digits, progress=False)
    assert graphed.engine == "cuda-graph"
    assert_same_training(
        graphed, train(config, few_digits, progress=False, engine="eager"), tolerance=1e-10
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_runs_side_by_side_equal_their_solo_runs(few_digits):
    configs = [replace(TINY, device="cuda", seed=seed) for seed in range(3)]
    for config, result in zip(
        configs, train_many(configs, few_digits, progress=False), strict=True
    ):
        solo = train(config, few_digits, progress=False)
        pd.testing.assert_frame_equal(comparable(result), comparable(solo), check_exact=True)
