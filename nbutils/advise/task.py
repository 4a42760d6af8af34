"""What every measurement trains: a model, its examples in memory, and the loss of each example."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from nbutils.advise.examples import Examples, read_examples
from nbutils.advise.own_data import OwnImages, call, read_images
from nbutils.errors import InputError
from nbutils.measure.factory import Factory, describe, find_factory
from nbutils.training.out_of_memory import is_out_of_memory

Losses = Callable[[nn.Module, Any], Any]

CHECKED = 64
"""Training examples whose loss must be finite before anything is measured."""

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ClassLosses:
    """Cross-entropy of a classifier's logits; `losses(model, (images, labels))`.

    Attributes:
        scaling: Mean and deviation of a pixel in [0, 1], by which uint8 images are normalised.
        dtype: Of the model's weights, to which images that are floats are cast.
        output: Where a training model's output has the logits, as source: "", ".logits", "[0]".
    """

    scaling: tuple[float, float] | None = None
    dtype: torch.dtype = torch.float32
    output: str = ""

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of each image, shape (images,)."""
        return F.cross_entropy(self.logits(model, batch[0]), batch[1], reduction="none")

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Shape (images, classes); float32 of a model in half precision."""
        _, logits = _part(model(self.prepared(images)))
        return logits.float() if isinstance(logits, Tensor) and logits.dtype in HALF else logits

    def prepared(self, images: Tensor) -> Tensor:
        """Images as the model takes them."""
        if self.scaling:
            images = (images / 255 - self.scaling[0]) / self.scaling[1]
        return images.to(self.dtype) if images.is_floating_point() else images


def _part(output: Any) -> tuple[str, Any]:
    """Where an output has the logits, as source, and these."""
    if hasattr(output, "logits"):
        return ".logits", output.logits
    if isinstance(output, Mapping):
        key = next((key for key in ("logits", "out") if key in output), None)
        return (f"[{key!r}]", output[key]) if key else ("", output)
    if isinstance(output, (tuple, list)) and output:
        return "[0]", output[0]
    return "", output


@dataclass(frozen=True)
class Maker:
    """Makes the model of a start: anew by the reader's factory, seeded, its lazy layers filled."""

    factory: Factory
    losses: Losses
    few: Examples

    def __call__(self, device: torch.device, start: int = 0) -> nn.Module:
        """A new model in training mode, with the same weights for the same `start`."""
        with seeded(device, start):
            model = self.factory().to(device)
            if any(isinstance(module, LazyModuleMixin) for module in model.modules()):
                with torch.no_grad():
                    self.losses(model.eval(), self.few.batch(torch.arange(2), device))
            return model.train()


@dataclass(frozen=True)
class Task:
    """A model, its examples and its losses, all checked.

    Attributes:
        make: Makes the model.
        losses: The loss of each example of a batch, or these and their weights.
        model_name: Of the factory: "package.module:name" where it has such a name.
        dataset_name: Of the dataset.
        train: Examples to train on.
        validation: Examples to judge by.
        examples_per_epoch: Of the whole dataset, of which `train` may be a part.
        batch_norms: Names of the layers that normalise by the statistics of a batch.
        images: The images, where it is a classifier.
        notes: What the reader should know.
        losses_name: "package.module:name" of the reader's losses, where they have such a name.
        weighted: Whether they come with weights.
    """

    make: Maker = field(repr=False)
    losses: Losses = field(repr=False)
    model_name: str
    dataset_name: str
    train: Examples = field(repr=False)
    validation: Examples = field(repr=False)
    examples_per_epoch: int
    batch_norms: list[str]
    images: OwnImages | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    losses_name: str = ""
    weighted: bool = False

    @property
    def noun(self) -> str:
        """What an example is called."""
        return "images" if self.images else "examples"


