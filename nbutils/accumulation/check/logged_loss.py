"""Whether a number that a loop returns is the mean loss over images, or one divided wrongly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbutils.accumulation.check.findings import Findings
from nbutils.accumulation.check.image_weights import Loss, mean_loss
from nbutils.accumulation.check.watch import Run

CHANGE = (
    "log the sum of the images' losses, not divided for the gradient, over the number of images"
)


@dataclass
class EpochLosses:
    """The true mean losses of one epoch.

    Attributes:
        batches: Of each micro-batch, with its number of images.
        windows: Of each window, with its micro-batches.
        mean: Of all images that were used.
        every: Of all images of the epoch.
    """

    batches: list[tuple[float, int]]
    windows: list[tuple[float, list[int]]]
    mean: float
    every: float

    @property
    def images(self) -> int:
        """In the epoch."""
        return sum(size for _, size in self.batches)


def epoch_losses(run: Run, epoch: int, loss: Loss) -> EpochLosses:
    """The true losses of an epoch, each image at the weight with which its window began."""
    labels, places = run.probe.labels, run.probe.places[: len(run.probe.labels)]
    weight = run.start.clone()
    windows: list[Tensor] = []
    for update in run.updates:
        own = update.own
        if own and own[0].epoch == epoch:
            weight[:, update.images] = own[0].weight[:, update.images].to(weight)
            windows.append(update.images)
    logits = weight.T * run.probe.model.scale

    def mean(numbers: Tensor) -> float:
        return loss(logits[numbers], labels[numbers]).item()

    everything = torch.arange(len(labels))
    batches = [everything[places == place] for place in places.unique()]
    return EpochLosses(
        [(mean(batch), len(batch)) for batch in batches],
        [(mean(window), places[window].unique().tolist()) for window in windows],
        mean(torch.cat(windows)) if windows else mean(everything),
        mean(everything),
    )


Verdict = tuple[str, str]
"""What a number is ("right", "wrong", "note", or "unknown"), and a text about it."""


def check_logged_loss(runs: Mapping[str, Run], loss: Loss | None, findings: Findings) -> None:
    """The rule "logged loss", on every value returned after every epoch of every run."""
    kinds, returned_any = set(), False
    for run in runs.values():
        for epoch, returned in enumerate(run.returned):
            losses = epoch_losses(run, epoch, mean_loss(loss))
            verdicts = dict(_verdicts(returned, losses, run.probe.accumulation_steps))
            if "right" not in verdicts and "wrong" in verdicts:
                findings.add("logged loss", verdicts["wrong"], CHANGE)
            elif "right" not in verdicts and "note" in verdicts:
                findings.note(verdicts["note"])
            kinds |= set(verdicts)
            returned_any |= returned is not None
    if returned_any and kinds <= {"unknown"}:
        findings.note("No number that the loop returns is a loss, so no logged loss was checked.")


def _verdicts(returned: Any, losses: EpochLosses, steps: int) -> list[Verdict]:
    """About every number in what a loop returned; about a list of losses as a whole."""
    if isinstance(returned, Mapping):
        returned = list(returned.values())
    if hasattr(returned, "tolist"):  # a tensor or an array
        returned = returned.tolist()
    if isinstance(returned, int | float) and not isinstance(returned, bool):
        return [_judge_number(float(returned), losses, steps)]
    if isinstance(returned, str) or not isinstance(returned, Iterable):
        return []
    values = [value.tolist() if hasattr(value, "tolist") else value for value in returned]
    if all(isinstance(value, float) for value in values):
        for judge in (_judge_micro_batches, _judge_windows):
            verdict = judge(values, losses, steps)
            if verdict[0] != "unknown":
                return [verdict]
    return [verdict for value in values for verdict in _verdicts(value, losses, steps)]


def _judge_number(value: float, losses: EpochLosses, steps: int) -> Verdict:
    means = [mean for mean, _ in losses.batches]
    windows = [mean for mean, _ in losses.windows]
    sums = [losses.every * losses.images, sum(means), sum(windows)]
    right = [losses.mean, losses.every, sums[0], means[-1], *windows[-1:]]
    if _among(value, right):
        return "right", ""
    if windows and _among(value, [sums[2] / len(windows)]):
        return "note", (
            "The logged loss is the mean over updates, so an image of a small last window weighs "
            "more in it than the others."
        )
    counts = [len(means), max(len(windows), 1), losses.images, 1.0 / steps]
    divisors = [*counts, *(count * steps for count in counts[:3])]
    if _among(value, [sums[1] / len(means)]):
        return "wrong", (
            f"a loss of {value:.4f} was logged, the mean of the micro-batches' means, for a mean "
            f"over images of {losses.mean:.4f}"
        )
    once_more = [total / divisor for total in sums for divisor in divisors]
    if _among(value, [*once_more, means[-1] / steps, *(one / steps for one in windows[-1:])]):
        return "wrong", f"a loss of {value:.4f} was logged for a mean of {losses.mean:.4f}"
    return "unknown", ""


def _judge_micro_batches(values: list[float], losses: EpochLosses, steps: int) -> Verdict:
    means = [mean for mean, _ in losses.batches]
    if len(values) != len(means):
        return "unknown", ""
    in_window = {
        place: sum(losses.batches[p][1] for p in window)
        for _, window in losses.windows
        for place in window
    }
    sums = [mean * size for mean, size in losses.batches]
    shares = [total / in_window.get(p, losses.images) for p, total in enumerate(sums)]
    if _same(values, means) or _same(values, sums):
        return "right", ""
    for wrong in ([m / steps for m in means], [m * steps for m in means], shares):
        if _same(values, wrong):
            return "wrong", (
                f"a micro-batch's loss of {values[0]:.4f} was logged for one of {means[0]:.4f}"
            )
    return "unknown", ""


def _judge_windows(values: list[float], losses: EpochLosses, steps: int) -> Verdict:
    if len(values) != len(losses.windows):
        return "unknown", ""
    truth = [mean for mean, _ in losses.windows]
    inside = [[losses.batches[place] for place in window] for _, window in losses.windows]
    images = [sum(size for _, size in window) for window in inside]
    last = [window[-1][0] for window in inside]
    if _same(values, truth) or _same(values, [m * n for m, n in zip(truth, images, strict=True)]):
        return "right", ""
    if _same(values, last):
        return "note", "The logged loss is that of the last micro-batch of each window only."
    sums = [sum(mean for mean, _ in window) for window in inside]
    means = [total / len(window) for total, window in zip(sums, inside, strict=True)]
    divided = [[v / steps for v in one] for one in (truth, sums, last)]
    for wrong in (means, sums, [v * steps for v in truth], *divided):
        if _same(values, wrong):
            worst = max(range(len(truth)), key=lambda i: abs(values[i] / truth[i] - 1))
            return "wrong", (
                f"an update's loss of {values[worst]:.4f} was logged for one of {truth[worst]:.4f}"
            )
    return "unknown", ""


def _same(values: list[float], others: list[float]) -> bool:
    return all(_among(value, [other]) for value, other in zip(values, others, strict=True))


def _among(value: float, others: list[float]) -> bool:
    return any(abs(value - other) <= 1e-5 * abs(other) for other in others)
