"""Right and wrong loops as people write them: each kind once, and what the report must say."""

import copy
import io
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.checkpoint import checkpoint
from training_loops import images_in, loop, step_schedule, sum_of_losses

from nbutils.accumulation import accumulate_gradient, check_accumulation, windows_of_batches
from nbutils.accumulation.check.report import CHANGES, RULES

right = loop()


def step_optimizer(model, optimizer, scheduler, window):
    optimizer.step()


def nothing(*_):
    pass


def decay(model, *_):
    model.weight.data.mul_(0.99)


def clip(maximum=1.0, clipper=clip_grad_norm_):
    return lambda model, *_: clipper(model.parameters(), maximum)


def on_gradient(change):
    return lambda model, o, s, window: change(model.weight.grad, images_in(window))


def on_images(change):
    return loop(forward=lambda model, images: model(change(images)))


def over(divisor, loss=sum_of_losses):
    return loop(loss=loss, divisor=divisor)


def scaled(*, unscale=True, clip_first=False, own_step=False, divide_late=False):
    def run(*given):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

        def before_step(model, optimizer, scheduler, window):
            if divide_late:
                model.weight.grad /= images_in(window)
            if clip_first:
                clip_grad_norm_(model.parameters(), 1.0)
            if unscale:
                scaler.unscale_(optimizer)
                clip_grad_norm_(model.parameters(), 1.0)

        def step(model, optimizer):
            if own_step:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()

        loop(
            divisor=lambda window, _: 1 if divide_late else images_in(window),
            backward=lambda loss: scaler.scale(loss).backward(),
            before_step=before_step,
            step=step,
        )(*given)

    return run


def add_gradients(model, window):
    for images, labels in window:
        (sum_of_losses(model(images), labels) / images_in(window)).backward()


def with_closure(clear=True):
    def run(model, optimizer, scheduler, batches, steps):
        for window in windows_of_batches(batches, steps):

            def closure(window=window):
                if clear:
                    optimizer.zero_grad()
                add_gradients(model, window)
                return torch.tensor(1.0)  # as a loss

            optimizer.step(closure)

    return run


def cleared_once_an_epoch(model, optimizer, *rest):
    optimizer.zero_grad()
    loop(clear=False, last_window="drop")(model, optimizer, *rest)


def updates_at(place):
    """The loop of tutorials: the number of the micro-batch tells when to update."""

    def run(model, optimizer, scheduler, batches, steps):
        for number, (images, labels) in enumerate(batches):
            (F.cross_entropy(model(images), labels) / steps).backward()
            if number % steps == place:
                optimizer.step()
                optimizer.zero_grad()

    return run


def running_sum(model, optimizer, scheduler, batches, steps):
    for window in windows_of_batches(batches, steps):
        optimizer.zero_grad()
        total = 0.0
        for images, labels in window:
            total = total + sum_of_losses(model(images), labels) / images_in(window)
            total.backward(retain_graph=True)
        optimizer.step()


def by_hand(model, optimizer, scheduler, batches, steps):
    for images, labels in batches:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            model.weight -= 0.1 * model.weight.grad


def of_batches(choose):
    return lambda m, o, s, batches, k: right(m, o, s, choose(batches, k), k)


def without_firsts(m, o, s, batches, k):
    right(m, o, s, [batch for number, batch in enumerate(batches) if number % k], k - 1)


def own_optimizer(model, optimizer, *rest):
    right(model, torch.optim.SGD(model.parameters(), lr=1e-9), *rest)


def gradients_outside(clip_each=None):
    """`torch.autograd.grad` per micro-batch, summed by hand."""

    def run(model, optimizer, scheduler, batches, steps):
        for window in windows_of_batches(batches, steps):
            total = torch.zeros_like(model.weight)
            for images, labels in window:
                loss = sum_of_losses(model(images), labels) / images_in(window)
                (part,) = torch.autograd.grad(loss, model.weight)
                total += part if clip_each is None else part * min(1.0, clip_each / part.norm())
            model.weight.grad = total
            optimizer.step()

    return run


def zero_then_forward(model, images):
    model.zero_grad()
    return model(images)


