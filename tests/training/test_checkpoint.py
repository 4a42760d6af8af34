import hashlib
import io
import os
import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import part

from nbutils import RunConfig, train, training
from nbutils import cuda_graph as cuda_graph_module
from nbutils.training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint

TINY = RunConfig(batch_size=64, epochs=3, device="cpu")  # shrunken for speed


@pytest.fixture(scope="module")
def few_digits(few_digits):
    """Fewer still: 160 images to train on, 20 to validate, 20 to test."""
    return replace(
        few_digits,
        train=part(few_digits.train, 160),
        validation=part(few_digits.validation, 20),
        test=part(few_digits.test, 20),
    )


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def history(result):
    return result.history.drop(columns="seconds")


@pytest.fixture
def killed_after(monkeypatch):
    """Ends training, once, when so many more epochs have been evaluated and saved."""

    def arm(epochs):
        left = [epochs]
        evaluate = training.Run.evaluate

        def counted(run):
            if not left[0]:
                monkeypatch.setattr(training.Run, "evaluate", evaluate)
                raise Killed
            left[0] -= 1
            return evaluate(run)

        monkeypatch.setattr(training.Run, "evaluate", counted)

    return arm


def interrupted(config, data, folder, killed_after, epochs, engine="auto"):
    killed_after(epochs)
    with pytest.raises(Killed):
        train(config, data, log_folder=folder, progress=False, engine=engine)


SETTINGS = [
    {},
    {"optimizer": "sgd", "learning_rate": 0.05, "dropout": 0.0},
    {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    {"schedule": "one-cycle", "learning_rate": 4e-3, "augment": True},
    {"norm": "batch", "accumulation_steps": 2, "augment": True},
    {"norm": "ghost", "batch_size": 150, "schedule": "one-cycle", "optimizer": "sgd"},
    {"norm": "none", "last_window": "drop", "precision": "float64"},
    {"precision": "bfloat16"},
]


@pytest.mark.parametrize("engine", ["eager", "pieces"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_resumed_run_ends_bitwise_as_an_uninterrupted_one(
    few_digits, tmp_path, killed_after, monkeypatch, engine, settings
):
    config = replace(TINY, **settings)
    engine = "eager" if config.precision == "bfloat16" else engine
    whole = train(config, few_digits, progress=False, engine=engine)
    for epochs in (1, 1):  # twice interrupted, each time after one more epoch
        interrupted(config, few_digits, tmp_path, killed_after, epochs, engine)
    assert len(pd.read_csv(tmp_path / "progress.csv")) == 2
    trained = []
    begin_epoch = training.Run.begin_epoch
    monkeypatch.setattr(
        training.Run, "begin_epoch", lambda run: trained.append(run) or begin_epoch(run)
    )
    resumed = train(config, few_digits, log_folder=tmp_path, progress=False, engine=engine)
    assert len(trained) == config.epochs - 2
    assert_equal_results(resumed, whole)


def assert_equal_results(resumed, whole):
    pd.testing.assert_frame_equal(history(resumed), history(whole), check_exact=True)
    assert torch.equal(resumed.predictions, whole.predictions)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not resumed.model.training


@pytest.mark.parametrize("settings", [{"optimizer": "sgd"}, {"schedule": "one-cycle"}], ids=str)
def test_graphs_resume_in_the_tensors_that_they_know(
    few_digits, tmp_path, killed_after, monkeypatch, settings
):
    """CUDA graphs, played by calling again what would have been recorded."""
    known = []

    class Graphed(cuda_graph_module.GraphedEpoch):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            known.append(addresses(arguments[4]))

    def addresses(optimizer):
        states = [t.data_ptr() for s in optimizer.state.values() for t in s.values()]
        return [*states, *(group["lr"].data_ptr() for group in optimizer.param_groups)]

    result = training.Run.result
    monkeypatch.setattr(training, "GraphedEpoch", Graphed)
    monkeypatch.setattr(cuda_graph_module, "record", lambda body, generators: body)
    monkeypatch.setattr(training, "resolve_engine", lambda engine, *_: engine)
    monkeypatch.setattr(
        training.Run, "result", lambda run: known.append(addresses(run.optimizer)) or result(run)
    )
    config = replace(TINY, learning_rate=2**-10, **settings)
    whole = train(config, few_digits, progress=False, engine="cuda-graph")
    interrupted(config, few_digits, tmp_path, killed_after, 1, "cuda-graph")
    resumed = train(config, few_digits, log_folder=tmp_path, progress=False, engine="cuda-graph")
    assert_equal_results(resumed, whole)
    assert known[-1] == known[-2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("engine", ["eager", "cuda-graph"])
@pytest.mark.parametrize("settings", [s for s in SETTINGS if "precision" not in s], ids=str)
def test_on_cuda_a_resumed_run_ends_bitwise_as_an_uninterrupted_one(
    few_digits, tmp_path, killed_after, engine, settings
):
    config = replace(TINY, device="cuda", **settings)
    whole = train(config, few_digits, progress=False, engine=engine)
    interrupted(config, few_digits, tmp_path, killed_after, 1, engine)
    resumed = train(config, few_digits, log_folder=tmp_path, progress=False, engine=engine)
    assert_equal_results(resumed, whole)


def test_a_finished_run_is_not_trained_again(few_digits, tmp_path, killed_after, capsys):
    first = train(TINY, few_digits, log_folder=tmp_path, progress=False)
    killed_after(0)
    again = train(TINY, few_digits, log_folder=tmp_path)
    assert_equal_results(again, first)
    assert again.history["seconds"].tolist() == first.history["seconds"].tolist()
    assert "goes on after epoch 3 of 3" in capsys.readouterr().out


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:40],
        lambda content: flip(content, 3),
        lambda content: flip(content, len(content) // 2),
        lambda content: b"no line\n" + content,
    ],
)
def test_a_damaged_checkpoint_is_not_used_and_a_warning_says_so(
    few_digits, tmp_path, killed_after, damage
):
    interrupted(TINY, few_digits, tmp_path, killed_after, 2)
    path = tmp_path / CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"checkpoint.pt is not used.*: it is damaged"):
        result = train(TINY, few_digits, log_folder=tmp_path, progress=False)
    assert_equal_results(result, train(TINY, few_digits, progress=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"epochs": 4}, "epochs was 3 and is 4"),
        ({"learning_rate": 0.01}, "learning_rate was 0.001 and is 0.01"),
    ],
)
def test_a_checkpoint_of_other_settings_is_not_used(
    few_digits, tmp_path, killed_after, change, message
):
    interrupted(TINY, few_digits, tmp_path, killed_after, 2)
    config = replace(TINY, **change)
    with pytest.warns(UserWarning, match=f"is not used, the run begins anew: {message}"):
        result = train(config, few_digits, log_folder=tmp_path, progress=False)
    assert_equal_results(result, train(config, few_digits, progress=False))


