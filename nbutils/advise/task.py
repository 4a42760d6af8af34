"""What every measurement trains: a model, its examples in memory, and the loss of each example."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from nbutils.accumulation.out_of_memory import is_out_of_memory
from nbutils.advise.examples import CPU, Examples
from nbutils.advise.own_data import Data, call, read_examples, read_images
from nbutils.data.dataset import mean_and_std
from nbutils.errors import InputError, suggest
from nbutils.measure.process import Factory, describe, find_factory, find_model
from nbutils.training.setup import generator_for

Losses = Callable[[nn.Module, Any], Any]

CHECKED = 64  # training examples whose loss must be finite before anything is measured
HALF = (torch.float16, torch.bfloat16)


class Recipe(NamedTuple):
    """An optimizer and the rates to try with it, ascending."""

    kind: type[torch.optim.Optimizer]
    options: dict[str, Any]
    usual_rate: float
    rates: tuple[float, ...]

    @property
    def optimizer(self) -> Callable[..., torch.optim.Optimizer]:
        """Makes it from parameters and, where it is to learn, `lr`."""
        return partial(self.kind, **self.options)


RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
RECIPES = {
    "adam": Recipe(torch.optim.Adam, {}, 1e-3, RATES[:-2]),
    "sgd": Recipe(torch.optim.SGD, {"momentum": 0.9}, 1e-2, RATES[2:]),
}


class ClassLosses(NamedTuple):
    """Cross-entropy of a classifier's logits; `losses(model, (images, labels))`."""

    scaling: tuple[float, float] | None  # mean and deviation of the pixels of uint8 images
    dtype: torch.dtype  # of the model's weights, to which images that are floats are cast

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of each image, shape (images,)."""
        return F.cross_entropy(self.logits(model, batch[0]), batch[1], reduction="none")

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Shape (images, classes); float32 of a model in half precision."""
        _, logits = self.found(model, images)
        return logits.float() if isinstance(logits, Tensor) and logits.dtype in HALF else logits

    def found(self, model: nn.Module, images: Tensor) -> tuple[str, Any]:
        """Where the model's output has the logits, as source such as "[0]", and these."""
        if self.scaling:
            images = (images / 255 - self.scaling[0]) / self.scaling[1]
        output = model(images.to(self.dtype) if images.is_floating_point() else images)
        if hasattr(output, "logits"):
            return ".logits", output.logits
        if isinstance(output, Mapping):
            key = next((key for key in ("logits", "out") if key in output), None)
            return (f"[{key!r}]", output[key]) if key else ("", output)
        if isinstance(output, (tuple, list)) and output:
            return "[0]", output[0]
        return "", output


@dataclass(frozen=True, repr=False)
class Task:
    """A training, all checked."""

    make: Callable[..., nn.Module]  # `make_model` but for device and start
    losses: Losses  # of each example of a batch, or these and their weights
    data: Data
    recipe: Recipe
    device: torch.device
    batch_norm: bool  # whether layers normalise by the statistics of a batch
    weighted: bool  # whether the losses come with weights
    model_name: str  # "package.module:name", where it has such a name; so has the next
    losses_name: str

    @property
    def noun(self) -> str:
        """What an example is called."""
        return "images" if self.data.classes else "examples"


def read_task(
    model: Factory | str,
    dataset: Any,
    losses: Losses | str | None = None,
    collate: Callable[[list[Any]], Any] | str | None = None,
    columns: Sequence[str] | None = None,
    optimizer: str = "adam",
    device: torch.device = CPU,
) -> Task:
    """Find the model, read the examples, and check that the one can learn the other.

    Args:
        model: Makes the model, a new one at each call: a function or class, or
            "package.module:name", as `losses` and `collate` may be given, too.
        dataset, columns: As `read_images` takes them; with `losses` as `read_examples` does.
        losses: `losses(model, batch)` returns the loss of every example, shape (n,), or a pair:
            these and a weight for each, such as its number of tokens. The batch is on the model's
            device. Without it the model is a classifier, learnt by cross-entropy.
        collate: Makes a batch of a list of items, as for a `DataLoader`.
        optimizer: One of `RECIPES`.
    """
    if optimizer not in RECIPES:
        raise InputError(f"optimizer = {optimizer!r}; {suggest(optimizer, RECIPES)}")
    if collate and losses is None:
        raise InputError("collate is used with losses only; a classifier's images are stacked")
    what = f"model = {model!r}"
    made = _checked_model(what, model)
    if losses is None:
        data = read_images(dataset, columns)
        dtype = next((p.dtype for p in made.parameters() if p.is_floating_point()), torch.float32)
        own = cast(Losses, ClassLosses(_scaling(data.train.items[0]), dtype))
    else:
        own = cast(Losses, find_factory(cast(Any, losses)))
        data = read_examples(dataset, cast(Any, collate and find_factory(cast(Any, collate))))
    make = partial(make_model, find_factory(model), own, data.train.first(2))
    return Task(
        make,
        own,
        data,
        RECIPES[optimizer],
        device,
        batch_norm=any(isinstance(layer, _BatchNorm) for layer in made.modules()),
        weighted=_check_losses(what, make, own, data, min(CHECKED, data.train.number)),
        model_name=_name_of(model),
        losses_name=_name_of(losses) if losses else "",
    )


