"""Loops as people write them, for tests of the checker and of what mistakes cost."""

import torch
import torch.nn.functional as F

from nbutils.accumulation import windows_of_batches


def sum_of_losses(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum")


def images_in(window):
    return sum(len(labels) for _, labels in window)


def step_schedule(model, optimizer, scheduler, window):
    scheduler.step()


def loop(
    *,
    forward=lambda model, images: model(images),
    loss=sum_of_losses,
    divisor=lambda window, steps: images_in(window),
    backward=torch.Tensor.backward,
    inside=None,  # after each backward pass
    before_step=None,
    step=lambda model, optimizer: optimizer.step(),
    after_step=step_schedule,
    clear=True,
    last_window="step",
):
    """A loop with hooks where mistakes are made; without any it is right."""

    def run(model, optimizer, scheduler, batches, steps):
        for window in windows_of_batches(batches, steps, last_window):
            given = model, optimizer, scheduler, window
            if clear:
                optimizer.zero_grad()
            for images, labels in window:
                backward(loss(forward(model, images), labels) / divisor(window, steps))
                if inside:
                    inside(*given)
            if before_step:
                before_step(*given)
            step(model, optimizer)
            after_step(*given)

    return run