def sum_of_squares(logits, _):
    return logits.square().sum()


mean = F.cross_entropy
WRONG = {
    "own optimizer": (own_optimizer, "optimizer", "that the loop made itself"),
    "update by hand": (by_hand, "optimizer", "not by optimizer.step()"),
    "step inside": (loop(inside=step_optimizer), "one update", "16 updates in 4 windows"),
    "step twice": (loop(after_step=step_optimizer), "one update", "8 updates in 4 windows"),
    "no step": (nothing, "window length", "no update was made"),
    "step first": (updates_at(0), "window length", "after 1, 3, 3, 3 micro-batches, not 3"),
    "stops early": (
        of_batches(lambda batches, k: batches[:k]),
        "every image",
        "micro-batches 4, 5, 6 of 6",
    ),
    "skips first": (without_firsts, "every image", "micro-batches 1, 4 of 6"),
    "weight decay inside": (loop(inside=decay), "still weights", "between two micro-batches"),
    "too large": (over(lambda w, k: images_in(w) / 3), "division", "a gradient 3 times too large"),
    "never divided": (over(lambda *_: 1), "division", "never divided"),
    "divided twice": (over(lambda w, k: images_in(w) * k), "division", "0.333 of its right size"),
    "never unscaled": (scaled(unscale=False, own_step=True), "division", "6.55e+04 times"),
    "sum of means": (over(lambda *_: 1, mean), "division, equal weight", "micro-batches' means"),
    "mean of means": (over(lambda w, k: len(w), mean), "equal weight", "weighed 4 times as much"),
    "running sum": (running_sum, "equal weight", "weighed 3 : 2 : 1"),
    "tutorial": (over(lambda w, k: k, mean), "equal weight, short window", "8 images in a window"),
    "full divisor": (over(lambda *_: 12), "short window", "0.75 of its right size"),
    "carry-over": (updates_at(2), "equal weight, one epoch", "2 micro-batches of one epoch"),
    "cleared inside": (loop(forward=zero_then_forward), "whole gradient", "was lost"),
    "cleared early": (
        loop(before_step=lambda m, *_: m.zero_grad()),
        "whole gradient",
        "no gradient at all",
    ),
    "never cleared": (loop(clear=False), "whole gradient", "the window before it"),
    "never cleared in a closure": (with_closure(clear=False), "whole gradient", "before it"),
    "any loss, never cleared": (
        loop(loss=sum_of_squares, clear=False),
        "whole gradient",
        "the window before it",
    ),
    "cleared once an epoch, remainder dropped": (cleared_once_an_epoch, "whole gradient", "before"),
    "clipping inside": (loop(inside=clip()), "clipping", "between the backward passes"),
    "clipping values": (loop(inside=clip(clipper=clip_grad_value_)), "clipping", "between"),
    "clipping parts": (gradients_outside(clip_each=1.0), "clipping", "between"),
    "clipping before unscale_": (scaled(clip_first=True), "clipping", "the scaler's factor"),
    "clipping, never unscaled": (scaled(unscale=False, clip_first=True), "clipping", "factor"),
    "clipping, never cleared": (
        loop(clear=False, inside=clip()),
        "whole gradient, clipping",
        "between the backward passes",
    ),
    "schedule inside": (
        loop(inside=step_schedule, after_step=nothing),
        "schedule",
        "12 steps of the schedule for 4 updates",
    ),
    "schedule first": (
        loop(before_step=step_schedule, after_step=nothing),
        "schedule",
        "before the first update",
    ),
}


def validate(model, optimizer, scheduler, window):
    model.eval()
    with torch.no_grad():
        [model(images) for images, _ in window]
    model.train()