def make_model(
    factory: Factory, losses: Losses, few: Examples, device: torch.device, start: int = 0
) -> nn.Module:
    """A new model in training mode, its lazy layers filled; the same for the same `start`."""
    with seeded(device, "model", start):
        model = factory().to(device)
        if any(isinstance(module, LazyModuleMixin) for module in model.modules()):
            with torch.no_grad():
                losses(model.eval(), few.batch(torch.arange(2), device))
        return model.train()


def weighted(losses: Any) -> tuple[Tensor, Tensor | None]:
    """Losses, shape (n,), and their weights, if any, of what a reader's `losses` returned."""
    each, weights = losses if isinstance(losses, tuple) and len(losses) == 2 else (losses, None)
    for name, found in {"losses": each, "weights": weights}.items():
        if not isinstance(found, Tensor) and not (found is None and name == "weights"):
            raise InputError(
                f"losses returned {type(found).__name__} for {name}, but it must return a tensor, "
                f"one loss per example, or a pair of tensors, these and their weights"
            )
    return each, None if weights is None else weights.to(each.dtype)


@contextmanager
def readers_errors() -> Iterator[None]:
    """Errors of the reader's model or losses are told as `InputError`, with their own line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"the model cannot be trained: {describe(error)}") from error


@contextmanager
def seeded(device: torch.device, purpose: str, number: int = 0) -> Iterator[None]:
    """Random numbers of torch, numpy and Python for a purpose; afterwards as if none were drawn.

    A plain seed such as 0 could be that of the reader's data, which would share its numbers with
    the first layer.
    """
    seed = generator_for(CPU, number, f"advise {purpose}").initial_seed() % 2**32
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what a reader's factory draws from
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _name_of(factory: Any) -> str:
    name = getattr(factory, "__qualname__", None)
    return f"{factory.__module__}:{name}" if name else str(factory)


def _checked_model(what: str, factory: Factory | str) -> nn.Module:
    make = find_model(factory)
    model, other = call(what, make), call(what, make)
    if not isinstance(model, nn.Module):
        raise InputError(f"{what} returned {type(model).__name__}, not a torch.nn.Module")
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trained:
        raise InputError(f"{what} has no parameters to train")
    if trained & {id(parameter) for parameter in other.parameters()}:
        raise InputError(
            f"{what} returned the same weights twice; it must make a new model each time"
        )
    return model


def _scaling(images: Tensor) -> tuple[float, float] | None:
    """Mean and deviation of the pixels in [0, 1], as the loop rounds them; None of floats."""
    if images.dtype != torch.uint8:
        return None
    mean, deviation = mean_and_std(images)
    return round(mean, 4), round(deviation, 4) or 1.0


def _check_losses(
    what: str, make: Callable[..., nn.Module], losses: Losses, data: Data, number: int
) -> bool:
    """Show a new model the first examples; whether their losses have weights."""
    shown = "its first examples"
    if data.classes:
        shown = f"images of shape {(number, *data.train.items[0].shape[1:])}"
    try:
        model, batch = make(CPU), data.train.batch(torch.arange(number))
        if isinstance(losses, ClassLosses):
            _check_logits(what, losses.logits(model, batch[0]), number, len(data.classes), shown)
        each, weights = weighted(losses(model, batch))
        shown = f"{shown} in evaluation mode, without gradients"
        with torch.no_grad():
            judged, _ = weighted(losses(model.eval(), batch))
    except InputError:
        raise
    except Exception as error:  # whatever the reader's model raises
        if is_out_of_memory(error) and number > 2:
            return _check_losses(what, make, losses, data, number // 2)
        raise InputError(f"{what} refuses {shown}: {describe(error)}") from error
    shapes = {part.shape for part in (each, judged, weights) if part is not None}
    if shapes != {(number,)}:
        raise InputError(
            f"losses returned the shape {tuple(each.shape)} for {number} examples, but it must be "
            f"one loss per example, ({number},): use reduction='none', and the mean over the rest"
        )
    if not each.isfinite().all():
        raise InputError(f"{what}: the loss of its first {number} examples is {each.mean().item()}")
    return weights is not None


def _check_logits(what: str, logits: Any, number: int, classes: int, shown: str) -> None:
    shape = tuple(getattr(logits, "shape", ()))
    if len(shape) != 2 or shape[0] != number or shape[1] < classes:
        raise InputError(
            f"{what} makes {type(logits).__name__} of shape {shape} of {shown}, but it must make "
            f"logits of shape ({number}, {classes}), one for each of the {classes} classes"
        )
