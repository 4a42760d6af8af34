"""How much each image of a window weighs in its update, against what it should weigh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.accumulation.check.findings import Findings
from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, BATCH_SIZE, CLASSES
from nbutils.accumulation.check.watch import Backward, Run, Update
from nbutils.accumulation.vectors import close, ratio

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


def own_passes(update: Update) -> list[Backward]:
    """The update's backward passes of its own epoch, without leftovers of an earlier one."""
    last = max((one.epoch for one in update.backwards), default=0)
    return [one for one in update.backwards if one.epoch == last]


def carried(update: Update) -> int:
    """How many backward passes of an earlier epoch are in the update's gradient."""
    old = update.backwards[: len(update.backwards) - len(own_passes(update))]
    kept = [one for one in old if update.gradient[:, one.images].any()]
    return len(kept)


def factor_of(update: Update) -> float | None:
    """The number by which the loop multiplied the whole gradient; None if it did more to it."""
    own = own_passes(update)
    if not own:
        return None
    last = own[-1].after
    total = torch.stack([one.added for one in own]).sum(0)
    from_last = None if last is None else ratio(update.gradient, last)
    if own[0].before.any():  # the gradient of the window before it is in there as well
        return from_last or ratio(update.gradient, total)
    return ratio(update.gradient, total) or from_last


@dataclass
class Window:
    """One update, as weights of images.

    Attributes:
        sizes: Images in each of its micro-batches.
        weights: The weight of an image in each micro-batch, relative to the right one: 1 is right.
        factor: As `factor_of` says; `weights` are those before it.
    """

    sizes: Tensor
    weights: Tensor
    factor: float | None

    @property
    def images(self) -> int:
        """In all its micro-batches."""
        return int(self.sizes.sum())

    @property
    def is_full(self) -> bool:
        """Whether it has as many images as a full window."""
        return self.images == FULL

    @property
    def size(self) -> float:
        """Size of its gradient relative to the right one, before the factor."""
        return ((self.sizes * self.weights).sum() / self.images).item()


def weigh(run: Run, update: Update, loss: Loss) -> Window | None:
    """The window of an update; None where the loop's loss is another one than `loss`."""
    own = own_passes(update)
    numbers = torch.cat([one.images for one in own]).unique()
    added = torch.stack([one.added for one in own]).sum(0)
    through = torch.stack([one.through_logits for one in own]).sum(0)
    if not close(added, through):
        return None
    scale = run.probe.model.scale
    logits = (own[0].weight[:, numbers] * scale).double().T.requires_grad_()
    labels = run.probe.batches.dataset.tensors[1]
    (truth,) = torch.autograd.grad(loss(logits, labels[numbers]), logits)
    seen, truth = through[:, numbers], truth.T * scale
    weights = (seen * truth).sum(0) / (truth * truth).sum(0)
    if not close(seen, (truth * weights).to(seen)):
        return None
    places = run.probe.places[numbers]
    of_batch = [weights[places == place] for place in places.unique()]
    if any(not close(one, one.mean().expand_as(one)) or one.mean() <= 0 for one in of_batch):
        return None
    return Window(
        torch.tensor([len(one) for one in of_batch]),
        torch.stack([one.mean() for one in of_batch]),
        factor_of(update),
    )


def check_image_weights(runs: Mapping[str, Run], loss: Loss | None, findings: Findings) -> None:
    """The rules "division", "equal weight" and "short window", on every update of every run."""
    mean = mean_loss(loss)
    windows = [
        weigh(run, update, mean)
        for run in runs.values()
        for update in run.updates
        if update.backwards and not carried(update)
    ]
    known = [window for window in windows if window is not None]
    if not known or len(known) < len(windows):
        name = "plain cross-entropy of model(images)" if loss is None else "the one given as loss="
        findings.cannot_check(
            f"The size of the gradient cannot be checked, because the loop's loss is not {name}. "
            "Pass the loss, a mean: check_accumulation(loop, loss=lambda logits, labels: ...)."
        )
        return
    for window in known:
        _check_equal(window, findings)
    factors = [window.factor for window in known[: len(runs["full"].updates)]]
    if any(f is None or abs(f / (factors[0] or 1) - 1) > 1e-3 for f in factors):
        findings.cannot_check(
            "The loop changes the whole gradient before the update by more than a fixed factor, "
            "so the size of the gradient cannot be checked."
        )
        return
    _check_sizes(known, findings)


def _check_equal(window: Window, findings: Findings) -> None:
    weights, sizes = window.weights, window.sizes
    if close(weights, weights.mean().expand_as(weights)):
        return
    by_batch = weights * sizes
    if close(by_batch, by_batch.mean().expand_as(by_batch)):
        small, large = int(sizes.min()), int(sizes.max())
        findings.add(
            "equal weight",
            f"an image in a micro-batch of {small} weighed {large / small:.3g} times as much as "
            f"one in a micro-batch of {large}",
            'use reduction="sum" and divide by the images in the window, not each micro-batch\'s '
            "mean by the number of micro-batches",
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
    """Sizes of the gradients: full windows first, then those with fewer images."""
    sizes = [(one, one.size * one.factor) for one in windows if one.factor is not None]
    full = [size for window, size in sizes if window.is_full]
    for size in full:
        if not _near(size, 1):
            how = {ACCUMULATION_STEPS: ", the sum of the micro-batches' means"}
            how[FULL] = ", the sum over all images"
            times = f"{size:.3g} times too large" if size > 1 else f"{size:.3g} of its right size"
            reason = next((text for value, text in how.items() if _near(size, value)), "")
            findings.add(
                "division",
                f"a gradient {times}{reason}",
                "divide each micro-batch's summed loss by the images in the window, once: "
                "(loss_sum / images).backward()",
            )
    for window, size in sizes:
        if window.is_full or not full:
            continue
        # Without a division a smaller window has a smaller sum, which is no mistake of its own.
        sums: dict[int, float] = {ACCUMULATION_STEPS: len(window.sizes), FULL: window.images}
        sums[FULL // ACCUMULATION_STEPS] = window.images / ACCUMULATION_STEPS
        expected = next((v for base, v in sums.items() if _near(full[0], base)), full[0])
        if not _near(size, expected):
            findings.add(
                "short window",
                f"{window.images} images in a window for {FULL}: a gradient "
                f"{size / expected:.3g} of its right size",
                "divide by the number of images that are in this window, not by "
                "accumulation_steps or the size of a full window",
            )


def _near(value: float, other: float) -> bool:
    return abs(value - other) <= 1e-3 * abs(other)
