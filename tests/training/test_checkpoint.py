import hashlib
import io
import os
from dataclasses import replace

import pandas as pd
import pytest
import torch

from nbutils import RunConfig, train
from nbutils.training import checkpoint
from nbutils.training.checkpoint import CHECKPOINT

TINY = RunConfig(batch_size=64, epochs=3, device="cpu")  # shrunken for speed

SETTINGS = [
    {},
    {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    {"schedule": "one-cycle", "learning_rate": 4e-3, "augment": True},
    {"norm": "batch", "accumulation_steps": 2, "augment": True},
    {"norm": "none", "last_window": "drop", "precision": "bfloat16"},
]


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def interrupted(config, data, folder, epochs):
    """Train, and be killed as soon as this many more epochs are saved."""
    saves = []
    save = checkpoint.save

    def counted(*arguments):
        save(*arguments)
        saves.append(arguments)
        if len(saves) == epochs:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", counted)
        with pytest.raises(Killed):
            train(config, data, log_folder=folder, progress=False)


def assert_equal_results(resumed, whole):
    ours, theirs = resumed.history, whole.history
    drop = {"columns": "seconds"}
    pd.testing.assert_frame_equal(ours.drop(**drop), theirs.drop(**drop), check_exact=True)
    assert torch.equal(resumed.late_predictions, whole.late_predictions)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_resumed_run_ends_bitwise_as_an_uninterrupted_one(few_digits, tmp_path, settings, device):
    config = replace(TINY, device=device, **settings)
    whole = train(config, few_digits, progress=False)
    for _ in range(2):  # killed twice, each time after one more epoch
        interrupted(config, few_digits, tmp_path, epochs=1)
    updates = []
    resumed = train(
        config,
        few_digits,
        log_folder=tmp_path,
        progress=False,
        cuda_graph=True,
        after_update=lambda update, _: updates.append(update),
    )
    assert len(updates) == whole.history["updates"].iloc[-1] // 3
    assert_equal_results(resumed, whole)


def test_a_finished_run_is_not_trained_again(few_digits, tmp_path, capsys):
    first = train(TINY, few_digits, log_folder=tmp_path, progress=False)
    again = train(TINY, few_digits, log_folder=tmp_path)
    assert_equal_results(again, first)
    assert again.history["seconds"].tolist() == first.history["seconds"].tolist()
    assert "resumed after epoch 3" in "".join(capsys.readouterr())


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: flip(content, 3),
        lambda content: flip(content, len(content) // 2),
    ],
)
def test_a_damaged_checkpoint_is_not_used_and_a_warning_says_so(few_digits, tmp_path, damage):
    interrupted(TINY, few_digits, tmp_path, epochs=2)
    path = tmp_path / CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"checkpoint.pt is not used.*: it is damaged"):
        result = train(TINY, few_digits, log_folder=tmp_path, progress=False)
    assert len(result.history) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: ({"seed": 1}, data), "seed was 0 and is 1"),
        (lambda data: ({"epochs": 4}, data), "epochs was 3 and is 4"),
        (lambda data: ({}, replace(data, test=data.validation)), "images was"),
    ],
)
def test_a_checkpoint_of_another_run_is_not_used(few_digits, tmp_path, change, message):
    interrupted(TINY, few_digits, tmp_path, epochs=2)
    settings, data = change(few_digits)
    config = replace(TINY, **settings)
    with pytest.warns(UserWarning, match=f"is not used, the run starts again: {message}"):
        result = train(config, data, log_folder=tmp_path, progress=False)
    assert_equal_results(result, train(config, data, progress=False))


@pytest.mark.parametrize(
    ("patched", "message"),
    [
        ((torch, "__version__", "2.0.0"), r"torch was .* and is '2.0.0'"),
        ((torch, "get_num_threads", lambda: 77), "threads was .* and is 77"),
    ],
)
def test_a_checkpoint_made_elsewhere_is_not_used(
    few_digits, tmp_path, monkeypatch, patched, message
):
    interrupted(TINY, few_digits, tmp_path, epochs=1)
    monkeypatch.setattr(*patched)
    with pytest.warns(UserWarning, match=message):
        train(TINY, few_digits, log_folder=tmp_path, progress=False)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"state": {"x": Evil()}, "conditions": {}}, buffer)
    content = buffer.getvalue()
    (tmp_path / CHECKPOINT).write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.warns(UserWarning, match="is not used"):
        assert checkpoint.resume(tmp_path, {}, {}) == ([], [])
    assert not (tmp_path / "executed").exists()
