import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from outcomes import assert_same_result, history
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nbutils import DigitCNN, InputError, RunConfig, train, train_many

TINY = RunConfig(batch_size=64, epochs=2, device="cpu")  # shrunken for speed

HISTORY_COLUMNS = (
    "epoch train_loss train_accuracy validation_accuracy test_loss test_accuracy updates seconds"
)


@pytest.mark.parametrize(
    "device", ["cpu", *(pytest.param(name, marks=pytest.mark.cuda) for name in ("cuda", "cuda:0"))]
)
def test_the_config_alone_decides_the_result_and_torch_is_left_as_it_was(few_digits, device):
    config = replace(TINY, accumulation_steps=3, augment=True, device=device)
    first = train(config, few_digits, progress=False)
    torch.rand(3)  # what others draw in between must not matter
    state = torch.get_rng_state()
    assert_same_result(train(config, few_digits, progress=False), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    other = train(replace(config, seed=1), few_digits, progress=False)
    assert not history(other).equals(history(first))


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
    losses = []
    for size, steps in ((300, 1), (60, 1), (17, 5)):
        config = replace(still, batch_size=size, accumulation_steps=steps)
        losses += train(config, few_digits, progress=False).history["train_loss"].tolist()
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


def test_what_a_result_holds(few_digits, tmp_path):
    config = replace(TINY, accumulation_steps=2, epochs=6)
    result = train(config, few_digits, log_folder=tmp_path / "new", progress=False)
    assert " ".join(result.history) == HISTORY_COLUMNS
    assert " ".join(result.history.select_dtypes("int64")) == "epoch updates"
    assert result.history.drop(columns=["epoch", "updates"]).dtypes.eq("float64").all()
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


def test_a_run_on_the_cpu_leaves_cuda_alone(few_digits, monkeypatch):
    for module, name in ((torch.cuda, "stream"), (torch.backends.cudnn, "flags")):
        monkeypatch.setattr(module, name, None)
    train(replace(TINY, device="cpu"), few_digits, progress=False)


def test_it_learns(digits):
    result = train(RunConfig(batch_size=64, epochs=1, device="cpu"), digits, progress=False)
    assert result.history["test_accuracy"].iloc[-1] > 0.85


def test_a_diverged_run_says_so_in_its_history(few_digits):
    config = replace(TINY, norm="none", optimizer="sgd", learning_rate=1e20)
    result = train(config, few_digits, progress=False)
    assert not math.isfinite(result.history["train_loss"].iloc[-1])


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
    look = lambda updates, model: seen.append((updates, model.training))  # noqa: E731
    train(TINY, few_digits, progress=False, after_update=look)
    assert seen == [(update, True) for update in range(1, 11)]


def test_without_configs_nothing_is_trained(few_digits):
    assert train_many([], few_digits) == []


@pytest.mark.parametrize(
    ("settings", "on_oom", "message"),
    [
        ({"batch_size": 301}, "stop", "batch_size = 301, but 'few-digits' has only 300 images"),
        ({"accumulation_steps": 5}, "stop", r"effective_batch_size .* = 320, but"),
        ({"device": "cuda:99"}, "stop", "device = 'cuda:99', but this machine has .* CUDA device"),
        ({"norm": "batch"}, "split", "on_oom = 'split', but norm = 'batch' normalises each"),
        ({"norm": "ghost"}, "split", "on_oom = 'split', but norm = 'ghost' normalises each"),
        ({}, "spilt", r"no on_oom 'spilt'; did you mean 'split'\?"),
    ],
)
def test_what_cannot_run_is_refused(few_digits, settings, on_oom, message):
    with pytest.raises(InputError, match=message):
        train(replace(TINY, **settings), few_digits, on_oom=on_oom)
