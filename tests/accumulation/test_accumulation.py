import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nbutils.accumulation.window import (
    accumulate_gradient,
    updates_per_epoch,
    windows,
    windows_of_batches,
)

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


@given(batches=st.integers(0, 40), steps=few, last=st.sampled_from(["step", "drop"]))
def test_windows_of_batches_gathers_what_a_loader_yields(batches, steps, last):
    cut = list(windows_of_batches(iter(range(batches)), steps, last))
    kept = batches if last == "step" else batches // steps * steps
    assert [batch for window in cut for batch in window] == list(range(kept))
    assert all(len(window) == steps for window in cut[:-1])
    assert all(window for window in cut)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def examples(images, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(images, 5, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(3, (images,), generator=generator)


def assert_same_weights(model, other, tolerance=1e-12):
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


@given(
    images=st.integers(1, 60),
    batch_size=few,
    steps=few,
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_two_epochs_with_any_windows_are_those_with_one_batch_an_update(
    images, batch_size, steps, optimizer, weighted, seed
):
    inputs, labels = examples(images, seed)
    classes = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64) if weighted else None
    accumulated, whole = classifier(), classifier()
    ours = OPTIMIZERS[optimizer](accumulated.parameters())
    theirs = OPTIMIZERS[optimizer](whole.parameters())

    def losses(m):
        return F.cross_entropy(accumulated(inputs[m]), labels[m], classes, reduction="none")

    def weight(m):
        return classes[labels[m]].sum().item()

    for epoch in range(2):
        order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch))
        for window in windows(order, batch_size, steps):
            ours.zero_grad()
            loss = accumulate_gradient(
                accumulated, window, losses, weight=weight if weighted else None
            )
            ours.step()
            batch = torch.cat(window)
            theirs.zero_grad()
            one_batch = F.cross_entropy(whole(inputs[batch]), labels[batch], classes)
            one_batch.backward()
            theirs.step()
            assert loss.item() == pytest.approx(one_batch.item(), rel=1e-9)
    # Adam divides by the root of squared gradients, which enlarges rounding of tiny ones.
    assert_same_weights(accumulated, whole, 1e-8 if optimizer.startswith("adam") else 1e-12)


