"""`check_accumulation`: says in plain words which rule of accumulation a training loop breaks.

The loop is run on tiny classifiers in float64, and watched: which micro-batches went through the
model before each update, and which gradient the optimizer then got. That gradient is compared
with the true one, of the mean loss over the images of the window. Each probe is built so that one
mistake shows in it and the others do not.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Images and labels of a micro-batch."""

StepFunction = Callable[..., Any]
"""`step_function(model, optimizer, scheduler, batches, accumulation_steps)`; trains one epoch."""

RULES = {
    "division": "The gradient of a window is divided by the number of its images.",
    "equal weight": "Every image of a window weighs the same, also in a smaller micro-batch.",
    "short window": "A short last window is divided by what is really in it.",
    "one epoch": "What is left at the end of an epoch stays out of the next one.",
    "whole gradient": "The gradient is cleared between windows, never inside one.",
    "window length": "An update comes after every `accumulation_steps` micro-batches.",
    "one update": "The optimizer makes one update a window.",
    "still weights": "The weights change at the update only, weight decay included.",
    "clipping": "Clipping comes once, on the gradient of the whole window.",
    "schedule": "The schedule advances at most once an update.",
    "logged loss": "The logged loss is the mean over images, not divided once more.",
    "batch norm": "BatchNorm's running statistics take one step an update.",
}
"""What `check_accumulation` looks at, by the name under which a finding appears."""

STEPS, BATCH, CLASSES, FEATURES = 3, 4, 3, 6
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Finding:
    """A rule that a loop breaks, and what was seen."""

    rule: str
    seen: str

    def __str__(self) -> str:
        rule = RULES.get(self.rule)
        return f"Broken: {rule}\n  Seen: {self.seen}" if rule else f"Wrong: {self.seen}"


