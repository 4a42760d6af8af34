"""Right and wrong loops as people write them: each kind once, and what the report must say."""

import copy
import importlib.util
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.checkpoint import checkpoint

from nbutils.accumulation import accumulate_gradient, check_accumulation, windows_of_batches
from nbutils.accumulation.check import PROBES, RULES, judge, make_probe, watch

SHARED = Path(__file__).parents[3] / "shared" / "cases" / "loops.py"


def sum_of_losses(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum")


def images_in(window):
    return sum(len(labels) for _, labels in window)


def loop(
    *,
    forward=lambda model, images: model(images),
    loss=sum_of_losses,
    divisor=lambda window, batches, steps: images_in(window),
    inside=None,  # after each backward pass
    before_step=None,
    after_step=lambda model, optimizer, scheduler, window: scheduler.step(),
    clear=True,
    drop=False,
):
    """A loop with hooks where mistakes are made; without any it is right."""

    def run(model, optimizer, scheduler, batches, steps):
        for window in windows_of_batches(batches, steps, "drop" if drop else "step"):
            given = model, optimizer, scheduler, window
            if clear:
                optimizer.zero_grad()
            for images, labels in window:
                (loss(forward(model, images), labels) / divisor(window, batches, steps)).backward()
                if inside:
                    inside(*given)
            if before_step:
                before_step(*given)
            optimizer.step()
            after_step(*given)

    return run


right = loop()


def clip(maximum=1.0, clipper=clip_grad_norm_):
    return lambda model, *_: clipper(model.parameters(), maximum)


def on_gradients(change):
    return lambda model, *_: [change(p.grad) for p in model.parameters()]


def scaled(*, unscale=True, clip_first=False, step_unscaled=False, maximum=1.0):
    def run(model, optimizer, scheduler, batches, steps):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        for window in windows_of_batches(batches, steps):
            optimizer.zero_grad()
            for images, labels in window:
                loss = sum_of_losses(model(images), labels) / images_in(window)
                scaler.scale(loss).backward()
            if clip_first:
                clip_grad_norm_(model.parameters(), maximum)
            if unscale:
                scaler.unscale_(optimizer)
                if not clip_first:
                    clip_grad_norm_(model.parameters(), maximum)
            if step_unscaled:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            scheduler.step()

    return run


def with_closure(clear=True):
    def run(model, optimizer, scheduler, batches, steps):
        for window in windows_of_batches(batches, steps):

            def closure(window=window):
                if clear:
                    optimizer.zero_grad()
                total = 0.0
                for images, labels in window:
                    loss = sum_of_losses(model(images), labels) / images_in(window)
                    loss.backward()
                    total += loss.detach()
                return total

            optimizer.step(closure)
            scheduler.step()

    return run


def cleared_once_an_epoch(drop):
    def run(model, optimizer, *rest):
        optimizer.zero_grad()
        loop(clear=False, drop=drop)(model, optimizer, *rest)

    return run


def carry_over(model, optimizer, scheduler, batches, steps):
    for number, (images, labels) in enumerate(batches, start=1):
        (F.cross_entropy(model(images), labels) / steps).backward()
        if number % steps == 0:
            optimizer.step()
            optimizer.zero_grad()


def last_window_not_cleared(model, optimizer, scheduler, batches, steps):
    windows = list(windows_of_batches(batches, steps))
    for window in windows:
        for images, labels in window:
            (sum_of_losses(model(images), labels) / images_in(window)).backward()
        optimizer.step()
        if window is not windows[-1]:
            optimizer.zero_grad()


def running_sum(model, optimizer, scheduler, batches, steps):
    for window in windows_of_batches(batches, steps):
        optimizer.zero_grad()
        total = 0.0
        for images, labels in window:
            total = total + sum_of_losses(model(images), labels) / images_in(window)
            total.backward(retain_graph=True)
        optimizer.step()


def steps_first(model, optimizer, scheduler, batches, steps):
    for number, (images, labels) in enumerate(batches):
        (F.cross_entropy(model(images), labels) / steps).backward()
        if number % steps == 0:
            optimizer.step()
            optimizer.zero_grad()


def by_hand(model, optimizer, scheduler, batches, steps):
    for window in windows_of_batches(batches, steps):
        model.zero_grad()
        for images, labels in window:
            (sum_of_losses(model(images), labels) / images_in(window)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad


def skips_first(model, optimizer, scheduler, batches, steps):
    for window in windows_of_batches(batches, steps):
        optimizer.zero_grad()
        for images, labels in window[1:]:
            (sum_of_losses(model(images), labels) / images_in(window)).backward()
        optimizer.step()


def schedule_first(model, optimizer, scheduler, *rest):
    scheduler.step()
    loop(after_step=lambda *_: None)(model, optimizer, scheduler, *rest)


def own_optimizer(model, optimizer, *rest):
    right(model, torch.optim.AdamW(model.parameters(), lr=1e-9), *rest)


def gradients_outside(clip_each=None):
    """`torch.autograd.grad` per micro-batch, summed by hand."""

    def run(model, optimizer, scheduler, batches, steps):
        (weight,) = model.parameters()
        for window in windows_of_batches(batches, steps):
            total = torch.zeros_like(weight)
            for images, labels in window:
                loss = sum_of_losses(model(images), labels) / images_in(window)
                (part,) = torch.autograd.grad(loss, weight)
                total += part if clip_each is None else part * min(1.0, clip_each / part.norm())
            weight.grad = total
            optimizer.step()

    return run


def mean_loss(logits, labels):
    return F.cross_entropy(logits, labels)


def by_steps(window, batches, steps):
    return steps


WRONG = {
    "own optimizer": (own_optimizer, ["optimizer"]),
    "update by hand": (by_hand, ["optimizer"]),
    "step inside": (loop(inside=lambda m, optimizer, *_: optimizer.step()), ["one update"]),
    "step twice": (loop(after_step=lambda m, optimizer, *_: optimizer.step()), ["one update"]),
    "step first": (steps_first, ["window length"]),
    "skips first": (skips_first, ["every image"]),
    "weight decay inside": (
        loop(inside=lambda model, *_: [p.data.mul_(0.99) for p in model.parameters()]),
        ["still weights"],
    ),
    "three times too large": (loop(divisor=lambda w, *_: images_in(w) / 3), ["division"]),
    "never divided": (loop(divisor=lambda *_: 1), ["division"]),
    "divided twice": (loop(divisor=lambda w, b, steps: images_in(w) * steps), ["division"]),
    "never unscaled": (scaled(unscale=False, step_unscaled=True), ["division"]),
    "sum of means": (loop(loss=mean_loss, divisor=lambda *_: 1), ["division", "equal weight"]),
    "mean of means": (loop(loss=mean_loss, divisor=lambda w, *_: len(w)), ["equal weight"]),
    "running sum": (running_sum, ["equal weight"]),
    "tutorial": (loop(loss=mean_loss, divisor=by_steps), ["equal weight", "short window"]),
    "full divisor": (loop(divisor=lambda w, b, steps: 4 * steps), ["short window"]),
    "carry-over": (carry_over, ["equal weight", "one epoch"]),
    "cleared inside": (
        loop(forward=lambda model, images: (model.zero_grad(), model(images))[1]),
        ["whole gradient"],
    ),
    "cleared before the step": (
        loop(before_step=lambda model, *_: model.zero_grad()),
        ["whole gradient"],
    ),
    "never cleared": (loop(clear=False), ["whole gradient"]),
    "never cleared, remainder dropped": (loop(clear=False, drop=True), ["whole gradient"]),
    "never cleared with a closure": (with_closure(clear=False), ["whole gradient"]),
    "cleared once an epoch": (cleared_once_an_epoch(drop=False), ["whole gradient"]),
    "cleared once, remainder dropped": (cleared_once_an_epoch(drop=True), ["whole gradient"]),
    "last window not cleared": (last_window_not_cleared, ["whole gradient"]),
    "clipping inside": (loop(inside=clip()), ["clipping"]),
    "clipping values inside": (loop(inside=clip(clipper=clip_grad_value_)), ["clipping"]),
    "clipping parts": (gradients_outside(clip_each=1.0), ["clipping"]),
    "clipping before unscale_": (scaled(clip_first=True), ["clipping"]),
    "clipping before step unscales": (scaled(unscale=False, clip_first=True), ["clipping"]),
    "clipping inside, never cleared": (
        loop(clear=False, inside=clip()),
        ["whole gradient", "clipping"],
    ),
    "schedule inside": (
        loop(inside=lambda m, o, scheduler, w: scheduler.step(), after_step=lambda *_: None),
        ["schedule"],
    ),
    "schedule before the optimizer": (
        loop(before_step=lambda m, o, scheduler, w: scheduler.step(), after_step=lambda *_: None),
        ["schedule"],
    ),
    "schedule at the start": (schedule_first, ["schedule"]),
}


def with_teacher(model, images):
    copy.deepcopy(model)(images)
    return model(images)


def validate(model, optimizer, scheduler, window):
    model.eval()
    with torch.no_grad():
        [model(images) for images, _ in window]
    model.train()


def in_one_pass(model, optimizer, scheduler, batches, steps):
    for window in windows_of_batches(batches, steps):
        optimizer.zero_grad()
        images, labels = (torch.cat(parts) for parts in zip(*window, strict=True))
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def helper(model, optimizer, scheduler, batches, steps):
    for window in windows_of_batches(batches, steps):
        optimizer.zero_grad()
        accumulate_gradient(
            model,
            window,
            lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        )
        optimizer.step()


def shuffled(model, optimizer, scheduler, batches, steps):
    right(model, optimizer, scheduler, random.sample(batches, len(batches)), steps)


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another, as Lookahead is."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        return self.inner.step(closure)


RIGHT = {
    "plain": right,
    "helper": helper,
    "one pass": in_one_pass,
    "remainder dropped": loop(drop=True),
    "shuffled": shuffled,
    "closure": with_closure(),
    "wrapped optimizer": lambda model, optimizer, *rest: right(model, Wrapper(optimizer), *rest),
    "autograd.grad": gradients_outside(),
    "divided afterwards": loop(
        divisor=lambda *_: 1,
        before_step=lambda m, o, s, window: on_gradients(lambda g: g.div_(images_in(window)))(m),
    ),
    "checkpointing": loop(forward=lambda m, x: checkpoint(m, x, use_reentrant=False)),
    "reentrant checkpointing": loop(
        forward=lambda m, x: checkpoint(m, x.clone().requires_grad_(), use_reentrant=True)
    ),
    "teacher": loop(forward=with_teacher),
    "second forward": loop(inside=lambda model, o, s, window: model(window[0][0]).argmax(1)),
    "validation inside": loop(inside=validate),
    "keyword": loop(forward=lambda model, images: model(pixels=images)),
    "half": loop(forward=lambda model, images: model(images.half())),
    "bytes": loop(forward=lambda model, images: model((255 * images).byte())),
    "normalised": loop(forward=lambda model, images: model((images - 0.5) / 0.5)),
    "noise": loop(forward=lambda model, images: model(images + 0.1 * torch.randn_like(images))),
    "channels last": loop(forward=lambda m, x: m(x.to(memory_format=torch.channels_last))),
    "float32 model": lambda model, *rest: loop(forward=lambda m, x: m(x.float()))(
        model.float(), *rest
    ),
    "clipping": loop(before_step=clip(0.01)),
    "clipping values": loop(before_step=clip(0.01, clip_grad_value_)),
    "scaler": scaled(),
    "scaler with little room": scaled(maximum=1e-3),
    "schedule per epoch": loop(after_step=lambda *_: None),
    "plateau": loop(after_step=lambda m, o, scheduler, w: scheduler.step(metrics=1.0)),
    "position": loop(
        inside=lambda m, o, scheduler, w: scheduler.step(0.5), after_step=lambda *_: None
    ),
    "average of weights": loop(
        after_step=lambda model, *_: torch.optim.swa_utils.AveragedModel(model)
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_loops_break_exactly_their_rules(name):
    wrong, rules = WRONG[name]
    report = check_accumulation(wrong)
    assert report.rules == rules
    for finding in report.findings:
        broken, seen, change = str(finding).splitlines()
        assert broken == f"Broken: {RULES[finding.rule]}"
        assert seen.startswith("  Seen: ")
        assert change.startswith("  Change: ")


def test_every_rule_is_broken_by_some_loop():
    covered = {rule for _, rules in WRONG.values() for rule in rules}
    assert covered | {"logged loss", "batch norm"} == set(RULES)  # these have tests of their own


@pytest.mark.parametrize("name", RIGHT)
def test_right_loops_break_none_and_are_checked_in_full(name):
    report = check_accumulation(RIGHT[name])
    assert report.rules == []
    assert report.complete
    assert ("are dropped" in str(report)) == (name == "remainder dropped")
    assert str(report).startswith("This loop breaks no rule of accumulation.")


UNCHECKED = {
    "label smoothing": loop(
        loss=lambda z, y: F.cross_entropy(z, y, reduction="sum", label_smoothing=0.1)
    ),
    "class weights": loop(
        loss=lambda z, y: F.cross_entropy(
            z, y, reduction="sum", weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
        )
    ),
    "auxiliary term": loop(loss=lambda z, y: sum_of_losses(z, y) + z.square().sum()),
    "hardest images only": loop(
        loss=lambda z, y: F.cross_entropy(z, y, reduction="none").topk((len(y) + 1) // 2)[0].sum()
    ),
    "images mixed": loop(forward=lambda model, images: model(images.roll(1, 2))),
    "gradient by its sign": loop(before_step=on_gradients(torch.Tensor.sign_)),
    "gradient by its norm": loop(before_step=on_gradients(lambda g: g.div_(g.norm()))),
}


@pytest.mark.parametrize("name", UNCHECKED)
def test_what_cannot_be_checked_is_not_called_broken(name):
    report = check_accumulation(UNCHECKED[name])
    assert report.rules == []
    assert "cannot be checked" in str(report)
    assert "not every rule could be checked" in str(report)


def smooth(logits, labels, reduction="mean"):
    return F.cross_entropy(logits, labels, label_smoothing=0.1, reduction=reduction)


def test_a_loss_of_the_reader_makes_the_loop_checkable():
    smooth_loop = UNCHECKED["label smoothing"]
    for given in (smooth, nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")):
        report = check_accumulation(smooth_loop, loss=given)
        assert (report.rules, report.complete) == ([], True)
    wrong = loop(loss=smooth, divisor=by_steps)
    assert check_accumulation(wrong, loss=smooth).rules == ["equal weight", "short window"]
    assert "not the one given as loss=" in str(check_accumulation(smooth_loop, loss=mean_loss))
    with pytest.raises(ValueError, match="given twice changed it from"):
        check_accumulation(smooth_loop, loss=lambda z, y: smooth(z, y, "sum"))


def test_rules_that_need_no_loss_are_checked_with_any_loss():
    assert check_accumulation(loop(loss=smooth, clear=False)).rules == ["whole gradient"]


def logging(what):
    """A right loop that returns `what(mean loss of each micro-batch, their sizes, steps)`."""

    def run(model, optimizer, scheduler, batches, steps):
        means, sizes = [], []
        for window in windows_of_batches(batches, steps):
            optimizer.zero_grad()
            for images, labels in window:
                loss = F.cross_entropy(model(images), labels)
                (loss * len(labels) / images_in(window)).backward()
                means.append(loss.item())
                sizes.append(len(labels))
            optimizer.step()
        return what(torch.tensor(means, dtype=torch.float64), torch.tensor(sizes), steps)

    return run


def true_mean(means, sizes):
    return ((means * sizes).sum() / sizes.sum()).item()


def of_windows(values, steps):
    return torch.stack([part.sum() for part in values.split(steps)])


def of_updates(means, sizes, steps):
    return of_windows(means * sizes, steps) / of_windows(sizes, steps)


@pytest.mark.parametrize(
    ("what", "note"),
    [
        (lambda m, n, k: true_mean(m, n), ""),
        (lambda m, n, k: (true_mean(m, n), 0.25), ""),
        (lambda m, n, k: {"accuracy": 7, "loss": torch.tensor(true_mean(m, n)).float()}, ""),
        (lambda m, n, k: of_updates(m, n, k), ""),
        (lambda m, n, k: (m.tolist(), [0.1] * len(m)), ""),
        (lambda m, n, k: None, ""),
        (lambda m, n, k: 0.25, "no logged loss was checked"),
        (lambda m, n, k: of_updates(m, n, k).mean(), "mean over updates"),
        (lambda m, n, k: [part[-1] for part in m.split(k)], "last micro-batch of each window"),
    ],
)
def test_loops_that_log_right_or_something_else_are_right(what, note):
    report = check_accumulation(logging(what))
    assert report.rules == []
    assert note in str(report)
    assert bool(report.notes) == bool(note)


@pytest.mark.parametrize(
    "what",
    [
        lambda m, n, k: m.mean(),
        lambda m, n, k: (m.mean(), 0.25),
        lambda m, n, k: {"loss": m.mean()},
        lambda m, n, k: true_mean(m, n) / k,
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


def frozen():
    layer = nn.BatchNorm1d(8)
    return layer.eval()


@pytest.mark.parametrize(
    ("norm", "rules", "text"),
    [
        (nn.BatchNorm1d(8), ["batch norm"], "3 steps of BatchNorm's running statistics"),
        (nn.BatchNorm1d(8, track_running_stats=False), ["batch norm"], "so it couples them"),
        (frozen(), [], "are frozen"),
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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("three times too large", "a gradient 3 times too large"),
        ("divided twice", "a gradient 0.333 of its right size"),
        ("full divisor", "9 images in a window for 12: a gradient 0.75 of its right size"),
        ("running sum", "weighed 3 : 2 : 1"),
        ("step first", "updates after 1, 3, 3, 3 micro-batches, not 3"),
        ("skips first", "micro-batches 1, 4 of an epoch's 6"),
        ("schedule inside", "12 steps of the schedule for 4 updates"),
        ("step inside", "16 updates in 4 windows of 3 micro-batches"),
    ],
)
def test_the_report_says_what_was_seen(name, text):
    assert text in str(check_accumulation(WRONG[name][0]))


def test_a_loop_that_never_updates():
    report = check_accumulation(lambda *_: None)
    assert report.rules == ["window length"]
    assert "no update was made" in str(report)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="an example of its images and labels is needed"):
        check_accumulation(right, net(nn.Identity()))
    with pytest.raises(ValueError, match="at least 6 images; it has 3"):
        check_accumulation(right, net(nn.Identity()), (torch.randn(3, 6), torch.arange(3)))
    with pytest.raises(ValueError, match="must call model\\(images\\) with images of 24 pixels"):
        check_accumulation(loop(forward=lambda model, images: model(images[:, :, :10])))


def test_a_trainer_is_watched_from_outside():
    def runs(divisor):
        for name in PROBES:
            probe = make_probe(name)
            with watch(probe) as run:
                own = torch.optim.SGD(probe.model.parameters(), lr=probe.learning_rate)
                train = loop(divisor=divisor)
                for _ in range(probe.epochs):
                    train(probe.model, own, run.schedule_of(own), probe.batches, 3)
                    run.end_epoch()
            yield name, run

    assert judge(dict(runs(lambda window, *_: images_in(window)))).rules == []
    assert judge(dict(runs(lambda *_: 12))).rules == ["short window"]


def shared_loops(which):
    if not SHARED.exists():
        return [pytest.param(None, None, marks=pytest.mark.skip(f"{SHARED.name} is not there"))]
    spec = importlib.util.spec_from_file_location("shared_loops", SHARED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [pytest.param(name, case, id=name) for name, case in getattr(module, which).items()]


@pytest.mark.parametrize(("name", "case"), shared_loops("WRONG"))
def test_shared_wrong_loops(name, case):
    wrong, rule = case
    rules = check_accumulation(wrong).rules
    assert rules if rule == "any" else rule in rules


@pytest.mark.parametrize(("name", "case"), shared_loops("RIGHT"))
def test_shared_right_loops(name, case):
    assert check_accumulation(case).rules == []
