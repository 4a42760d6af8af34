"""What `window.py` needs around a micro-batch: its weight, its gradients, and checks of both."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Weight = Callable[[Any], float | Tensor]
"""What the losses of a micro-batch weigh in all."""

LONGEST = 4096  # micro-batches of a window; an iterator that gives more is taken for endless


def trained(model: nn.Module, update: int | None) -> list[nn.Parameter]:
    """The parameters that get a gradient; ValueError if there are none."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"{place(update)}the model has no parameters that require a gradient")
    return parameters


def weights_of(micro_batches: Sequence[Any], weight: Weight | None) -> list[float]:
    """What the losses of each micro-batch weigh; NaN where only their number will tell."""
    if weight is None:
        # `check_losses` makes sure that a tensor gets as many losses as it is long.
        return [len(m) if isinstance(m, Tensor) and m.ndim else math.nan for m in micro_batches]
    weights = [float(weight(micro_batch)) for micro_batch in micro_batches]
    if not all(0 <= value < math.inf for value in weights):
        raise ValueError(f"weight returned {weights}, but weights must be finite and >= 0")
    return weights


def set_aside(
    parameters: Sequence[Tensor], losses: Tensor, earlier: dict[Tensor, Tensor | None]
) -> None:
    """Move the gradients of parameters to `earlier`, also of others that `losses` reach."""
    seen: set[Any] = {None}
    todo: set[Any] = {losses.grad_fn} - seen
    while todo:
        seen |= todo
        todo = {node for one in todo for node, _ in one.next_functions} - seen
    for parameter in (*parameters, *(getattr(node, "variable", None) for node in seen)):
        if isinstance(parameter, Tensor) and parameter not in earlier:
            earlier[parameter], parameter.grad = parameter.grad, None


@torch.no_grad()
def rescale(earlier: Mapping[Tensor, Tensor | None], factor: float) -> None:
    """Multiply the gradients, and add those that were set aside."""
    for parameter, gradient in earlier.items():
        added = parameter.grad
        if added is not None and factor != 1:
            added.mul_(factor)
        if gradient is not None and added is not None:  # a dense one can take a sparse one
            into, other = (added, gradient) if gradient.is_sparse else (gradient, added)
            gradient = into.add_(other)
        parameter.grad = added if gradient is None else gradient


def couples_images(layer: nn.Module) -> bool:
    """Whether a layer is BatchNorm that normalises by the statistics of its micro-batch."""
    return isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)


def lengths(batch: Any, depth: int = 4) -> Iterator[int]:
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
        yield from map(int, batch.shape[:1])
    elif not isinstance(batch, (type, nn.Module)):
        with suppress(Exception):  # nothing to look into, or a `__getattr__` of the reader's
            parts = vars(batch).values()
    for part in parts if depth else ():
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
            f"weight=lambda batch: (batch[1] != -100).sum()"
        )


def check_finite(
    losses: Sequence[Tensor], model: nn.Module, gradients: bool, update: int | None
) -> None:
    """Refuse a loss, or with `gradients` a gradient, that is not finite; waits for the device."""
    named = [(n, p.grad) for n, p in model.named_parameters() if gradients and p.grad is not None]
    values = [grad.coalesce().values() if grad.is_sparse else grad for _, grad in named]
    flags = [tensor.isfinite().all() for tensor in (*losses, *values)]
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    if all(finite):
        return
    first = finite.index(False)
    if first < len(losses):
        raise ValueError(
            f"{place(update, first + 1, len(losses))}the loss is {losses[first].item()}; the "
            f"learning rate may be too large, or an input not finite"
        )
    raise ValueError(
        f"{place(update)}the gradient of {named[first - len(losses)][0]} is not finite although "
        f"the losses are: look for a division by zero, the root of zero or an overflow in the "
        f"model or its loss"
    )


def listed(window: Iterable[Any]) -> list[Any]:
    """The micro-batches of a window as a list."""
    if isinstance(window, (str, bytes, Mapping)) or not isinstance(window, Iterable):
        raise TypeError(
            f"the window is of type {type(window).__name__}, but it must be a list of micro-batches"
        )
    sized = hasattr(window, "__len__")
    micro_batches = list(window if sized else islice(window, LONGEST + 1))
    if not sized and len(micro_batches) > LONGEST:
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