@dataclass(frozen=True)
class Report:
    """What `check_accumulation` found."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def rules(self) -> list[str]:
        """Names of the broken rules."""
        return [finding.rule for finding in self.findings]

    def __str__(self) -> str:
        verdict = [] if self.findings else ["This loop breaks no rule of accumulation."]
        notes = [f"Note: {note}" for note in self.notes]
        return "\n".join([*verdict, *map(str, self.findings), *notes])


@dataclass
class Update:
    """What was seen at one step of the optimizer.

    Attributes:
        batches: The micro-batches that went through the model since the last step.
        epochs: The epoch of each, from 0.
        gradient: What the optimizer got, flat.
        model: A copy of the model with the weights before the step.
        weights_moved: Whether the weights changed since the window's first forward pass.
    """

    batches: list[Batch]
    epochs: list[int]
    gradient: Tensor
    model: nn.Module = field(repr=False)
    weights_moved: bool

    def true_gradient(self, batches: Sequence[Batch] | None = None) -> Tensor:
        """Gradient of the mean loss over the images of `batches` (by default, all), flat."""
        batches = self.batches if batches is None else batches
        model = copy.deepcopy(self.model)
        model.zero_grad()
        F.cross_entropy(model(_inputs(batches)), _labels(batches)).backward()
        return flat_gradient(model)

    def true_loss(self) -> float:
        """Mean loss over the images of the window."""
        with torch.no_grad():
            logits = copy.deepcopy(self.model)(_inputs(self.batches))
            return F.cross_entropy(logits, _labels(self.batches)).item()


@dataclass
class Watched:
    """What was seen of a loop: its updates, steps of the schedule, and what it returned."""

    updates: list[Update]
    schedule_steps: int
    returned: Any


def watch(
    step_function: StepFunction,
    model: nn.Module,
    batches: Sequence[Batch],
    accumulation_steps: int,
    epochs: int = 1,
    learning_rate: float = 0.1,
) -> Watched:
    """Run a training loop with plain SGD and record every update that it makes.

    Args:
        step_function: Trains one epoch; called as `step_function(model, optimizer, scheduler,
            batches, accumulation_steps)`.
        model: Trained in place.
        batches: The micro-batches of an epoch.
        accumulation_steps: Passed on.
        epochs: How often to call it.
        learning_rate: Of the SGD.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    updates: list[Update] = []
    seen: list[tuple[Batch, int]] = []
    weights_at_start = [flat_weights(model)]
    moved = [False]
    epoch = 0

    def before_forward(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        if not seen:
            weights_at_start[0] = flat_weights(model)
        moved[0] |= not torch.equal(flat_weights(model), weights_at_start[0])
        seen.append((_find(inputs[0], batches), epoch))

    def before_step(*_: Any) -> None:
        snapshot = copy.deepcopy(model)
        snapshot._forward_pre_hooks.clear()
        updates.append(
            Update(
                [batch for batch, _ in seen],
                [when for _, when in seen],
                flat_gradient(model),
                snapshot,
                moved[0] or not torch.equal(flat_weights(model), weights_at_start[0]),
            )
        )
        seen.clear()
        moved[0] = False

    hooks = [model.register_forward_pre_hook(before_forward)]
    hooks.append(optimizer.register_step_pre_hook(before_step))
    returned = None
    with warnings.catch_warnings():
        # A loop that steps its schedule too early is told so by the report.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for epoch in range(epochs):  # noqa: B007  (read by before_forward)
            returned = step_function(model, optimizer, scheduler, batches, accumulation_steps)
    for hook in hooks:
        hook.remove()
    return Watched(updates, scheduler.last_epoch, returned)


def gradient_errors(
    step_function: StepFunction,
    model: nn.Module,
    batches: Sequence[Batch],
    accumulation_steps: int,
    epochs: int = 1,
) -> list[float]:
    """How far the gradient of each update is from the true one, relative to it.

    The rate is so small that the weights stay where they are. Arguments as in `watch`.
    """
    watched = watch(step_function, model, batches, accumulation_steps, epochs, 1e-12)
    errors = []
    for update in watched.updates:
        truth = update.true_gradient()
        errors.append(relative_difference(update.gradient, truth))
    return errors


def check_accumulation(
    step_function: StepFunction,
    model: nn.Module | None = None,
    example: Batch | None = None,
) -> Report:
    """Which rules of accumulation a training loop breaks.

    The loop must take the mean cross-entropy of `model(images)` and `labels` over a window, call
    `optimizer.step()` for its updates, and may call `scheduler.step()`. If it returns the losses
    it logs (one an update, one a micro-batch, or their mean), they are checked too.

    Args:
        step_function: Trains one epoch; called as `step_function(model, optimizer, scheduler,
            batches, accumulation_steps)` with a list of (images, labels). The images are float64
            of shape (n, 6), the labels int64 of shape (n,), from 0 to 2.
        model: A classifier of yours, to look at how its BatchNorm layers fare; a copy is used.
        example: Images and labels that `model` takes, 6 or more.

    Returns:
        A report; print it. `report.rules` is empty where no rule is broken.
    """
    findings: dict[str, str] = {}
    notes: list[str] = []
    if model is not None:
        if example is None:
            raise ValueError("to look at a model, an example of its images and labels is needed")
        _check_batch_norm(step_function, model, example, findings, notes)

    full = _run(step_function, [BATCH] * (2 * STEPS))
    if len(full.updates) == 2 * STEPS:
        findings["one update"] = f"{2 * STEPS} updates in 2 windows of {STEPS} micro-batches"
    elif any(len(update.batches) != STEPS for update in full.updates) or len(full.updates) != 2:
        counts = ", ".join(str(len(update.batches)) for update in full.updates)
        findings["window length"] = f"updates after {counts or 'no'} micro-batches, not {STEPS}"
    _check_schedule(full, findings)
    if any(update.weights_moved for update in full.updates):
        findings["still weights"] = "they changed between two micro-batches of a window"
    if {"one update", "window length", "still weights"} & set(findings):
        notes.append("Other rules can be checked only once an update follows its own window.")
        return _report(findings, notes)

    _explain(full.updates[0], findings)
    _check_logged_loss(full, findings, notes)
    unequal = _run(step_function, [BATCH] * (STEPS - 1) + [1])
    for update in unequal.updates:
        _explain(update, findings)
    short = _run(step_function, [BATCH] * (2 * STEPS - 1), epochs=2)
    _check_leftovers(short, findings, notes)
    if not findings:
        _check_clipping(_run(step_function, [BATCH] * STEPS, scale=1e3), findings)
    return _report(findings, notes)


def _report(findings: dict[str, str], notes: list[str]) -> Report:
    return Report(tuple(Finding(rule, seen) for rule, seen in findings.items()), tuple(notes))


def _run(
    step_function: StepFunction, sizes: list[int], epochs: int = 1, scale: float = 1e-4
) -> Watched:
    """Watch the loop on a linear classifier with gradients of about the size of `scale`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(FEATURES, CLASSES, bias=False).double()
        with torch.no_grad():
            model.weight.div_(scale)  # so that logits are of size 1
        inputs = torch.randn(sum(sizes), FEATURES, dtype=torch.float64) * scale
        labels = torch.randint(CLASSES, (sum(sizes),))
        batches = list(zip(inputs.split(sizes), labels.split(sizes), strict=True))
        return watch(step_function, model, batches, STEPS, epochs, learning_rate=1e-9)


def _explain(update: Update, findings: dict[str, str], batches: list[Batch] | None = None) -> None:
    """Compare an update's gradient with the true one, and with those of known mistakes."""
    batches = update.batches if batches is None else batches
    gradient, truth = update.gradient, update.true_gradient(batches)
    if _close(gradient, truth):
        return
    images = sum(len(labels) for _, labels in batches)
    means = [update.true_gradient([batch]) for batch in batches]
    ratio = _ratio(gradient, truth)
    if len(batches) > 1 and _ratio(gradient, means[-1]) is not None:
        findings["whole gradient"] = "an update had the gradient of its last micro-batch only"
    elif ratio is not None and _near(ratio, len(batches), images):
        findings["division"] = f"a gradient {ratio:.3g} times too large"
    elif ratio is not None and _near(ratio, len(batches) / STEPS, images / (STEPS * BATCH)):
        findings["short window"] = (
            f"{images} images in a window for {STEPS * BATCH}: a gradient {ratio:.3g} of its size"
        )
    elif _ratio(gradient, torch.stack(means).mean(0)) is not None:
        findings["equal weight"] = (
            f"an image in a micro-batch of {len(batches[-1][1])} weighed as much as "
            f"{BATCH} in one of {BATCH}"
        )
    else:
        error = relative_difference(gradient, truth)
        findings["other"] = f"a gradient {error:.0%} off, in a way that none of the rules explains"


def _check_schedule(full: Watched, findings: dict[str, str]) -> None:
    if full.schedule_steps > len(full.updates) or full.schedule_steps == 2 * STEPS:
        findings["schedule"] = f"{full.schedule_steps} steps of the schedule in 2 windows"


def _check_logged_loss(full: Watched, findings: dict[str, str], notes: list[str]) -> None:
    try:
        logged = torch.as_tensor(full.returned, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        notes.append("The loop returns no losses, so the logged loss was not checked.")
        return
    truth = sum(update.true_loss() for update in full.updates) / len(full.updates)
    ratio = sum(logged) / len(logged) / truth if logged else 0.0
    if _near(ratio, 1 / STEPS):
        findings["logged loss"] = f"a loss of {ratio * truth:.3f} was logged for one of {truth:.3f}"
    elif not _near(ratio, 1.0):
        findings["logged loss"] = f"a mean loss of {truth:.3f} was logged as {ratio * truth:.3f}"


def _check_leftovers(short: Watched, findings: dict[str, str], notes: list[str]) -> None:
    """Two epochs of a full window and a short one: is it stepped, dropped, or carried over?"""
    dropped = False
    for update in short.updates:
        own = [b for b, epoch in zip(update.batches, update.epochs, strict=True) if epoch == 1]
        if own and len(own) < len(update.batches):
            if _ratio(update.gradient, update.true_gradient(own)) is None:
                findings["one epoch"] = (
                    f"{len(update.batches) - len(own)} micro-batches left over from one epoch "
                    f"were in the first update of the next"
                )
                return
            dropped = True
    if dropped or len(short.updates) < 4:
        notes.append("The images left over at the end of an epoch are dropped.")
    else:
        _explain(short.updates[1], findings)


def _check_clipping(large: Watched, findings: dict[str, str]) -> None:
    """Large gradients, so that clipping acts: it may shrink the true one, or cut it off."""
    for update in large.updates:
        gradient, truth = update.gradient, update.true_gradient()
        ratio = _ratio(gradient, truth)
        by_norm = ratio is not None and ratio <= 1 + TOLERANCE
        by_value = _close(gradient, truth.clamp(-gradient.abs().max(), gradient.abs().max()))
        if not by_norm and not by_value:
            findings["clipping"] = (
                "small gradients came out right, large ones with another direction"
            )


def _check_batch_norm(
    step_function: StepFunction,
    model: nn.Module,
    example: Batch,
    findings: dict[str, str],
    notes: list[str],
) -> None:
    model = copy.deepcopy(model).train()
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    layers = [layer for layer in layers if layer.track_running_stats]
    if not layers:
        notes.append("The model has no BatchNorm layer with running statistics.")
        return
    images, labels = example
    size = len(labels) // STEPS
    if size < 2:
        raise ValueError(f"the example must have at least {2 * STEPS} images; it has {len(labels)}")
    batches = [(images[i * size :][:size], labels[i * size :][:size]) for i in range(STEPS)]
    before = [int(layer.num_batches_tracked or 0) for layer in layers]
    watched = watch(step_function, model, batches, STEPS)
    steps = max(
        int(layer.num_batches_tracked or 0) - b for layer, b in zip(layers, before, strict=True)
    )
    if steps > len(watched.updates):
        findings["batch norm"] = (
            f"{steps} steps of the running statistics in {len(watched.updates)} update(s), each "
            f"from {size} images; group norm has none"
        )


def _find(inputs: Tensor, batches: Sequence[Batch]) -> Batch:
    """The micro-batch whose images went into the model."""
    for batch in batches:
        if batch[0].shape == inputs.shape and torch.equal(batch[0], inputs.to(batch[0])):
            return batch
    raise ValueError(
        "the loop put images into the model that are not one of the micro-batches it was given; "
        "for this check it must pass them on as they are"
    )


def _inputs(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([inputs for inputs, _ in batches])


def _labels(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([labels for _, labels in batches])


def flat_weights(model: nn.Module) -> Tensor:
    """A copy of all weights, flat."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def flat_gradient(model: nn.Module) -> Tensor:
    """The gradient of all parameters, flat; zero where there is none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.detach().flatten().clone() for part in parts])


def relative_difference(vector: Tensor, other: Tensor) -> float:
    """Norm of the difference, relative to the norm of `other`."""
    return ((vector - other).norm() / other.norm()).item()


def _close(gradient: Tensor, other: Tensor) -> bool:
    return bool((gradient - other).norm() <= TOLERANCE * other.norm())


def _ratio(gradient: Tensor, other: Tensor) -> float | None:
    """How many times `other` the gradient is, if it has the same direction."""
    ratio = (gradient @ other / (other @ other)).item()
    return ratio if ratio > 0 and _close(gradient, ratio * other) else None


def _near(value: float, *others: float) -> bool:
    return any(abs(value - other) <= 1e-4 * other for other in others)