@given(images=st.integers(1, 60), batch_size=few, seed=st.integers(0, 1000))
def test_the_gradient_of_a_window_is_that_of_one_batch(images, batch_size, seed):
    inputs, labels = examples(images, seed)
    model, whole = classifier(), classifier()
    accumulate_gradient(
        model,
        torch.randperm(images).split(batch_size),
        lambda m: F.cross_entropy(model(inputs[m]), labels[m], reduction="none"),
    )
    F.cross_entropy(whole(inputs), labels).backward()
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_micro_batches_as_a_loader_yields_them():
    inputs, labels = examples(10, 0)
    gradients = []
    for pack in (lambda x, y: (x, y), lambda x, y: {"x": x, "y": y}, lambda x, y: [[x], y]):
        model = classifier()
        window = [pack(inputs[:7], labels[:7]), pack(inputs[7:], labels[7:])]

        def losses(m, model=model):
            x, y = m.values() if isinstance(m, dict) else m
            x = x[0] if isinstance(x, list) else x
            return F.cross_entropy(model(x), y, reduction="none")

        accumulate_gradient(model, window, losses)
        gradients.append(model[0].weight.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def one_weight(value=1.0):
    """The smallest model: one number. The loss of an image is the number times the image."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model, lambda images: model(images.view(-1, 1)).squeeze(1)


def test_it_adds_to_the_gradient_that_is_there():
    model, losses = one_weight()
    model.weight.grad = torch.tensor([[10.0]])
    accumulate_gradient(model, [torch.tensor([1.0, 3.0])], losses)
    assert model.weight.grad.item() == 12


def test_clipping_goes_after_the_window_and_a_gradient_scaler_around_the_loss():
    inputs, labels = examples(20, 0)
    model, whole = classifier(), classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accumulate_gradient(
        model,
        torch.arange(20).split(6),
        lambda m: F.cross_entropy(model(inputs[m]), labels[m], reduction="none"),
        backward=lambda loss: scaler.scale(loss).backward(),
    )
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    scaler.step(optimizer)

    F.cross_entropy(whole(inputs), labels).backward()
    assert torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.01) > 0.01
    torch.optim.SGD(whole.parameters(), lr=1.0).step()
    assert_same_weights(model, whole)


def refused(model, window, losses, message, **options):
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        accumulate_gradient(model, window, losses, update=7, **options)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda losses: losses[:-1]])
def test_a_loss_that_is_not_one_an_image_is_refused(reduce):
    model, losses = one_weight()
    window = torch.arange(10.0).split(4)
    message = "update 7, micro-batch 1 of 3: losses have shape .* already averaged"
    refused(model, window, lambda images: reduce(losses(images)), message)


def test_an_averaged_loss_in_a_later_micro_batch_is_refused_without_a_trace():
    model, losses = one_weight()

    def sometimes(images):
        return losses(images) if len(images) == 4 else losses(images).mean()

    refused(model, torch.arange(10.0).split(4), sometimes, "update 7, micro-batch 3 of 3: losses")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_by_place(bad):
    model, losses = one_weight()
    images = torch.arange(10.0)
    images[5] = bad
    message = f"update 7, micro-batch 2 of 3: the loss is {bad}"
    refused(model, images.split(4), losses, message)
    accumulate_gradient(model, images.split(4), losses, check_finite=False)
    assert not model.weight.grad.isfinite().any()


def test_an_empty_window_is_refused():
    model, losses = one_weight()
    refused(model, [], losses, "update 7: the window is empty")
    refused(model, [torch.arange(0.0)], losses, "update 7: the window is empty")
    weightless = {"weight": lambda _: 0.0}
    refused(model, [torch.arange(3.0)], losses, "the window is empty or weighs", **weightless)


def test_a_model_without_parameters_is_refused():
    refused(nn.ReLU(), [torch.arange(3.0)], lambda m: m, "update 7: the model has no parameters")
    model, losses = one_weight()
    model.requires_grad_(False)
    refused(model, [torch.arange(3.0)], losses, "has no parameters that require a gradient")


def test_an_error_of_the_readers_own_goes_through_and_leaves_no_gradient():
    model, losses = one_weight()

    def broken(images):
        if 9 in images:
            raise RuntimeError("out of memory")
        return losses(images)

    with pytest.raises(RuntimeError, match="out of memory"):
        accumulate_gradient(model, torch.arange(10.0).split(4), broken)
    assert model.weight.grad is None


RANKS = 2


def of_rank(rank, window):
    """A window dealt to two ranks unequally: 7 images and 3, in 3 micro-batches and 2."""
    return (window[:7].split(3), window[7:].split(2))[rank]


def train_on_rank(rank, folder):
    """Three updates under DistributedDataParallel; counts the synchronisations."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    inputs, labels = examples(30, 0)
    model = DistributedDataParallel(classifier())
    reductions = []

    def count(_, bucket):
        reductions.append(1)
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / RANKS)

    model.register_comm_hook(None, count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for window in torch.arange(30).split(10):
        optimizer.zero_grad()
        accumulate_gradient(
            model,
            of_rank(rank, window),
            lambda m: F.cross_entropy(model(inputs[m]), labels[m], reduction="none"),
        )
        optimizer.step()
    refusals = []
    for mine in ([], [torch.arange(4)])[rank], [torch.arange(2)]:
        try:
            accumulate_gradient(model, mine, lambda m: model(inputs[m]).sum(1))
            refusals.append(None)
        except ValueError as error:
            refusals.append(str(error))
    torch.save(
        {"weights": model.module.state_dict(), "reductions": len(reductions), "refusals": refusals},
        f"{folder}/rank{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_processes_train_as_one_with_one_synchronisation_an_update(tmp_path):
    torch.multiprocessing.spawn(train_on_rank, args=(str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]

    inputs, labels = examples(30, 0)
    alone = classifier()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for window in torch.arange(30).split(10):
        optimizer.zero_grad()
        F.cross_entropy(alone(inputs[window]), labels[window]).backward()
        optimizer.step()
    for rank in ranks:
        together = classifier()
        together.load_state_dict(rank["weights"])
        assert_same_weights(together, alone)
        # Three updates, and a fourth after a window that both ranks refused.
        assert rank["reductions"] == 3 + 1
        assert "the window is empty" in rank["refusals"][0]
        assert rank["refusals"][1] is None
