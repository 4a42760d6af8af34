"""What wrong training loops do to the gradient and to the accuracy; notebook 06 has the loops."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from nbutils.accumulation.check.probe import Batch
from nbutils.accumulation.check.watch import AnySchedule, StepFunction, undisturbed
from nbutils.accumulation.equivalence import small_cnn
from nbutils.accumulation.vectors import flat_gradient, relative_difference

# 75 micro-batches: nine windows of eight and one of three, whose last has 6 images.
IMAGES, BATCH_SIZE, ACCUMULATION_STEPS = 1_190, 16, 8
LAST = 2 * ACCUMULATION_STEPS + 3  # their gradients are compared: two full windows, the short one


def gradient_errors(
    step_function: StepFunction, model: nn.Module, batches: Sequence[Batch], accumulation_steps: int
) -> list[float]:
    """How far the gradient of each update of two epochs is from the true one, relative to it.

    The true gradient is that of the mean cross-entropy over the images that went through the model
    since the last update. A copy of the model is used; SGD at a tiny rate leaves it where it is.
    """
    model, twin = copy.deepcopy(model), copy.deepcopy(model)
    labels_of = {id(images): labels for images, labels in batches}
    seen: list[Tensor] = []
    errors: list[float] = []

    def before_step(*_: Any) -> None:
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        labels = torch.cat([labels_of[id(images)] for images in seen])
        F.cross_entropy(twin(torch.cat(seen)), labels).backward()
        errors.append(relative_difference(flat_gradient(model), flat_gradient(twin)))
        seen.clear()

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    optimizer.register_step_pre_hook(before_step)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with undisturbed():
        for _ in range(2):
            step_function(model, optimizer, AnySchedule(optimizer), batches, accumulation_steps)
    return errors


def measure_damage(
    loops: Mapping[str, StepFunction], data: Any, seeds: int = 3, epochs: int = 4
) -> pd.DataFrame:
    """What each loop does to the gradient and to the accuracy.

    A small network is trained on 1,190 images of `data`, an `nbutils.Dataset`, in micro-batches of
    16, 8 to a window, by SGD with momentum at a rate that falls to zero.

    Returns one row per loop and seed: `loop`, `seed`, `gradient_error` (the largest of the updates
    of two epochs of the last 294 images, at the initial weights, relative to the true gradient) and
    `accuracy` on the test images after training, in [0, 1].
    """
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(data.train.labels), generator=generator)[:IMAGES]
    images = data.normalised(data.train.images[chosen], cpu, torch.float32)
    test_images = data.normalised(data.test.images, cpu, torch.float32)
    labels = data.train.labels[chosen]
    batches = list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))
    updates = epochs * -(-len(batches) // ACCUMULATION_STEPS)
    rows = []
    for seed in range(seeds):
        for name, loop in loops.items():
            with undisturbed():
                torch.manual_seed(seed)
                model = small_cnn("group")
                error = max(gradient_errors(loop, model, batches[-LAST:], ACCUMULATION_STEPS))
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
                schedule = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / updates))
                for _ in range(epochs):
                    loop(model, optimizer, schedule, batches, ACCUMULATION_STEPS)
            with torch.no_grad():
                right = model(test_images).argmax(1) == data.test.labels
            rows.append((name, seed, error, right.double().mean().item()))
    return pd.DataFrame(rows, columns=["loop", "seed", "gradient_error", "accuracy"])
