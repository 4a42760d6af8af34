import itertools
import math
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nbutils.accumulation import accumulate_gradient, updates_per_epoch, windows, windows_of_batches
from nbutils.accumulation.equivalence import OPTIMIZERS
from nbutils.accumulation.out_of_memory import FITTING

few = st.integers(1, 20)
last_windows = st.sampled_from(["step", "drop"])


@given(images=st.integers(0, 200), batch_size=few, steps=few, last=last_windows)
def test_windows_cut_the_order_into_full_windows_and_one_short_one(images, batch_size, steps, last):
    order, effective = torch.randperm(images), batch_size * steps
    cut = list(windows(order, batch_size, steps, last))
    kept = images if last == "step" else images // effective * effective
    assert torch.equal(torch.cat([order[:0], *(m for window in cut for m in window)]), order[:kept])
    assert len(cut) == updates_per_epoch(images, effective, last) == math.ceil(kept / effective)
    for window in cut[:-1]:
        assert [len(m) for m in window] == [batch_size] * steps
    for window in cut:
        assert [len(m) for m in window[:-1]] == [batch_size] * (len(window) - 1)
        assert 1 <= len(window) <= steps
        assert 1 <= len(window[-1]) <= batch_size


@given(batches=st.integers(0, 40), steps=few, last=last_windows)
def test_windows_of_batches_gathers_what_a_loader_yields(batches, steps, last):
    cut = list(windows_of_batches(iter(range(batches)), steps, last))
    kept = batches if last == "step" else batches // steps * steps
    assert [batch for window in cut for batch in window] == list(range(kept))
    assert all(len(window) == steps for window in cut[:-1])


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def examples(images, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(images, 5, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(3, (images,), generator=generator)


def assert_same(model, whole, grad=False, rtol=1e-12):
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        pair = (mine.grad, theirs.grad) if grad else (mine.detach(), theirs.detach())
        torch.testing.assert_close(*pair, rtol=rtol, atol=1e-14)


def assert_one_batch(model, whole, window, losses, one_batch, **options):
    """A window gives the mean loss `one_batch` of the whole model, and its gradient."""
    loss = accumulate_gradient(model, window, losses, **options)
    one_batch.backward()
    torch.testing.assert_close(loss, one_batch.detach(), rtol=1e-12, atol=0)
    assert_same(model, whole, grad=True)


@settings(max_examples=15)
@given(
    images=st.integers(1, 60),
    batch_size=few,
    steps=few,
    optimizer=st.sampled_from(["momentum", "AdamW"]),
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
    assert_same(accumulated, whole, rtol=1e-7 if optimizer == "AdamW" else 1e-10)


@dataclass
class Sample:
    name: str
    inputs: torch.Tensor
    labels: torch.Tensor


class Encoding(UserDict):
    """As transformers' BatchEncoding."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Graphs:
    """Two nodes per graph; the losses are those of the graphs."""

    def __init__(self, inputs, labels):
        self.store = {"nodes": inputs.repeat_interleave(2, 0), "labels": labels}
        self.edges = torch.zeros(2, 3 * len(labels), dtype=torch.long)


class Slots:
    """Nothing can be seen from outside, and what is asked for may raise any error."""

    __slots__ = ("inputs", "labels")

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __getattr__(self, name):
        raise KeyError(name)


def without_names(names, x, y):
    assert len(names) == len(y)
    return x, y


KINDS = {
    "pair": (lambda x, y: (x, y), lambda b: b),
    "text first": (lambda x, y: (["1.png"] * len(y), x, y), lambda b: without_names(*b)),
    "numbers first": (lambda x, y: [list(range(len(y))), x, y], lambda b: b[1:]),
    "None and scalar first": (lambda x, y: (None, torch.tensor(0.5), x, y), lambda b: b[2:]),
    "arrays": (lambda x, y: (x.numpy(), y.numpy()), lambda b: map(torch.as_tensor, b)),
    "samples": (
        lambda x, y: list(zip(x, y, strict=True)),
        lambda b: map(torch.stack, zip(*b, strict=True)),
    ),
    "dict": (
        lambda x, y: {"lr": 0.1, "x": x, "y": y, "names": ("1.png",) * len(y)},
        lambda b: without_names(b["names"], b["x"], b["y"]),
    ),
    "nested": (lambda x, y: [[x], {"y": y}], lambda b: (b[0][0], b[1]["y"])),
    "dataclass": (lambda x, y: Sample("a", x, y), lambda b: (b.inputs, b.labels)),
    "encoding": (lambda x, y: Encoding(x=x, y=y), lambda b: (b.x, b.y)),
    "graphs": (Graphs, lambda b: (b.store["nodes"][::2], b.store["labels"])),
    "slots": (Slots, lambda b: (b.inputs, b.labels)),
}
"""How a batch is packed, and how images and labels are taken out of it."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_one_batch_whatever_a_loader_yields(kind):
    pack, unpack = KINDS[kind]
    inputs, labels = examples(10, 0)
    model, whole = classifier(), classifier()
    head, whole_head = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
    whole_head.load_state_dict(head.state_dict())
    for each in (model, whole, head, whole_head):
        for parameter in each.parameters():
            parameter.grad = torch.full_like(parameter, 3)  # it is added to what is there

    def losses(micro_batch):
        x, y = unpack(micro_batch)
        return F.cross_entropy(head(model(x)), y, reduction="none")  # only the loss has the head

    window = (pack(x, y) for x, y in zip(inputs.split(4), labels.split(4), strict=True))
    one_batch = F.cross_entropy(whole_head(whole(inputs)), labels)
    assert_one_batch(model, whole, window, losses, one_batch)
    assert_same(head, whole_head, grad=True)


class_weights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_index": -100},
        {"weight": class_weights},
        {"label_smoothing": 0.2},
        {"ignore_index": -100, "weight": class_weights, "label_smoothing": 0.2},
    ],
    ids=["ignored", "weighted", "smooth", "all"],
)
def test_tokens_of_any_weight_are_those_of_one_batch(options):
    sequences, labels = examples(6 * 4, 0)
    sequences, labels = sequences.view(6, 4, 5), labels.view(6, 4)
    if "ignore_index" in options:
        labels[0, 1:] = labels[4] = labels[5] = -100
    model, whole = classifier(), classifier()

    def losses(batch):
        x, y = batch
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none", **options)

    def weight(batch):
        kept = batch[1][batch[1] != -100]
        return class_weights[kept].sum() if "weight" in options else len(kept)

    window = list(zip(sequences.split([1, 3, 2]), labels.split([1, 3, 2]), strict=True))
    one_batch = F.cross_entropy(whole(sequences).flatten(0, 1), labels.flatten(), **options)
    assert_one_batch(model, whole, window, losses, one_batch, weight=weight)


def test_one_labelled_token_is_not_taken_for_an_average():
    model, whole = classifier(), classifier()
    inputs, labels = examples(9, 0)
    labels[:2] = -100  # of the first three, one is left

    def losses(batch):
        kept = batch[1] >= 0
        return F.cross_entropy(model(batch[0])[kept], batch[1][kept], reduction="none")

    window = list(zip(inputs.split(3), labels.split(3), strict=True))
    one_batch = F.cross_entropy(whole(inputs), labels)
    assert_one_batch(
        model, whole, window, losses, one_batch, weight=lambda batch: (batch[1] >= 0).sum()
    )


def test_an_earlier_gradient_neither_overflows_nor_needs_to_be_a_leaf():
    model = nn.Linear(1, 1, bias=False).half()
    window = [torch.ones(images, 1).half() for images in (7, 7, 7, 2)]
    batches = [[images] for images in window]  # no plain tensors: their number is not known

    def losses(batch):
        return model(batch[0]).squeeze(1)

    model.weight.grad = torch.full((1, 1), 6e4).half()
    accumulate_gradient(model, batches, losses)
    assert model.weight.grad.item() == 6e4
    model.weight.grad = torch.full((1, 1), 2.0).half().requires_grad_() * 1
    accumulate_gradient(model, batches, losses)
    assert model.weight.grad.item() == pytest.approx(3, rel=1e-2)


def one_weight():
    """The smallest model: one number. The loss of an image is the number times the image."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return model, lambda images: model(images.view(-1, 1)).squeeze(1)


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
    assert_same(model, whole)


def refused(model, window, losses, message, **options):
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        accumulate_gradient(model, window, losses, update=7, **options)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def tokens(sequences, length):
    return torch.ones(sequences, length, 1), torch.zeros(sequences, length)


@pytest.mark.parametrize(
    ("micro_batch", "shape", "options", "message"),
    [
        (tokens(3, 4), (), {}, r'shape \(\), .* reduction="none".* weight=lambda'),
        (tokens(3, 4), (), {"weight": len}, 'already averaged or summed.* reduction="none"'),
        (tokens(3, 4), (1,), {"weight": len}, "already averaged or summed"),
        (tokens(3, 4), (12,), {}, r"shape \(12,\), .*not one loss per image.* weight=lambda"),
        (tokens(3, 4), (3, 4), {}, r"shape \(3, 4\), .* weight=lambda"),
        (tokens(3, 4), (2,), {}, "weight=lambda"),  # as many as the tuple has parts
        (Sample("a", *tokens(3, 4)), (12,), {}, "weight=lambda"),
        (Encoding(x=tokens(3, 4)[0]), (12,), {}, "weight=lambda"),
        (torch.ones(3), (6,), {}, "weight=lambda"),  # two labels per image
    ],
)
def test_losses_that_are_reduced_or_not_one_per_image_are_refused(
    micro_batch, shape, options, message
):
    model, _ = one_weight()
    message = f"update 7, micro-batch 1 of 1: losses have .*{message}"
    refused(model, [micro_batch], lambda _: model.weight.sum().expand(shape), message, **options)


def test_an_averaged_loss_in_a_later_micro_batch_is_refused_without_a_trace():
    model, losses = one_weight()

    def sometimes(images):
        return losses(images) if len(images) == 4 else losses(images).mean()

    pairs = [(part, part) for part in torch.arange(10.0).split(4)]
    message = "update 7, micro-batch 3 of 3: losses"
    refused(model, pairs, lambda pair: sometimes(pair[0]), message)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_by_place(bad):
    model, losses = one_weight()
    images = torch.arange(10.0)
    images[5] = bad
    message = f"update 7, micro-batch 2 of 3: the loss is {bad}"
    refused(model, images.split(4), losses, message)
    accumulate_gradient(model, images.split(4), losses, check_finite=False)
    assert not model.weight.grad.isfinite().any()


def test_a_gradient_that_is_not_finite_is_refused_but_left_to_a_scaler():
    model, losses = one_weight()

    def root(images):
        return losses(images).sqrt()  # the slope of the root of zero is infinite

    window = [torch.zeros(2)]
    refused(model, window, root, "update 7: the gradient of weight is not finite")
    accumulate_gradient(model, window, root, check_finite=False)
    assert not model.weight.grad.isfinite().any()

    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accumulate_gradient(model, window, root, backward=lambda loss: scaler.scale(loss).backward())
    scaler.step(optimizer)
    scaler.update()
    assert model.weight.item() == 1
    assert scaler.get_scale() == 2.0**15


@pytest.mark.parametrize(
    ("window", "options", "message"),
    [
        ([], {}, "update 7: the window is empty"),
        (iter([]), {}, "update 7: the window is empty"),
        ([torch.arange(0.0)], {}, "update 7: the losses of the window weigh nothing"),
        ([torch.arange(3.0)], {"weight": lambda _: 0.0}, "weigh nothing"),
        ([torch.arange(3.0)], {"weight": lambda _: math.nan}, "weight returned"),
        (itertools.repeat(torch.arange(3.0)), {}, "endless"),
    ],
)
def test_a_window_of_no_weight_or_no_end_is_refused(window, options, message):
    model, losses = one_weight()
    refused(model, window, losses, message, **options)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        *((w, "must be a list of micro-batches") for w in (None, 3, "text", {"x": torch.ones(3)})),
        ([torch.ones(3)], "losses returned tuple"),
    ],
)
def test_what_is_no_list_of_micro_batches_or_no_tensor_of_losses_is_refused(window, message):
    with pytest.raises(TypeError, match=message):
        accumulate_gradient(one_weight()[0], window, lambda images: (images, 1))


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "4", None])
def test_arguments_are_refused_by_name_at_the_call(wrong):
    order = torch.arange(10)
    for name, call in {
        "batch_size": lambda: windows(order, wrong, 2),
        "accumulation_steps": lambda: windows(order, 2, wrong),
        "accumulation_steps ": lambda: windows_of_batches([order], wrong),
        "effective_batch_size": lambda: updates_per_epoch(10, wrong),
        "last_window": lambda: windows(order, 2, 2, wrong),
        "last_window ": lambda: windows_of_batches([order], 2, wrong),
        "last_window  ": lambda: updates_per_epoch(10, 2, wrong),
    }.items():
        with pytest.raises(ValueError, match=f"^{name.strip()} = {wrong!r}, but it must be"):
            call()


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


class Small(nn.Module):
    """Runs out of memory with more than `room` images, in the forward or the backward pass."""

    def __init__(self, room, where="forward"):
        super().__init__()
        self.layer, self.room, self.where, self.passes = nn.Linear(5, 3).double(), room, where, []

    def forward(self, images):
        self.passes.append(len(images))
        out = self.layer(images)
        if len(images) > self.room:
            if self.where == "forward":
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            out.register_hook(self.fail)
        return out

    def fail(self, _):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("pair", "backward"),
        *((kind, "forward") for kind in ("pair", "text first", "dict", "encoding")),
        ("None and scalar first", "forward"),
    ],
)
def test_micro_batches_that_do_not_fit_are_cut_and_the_update_stays_the_same(kind, where):
    pack, unpack = KINDS[kind]
    inputs, labels = examples(21, 0)
    window = [pack(x, y) for x, y in zip(inputs.split(8), labels.split(8), strict=True)]
    small, whole = Small(3, where), Small(100)
    whole.load_state_dict(small.state_dict())
    for model in (small, whole):  # a gradient from before is kept
        model.layer.weight.grad = torch.ones(3, 5).double()

    def losses(batch):
        x, y = unpack(batch)
        return F.cross_entropy(small(x), y, reduction="none")

    one_batch = F.cross_entropy(whole(inputs), labels)
    with pytest.warns(UserWarning, match="of 8 images does not fit .* pieces of at most 2"):
        assert_one_batch(small, whole, window, losses, one_batch, on_oom="split")
    small.passes.clear()  # the size that fits is remembered, without another warning
    accumulate_gradient(small, window, losses, on_oom="split")
    assert small.passes == [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]


def test_what_cannot_be_cut_without_changing_the_update_is_refused():
    def losses(batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    window = [examples(4, 0)]
    for layer in (nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False).eval()):
        model = nn.Sequential(nn.Linear(5, 3), layer).double()
        with pytest.raises(ValueError, match="BatchNorm layer '1' normalises each image"):
            accumulate_gradient(model, window, losses, on_oom="split")
    with pytest.raises(ValueError, match="on_oom = 'spilt', but it must be"):
        accumulate_gradient(model, window, losses, on_oom="spilt")
    model = Small(0)
    with pytest.raises(RuntimeError, match="can't allocate"):  # not even one image fits
        accumulate_gradient(model, window, losses, on_oom="split")


def rows_of(batch):
    return torch.stack(batch).transpose(0, 1).flatten(0, 1)  # in one pass, as an RNN would


@pytest.mark.parametrize(
    ("micro_batch", "losses", "weight", "message"),
    [
        (  # time comes first
            (torch.randn(6, 4, 5).double(), torch.zeros(4)),
            lambda model, batch: model(batch[0].flatten(0, 1)).view(6, 4, 3).mean((0, 2)),
            None,
            r"micro-batch have unequal lengths: \[4, 6\]",
        ),
        (  # a list of sequences
            [torch.randn(6, 5).double() for _ in range(4)],
            lambda model, batch: model(rows_of(batch)).view(-1, 4, 3).mean((0, 2)),
            None,
            "there are 4 losses for 1 rows",
        ),
        (
            {"x": torch.randn(4, 5).double(), "items": 7},
            lambda model, batch: model(batch["x"]),
            lambda batch: batch["items"],
            "weighs 7, but its pieces 28",
        ),
    ],
)
def test_micro_batches_whose_rows_are_not_images_are_not_cut(micro_batch, losses, weight, message):
    model = Small(100)
    FITTING[model] = 1
    model.layer.weight.grad = torch.ones(3, 5).double()
    with pytest.raises(ValueError, match=message):
        accumulate_gradient(
            model, [micro_batch], lambda b: losses(model, b), weight=weight, on_oom="split"
        )
    assert model.layer.weight.grad is None
