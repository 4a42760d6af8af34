"""How much each image of a window weighs in its update, against what it should weigh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.accumulation.check.findings import Findings
from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, BATCH_SIZE, CLASSES
from nbutils.accumulation.check.update import Update
from nbutils.accumulation.check.watch import Run
from nbutils.accumulation.vectors import close

Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(logits, labels)`: the mean loss of images, or one loss per image."""

FULL = ACCUMULATION_STEPS * BATCH_SIZE


def mean_loss(loss: Loss | None) -> Loss:
    """The loss as a mean over images; cross-entropy where none is given.

    Raises:
        ValueError: It returns something else than a mean or one loss per image.
    """
    if loss is None:
        return F.cross_entropy

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        value = loss(logits, labels)
        return value if value.dim() == 0 else value.mean()

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
        images: In the window.
        micro_batches: In the window.
        sizes: Images in each micro-batch whose gradient was not lost.
        weights: The weight of an image in each of them, relative to the right one: 1 is right.
        factors: By which the loop multiplied the gradient of each micro-batch after its backward
            pass, which `weights` include; None if it did more than that.
    """

    images: int
    micro_batches: int
    sizes: Tensor
    weights: Tensor
    factors: Tensor | None

    @property
    def size(self) -> float:
        """Size of the gradient relative to the right one."""
        return ((self.sizes * self.weights).sum() / self.sizes.sum()).item()

    @property
    def is_equal(self) -> bool:
        """Whether every image weighs the same."""
        return close(self.weights, self.weights.mean().expand_as(self.weights))


def weigh(run: Run, update: Update, loss: Loss) -> Window | None:
    """The window of an update; None where the loop's loss is another one than `loss`."""
    numbers, scale = update.images, run.probe.model.scale
    through = torch.stack([one.through_logits for one in update.own]).sum(0)
    if not close(update.total, through):
        return None
    logits = (update.own[0].weight[:, numbers] * scale).double().T.requires_grad_()
    (truth,) = torch.autograd.grad(loss(logits, run.probe.labels[numbers]), logits)
    seen, truth = through[:, numbers].double(), truth.T * scale
    weights = (seen * truth).sum(0) / (truth * truth).sum(0)
    if not close(through[:, numbers], truth * weights):
        return None
    factors = update.factors
    places = run.probe.places[numbers]
    each = [(weights[places == place], places == place) for place in places.unique()]
    if any(not close(one, one.mean().expand_as(one)) or one.mean() <= 0 for one, _ in each):
        return None
    times = torch.ones(len(numbers)) if factors is None else factors
    by_batch = torch.stack([times[here].mean() for _, here in each])
    kept = by_batch > 0
    return Window(
        len(numbers),
        len(each),
        torch.tensor([len(one) for one, _ in each])[kept],
        (torch.stack([one.mean() for one, _ in each]) * by_batch)[kept],
        None if factors is None else by_batch,
    )


def check_image_weights(runs: Mapping[str, Run], loss: Loss | None, findings: Findings) -> None:
    """The rules "division", "equal weight" and "short window", on every update of every run."""
    mean = mean_loss(loss)
    windows = {name: [weigh(run, one, mean) for one in _whole(run)] for name, run in runs.items()}
    known = {name: [one for one in some if one is not None] for name, some in windows.items()}
    if any(one is None for some in windows.values() for one in some):
        name = "plain cross-entropy of model(images)" if loss is None else "the one given as loss="
        findings.cannot_check(
            f"The size of the gradient cannot be checked, because the loop's loss is not {name}. "
            "Pass the loss, a mean: check_accumulation(loop, loss=lambda logits, labels: ...)."
        )
        return
    for window in (window for some in known.values() for window in some):
        _check_equal(window, findings)
    usual = [window.factors for window in known["full"]]
    if any(one is None or usual[0] is None or not close(one, usual[0]) for one in usual):
        findings.cannot_check(
            "The loop changes the whole gradient before the update by more than a fixed factor, "
            "so the size of the gradient cannot be checked."
        )
    elif all(window.is_equal for window in known["full"]):
        for some in known.values():
            _check_sizes(some, findings)


def _whole(run: Run) -> list[Update]:
    """The updates whose gradient is of their own epoch, and is not lost."""
    return [one for one in run.updates if one.own and one.gradient.any() and not one.carried]


def _check_equal(window: Window, findings: Findings) -> None:
    weights, sizes = window.weights, window.sizes
    if window.is_equal:
        return
    by_batch = weights * sizes
    if close(by_batch, by_batch.mean().expand_as(by_batch)):
        small, large = int(sizes.min()), int(sizes.max())
        findings.add(
            "equal weight",
            f"an image in a micro-batch of {small} weighed {large / small:.3g} times as much as "
            f"one in a micro-batch of {large}",
            'take reduction="sum" and divide by the images in the window, instead of the mean of '
            "the micro-batches' means",
        )
    else:
        shares = " : ".join(f"{share:.3g}" for share in (weights / weights.min()).tolist())
        findings.add(
            "equal weight",
            f"the images of the micro-batches of one window weighed {shares}",
            "call backward() once per micro-batch, on its own loss, each divided by the same "
            "number of images",
        )


def _check_sizes(windows: list[Window], findings: Findings) -> None:
    """Sizes of the gradients of one run: full windows, then those with fewer images."""
    full = [one.size for one in windows if one.images == FULL]
    for size in full:
        _check_division(size, findings)
    for window in windows if full else ():
        if window.images == FULL or len(window.sizes) < window.micro_batches:
            continue
        # Without a division a smaller window has a smaller sum, which is no mistake of its own.
        sums: dict[int, float] = {FULL: window.images, ACCUMULATION_STEPS: window.micro_batches}
        sums[FULL // ACCUMULATION_STEPS] = window.images / ACCUMULATION_STEPS
        expected = [full[0], *(total for base, total in sums.items() if _near(full[0], base))]
        if not any(_near(window.size, one) for one in expected):
            findings.add(
                "short window",
                f"{window.images} images in a window for {FULL}: a gradient "
                f"{window.size / expected[-1]:.3g} of its right size",
                "divide by the number of images that are in this window, not by "
                "accumulation_steps or the size of a full window",
            )


def _check_division(size: float, findings: Findings) -> None:
    if _near(size, 1):
        return
    sums = {ACCUMULATION_STEPS: ", the sum of the micro-batches' means", FULL: ", never divided"}
    reason = next((text for times, text in sums.items() if _near(size, times)), "")
    findings.add(
        "division",
        f"a gradient {size:.3g} times too large{reason}"
        if size > 1
        else f"a gradient {size:.3g} of its right size",
        "divide each micro-batch's summed loss by the images in the window, once: "
        "(loss_sum / images).backward()",
    )


def _near(value: float, other: float) -> bool:
    return abs(value - other) <= 1e-3 * abs(other)