def test_a_checkpoint_made_elsewhere_is_not_used(few_digits, tmp_path, killed_after, monkeypatch):
    interrupted(TINY, few_digits, tmp_path, killed_after, 1)
    others = {
        "images was": {"data": replace(few_digits, test=few_digits.validation)},
        "engine was 'pieces' and is 'eager'": {"engine": "eager"},
    }
    for message, changes in others.items():
        arguments = {"config": TINY, "data": few_digits, "log_folder": tmp_path} | changes
        killed_after(0)
        with pytest.warns(UserWarning, match=message), pytest.raises(Killed):
            train(**arguments, progress=False)
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    killed_after(0)
    with pytest.warns(UserWarning, match=r"torch was .* and is '2.0.0'"), pytest.raises(Killed):
        train(TINY, few_digits, log_folder=tmp_path, progress=False)
    torch.set_num_threads(2)
    killed_after(0)
    try:
        with pytest.warns(UserWarning, match="threads was 1 and is 2"), pytest.raises(Killed):
            train(TINY, few_digits, log_folder=tmp_path, progress=False)
    finally:
        torch.set_num_threads(1)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"state": {"x": Evil()}, "conditions": {}}, buffer)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest().encode()
    (tmp_path / CHECKPOINT).write_bytes(digest + b"\n" + content)
    with pytest.warns(UserWarning, match="is not used"):
        assert load_checkpoint(tmp_path / CHECKPOINT, {}) is None
    assert not (tmp_path / "executed").exists()


def test_no_folder_no_checkpoint(few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(replace(TINY, epochs=1), few_digits, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, {"epoch": 1}, {"seed": 0})

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"epoch": 2}, {"seed": 0})
    assert load_checkpoint(path, {"seed": 0}) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]