def read_task(
    model: Factory | str,
    dataset: Any,
    losses: Losses | str | None = None,
    collate: Callable[[list[Any]], Any] | str | None = None,
    columns: Sequence[str] | None = None,
) -> Task:
    """Find the model, read the examples, and check that the one can learn the other.

    Args:
        model: Makes the model, a new one at each call: a function or class, or
            "package.module:name".
        dataset: Without `losses`, as `read_images` takes it; with them, any map-style dataset, or
            "package.module:name" of what returns it. A tenth, drawn with a fixed seed, is for
            validation.
        losses: `losses(model, batch)` returns the loss of every example, shape (n,), or a pair:
            these and a weight for each, such as its number of tokens. The batch is on the model's
            device. Without it the model is a classifier, learnt by cross-entropy.
        collate: Makes a batch of a list of items, as for a `DataLoader`; or where to find it.
        columns: As for `read_images`.

    Raises:
        InputError: Something of this cannot be used; the message says what and why.
    """
    what = f"model = {model!r}"
    made = _made(what, model)
    weights = next((p for p in made.parameters() if p.is_floating_point()), None)
    if losses is None:
        images = read_images(dataset, columns)
        own: Losses = ClassLosses(_scaling(images.train[0]), _dtype(weights))
        train, validation = Examples(images.train), Examples(images.validation)
        name, total, notes = images.name, images.images_per_epoch, images.notes
    else:
        images, notes = None, ()
        own = cast(Losses, find_factory(cast(Any, losses)))
        train, validation, name, total = read_examples(
            dataset, cast(Any, collate and find_factory(cast(Any, collate)))
        )
    maker = Maker(find_factory(model), own, train.first(2))
    output, with_weights = _check_losses(what, maker, train.first(CHECKED), images)
    if isinstance(own, ClassLosses):
        own = replace(own, output=output)
    return Task(
        make=replace(maker, losses=own),
        losses=own,
        model_name=_name_of(model),
        dataset_name=name,
        train=train,
        validation=validation,
        examples_per_epoch=total,
        batch_norms=[n for n, layer in made.named_modules() if isinstance(layer, _BatchNorm)],
        images=images,
        notes=notes,
        losses_name=_name_of(losses) if losses else "",
        weighted=with_weights,
    )


def weighted(losses: Any) -> tuple[Tensor, Tensor | None]:
    """Losses, shape (n,), and their weights, if any, of what a reader's `losses` returned."""
    each, weights = losses if isinstance(losses, tuple) else (losses, None)
    return each, None if weights is None else weights.to(each.dtype)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers of torch, numpy and Python from a seed; afterwards as if none were drawn."""
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
    if isinstance(factory, str):
        return factory
    name = getattr(factory, "__qualname__", None)
    return f"{factory.__module__}:{name}" if name else repr(factory)


def _made(what: str, factory: Factory | str) -> nn.Module:
    model, other = call(what, factory), call(what, factory)
    if not isinstance(model, nn.Module):
        raise InputError(f"{what} returned {type(model).__name__}, not a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{what} has no parameters to train")
    if {id(p) for p in model.parameters() if p.requires_grad} & {id(p) for p in other.parameters()}:
        raise InputError(
            f"{what} returned the same weights twice; it must make a new model each time"
        )
    return model


def _dtype(weight: Tensor | None) -> torch.dtype:
    return torch.float32 if weight is None else weight.dtype


def _scaling(images: Tensor) -> tuple[float, float] | None:
    """Mean and deviation of the pixels in [0, 1], as the loop rounds them; None of floats."""
    if images.dtype != torch.uint8:
        return None
    count = torch.bincount(images.flatten(), minlength=256).double()
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = (count @ value / count.sum()).item()
    deviation = math.sqrt((count @ (value - mean) ** 2 / count.sum()).item())
    return round(mean, 4), round(deviation, 4) or 1.0


def _check_losses(
    what: str, make: Maker, examples: Examples, images: OwnImages | None
) -> tuple[str, bool]:
    """Show a new model some examples. Where its logits are; whether losses have weights."""
    cpu, number = torch.device("cpu"), examples.number
    try:
        model, batch = make(cpu), examples.batch(torch.arange(number), cpu)
        if images and isinstance(make.losses, ClassLosses):
            _check_logits(what, make.losses.logits(model, batch[0]), images, number)
        each, weights = weighted(make.losses(model, batch))
    except InputError:
        raise
    except Exception as error:  # whatever the reader's model raises
        if is_out_of_memory(error) and number > 2:
            return _check_losses(what, make, examples.first(number // 2), images)
        shape = images and (number, *images.train[0].shape[1:])
        shown = f"images of shape {shape}" if images else "its first examples"
        raise InputError(f"{what} refuses {shown}: {describe(error)}") from error
    if each.shape != (number,) or (weights is not None and weights.shape != (number,)):
        raise InputError(
            f"losses returned the shape {tuple(each.shape)} for {number} examples, but it must be "
            f"one loss per example, ({number},): use reduction='none', and the mean over the rest"
        )
    if not each.isfinite().all():
        raise InputError(f"{what}: the loss of its first {number} examples is {each.mean().item()}")
    if not isinstance(make.losses, ClassLosses):
        return "", weights is not None
    return _part(model(make.losses.prepared(batch[0])))[0], False


def _check_logits(what: str, logits: Any, images: OwnImages, number: int) -> None:
    classes, shape = len(images.classes), tuple(images.train[0][:number].shape)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != number:
        raise InputError(
            f"{what} makes {found} of images of shape {shape}, but it must make logits of shape "
            f"({number}, {classes})"
        )
    if logits.shape[1] < classes:
        raise InputError(
            f"{what} gives {logits.shape[1]} logits per image, but there are {classes} classes, "
            f"which need a logit each"
        )