def helper(model, optimizer, scheduler, batches, steps):
    def losses(batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    for window in windows_of_batches(batches, steps):
        optimizer.zero_grad()
        accumulate_gradient(model, window, losses)
        optimizer.step()


def in_one_pass(model, optimizer, scheduler, batches, steps):
    joined = [
        tuple(torch.cat(parts) for parts in zip(*window, strict=True))
        for window in windows_of_batches(batches, steps)
    ]
    right(model, optimizer, scheduler, joined, 1)


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another, as Lookahead is."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        return self.inner.step(closure)


def sharpness_aware(model, optimizer, scheduler, batches, steps):
    for window in windows_of_batches(batches, steps):
        for sign in (1, -1):
            optimizer.zero_grad()
            add_gradients(model, window)
            if sign == 1:
                step = 0.05 * model.weight.grad / (model.weight.grad.norm() + 1e-12)
            model.weight.data.add_(step, alpha=sign)
        optimizer.step()
        scheduler.step()


def saves_the_schedule(model, optimizer, scheduler, batches, steps):
    right(model, optimizer, scheduler, batches, steps)
    torch.save({"schedule": scheduler.state_dict()}, io.BytesIO())


class Dividing(Wrapper):
    """An optimizer that divides the sum of the gradients by itself."""

    def __init__(self, inner, images):
        super().__init__(inner)
        self.images = images

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= next(self.images)
        return self.inner.step(closure)


def divided_by_the_optimizer(model, optimizer, scheduler, batches, steps):
    images = (images_in(window) for window in windows_of_batches(batches, steps))
    over(lambda *_: 1)(model, Dividing(optimizer, images), scheduler, batches, steps)


def looked_at(model, optimizer, scheduler, window):
    loss = F.cross_entropy(model(window[0][0]), window[0][1])
    torch.autograd.grad(loss, model.weight)
    scheduler.step()


def yields(*given):
    yield right(*given)


def step_unless_spiked(model, optimizer):
    if clip_grad_norm_(model.parameters(), torch.inf) < 100:
        optimizer.step()


def steepest(model, images):
    """Moves images along the gradient, as training against an adversary does."""
    images = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(images).logsumexp(1).sum(), images)
    return model((images + 0.1 * slope.sign()).detach())


def decay_added(model, optimizer, scheduler, batches, steps):
    optimizer.zero_grad()  # of what was left over
    seen = 0
    for number, (images, labels) in enumerate(batches, start=1):
        sum_of_losses(model(images), labels).backward()
        seen += len(labels)
        if number % steps == 0:
            model.weight.grad.div_(seen).add_(model.weight.data, alpha=1e-4)
            optimizer.step()
            optimizer.zero_grad()
            seen = 0


def plateau_once_an_epoch(model, optimizer, scheduler, *rest):
    loop(after_step=nothing)(model, optimizer, scheduler, *rest)
    scheduler.step(1.0)


def clip_rows(gradient, _):
    """As adaptive clipping does, each output unit by itself."""
    gradient.mul_((0.01 / gradient.norm(dim=1, keepdim=True)).clamp(max=1.0))


def whole_training(*given):
    for _ in range(3):
        loop(last_window="drop")(*given)


