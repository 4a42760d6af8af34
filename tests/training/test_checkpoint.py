import hashlib
import io
from dataclasses import replace

import pytest
import torch
from outcomes import Evil, assert_same_result

from nbutils import RunConfig, train
from nbutils.training import checkpoint, setup
from nbutils.training.checkpoint import CHECKPOINT

TINY = RunConfig(batch_size=64, epochs=3, device="cpu")  # shrunken for speed

SETTINGS = [
    {},
    {"norm": "ghost", "optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-3},
    {"schedule": "one-cycle", "learning_rate": 4e-3, "augment": True},
    {"norm": "batch", "accumulation_steps": 2, "augment": True},
    {"norm": "none", "last_window": "drop", "precision": "bfloat16"},
]


def interrupted(config, data, folder, epochs):
    """Train, and be interrupted as soon as this many more epochs are saved."""
    saves = []
    save = checkpoint.save

    def counted(*arguments):
        save(*arguments)
        saves.append(arguments)
        if len(saves) == epochs:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", counted)
        with pytest.raises(KeyboardInterrupt):
            train(config, data, log_folder=folder, progress=False)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_resumed_run_ends_bitwise_as_an_uninterrupted_one(few_digits, tmp_path, settings, device):
    config = replace(TINY, device=device, **settings)
    whole = train(config, few_digits, progress=False)
    for _ in range(2):  # each time after one more epoch
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
    assert_same_result(resumed, whole)


def test_a_finished_run_is_not_trained_again(few_digits, tmp_path, capsys):
    first = train(TINY, few_digits, log_folder=tmp_path, progress=False)
    again = train(TINY, few_digits, log_folder=tmp_path)
    assert_same_result(again, first)
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
def test_a_damaged_checkpoint_is_not_used_and_a_warning_says_so(tmp_path, damage):
    path = tmp_path / CHECKPOINT
    checkpoint.save(tmp_path, {}, ([{"epoch": 1}], []), {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"checkpoint.pt is not used.*: it is damaged"):
        assert checkpoint.resume(tmp_path, {}, {}) == ([], [])


def test_a_run_with_other_settings_starts_again(few_digits, tmp_path):
    interrupted(TINY, few_digits, tmp_path, epochs=1)
    config = replace(TINY, seed=1, epochs=2)
    message = "checkpoint.pt is not used, the run starts again: epochs was 3 and is 2; seed was 0 "
    with pytest.warns(UserWarning, match=message):
        result = train(config, few_digits, log_folder=tmp_path, progress=False)
    assert_same_result(result, train(config, few_digits, progress=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda patch, data: replace(data, test=data.validation), "images was"),
        (lambda patch, _: patch.setattr(torch, "__version__", "2.0.0"), "torch was .* is '2.0.0'"),
        (lambda patch, _: patch.setattr(torch, "get_num_threads", lambda: 77), "threads was 1 and"),
    ],
)
def test_a_checkpoint_made_elsewhere_is_not_used(
    few_digits, tmp_path, monkeypatch, change, message
):
    def conditions(data):
        return setup.conditions(TINY, data, torch.device("cpu"), TINY.batch_size, False)

    checkpoint.save(tmp_path, {}, ([{"epoch": 1}], []), conditions(few_digits))
    here = conditions(change(monkeypatch, few_digits) or few_digits)
    with pytest.warns(UserWarning, match=f"the run starts again: {message}"):
        assert checkpoint.resume(tmp_path, {}, here) == ([], [])


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"state": {"x": Evil()}, "conditions": {}}, buffer)
    content = buffer.getvalue()
    (tmp_path / CHECKPOINT).write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.warns(UserWarning, match="is not used"):
        assert checkpoint.resume(tmp_path, {}, {}) == ([], [])
    assert not (tmp_path / "executed").exists()
