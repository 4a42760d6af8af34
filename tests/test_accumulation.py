import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nbutils.accumulation import accumulate_gradient, updates_per_epoch, windows

sizes = st.integers(1, 200)
few = st.integers(1, 20)


@given(images=sizes, batch_size=few, accumulation_steps=few)
def test_windows_cut_the_order_into_full_windows_and_one_short_one(
    images, batch_size, accumulation_steps
):
    order = torch.randperm(images)
    cut = list(windows(order, batch_size, accumulation_steps))
    assert torch.equal(torch.cat([m for window in cut for m in window]), order)
    assert len(cut) == math.ceil(images / (batch_size * accumulation_steps))
    for window in cut[:-1]:
        assert [len(m) for m in window] == [batch_size] * accumulation_steps
    last = [len(m) for m in cut[-1]]
    assert len(last) <= accumulation_steps
    assert all(size == batch_size for size in last[:-1])
    assert 1 <= last[-1] <= batch_size


@given(images=sizes, batch_size=few, accumulation_steps=few)
def test_drop_leaves_out_the_short_last_window_and_nothing_else(
    images, batch_size, accumulation_steps
):
    order = torch.randperm(images)
    effective = batch_size * accumulation_steps
    cut = list(windows(order, batch_size, accumulation_steps, "drop"))
    assert all(sum(map(len, window)) == effective for window in cut)
    assert len(cut) == images // effective


@given(images=sizes, batch_size=few, steps=few, last=st.sampled_from(["step", "drop"]))
def test_updates_per_epoch_counts_the_windows(images, batch_size, steps, last):
    cut = list(windows(torch.arange(images), batch_size, steps, last))
    assert updates_per_epoch(images, batch_size * steps, last) == len(cut)


def test_the_windows_of_60_000_images():
    cut = list(windows(torch.arange(60_000), 128, 8))
    assert len(cut) == 59
    assert [len(m) for m in cut[-1]] == [128, 128, 128, 128, 96]


@given(images=st.integers(1, 60), batch_size=few, seed=st.integers(0, 1000))
def test_the_gradient_of_a_window_is_that_of_one_batch(images, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(images, 5, dtype=torch.float64, generator=generator)
    labels = torch.randint(3, (images,), generator=generator)
    weight = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()

    F.cross_entropy(inputs @ weight, labels).backward()
    one_batch, weight.grad = weight.grad, None
    accumulate_gradient(
        torch.randperm(images).split(batch_size),
        lambda m: F.cross_entropy(inputs[m] @ weight, labels[m], reduction="none"),
    )
    assert torch.allclose(weight.grad, one_batch, rtol=1e-12, atol=1e-14)


def test_it_adds_to_the_gradient_that_is_there():
    weight = torch.tensor([2.0], requires_grad=True)
    weight.grad = torch.tensor([10.0])
    accumulate_gradient([torch.tensor([1.0, 3.0])], lambda inputs: weight * inputs)
    assert weight.grad.item() == 12


def test_micro_batches_of_another_kind_with_their_size():
    weight = torch.tensor([1.0], requires_grad=True)
    window = [{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([6.0])}]
    accumulate_gradient(window, lambda m: weight * m["x"], size=lambda m: len(m["x"]))
    assert weight.grad.item() == 3


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda losses: losses[:-1]])
def test_a_loss_that_is_not_one_an_image_is_refused(reduce):
    weight = torch.tensor([1.0], requires_grad=True)
    window = torch.arange(10.0).split(4)
    with pytest.raises(ValueError, match="micro-batch 1 of 3: losses have shape"):
        accumulate_gradient(window, lambda inputs: reduce(weight * inputs))
    assert weight.grad is None