RIGHT = {
    "plain": right,
    "SAM": sharpness_aware,
    "schedule saved": saves_the_schedule,
    "divided before unscaling": scaled(divide_late=True),
    "divided by the optimizer": divided_by_the_optimizer,
    "gradient looked at": loop(after_step=looked_at),
    "gradient of the images": loop(forward=steepest),
    "coloured": on_images(lambda images: images.repeat(1, 3, 1, 1)),
    "generator": yields,
    "large gradients left out": loop(step=step_unless_spiked),
    "helper": helper,
    "one pass": in_one_pass,
    "remainder dropped": loop(last_window="drop"),
    "shuffled": of_batches(lambda batches, k: random.sample(batches, len(batches))),
    "closure": with_closure(),
    "wrapped optimizer": lambda model, optimizer, *rest: right(model, Wrapper(optimizer), *rest),
    "autograd.grad": gradients_outside(),
    "divided afterwards": loop(divisor=lambda *_: 1, before_step=on_gradient(torch.Tensor.div_)),
    "checkpointing": loop(forward=lambda m, x: checkpoint(m, x, use_reentrant=False)),
    "reentrant checkpointing": loop(
        forward=lambda m, x: checkpoint(m, x.clone().requires_grad_(), use_reentrant=True)
    ),
    "teacher": loop(forward=lambda model, images: (copy.deepcopy(model)(images), model(images))[1]),
    "second forward": loop(inside=lambda model, o, s, window: model(window[0][0]).argmax(1)),
    "validation inside": loop(inside=validate),
    "keyword": loop(forward=lambda model, images: model(pixels=images)),
    "half": on_images(torch.Tensor.half),
    "bytes": on_images(lambda images: (255 * images).byte()),
    "normalised": on_images(lambda images: (images - 0.5) / 0.5),
    "channels last": on_images(lambda images: images.to(memory_format=torch.channels_last)),
    "autocast": torch.autocast("cpu", torch.bfloat16)(right),
    "noise": on_images(lambda images: images + 0.1 * torch.randn_like(images)),
    "float32 model": lambda model, *rest: on_images(torch.Tensor.float)(model.float(), *rest),
    "clipping": loop(before_step=clip(0.01)),
    "clipping values": loop(before_step=clip(0.01, clip_grad_value_)),
    "clipping rows": loop(before_step=on_gradient(clip_rows)),
    "scaler": scaled(),
    "plateau": loop(after_step=lambda m, o, scheduler, w: scheduler.step(metrics=1.0)),
    "plateau once an epoch": plateau_once_an_epoch,
    "position": loop(inside=lambda m, o, scheduler, w: scheduler.step(0.5), after_step=nothing),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_loops_break_exactly_their_rules(name):
    wrong, rules, seen = WRONG[name]
    report = check_accumulation(wrong)
    text = str(report)
    assert ", ".join(report.rules) == rules
    assert seen in text
    assert max(map(len, text.splitlines())) <= 95
    for rule in report.rules:
        assert f"Broken: {RULES[rule]}\n  Seen: " in text
        assert f"\n  Change: {CHANGES[rule]}." in text


def test_every_rule_is_broken_by_some_loop():
    covered = {rule for _, rules, _ in WRONG.values() for rule in rules.split(", ")}
    assert covered | {"logged loss", "batch norm"} == set(RULES)  # these have tests of their own


@pytest.mark.parametrize("name", RIGHT)
def test_right_loops_break_none_and_are_checked_in_full(name):
    report = check_accumulation(RIGHT[name])
    assert (report.rules, report.complete) == ([], True)
    assert ("are dropped" in str(report)) == (name == "remainder dropped")
    assert str(report).startswith("This loop breaks no rule of accumulation.")


def smooth(logits, labels, reduction="mean"):
    return F.cross_entropy(logits, labels, label_smoothing=0.1, reduction=reduction)


def weighted(logits, labels):
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    return F.cross_entropy(logits, labels, weight, reduction="sum")


def hardest(logits, labels):
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses.topk((len(labels) + 1) // 2)[0].sum()


smooth_loop = loop(loss=lambda logits, labels: smooth(logits, labels, "sum"))
UNCHECKED = {
    "weight decay added": decay_added,
    "several epochs": whole_training,
    "label smoothing": smooth_loop,
    "class weights": loop(loss=weighted),
    "auxiliary term": loop(loss=lambda z, y: sum_of_losses(z, y) + sum_of_squares(z, y)),
    "hardest images only": loop(loss=hardest),
    "images mixed": on_images(lambda images: images.roll(1, 2)),
    "gradient by its sign": loop(before_step=on_gradient(lambda g, _: g.sign_())),
    "gradient by its norm": loop(before_step=on_gradient(lambda g, _: g.div_(g.norm()))),
}


@pytest.mark.parametrize("name", UNCHECKED)
def test_what_cannot_be_checked_is_not_called_broken(name):
    report = check_accumulation(UNCHECKED[name])
    assert report.rules == []
    assert "cannot be checked" in str(report)
    assert "not every rule could be checked" in str(report)


def test_a_loss_of_the_reader_makes_the_loop_checkable():
    for given in (smooth, nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")):
        report = check_accumulation(smooth_loop, loss=given)
        assert (report.rules, report.complete) == ([], True)
    wrong = loop(loss=smooth, divisor=lambda window, steps: steps)
    assert check_accumulation(wrong, loss=smooth).rules == ["equal weight", "short window"]
    assert "not the one given as loss=" in str(check_accumulation(right, loss=smooth))
    with pytest.raises(ValueError, match="given twice changed it from"):
        check_accumulation(smooth_loop, loss=sum_of_losses)
    with pytest.raises(TypeError, match="loss must return a tensor, but it returned float"):
        check_accumulation(smooth_loop, loss=lambda logits, labels: 0.5)


def logging(what):
    """A right loop that returns `what(mean loss of each micro-batch, their sizes, steps)`."""

    def run(model, optimizer, scheduler, batches, steps):
        right(model, optimizer, scheduler, batches, steps)
        assert len(batches.dataset) == images_in(batches)  # as of a DataLoader
        with torch.no_grad():
            means = [F.cross_entropy(model(images), labels) for images, labels in batches]
        return what(torch.stack(means), torch.tensor([len(y) for _, y in batches]), steps)

    return run


def true_mean(means, sizes):
    return ((means * sizes).sum() / sizes.sum()).item()


def of_windows(values, steps):
    return torch.stack([part.sum() for part in values.split(steps)])


def of_updates(means, sizes, steps):
    return of_windows(means * sizes, steps) / of_windows(sizes, steps)


@pytest.mark.parametrize(
    "what",
    [
        lambda m, n, k: (true_mean(m, n), 0.25),
        lambda m, n, k: {"accuracy": 7, "loss": torch.tensor(true_mean(m, n)).float()},
        lambda m, n, k: of_updates(m, n, k),
        lambda m, n, k: of_updates(m, n, k).mean(),
        lambda m, n, k: (m.tolist(), [0.1] * len(m)),
        lambda m, n, k: [part[-1] for part in m.split(k)],
    ],
)
def test_a_right_loss_in_the_log_is_right(what):
    report = check_accumulation(logging(what))
    assert (report.rules, report.notes) == ([], [])


@pytest.mark.parametrize("number", [0.25, 4])
def test_a_number_that_is_no_loss_is_not_called_broken(number):
    report = check_accumulation(logging(lambda m, n, k: number))
    assert report.rules == []
    assert "no logged loss was checked" in str(report)


@pytest.mark.parametrize(
    "what",
    [
        lambda m, n, k: (m.mean(), 0.25),
        lambda m, n, k: {"loss": true_mean(m, n) / k},
        lambda m, n, k: true_mean(m, n) * k,
        lambda m, n, k: m.sum() / n.sum(),
        lambda m, n, k: m / k,
        lambda m, n, k: m * n / of_windows(n, k).repeat_interleave(k)[: len(m)],
        lambda m, n, k: of_updates(m, n, k) / k,
        lambda m, n, k: of_windows(m, k),
        lambda m, n, k: [part[-1] / k for part in m.split(k)],
    ],
)
def test_a_loss_divided_wrongly_in_the_log_is_broken(what):
    assert check_accumulation(logging(what)).rules == ["logged loss"]


def net(norm):
    return nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("norm", "rules", "text"),
    [
        (nn.BatchNorm1d(8), ["batch norm"], "BatchNorm1d took its statistics 3 times"),
        (nn.BatchNorm1d(8, track_running_stats=False), ["batch norm"], "each from 4 images"),
        (nn.BatchNorm1d(8).eval(), [], "are frozen"),
        (nn.GroupNorm(2, 8), [], "has no BatchNorm layer"),
    ],
)
def test_batch_norm_of_a_readers_model(norm, rules, text):
    model = net(norm)
    before = copy.deepcopy(model.state_dict())
    report = check_accumulation(right, model, (torch.randn(12, 6), torch.arange(12) % 3))
    assert report.rules == rules
    assert text in str(report)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_bad_input_is_refused():
    for example in (None, (torch.randn(3, 6), torch.arange(3))):
        with pytest.raises(ValueError, match="an example of its images and labels, at least 6"):
            check_accumulation(right, net(nn.Identity()), example)
    with pytest.raises(ValueError, match="must call model\\(images\\) with images of 24 pixels"):
        check_accumulation(on_images(lambda images: images[:, :, :10]))
