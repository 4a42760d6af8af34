import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from nbutils import DigitCNN, InputError, RunConfig, train
from nbutils.training.train import HISTORY_COLUMNS, resolve_device

TINY = RunConfig(batch_size=64, epochs=2, device="cpu")  # shrunken for speed


def history(config, data):
    return train(config, data, progress=False).history.drop(columns="seconds")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulation_steps": 3, "augment": True},
        {"norm": "ghost", "optimizer": "sgd", "momentum": 0.9, "schedule": "one-cycle"},
        {"norm": "batch", "last_window": "drop", "weight_decay": 1e-3},
        {"norm": "none", "precision": "bfloat16"},
    ],
)
def test_the_same_config_gives_bitwise_the_same_history(few_digits, settings):
    config = replace(TINY, **settings)
    first = history(config, few_digits)
    torch.rand(3)  # what others draw in between must not matter
    pd.testing.assert_frame_equal(first, history(config, few_digits), check_exact=True)
    assert not first.equals(history(replace(config, seed=1), few_digits))


def test_training_leaves_torch_as_it_was(few_digits):
    state = torch.get_rng_state()
    history(TINY, few_digits)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def plain_loop(config, data):
    """The usual training loop with one batch an update; weights after it and its history."""
    device, dtype = torch.device("cpu"), torch.float64
    train_images = data.normalised(data.train.images, device, dtype)
    torch.manual_seed(config.seed)
    model = DigitCNN(config.norm).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    rows = []
    for _ in range(config.epochs):
        model.train()
        order = torch.randperm(len(train_images), generator=generator)
        loss_sum = correct = 0
        for batch in order.split(config.effective_batch_size):
            logits = model(train_images[batch])
            loss = F.cross_entropy(logits, data.train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(batch)
            correct += (logits.argmax(1) == data.train.labels[batch]).sum().item()
        row = {"train_loss": loss_sum / len(order), "train_accuracy": correct / len(order)}
        model.eval()
        with torch.no_grad():
            for name in ("validation", "test"):
                split = getattr(data, name)
                logits = model(data.normalised(split.images, device, dtype))
                row[f"{name}_loss"] = F.cross_entropy(logits, split.labels).item()
                right = (logits.argmax(1) == split.labels).double()
                row[f"{name}_accuracy"] = right.mean().item()
        rows.append(row)
    return model, pd.DataFrame(rows)


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize(("batch_size", "steps"), [(96, 1), (32, 3), (12, 8), (1, 96)])
def test_accumulation_trains_as_the_plain_loop_with_the_large_batch(
    few_digits, norm, batch_size, steps
):
    config = replace(
        TINY,
        batch_size=batch_size,
        accumulation_steps=steps,
        norm=norm,
        dropout=0.0,
        precision="float64",
    )
    result = train(config, few_digits, progress=False)
    model, expected = plain_loop(config, few_digits)
    for ours, theirs in zip(result.model.parameters(), model.parameters(), strict=True):
        # Adam divides by the root of squared gradients, which enlarges rounding of tiny ones.
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm()
    for column in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert result.history[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-9)
    assert (
        result.history["validation_accuracy"].tolist() == expected["validation_accuracy"].tolist()
    )


def test_the_start_and_the_order_do_not_depend_on_the_batch_size(few_digits):
    config = replace(TINY, epochs=1, learning_rate=1e-30, dropout=0.0, precision="float64")
    losses = [
        history(replace(config, batch_size=size, accumulation_steps=steps), few_digits)[
            "train_loss"
        ]
        for size, steps in ((300, 1), (32, 1), (7, 5))
    ]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-12)
    assert losses[2].item() == pytest.approx(losses[0].item(), rel=1e-12)


def test_what_a_result_holds(few_digits, tmp_path):
    config = replace(TINY, accumulation_steps=2, epochs=3)
    result = train(config, few_digits, log_folder=tmp_path / "new", progress=False)
    assert result.history.dtypes.astype(str).to_dict() == HISTORY_COLUMNS
    assert result.history["epoch"].tolist() == [1, 2, 3]
    assert result.history["updates"].tolist() == [3, 6, 9]  # 300 images: 128 + 128 + 44
    assert result.history["seconds"].is_monotonic_increasing
    assert result.images_per_epoch == 300
    assert result.peak_memory > 1e6
    assert result.predictions.dtype == torch.uint8
    correct = (result.predictions == few_digits.test.labels).double().mean().item()
    assert correct == result.history["test_accuracy"].iloc[-1]
    assert not result.model.training
    log = pd.read_csv(tmp_path / "new" / "progress.csv")
    pd.testing.assert_frame_equal(log, result.history, check_exact=True)


def test_drop_uses_full_windows_only(few_digits):
    result = train(replace(TINY, last_window="drop"), few_digits, progress=False)
    assert result.images_per_epoch == 256
    assert result.history["updates"].tolist() == [4, 8]


def test_one_cycle_ends_at_a_rate_near_zero(few_digits):
    config = replace(TINY, schedule="one-cycle", learning_rate=0.01, epochs=3)
    assert history(config, few_digits)["train_loss"].iloc[-1] < 2.3


def test_it_learns(digits):
    config = RunConfig(epochs=3, device="cpu")
    result = train(config, digits, progress=False)
    assert result.history["test_accuracy"].iloc[-1] > 0.93


def test_a_diverged_run_says_so_in_its_history(few_digits):
    config = replace(TINY, norm="none", optimizer="sgd", learning_rate=1e20)
    assert not math.isfinite(history(config, few_digits)["train_loss"].iloc[-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 301}, "batch_size = 301, but 'few-digits' has only 300 images"),
        ({"batch_size": 64, "accumulation_steps": 5}, r"effective_batch_size .* = 320, but"),
    ],
)
def test_an_update_larger_than_the_training_set_is_refused(few_digits, settings, message):
    with pytest.raises(InputError, match=message):
        train(replace(TINY, **settings), few_digits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_device_that_is_not_there_is_refused(few_digits, name):
    with pytest.raises(InputError, match=f"device = '{name}', but this machine has no CUDA device"):
        train(replace(TINY, device=name), few_digits)
    assert resolve_device("auto").type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_the_same_config_gives_the_same_history(few_digits):
    config = replace(TINY, device="cuda")
    pd.testing.assert_frame_equal(
        history(config, few_digits), history(config, few_digits), check_exact=True
    )
