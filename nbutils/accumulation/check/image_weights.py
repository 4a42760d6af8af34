"""How much each image of a window weighs in its update, against what it should weigh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, BATCH_SIZE, CLASSES
from nbutils.accumulation.check.report import Report
from nbutils.accumulation.check.watch import Run, Update
from nbutils.accumulation.vectors import close

Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(logits, labels)`: the mean loss of images, or one loss per image."""

FULL = ACCUMULATION_STEPS * BATCH_SIZE


def mean_loss(loss: Loss | None) -> Loss:
    """The loss as a mean over images, cross-entropy where none is given; refuses a sum."""
    if loss is None:
        return F.cross_entropy

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        return loss(logits, labels).mean()

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


@dataclass
class Window:
    """One update, as weights of images.

    Attributes:
        sizes: Images in each micro-batch.
        weights: The weight of an image in each of them, relative to the right one: 1 is right, 0
            where the loop lost the gradient.
        factors: By which the loop multiplied the gradient of each micro-batch after its backward
            pass, which `weights` include; None if it did more than that.
    """

    sizes: Tensor
    weights: Tensor
    factors: Tensor | None

    @property
    def images(self) -> int:
        """In the window."""
        return int(self.sizes.sum())

    @property
    def size(self) -> float:
        """Size of the gradient relative to the right one."""
        sizes = self.sizes * (self.weights > 0)
        return ((sizes * self.weights).sum() / sizes.sum()).item()

    @property
    def is_equal(self) -> bool:
        """Whether every image weighs the same."""
        return _equal(self.weights[self.weights > 0])


def _equal(values: Tensor) -> bool:
    return close(values, values.mean().expand_as(values))


def _near(value: float, other: float) -> bool:
    return abs(value - other) <= 1e-3 * abs(other)


def weigh(run: Run, update: Update, loss: Loss) -> Window | None:
    """The window of an update; None where the loop's loss is another one than `loss`."""
    numbers, scale = update.images, run.probe.model.scale
    logits = (update.own[0].weight[:, numbers] * scale).double().T.requires_grad_()
    (truth,) = torch.autograd.grad(loss(logits, run.probe.labels[numbers]), logits)
    seen, truth = update.total[:, numbers].double(), truth.T * scale
    weights = (seen * truth).sum(0) / (truth * truth).sum(0)
    if not close(seen, truth * weights):
        return None
    _, batch, sizes = run.probe.places[numbers].unique(return_inverse=True, return_counts=True)

    def of_batches(values: Tensor) -> Tensor:
        return torch.zeros(len(sizes)).double().index_add_(0, batch, values.double()) / sizes

    each, factors = of_batches(weights), update.factors
    if not close(weights, each[batch]) or bool((each <= 0).any()):
        return None
    factors = None if factors is None else of_batches(factors)
    return Window(sizes, each if factors is None else each * factors, factors)


def check_image_weights(runs: Mapping[str, Run], loss: Loss | None, report: Report) -> None:
    """The rules "division", "equal weight" and "short window", on every update of every run."""
    windows: dict[str, list[Window]] = {}
    for name, run in runs.items():
        whole = [u for u in run.updates if u.own and u.gradient.any() and not u.carried]
        weighed = [weigh(run, update, mean_loss(loss)) for update in whole]
        windows[name] = [window for window in weighed if window is not None]
        if len(windows[name]) < len(weighed):
            what = "the one given as loss=" if loss else "plain cross-entropy of model(images)"
            report.cannot_check(
                f"the loop's loss is not {what}. Pass the loss, a mean: "
                f"check_accumulation(loop, loss=lambda logits, labels: ...)."
            )
            return
    for window in (window for some in windows.values() for window in some):
        _check_equal(window, report)
    usual = [window.factors for window in windows["full"]]
    if any(one is None or usual[0] is None or not close(one, usual[0]) for one in usual):
        report.cannot_check(
            "before the update the loop changes the whole of it by more than a fixed factor."
        )
    elif all(window.is_equal for window in windows["full"]):
        for some in windows.values():
            _check_sizes(some, report)


def _check_equal(window: Window, report: Report) -> None:
    kept = window.weights > 0
    weights, sizes = window.weights[kept], window.sizes[kept]
    if window.is_equal:
        return
    if _equal(weights * sizes):
        small, large = int(sizes.min()), int(sizes.max())
        seen = (
            f"an image in a micro-batch of {small} weighed {large / small:.3g} times as much as "
            f"one in a micro-batch of {large}"
        )
    else:
        shares = " : ".join(f"{share:.3g}" for share in (weights / weights.min()).tolist())
        seen = f"the images of the micro-batches of one window weighed {shares}"
    report.broken("equal weight", seen)


def _check_sizes(windows: list[Window], report: Report) -> None:
    """Sizes of the gradients of one run: full windows, then those with fewer images."""
    full = [window.size for window in windows if window.images == FULL]
    reasons = {ACCUMULATION_STEPS: ", the sum of the micro-batches' means", FULL: ", never divided"}
    for size in full:
        if not _near(size, 1):
            reason = next((text for times, text in reasons.items() if _near(size, times)), "")
            large = f"a gradient {size:.3g} times too large{reason}"
            small = f"a gradient {size:.3g} of its right size"
            report.broken("division", large if size > 1 else small)
    for window in windows if full else ():
        if window.images == FULL or not (window.weights > 0).all():
            continue
        # Without a division a smaller window has a smaller sum, which is no mistake of its own.
        sums = {FULL: window.images, BATCH_SIZE: window.images / ACCUMULATION_STEPS}
        sums[ACCUMULATION_STEPS] = len(window.sizes)
        expected = next((total for base, total in sums.items() if _near(full[0], base)), full[0])
        if not _near(window.size, full[0]) and not _near(window.size, expected):
            report.broken(
                "short window",
                f"{window.images} images in a window for {FULL}: a gradient "
                f"{window.size / expected:.3g} of its right size",
            )
