import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nbutils import DigitCNN, InputError, RunConfig, train, train_many

TINY = RunConfig(batch_size=64, epochs=2, device="cpu")  # shrunken for speed

HISTORY_COLUMNS = {
    "epoch": "int64",
    "train_loss": "float64",
    "train_accuracy": "float64",
    "validation_accuracy": "float64",
    "test_loss": "float64",
    "test_accuracy": "float64",
    "updates": "int64",
    "seconds": "float64",
}

SETTINGS = [
    {},
    {"accumulation_steps": 3, "augment": True},
    {"norm": "ghost", "optimizer": "sgd", "momentum": 0.9, "schedule": "one-cycle"},
    {"norm": "batch", "last_window": "drop", "weight_decay": 1e-3},
    {"norm": "none", "precision": "bfloat16"},
]


def history(config, data, **options):
    return train(config, data, progress=False, **options).history.drop(columns="seconds")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_config_gives_bitwise_the_same_history(few_digits, settings):
    config = replace(TINY, **settings)
    first = history(config, few_digits)
    torch.rand(3)  # what others draw in between must not matter
    pd.testing.assert_frame_equal(first, history(config, few_digits), check_exact=True)


def test_another_seed_trains_otherwise_and_leaves_torch_as_it_was(few_digits):
    state = torch.get_rng_state()
    assert not history(TINY, few_digits).equals(history(replace(TINY, seed=1), few_digits))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def textbook_loop(config, data):
    """The usual loop with one large batch per update, in float64; its weights and losses."""
    images = data.normalised(data.train.images, torch.device("cpu"), torch.float64)
    torch.manual_seed(config.seed)
    model = DigitCNN(config.norm).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    losses = []
    for _ in range(config.epochs):
        order = torch.randperm(len(images), generator=generator)
        loss_sum = 0.0
        for batch in order.split(config.effective_batch_size):
            loss = F.cross_entropy(model(images[batch]), data.train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(batch)
        losses.append(loss_sum / len(order))
    return model, losses


@pytest.mark.parametrize(("batch_size", "steps"), [(96, 1), (32, 3), (7, 11), (1, 96)])
def test_accumulation_trains_as_the_textbook_loop_with_the_large_batch(
    few_digits, batch_size, steps
):
    sizes = {"batch_size": batch_size, "accumulation_steps": steps}
    config = replace(TINY, **sizes, dropout=0.0, precision="float64")
    data = few_digits.subset(101)  # windows of 96 and 5
    result = train(config, data, progress=False)
    model, losses = textbook_loop(config, data)
    for ours, theirs in zip(result.model.parameters(), model.parameters(), strict=True):
        # Adam divides by the root of squared gradients, which enlarges rounding of tiny ones.
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm()
    assert result.history["train_loss"].tolist() == pytest.approx(losses, rel=1e-9)


def test_the_start_and_the_order_do_not_depend_on_the_batch_size(few_digits):
    still = replace(TINY, epochs=1, learning_rate=1e-30, dropout=0.0, precision="float64")
    one, *others = (
        history(replace(still, batch_size=size, accumulation_steps=steps), few_digits)
        for size, steps in ((300, 1), (60, 1), (17, 5))
    )
    for other in others:
        assert other["train_loss"].item() == pytest.approx(one["train_loss"].item(), rel=1e-12)


def test_what_a_result_holds(few_digits, tmp_path):
    config = replace(TINY, accumulation_steps=2, epochs=6)
    result = train(config, few_digits, log_folder=tmp_path / "new", progress=False)
    columns = result.history.dtypes.astype(str).items()
    assert list(columns) == list(HISTORY_COLUMNS.items())
    assert result.history["epoch"].tolist() == [1, 2, 3, 4, 5, 6]
    assert result.history["updates"].tolist() == [3, 6, 9, 12, 15, 18]  # 128 + 128 + 44 images
    assert result.history["seconds"].is_monotonic_increasing
    assert result.images_per_epoch == 300
    assert result.peak_memory > 1e6
    assert result.late_predictions.dtype == torch.uint8
    assert len(result.late_predictions) == 5
    right = (result.late_predictions == few_digits.test.labels).double().mean(1)
    assert right.tolist() == result.history["test_accuracy"].iloc[-5:].tolist()
    assert torch.equal(result.predictions, result.late_predictions[-1])
    assert not result.model.training
    log = pd.read_csv(tmp_path / "new" / "progress.csv")
    pd.testing.assert_frame_equal(log, result.history, check_exact=True)


def test_drop_uses_full_windows_only(few_digits):
    result = train(replace(TINY, last_window="drop"), few_digits, progress=False)
    assert result.images_per_epoch == 256
    assert result.history["updates"].tolist() == [4, 8]


def test_it_learns(digits):
    result = train(RunConfig(batch_size=64, epochs=1, device="cpu"), digits, progress=False)
    assert result.history["test_accuracy"].iloc[-1] > 0.85


def test_a_diverged_run_says_so_in_its_history(few_digits):
    config = replace(TINY, norm="none", optimizer="sgd", learning_rate=1e20)
    assert not math.isfinite(history(config, few_digits)["train_loss"].iloc[-1])


def test_one_cycle_ends_at_a_rate_near_zero(few_digits):
    config = replace(TINY, schedule="one-cycle", learning_rate=1e-2, epochs=1)
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    train(config, few_digits, progress=False)
    hook.remove()
    assert max(rates) == pytest.approx(1e-2, rel=0.2)
    assert rates[-1] < rates[0] < max(rates)


def test_after_each_update_a_caller_may_look(few_digits):
    seen = []
    result = train(
        TINY,
        few_digits,
        progress=False,
        after_update=lambda updates, model: seen.append((updates, model.training)),
    )
    assert seen == [(update, True) for update in range(1, 11)]
    assert history(TINY, few_digits).equals(result.history.drop(columns="seconds"))


def test_train_many_gives_each_its_solo_result(few_digits):
    configs = [replace(TINY, seed=1), replace(TINY, norm="batch", augment=True, epochs=3)]
    together = train_many(configs, few_digits, progress=False)
    assert [result.config for result in together] == configs
    for config, result in zip(configs, together, strict=True):
        assert history(config, few_digits).equals(result.history.drop(columns="seconds"))
    assert train_many([], few_digits) == []


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


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_on_cuda_the_same_config_gives_the_same_history(few_digits, settings, device):
    config = replace(TINY, device=device, **settings)
    first, second = (history(config, few_digits) for _ in range(2))
    pd.testing.assert_frame_equal(first, second, check_exact=True)
