"""The gradient noise scale: how many images an update needs before more of them stop helping.

At fixed weights, let `G` be the mean gradient over all images and `Sigma` the covariance of one
image's gradient. The mean gradient of B images has squared length |G|^2 + tr(Sigma)/B, of which
the second part is noise. The two are equal at the *simple noise scale*

    B_simple = tr(Sigma) / |G|^2

Far fewer images per update are mostly noise, so that more of them help nearly in proportion; far
more images hardly change the update. The micro-batches of one window tell it: their gradients
differ by noise alone.

Source: McCandlish, Kaplan, Amodei et al. (2018), "An Empirical Model of Large-Batch Training",
section 2.2 and appendix A.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nbutils.accumulation.window import MicroBatch, accumulate_gradient
from nbutils.data.dataset import Dataset
from nbutils.errors import InputError
from nbutils.training.config import RunConfig
from nbutils.training.train import Run, deterministic, generator_for, resolve_device

FEWEST_MICRO_BATCHES = 3
"""Two tell their spread, and the interval needs one more to leave out."""


@dataclass(frozen=True)
class NoiseScale:
    """The simple noise scale at fixed weights, estimated from one window.

    Attributes:
        value: `trace / gradient_norm_squared`, in images; infinite where the estimate of
            |G|^2 is not positive. Numerator and denominator are unbiased, their ratio is so only
            in the limit of many images.
        low: Lower end of its interval, in images, >= 0.
        high: Upper end; infinite where the window does not tell |G| from zero.
        gradient_norm_squared: Unbiased estimate of |G|^2; it may be negative.
        trace: Unbiased estimate of tr(Sigma), >= 0.
        images: Images in the window.
        micro_batches: Micro-batches in the window.
    """

    value: float
    low: float
    high: float
    gradient_norm_squared: float
    trace: float
    images: int
    micro_batches: int


def noise_scale(
    model: nn.Module,
    window: Sequence[MicroBatch],
    losses: Callable[[MicroBatch], Tensor],
    confidence: float = 0.95,
) -> NoiseScale:
    """Estimate the simple noise scale of any model from the micro-batches of one window.

    With micro-batches of b_k images, mean gradients g_k, and n images in all, of mean gradient g,

        tr(Sigma) is estimated by sum_k b_k |g_k - g|^2 / (K - 1), and |G|^2 by |g|^2 - tr(Sigma)/n

    without bias, whatever the sizes b_k, if the images are drawn independently. Images drawn
    without replacement from a set not much larger than the window make |G|^2 too small for the
    mean gradient of that set, and the noise scale too large.

    The interval is Fieller's for a ratio, since it stays right where the denominator may be zero
    and then has no upper end. Its variances and covariance come from leaving out one micro-batch
    at a time (the jackknife for groups of unequal size), its quantile is Student's with K - 1
    degrees of freedom.

    The model stays in the mode that it is in: in training mode the noise of dropout counts, as it
    does in an update. Weights and gradients are left as they were. The gradient of every
    micro-batch is held in memory at once.

    Args:
        model: Any model whose parameters get gradients.
        window: At least `FEWEST_MICRO_BATCHES` micro-batches, of at least one image each.
        losses: The loss of every image of a micro-batch, not reduced, shape (images,).
        confidence: Of the interval.

    Raises:
        InputError: There are too few micro-batches, or the model normalises by the statistics of
            a batch.
        ValueError: As `accumulate_gradient`.

    Sources: McCandlish et al. (2018), appendix A.1, for two batch sizes; Fieller (1954); Busing,
    Meijer, van der Leeden (1999), "Delete-m jackknife for unequal m".
    """
    if len(window) < FEWEST_MICRO_BATCHES:
        raise InputError(
            f"the window has {len(window)} micro-batches, but the noise scale needs at least "
            f"{FEWEST_MICRO_BATCHES}: their differences are the noise"
        )
    _refuse_batch_statistics(model)
    sizes, products = _inner_products(model, window, losses)
    whole = _estimates(sizes, products)
    spread = _jackknife(sizes, products, whole)
    trace, squared = whole
    low, high = _fieller(trace, squared, spread, len(sizes) - 1, confidence)
    return NoiseScale(
        value=trace / squared if squared > 0 else math.inf,
        low=low,
        high=high,
        gradient_norm_squared=squared,
        trace=trace,
        images=int(sizes.sum()),
        micro_batches=len(sizes),
    )


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise InputError(
                f"the model's {type(module).__name__} ({name}) normalises by the statistics of a "
                f"batch, so that an image has no gradient of its own and there is no noise scale; "
                f"use GroupNorm or no normalisation"
            )


def _inner_products(
    model: nn.Module, window: Sequence[MicroBatch], losses: Callable[[MicroBatch], Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of the micro-batches, shape (K,), and inner products of their gradients, (K, K)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad for p in parameters]
    sizes: list[int] = []
    gradients: list[list[Tensor]] = []

    def counted(micro_batch: MicroBatch) -> Tensor:
        image_losses = losses(micro_batch)
        sizes.append(len(image_losses))
        return image_losses

    try:
        for micro_batch in window:
            for parameter in parameters:
                parameter.grad = None
            accumulate_gradient(model, [micro_batch], counted)
            gradients.append(
                [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            )
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
    products = torch.zeros(len(sizes), len(sizes), dtype=torch.float64)
    for of_one_parameter in zip(*gradients, strict=True):
        flat = torch.stack(of_one_parameter).flatten(1)
        exact = torch.float32 if flat.device.type == "mps" else torch.float64
        flat = flat.to(exact)
        products += (flat @ flat.T).to("cpu", torch.float64)
    return np.array(sizes, dtype=float), products.numpy()


def _estimates(sizes: np.ndarray, products: np.ndarray) -> tuple[float, float]:
    """Unbiased estimates of tr(Sigma) and of |G|^2."""
    n = sizes.sum()
    mean_squared = sizes @ products @ sizes / n**2
    spread = sizes @ products.diagonal() - n * mean_squared
    trace = max(0.0, float(spread)) / (len(sizes) - 1)  # below 0 by rounding alone
    return trace, float(mean_squared - trace / n)


def _jackknife(sizes: np.ndarray, products: np.ndarray, whole: tuple[float, float]) -> np.ndarray:
    """Covariance matrix, shape (2, 2), of the two estimates."""
    without = []
    for left_out in range(len(sizes)):
        kept = np.arange(len(sizes)) != left_out
        without.append(_estimates(sizes[kept], products[np.ix_(kept, kept)]))
    shares = (sizes.sum() / sizes)[:, None]
    pseudo_values = shares * np.array(whole) - (shares - 1) * np.array(without)
    # Each estimates the same two numbers; a larger micro-batch does so more precisely.
    residuals = pseudo_values - np.average(pseudo_values, axis=0, weights=sizes)
    scaled = residuals / np.sqrt(shares - 1)
    return scaled.T @ scaled / len(sizes)


def _fieller(
    numerator: float, denominator: float, covariance: np.ndarray, freedom: int, confidence: float
) -> tuple[float, float]:
    """The ratios r >= 0 for which `numerator - r * denominator` may well be zero."""
    from scipy import stats

    (var_numerator, cov), (_, var_denominator) = stats.t.ppf((1 + confidence) / 2, freedom) ** 2 * (
        covariance
    )
    # Solve a r^2 - 2 b r + c <= 0.
    a = denominator**2 - var_denominator
    b = numerator * denominator - cov
    c = numerator**2 - var_numerator
    larger = b + math.sqrt(max(0.0, b * b - a * c))
    low = max(0.0, c / larger) if c > 0 and larger != 0 else 0.0
    high = larger / a if a > 0 and denominator > 0 else math.inf
    return low, high


def noise_along_training(
    config: RunConfig,
    data: Dataset,
    updates: Sequence[int],
    batch_size: int = 64,
    micro_batches: int = 64,
) -> pd.DataFrame:
    """Train as `config` says, and measure the noise scale after some of the updates.

    The measurements leave no trace in the training. Their images are drawn from the training
    images with replacement, so that each is an independent draw.

    Args:
        config: Of the run.
        data: Its images.
        updates: When to measure, >= 1.
        batch_size: Images in each micro-batch of a measurement.
        micro_batches: Of a measurement.

    Returns:
        A row a measurement: `optimizer`, `learning_rate`, `seed`, `update`,
        `validation_accuracy`, and the fields of `NoiseScale`.

    Raises:
        InputError: As `train` and `noise_scale`, or the run has fewer updates.
    """
    device = resolve_device(config.device)
    rows = []
    with deterministic(device), Run(config, data, device, "eager") as run:
        if not updates or min(updates) < 1 or max(updates) > run.total_updates:
            raise InputError(
                f"updates = {list(updates)}, but they must be in 1 to {run.total_updates}, "
                f"the updates of the run"
            )
        while run.updates < max(updates):
            run.begin_epoch()
            while run.next_update():
                if run.updates in updates:
                    measured = _measure(run, batch_size * micro_batches, batch_size)
                    rows.append({"update": run.updates, **measured})
    settings = {name: getattr(config, name) for name in ("optimizer", "learning_rate", "seed")}
    return pd.DataFrame([settings | row for row in rows])


def _measure(run: Run, images: int, batch_size: int) -> dict[str, float]:
    """The noise scale and the validation accuracy of a run's weights as they are now."""
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)  # the run has a stream of its own
    purpose = run.config.seed, f"noise scale after {run.updates}"
    generator = generator_for(torch.device("cpu"), *purpose)
    chosen = torch.randint(len(run.train_labels), (images,), generator=generator)

    def losses(micro_batch: Tensor) -> Tensor:
        logits = run.model(run.train_images[micro_batch])
        return F.cross_entropy(logits, run.train_labels[micro_batch], reduction="none")

    run.model.eval()
    predicted = run.logits(run.validation_images).argmax(1)
    run.model.train()
    dropout = run.model.dropout
    of_the_run, dropout.generator = dropout.generator, generator_for(run.device, *purpose)
    measured = noise_scale(run.model, chosen.to(run.device).split(batch_size), losses)
    dropout.generator = of_the_run
    accuracy = (predicted == run.data.validation.labels).double().mean().item()
    return {"validation_accuracy": accuracy, **asdict(measured)}
