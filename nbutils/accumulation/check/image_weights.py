"""How much each image of a window weighs in its update, against what it should weigh."""

from collections.abc import Callable, Mapping
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, BATCH_SIZE, CLASSES
from nbutils.accumulation.check.report import Report
from nbutils.accumulation.check.watch import Run, Update
from nbutils.accumulation.vectors import close, constant

Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(logits, labels)`: the mean loss of images, or one loss per image."""

FULL = ACCUMULATION_STEPS * BATCH_SIZE


def mean_loss(loss: Loss | None) -> Loss:
    """The loss as a mean over images, cross-entropy where none is given; refuses a sum."""
    if loss is None:
        return F.cross_entropy

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        found = loss(logits, labels)
        if not isinstance(found, Tensor):
            raise TypeError(f"loss must return a tensor, but it returned {type(found).__name__}")
        return found.mean()

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(FULL, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.arange(FULL) % CLASSES
    once, twice = mean(logits, labels), mean(logits.repeat(2, 1), labels.repeat(2))
    if not close(twice, once):
        raise ValueError(
            f"loss must return the mean over the images, or one loss per image; the same images "
            f"given twice changed it from {once.item():.4g} to {twice.item():.4g}"
        )
    return mean


class OtherLossError(Exception):
    """The gradient of an image does not have the direction of the loss's."""


class Window:
    """One update, as weights of images.

    Attributes:
        images, micro_batches: How many there are.
        factors: Of each micro-batch, as in `Update`.
        sizes: The images in each micro-batch whose gradient was not lost.
        weights: Of an image in each of these, relative to the right one; with `factors`.
        size: Of the gradient, relative to the right one.
    """

    def __init__(self, run: Run, update: Update, loss: Loss = F.cross_entropy) -> None:
        numbers, scale = update.images, run.probe.model.scale
        logits = (update.own[0].weight[:, numbers] * scale).double().T.requires_grad_()
        (truth,) = torch.autograd.grad(loss(logits, run.probe.labels[numbers]), logits)
        seen, truth = update.total[:, numbers].double(), truth.T * scale
        weights = (seen * truth).sum(0) / (truth * truth).sum(0)
        _, batch, sizes = run.probe.places[numbers].unique(return_inverse=True, return_counts=True)

        def of_batches(values: Tensor) -> Tensor:
            return torch.zeros(len(sizes)).double().index_add_(0, batch, values.double()) / sizes

        each = of_batches(weights)
        if not close(seen, truth * each[batch]) or bool((each <= 0).any()):
            raise OtherLossError
        self.factors = None if update.factors is None else of_batches(update.factors)
        if self.factors is not None:
            each = each * self.factors
        self.images, self.micro_batches = len(numbers), len(sizes)
        self.sizes, self.weights = sizes[each > 0], each[each > 0]
        self.size = ((self.sizes * self.weights).sum() / self.sizes.sum()).item()


def check_image_weights(runs: Mapping[str, Run], loss: Loss | None, report: Report) -> None:
    """The rules "division", "equal weight" and "short window", on every update of every run."""
    windows: dict[str, list[Window]] = {}
    try:
        for name, run in runs.items():
            whole = [u for u in run.updates if u.own and u.gradient.any() and not u.carried]
            windows[name] = [Window(run, update, mean_loss(loss)) for update in whole]
    except OtherLossError:
        what = "the one given as loss=" if loss else "plain cross-entropy of model(images)"
        report.cannot_check(
            f"the loop's loss is not {what}. Pass the loss, a mean: "
            f"check_accumulation(loop, loss=lambda logits, labels: ...)."
        )
        return
    for window in chain.from_iterable(windows.values()):
        if not constant(window.weights):
            report.broken("equal weight", _unequal(window.weights, window.sizes))
    factors = [window.factors for window in windows["full"]]
    if any(one is None or factors[0] is None or not close(one, factors[0]) for one in factors):
        report.cannot_check(
            "before the update the loop changes the whole of it by more than a fixed factor."
        )
    elif all(constant(window.weights) for window in windows["full"]):
        for some in windows.values():
            _check_sizes(some, report)


def _unequal(weights: Tensor, sizes: Tensor) -> str:
    if constant(weights * sizes):
        small, large = int(sizes.min()), int(sizes.max())
        times = f"weighed {large / small:.3g} times as much as one in a micro-batch of {large}"
        return f"an image in a micro-batch of {small} {times}"
    shares = " : ".join(f"{share:.3g}" for share in (weights / weights.min()).tolist())
    return f"the images of the micro-batches of one window weighed {shares}"


def _check_sizes(windows: list[Window], report: Report) -> None:
    """Sizes of the gradients of one run: full windows, then those with fewer images."""
    full = [window.size for window in windows if window.images == FULL]
    reasons = {ACCUMULATION_STEPS: ", the sum of the micro-batches' means", FULL: ", never divided"}
    for size in full:
        if not _near(size, 1):
            reason = next((text for times, text in reasons.items() if _near(size, times)), "")
            wrong = f"times too large{reason}" if size > 1 else "of its right size"
            report.broken("division", f"a gradient {size:.3g} {wrong}")
    for window in windows if full else ():
        if window.images == FULL or len(window.sizes) < window.micro_batches:
            continue
        # Without a division a smaller window has a smaller sum, which is no mistake of its own.
        sums = {FULL: window.images, BATCH_SIZE: window.images / ACCUMULATION_STEPS}
        sums[ACCUMULATION_STEPS] = window.micro_batches
        right = next((total for base, total in sums.items() if _near(full[0], base)), full[0])
        if not _near(window.size, full[0]) and not _near(window.size, right):
            seen = f"a gradient {window.size / right:.3g} of its right size"
            report.broken("short window", f"{window.images} images in a window for {FULL}: {seen}")


def _near(value: float, other: float) -> bool:
    return abs(value - other) <= 1e-3 * abs(other)
