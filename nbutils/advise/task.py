"""What every measurement trains: a model, its examples in memory, and the loss of each example."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from nbutils.accumulation.out_of_memory import is_out_of_memory
from nbutils.advise.own_data import CPU, Data, read_examples, read_images, told
from nbutils.data.dataset import mean_and_std
from nbutils.errors import InputError, suggest
from nbutils.measure.process import Factory, find_factory, find_model
from nbutils.training.setup import generator_for

Losses = Callable[[nn.Module, Any], Any]

CHECKED = 64  # training examples whose loss must be finite before anything is measured
HALF = (torch.float16, torch.bfloat16)


class Recipe(NamedTuple):
    """An optimizer and the rates to try with it, ascending."""

    optimizer: Any  # a `partial` that makes it from parameters and `lr`
    usual_rate: float
    rates: tuple[float, ...]


RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
RECIPES = {
    "adam": Recipe(partial(torch.optim.Adam), 1e-3, RATES[:-2]),
    "sgd": Recipe(partial(torch.optim.SGD, momentum=0.9), 1e-2, RATES[2:]),
}


class ClassLosses(NamedTuple):
    """Cross-entropy of a classifier's logits; `losses(model, (images, labels))`."""

    scaling: tuple[float, float] | None  # mean and deviation of the pixels of uint8 images
    dtype: torch.dtype  # of the model's weights, to which images that are floats are cast
    classes: int

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of each image, shape (images,)."""
        return F.cross_entropy(self.logits(model, batch[0])[1], batch[1], reduction="none")

    def logits(self, model: nn.Module, images: Tensor) -> tuple[str, Tensor]:
        """Where the model's output has the logits, as source such as "[0]", and these.

        They have the shape (images, classes), and are float32 of a model in half precision.
        """
        if self.scaling:
            images = (images / 255 - self.scaling[0]) / self.scaling[1]
        output, where = model(images.to(self.dtype) if images.is_floating_point() else images), ""
        keys = [key for key in ("logits", "out") if isinstance(output, Mapping) and key in output]
        if hasattr(output, "logits"):
            where, output = ".logits", output.logits
        elif keys or (isinstance(output, (tuple, list)) and output):
            key = [*keys, 0][0]
            where, output = f"[{key!r}]", output[key]
        shape = tuple(getattr(output, "shape", ()))
        if len(shape) != 2 or shape[0] != len(images) or shape[1] < self.classes:
            raise InputError(
                f"the model makes {type(output).__name__} of shape {shape} of images of shape "
                f"{tuple(images.shape)}, but it must make logits of shape ({len(images)}, "
                f"{self.classes}), one for each of the {self.classes} classes"
            )
        return where, output.float() if output.dtype in HALF else output


@dataclass(frozen=True, repr=False)
class Task:
    """A training, all checked."""

    factory: Factory  # of the model
    losses: Losses  # of each example of a batch, or these and their weights
    data: Data
    recipe: Recipe
    device: torch.device
    batch_norm: bool  # whether layers normalise by the statistics of a batch
    noun: str  # what an example is called: "images" or "examples"
    losses_name: str  # "package.module:name", where they have such a name
    weighted: bool = False  # whether the losses come with weights

    def make(self, device: torch.device, start: int = 0) -> nn.Module:
        """A new model in training mode, its lazy layers filled; the same for the same `start`."""
        with seeded(device, "model", start):
            model = self.factory().to(device)
            if any(isinstance(module, LazyModuleMixin) for module in model.modules()):
                few = torch.arange(min(2, self.data.train.number))
                with torch.no_grad():
                    self.losses(model.eval(), self.data.train.batch(few, device))
            return model.train()


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
    what, factory = f"model = {model!r}", find_model(model)
    made = _checked_model(what, factory)
    own: Any = losses and find_factory(losses)  # type: ignore[arg-type] # of any function
    if own:
        data = read_examples(dataset, collate and find_factory(collate))  # type: ignore[arg-type]
    else:
        data = read_images(dataset, columns)
        own = _class_losses(made, data)
    task = Task(
        factory,
        own,
        data,
        RECIPES[optimizer],
        device,
        batch_norm=any(isinstance(layer, _BatchNorm) for layer in made.modules()),
        noun="examples" if losses else "images",
        losses_name=name_of(losses or ""),
    )
    return replace(task, weighted=_check_losses(what, task, min(CHECKED, data.train.number)))


def name_of(factory: Any) -> str:
    """Its "package.module:name", if it has one."""
    name = getattr(factory, "__qualname__", None)
    return f"{factory.__module__}:{name}" if name else str(factory)


def weighted(losses: Any, number: int) -> tuple[Tensor, Tensor]:
    """Losses and weights of `number` examples, as a reader's function returned them, or with 1."""
    pair = losses if isinstance(losses, tuple) and len(losses) == 2 else (losses,)
    if not all(isinstance(part, Tensor) and part.shape == (number,) for part in pair):
        found = [str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in pair]
        raise InputError(
            f"losses returned {' and '.join(found)} for {number} examples, but it must return a "
            f"tensor, one loss per example, ({number},), or a pair, these and their weights: use "
            f"reduction='none', and the mean over the rest"
        )
    each, *weights = pair
    return each, weights[0].to(each.dtype) if weights else torch.ones_like(each)


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


def _checked_model(what: str, factory: Factory) -> nn.Module:
    with told(f"{what} raised "):
        model, other = factory(), factory()
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


def _class_losses(model: nn.Module, data: Data) -> ClassLosses:
    """Those of uint8 images scale by their mean and deviation, as the loop rounds them."""
    images, scaling = data.train.items[0], None
    if images.dtype == torch.uint8:
        mean, deviation = mean_and_std(images)
        scaling = round(mean, 4), round(deviation, 4) or 1.0
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return ClassLosses(scaling, [*dtypes, torch.float32][0], len(data.classes))


def _check_losses(what: str, task: Task, number: int) -> bool:
    """Show a new model the first examples; whether their losses have weights."""
    train, shown = task.data.train, "its first examples"
    if task.data.classes:
        shown = f"images of shape {(number, *train.items[0].shape[1:])}"
    try:
        with told(f"{what} refuses {shown}: "):
            model, batch = task.make(CPU), train.batch(torch.arange(number))
            returned = task.losses(model, batch)
            loss = weighted(returned, number)[0].mean()
        shown += " in evaluation mode, without gradients"
        with told(f"{what} refuses {shown}: "), torch.no_grad():
            weighted(task.losses(model.eval(), batch), number)
    except InputError as error:
        if number > 2 and is_out_of_memory(error.__cause__ or error):
            return _check_losses(what, task, number // 2)
        raise
    if not loss.isfinite():
        raise InputError(f"{what}: the loss of its first {number} examples is {loss.item()}")
    return isinstance(returned, tuple)
