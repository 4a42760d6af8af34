"""Whether BatchNorm layers of a reader's model couple the images of a micro-batch."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from nbutils.accumulation.check.findings import Findings
from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, Batch, Batches
from nbutils.accumulation.check.watch import StepFunction


def check_batch_norm(
    step_function: StepFunction, model: nn.Module, example: Batch, findings: Findings
) -> None:
    """Run the loop for one window of a reader's model and look at its BatchNorm layers.

    Args:
        step_function: As in `check_accumulation`.
        model: A copy is trained, in the mode in which its layers are.
        example: Images and labels that it takes, at least two for each micro-batch.
        findings: Where "batch norm" is added.
    """
    model = copy.deepcopy(model)
    images, labels = example
    size = len(labels) // ACCUMULATION_STEPS
    parts = [slice(i * size, (i + 1) * size) for i in range(ACCUMULATION_STEPS)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    layers = [m for m in model.modules() if isinstance(m, _NormBase)]
    before = [int(layer.num_batches_tracked or 0) for layer in layers]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        batches = Batches((images[part], labels[part]) for part in parts)
        step_function(model, optimizer, schedule, batches, ACCUMULATION_STEPS)
    steps = [int(m.num_batches_tracked or 0) - b for m, b in zip(layers, before, strict=True)]
    without = [m for m in layers if isinstance(m, _BatchNorm) and m.running_mean is None]
    change = "use GroupNorm, or freeze the layer with eval()"
    if max(steps, default=0) > 1:
        findings.add(
            "batch norm",
            f"{max(steps)} steps of BatchNorm's running statistics in one window, each from the "
            f"{size} images of a micro-batch",
            change,
        )
    elif without:
        findings.add(
            "batch norm",
            f"{type(without[0]).__name__} without running statistics normalises each image by the "
            f"{size} images of its micro-batch, so it couples them",
            change,
        )
    elif layers and not any(steps):
        findings.note("The running statistics of the model's BatchNorm layers are frozen.")
    elif not layers:
        findings.note("The model has no BatchNorm layer.")
