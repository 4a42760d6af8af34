"""Whether a number that a loop returns is the mean loss over images, or one divided wrongly."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nbutils.accumulation.check.image_weights import Loss, mean_loss
from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, BATCH_SIZE
from nbutils.accumulation.check.report import Report
from nbutils.accumulation.check.watch import Run


def check_logged_loss(runs: Mapping[str, Run], loss: Loss | None, report: Report) -> None:
    """The rule "logged loss", on every value returned after every epoch of every run."""
    returned_any = known_any = False
    for run in runs.values():
        for epoch, returned in enumerate(run.returned):
            known = _known(run, epoch, mean_loss(loss))
            texts = [text for logged in _series(returned) for text in _text(logged, known)]
            returned_any |= returned is not None
            known_any |= bool(texts)
            if texts and all(texts):
                report.broken("logged loss", texts[0])
    if returned_any and not known_any:
        report.note("No number that the loop returns is a loss, so no logged loss was checked.")


def _series(returned: Any) -> Iterator[list[float]]:
    """Every list of numbers in what a loop returned, and every number as a list of one."""
    if isinstance(returned, Mapping):
        returned = list(returned.values())
    if hasattr(returned, "tolist"):  # a tensor or an array
        returned = returned.tolist()
    if isinstance(returned, int | float):
        yield [returned]
    elif isinstance(returned, Iterable) and not isinstance(returned, str):
        values = [value.tolist() if hasattr(value, "tolist") else value for value in returned]
        if all(isinstance(value, float) for value in values):
            yield values
        for value in values:
            yield from _series(value)


Known = list[tuple[str, Tensor, Tensor]]
"""What a log may hold: a text ("" if it is right), the values, and the true ones."""


def _text(logged: list[float], known: Known) -> list[str]:
    values = torch.tensor(logged, dtype=torch.float64)
    for text, candidate, truth in known:
        candidate, truth = candidate.reshape(-1).double(), truth.reshape(-1)
        if len(values) == len(candidate) and values.allclose(candidate, rtol=1e-5, atol=0):
            worst = int((values / truth - 1).abs().argmax())
            return [text.format(values[worst], truth[worst])]
    return []


def _known(run: Run, epoch: int, loss: Loss) -> Known:
    """The true losses take each image at the weight with which its window began."""
    labels, k = run.probe.labels, ACCUMULATION_STEPS
    count, weight, windows = len(labels), run.start.clone(), []
    for update in run.updates:
        if update.own and update.own[0].epoch == epoch:
            weight[:, update.images] = update.own[0].weight[:, update.images].to(weight)
            windows.append(update.images)
    logits, everything = weight.T[:count] * run.probe.model.scale, torch.arange(count)
    windows, batches = windows or [everything], everything.split(BATCH_SIZE)
    inside = [run.probe.places[window].unique() for window in windows]  # micro-batches of each

    def each(parts: Iterable[Tensor], of: Any) -> Tensor:
        return torch.stack([of(part) for part in parts])

    def mean_of(part: Tensor) -> Tensor:
        return loss(logits[part], labels[part])

    means, updates = each(batches, mean_of), each(windows, mean_of)
    mean, every = each([torch.cat(windows), everything], mean_of)
    sizes, images_in = (torch.tensor([len(part) for part in parts]) for parts in (batches, windows))
    sums = means * sizes
    shares = sums / count  # each a part of its window's mean
    for part, images in zip(inside, images_in, strict=True):
        shares[part] = sums[part] / images
    last = each(inside, lambda part: means[part[-1]])
    summed = each(inside, lambda part: means[part].sum())
    averaged = each(inside, lambda part: means[part].mean())

    right = [mean, every, every * count, updates.mean(), means[-1], updates[-1]]
    right += [means, sums, updates, updates * images_in, last]
    counts = torch.tensor([len(batches), len(windows), count])
    totals = torch.stack([sums.sum(), means.sum(), updates.sum()])
    numbers = totals.outer(1 / torch.cat([counts, counts * k, torch.tensor([1 / k])])).flatten()
    numbers = torch.cat([numbers, means[-1:] / k, updates[-1:] / k])
    of_means = "{:.4f} was logged, the mean of the micro-batches' means; the mean loss is {:.4f}"
    instead = "loss of {1:.4f} was logged as {0:.4f}"
    known = [("", one, one) for one in right] + [(of_means, means.mean(), mean)]
    known += [(f"a mean {instead}", one, mean) for one in numbers]
    known += [(f"a micro-batch's {instead}", one, means) for one in (means / k, means * k, shares)]
    wrong = averaged, summed, summed / k, updates * k, updates / k, last / k
    return known + [(f"an update's {instead}", one, updates) for one in wrong]
