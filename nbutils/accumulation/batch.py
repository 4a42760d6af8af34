"""What `window.py` needs around a micro-batch: counting its losses, and the checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nbutils.accumulation.distributed import Ranks

LONGEST = 4096  # micro-batches of a window; an iterator that gives more is taken for endless
DEPTH = 4  # how deep `lengths` looks into a micro-batch
WEIGHT_LINE = "weight=lambda batch: (batch[1] != -100).sum()"


class TotalWeight:
    """The total weight of a window's losses on all ranks, by which their sum is divided.

    It is known before the first pass if the reader gives weights, or if micro-batches are tensors
    of indices. Otherwise it is the number of losses, known only after the last forward pass. Until
    then the losses are divided by an estimate; just before the last backward pass the gradient so
    far is multiplied by estimate / total, which makes it exact.

    `of_this_rank` is the part of this rank; NaN until it is known.
    """

    def __init__(
        self,
        micro_batches: Sequence[Any],
        weight: Callable[[Any], float | Tensor] | None,
        ranks: Ranks,
        parameters: list[nn.Parameter],
        update: int | None,
    ) -> None:
        self._steps, self._update = len(micro_batches), update
        self._ranks, self._parameters = ranks, parameters
        self._counts: list[int] = []
        self._weights = _weights(micro_batches, weight)
        self.of_this_rank = _known_weight(micro_batches, self._weights)
        self._total = self._not_zero(self._compare_ranks())
        self._earlier = [parameter.grad for parameter in parameters]
        if math.isnan(self._total):  # what the window adds to `.grad` will be multiplied
            clear(parameters)

    def after(self, losses: Tensor, micro_batch: Any) -> float:
        """Check the losses of the next micro-batch; returns what to divide their sum by."""
        number = len(self._counts) + 1
        where = place(self._update, number, self._steps)
        check_losses(losses, micro_batch, self._weights[number - 1], where)
        self._counts.append(losses.numel())
        if not math.isnan(self._total):
            return self._total
        known = set(map(id, self._parameters))
        others = [parameter for parameter in reached(losses) if id(parameter) not in known]
        self._parameters += others  # such as those of a loss with weights of its own
        self._earlier += [parameter.grad for parameter in others]
        clear(others)
        estimate = max(1, self._counts[0]) * self._steps * self._ranks.number
        if number < self._steps:
            return estimate
        self.of_this_rank = float(sum(self._counts))
        counts = self._ranks.gather([self.of_this_rank])
        self._total = self._not_zero(sum(count for (count,) in counts))
        with torch.no_grad():
            for parameter in self._parameters:
                if parameter.grad is not None and estimate != self._total:
                    parameter.grad.mul_(estimate / self._total)
        add_gradients(self._parameters, self._earlier)
        return self._total

    def _compare_ranks(self) -> float:
        """Refuse windows that do not match; the total weight, NaN if a rank does not know its own.

        All ranks see the same numbers, so either all go on or all raise.
        """
        update = -1 if self._update is None else self._update
        told = self._ranks.gather([self._steps, self.of_this_rank, update])
        empty = [rank for rank, (steps, _, _) in enumerate(told) if steps == 0]
        if empty:
            whose = f" of rank {empty[0]}" if len(told) > 1 else ""
            raise ValueError(f"{place(self._update)}the window{whose} is empty")
        updates = [int(each) for _, _, each in told]
        if len(set(updates)) > 1:
            raise ValueError(
                f"the ranks are at updates {updates}, so they have unequal numbers of windows; "
                f"give every rank the same number"
            )
        return sum(weight for _, weight, _ in told)

    def _not_zero(self, total: float) -> float:
        if total == 0:
            raise ValueError(f"{place(self._update)}the losses of the window weigh nothing")
        return total


def reached(losses: Tensor) -> list[nn.Parameter]:
    """The parameters that a backward pass will reach."""
    seen: set[Any] = {None}
    todo: set[Any] = {losses.grad_fn} - seen
    while todo:
        seen |= todo
        todo = {node for one in todo for node, _ in one.next_functions} - seen
    ends = (getattr(node, "variable", None) for node in seen)
    return [parameter for parameter in ends if isinstance(parameter, nn.Parameter)]


def clear(parameters: Iterable[Tensor]) -> None:
    """Take the gradients away."""
    for parameter in parameters:
        parameter.grad = None


@torch.no_grad()
def add_gradients(parameters: Iterable[Tensor], earlier: Iterable[Tensor | None]) -> None:
    """Add the gradients that were set aside before a window to what it brought."""
    for parameter, gradient in zip(parameters, earlier, strict=True):
        if gradient is not None:
            brought = parameter.grad
            parameter.grad = gradient if brought is None else gradient.add_(brought)


def couples_images(layer: nn.Module) -> bool:
    """Whether a layer is BatchNorm that normalises by the statistics of its micro-batch."""
    return isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)


def _weights(
    micro_batches: Sequence[Any], weight: Callable[[Any], float | Tensor] | None
) -> list[float | None]:
    """What the losses of each micro-batch weigh; None where the reader does not say."""
    if weight is None:
        return [None] * len(micro_batches)
    weights = [float(weight(micro_batch)) for micro_batch in micro_batches]
    if not all(0 <= value < math.inf for value in weights):
        raise ValueError(f"weight returned {weights}, but weights must be finite and >= 0")
    return [*weights]


def _known_weight(micro_batches: Sequence[Any], weights: Sequence[float | None]) -> float:
    """The weight of the window if it is known before the forward passes, else NaN."""
    known = [weight for weight in weights if weight is not None]
    if known:
        return sum(known)
    # `check_losses` makes sure that a tensor gets as many losses as it is long.
    if all(isinstance(m, Tensor) and m.ndim > 0 for m in micro_batches):
        return float(sum(len(micro_batch) for micro_batch in micro_batches))
    return math.nan


def lengths(batch: Any, depth: int = DEPTH) -> Iterator[int]:
    """The lengths of everything in a micro-batch; the number of images is one of them."""
    parts: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, (list, tuple)):
        parts = batch
        # Images and labels are columns; images of several sizes have equally many dimensions.
        if len({part.ndim if isinstance(part, Tensor) else None for part in batch} - {0}) < 2:
            yield len(batch)
    elif hasattr(type(batch), "shape"):  # a tensor or an array
        if len(batch.shape) > 0:
            yield int(batch.shape[0])
    elif not isinstance(batch, (type, nn.Module)):
        with suppress(Exception):  # nothing to look into, or a `__getattr__` of the reader's
            parts = vars(batch).values()
    if depth > 0:
        for part in parts:
            yield from lengths(part, depth - 1)


def check_losses(losses: Any, micro_batch: Any, weight: float | None, where: str) -> None:
    """Refuse losses that are reduced already, or not one per image and without a weight."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"{where}losses returned {type(losses).__name__}, but it must be a tensor")
    number = losses.numel()
    seen = lengths(micro_batch)
    fits = next(seen, number) == number or number in seen
    wrong = ""
    if losses.ndim == 0 or (number == 1 and not fits and weight != 1):
        wrong = 'a loss that is already averaged or summed; return all: use reduction="none"'
    elif weight is None and (losses.ndim != 1 or not fits):
        wrong = "not one loss per image; average them over each image"
    if wrong:
        raise ValueError(
            f"{where}losses have shape {tuple(losses.shape)}, {wrong}. If tokens, pixels or "
            f"several labels count, pass also what the losses of a micro-batch weigh, such as "
            f"{WEIGHT_LINE}"
        )


