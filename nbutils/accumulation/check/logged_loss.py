"""Whether a number that a loop returns is the mean loss over images, or one divided wrongly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nbutils.accumulation.check.image_weights import Loss, mean_loss
from nbutils.accumulation.check.report import Report
from nbutils.accumulation.check.watch import Run

Known = list[tuple[str, Tensor, Tensor]]
"""What a log may hold: a text ("" if it is right), the values, and the true ones."""


def check_logged_loss(runs: Mapping[str, Run], loss: Loss | None, report: Report) -> None:
    """The rule "logged loss", on every value returned after every epoch of every run."""
    returned_any = known_any = False
    for run in runs.values():
        for epoch, returned in enumerate(run.returned):
            texts = list(_texts(returned, _known(run, epoch, mean_loss(loss))))
            returned_any |= returned is not None
            known_any |= bool(texts)
            if texts and all(texts):
                report.broken("logged loss", texts[-1])
    if returned_any and not known_any:
        report.note("No number that the loop returns is a loss, so no logged loss was checked.")


def _texts(returned: Any, known: Known) -> Iterator[str]:
    """About every known number in what a loop returned; about a list of losses as a whole."""
    if isinstance(returned, Mapping):
        returned = list(returned.values())
    if hasattr(returned, "tolist"):  # a tensor or an array
        returned = returned.tolist()
    if isinstance(returned, int | float):
        yield from _text([returned], known)
    elif isinstance(returned, Iterable) and not isinstance(returned, str):
        values = [value.tolist() if hasattr(value, "tolist") else value for value in returned]
        whole = all(isinstance(value, float) for value in values) and _text(values, known)
        yield from whole or (text for value in values for text in _texts(value, known))


def _text(logged: Sequence[float], known: Known) -> list[str]:
    values = torch.tensor(logged, dtype=torch.float64)
    for text, candidate, truth in known:
        candidate, truth = candidate.reshape(-1).double(), truth.reshape(-1)
        if len(values) == len(candidate) and values.allclose(candidate, rtol=1e-5, atol=0):
            worst = int((values / truth - 1).abs().argmax())
            return [text.format(values[worst], truth[worst])]
    return []


def _known(run: Run, epoch: int, loss: Loss) -> Known:
    """The true losses take each image at the weight with which its window began."""
    labels, places, k = run.probe.labels, run.probe.places, run.probe.accumulation_steps
    count, weight, windows = len(labels), run.start.clone(), []
    for update in run.updates:
        if update.own and update.own[0].epoch == epoch:
            weight[:, update.images] = update.own[0].weight[:, update.images].to(weight)
            windows.append(update.images)
    logits = weight.T[:count] * run.probe.model.scale

    def means_of(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([loss(logits[part], labels[part]) for part in parts])

    everything = torch.arange(count)
    windows = windows or [everything]  # no update in this epoch
    batches = everything.split([len(labels) for _, labels in run.probe.batches])
    means, updates = means_of(batches), means_of(windows)
    mean, every = means_of([torch.cat(windows), everything])
    sums = means * torch.tensor([len(batch) for batch in batches])

    inside = [places[window].unique() for window in windows]  # the micro-batches of each
    images_in = torch.tensor([len(window) for window in windows])
    shares = sums / count  # each a part of its window's mean
    for part, images in zip(inside, images_in, strict=True):
        shares[part] = sums[part] / images
    last = torch.stack([means[part[-1]] for part in inside])
    summed = torch.stack([means[part].sum() for part in inside])
    averaged = torch.stack([means[part].mean() for part in inside])

    totals = torch.stack([sums.sum(), means.sum(), updates.sum()])
    counts = torch.tensor([len(batches), len(windows), count])
    numbers = totals.outer(1 / torch.cat([counts, counts * k, torch.tensor([1 / k])])).flatten()
    numbers = torch.cat([numbers, means[-1:] / k, updates[-1:] / k])
    right = [mean, every, every * count, updates.mean(), means[-1], updates[-1]]
    right += [means, sums, updates, updates * images_in, last]
    instead = "loss of {1:.4f} was logged as {0:.4f}"
    of_means = "{:.4f} was logged, the mean of the micro-batches' means; the mean loss is {:.4f}"
    return [
        *(("", one, one) for one in right),
        (of_means, means.mean(), mean),
        *((f"a mean {instead}", one, mean) for one in numbers),
        *((f"a micro-batch's {instead}", one, means) for one in (means / k, means * k, shares)),
        *((f"an update's {instead}", one, updates) for one in (averaged, summed, summed / k)),
        *((f"an update's {instead}", one, updates) for one in (updates * k, updates / k, last / k)),
    ]