def check_finite(
    losses: Sequence[Tensor], model: nn.Module, gradients: bool, update: int | None
) -> None:
    """Refuse a loss, or with `gradients` a gradient, that is not finite; waits for the device."""
    named = [(n, p.grad) for n, p in model.named_parameters() if gradients and p.grad is not None]
    values = [grad.coalesce().values() if grad.is_sparse else grad for _, grad in named]
    flags = [tensor.isfinite().all() for tensor in (*losses, *values)]
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    first = finite.index(False) if False in finite else len(finite)
    if first < len(losses):
        raise ValueError(
            f"{place(update, first + 1, len(losses))}the loss is {losses[first].item()}; the "
            f"learning rate may be too large, or an input not finite"
        )
    if first < len(finite):
        raise ValueError(
            f"{place(update)}the gradient of {named[first - len(losses)][0]} is not finite "
            f"although the losses are: look for a division by zero, the root of zero or an "
            f"overflow in the model or its loss"
        )


def listed(window: Iterable[Any]) -> list[Any]:
    """The micro-batches of a window as a list."""
    if isinstance(window, (str, bytes, Mapping)) or not isinstance(window, Iterable):
        raise TypeError(
            f"the window is of type {type(window).__name__}, but it must be a list of micro-batches"
        )
    if hasattr(window, "__len__"):
        return list(window)
    micro_batches = list(islice(window, LONGEST + 1))
    if len(micro_batches) > LONGEST:
        raise ValueError(
            f"the window is an iterator of more than {LONGEST} micro-batches, perhaps an endless "
            f"one; pass a list, or cut it with windows_of_batches"
        )
    return micro_batches


def check_counts(last_window: Any = "step", **counts: Any) -> None:
    """Refuse by name what is no whole number of at least 1, and an unknown `last_window`."""
    check_choice("last_window", last_window, "step", "drop")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} = {value!r}, but it must be a whole number >= 1")


def check_choice(name: str, value: Any, *allowed: str) -> None:
    """Refuse by name what is not one of the allowed values."""
    if value not in allowed:
        choices = " or ".join(f'"{each}"' for each in allowed)
        raise ValueError(f"{name} = {value!r}, but it must be {choices}")


def place(update: int | None, number: int | None = None, micro_batches: int = 0) -> str:
    """The beginning of a message: the update and micro-batch that it is about."""
    parts = [f"update {update}"] * (update is not None)
    parts += [f"micro-batch {number} of {micro_batches}"] * (number is not None)
    return ", ".join(parts) + ": " * bool(parts)
