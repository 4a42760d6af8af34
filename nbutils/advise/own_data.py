"""A reader's own classifier: any model and any images, read, and checked before work starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from nbutils.data.dataset import (
    DATASETS,
    KAGGLE,
    VALIDATION_EVERY,
    Dataset,
    Split,
    for_validation,
    load_dataset,
)
from nbutils.errors import InputError, suggest
from nbutils.machine import no_progress
from nbutils.measure.cost import Factory, find_factory

HELD_BYTES = 2**29
"""Bytes of images, as float32, that are held in memory; of a larger dataset a part is taken."""

CHECKED_IMAGES = 64
"""Training images whose loss must be finite before anything is measured."""


@dataclass(frozen=True)
class Classifier:
    """A model and the images that it is to learn.

    Attributes:
        factory: Makes the model, untrained.
        model_name: What `factory` is called: "package.module:name" where it has such a name.
        dataset_name: What the images are called.
        train: Images as the model takes them, float, shape (n, ...), and their classes.
        validation: As `train`.
        classes: Number of classes.
        pixel_mean_and_std: What pixels scaled to [0, 1] were normalised by; None where the images
            came as float and were left as they are.
        images_per_epoch: Training images of the whole dataset, of which `train` may be a part.
    """

    factory: Factory = field(repr=False)
    model_name: str
    dataset_name: str
    train: Split = field(repr=False)
    validation: Split = field(repr=False)
    classes: int
    pixel_mean_and_std: tuple[float, float] | None
    images_per_epoch: int

    def make(self, device: torch.device) -> nn.Module:
        """A new model in training mode, with the same weights each time if torch draws them."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.factory().to(device).train()


def read_classifier(model: Factory | str, dataset: Any) -> Classifier:
    """Find the model, read the images, and check that the one can learn the other.

    Args:
        model: Makes the model: a function or class of a module, or "package.module:name".
        dataset: A name that `load_dataset` knows; a folder that holds a folder of images a class,
            as torchvision's `ImageFolder` reads it, but grey images stay grey; a tuple of two
            tensors, images (n, ...) and classes (n,); any map-style dataset of pairs, an image
            (tensor or PIL) and its class; or "package.module:name" of what returns one of these
            two. Images of uint8 are normalised to mean 0 and deviation 1, those of float are left
            as they are. Every tenth image, in file order, is for validation.

    Raises:
        InputError: Something of this cannot be used; the message says what and why.
    """
    factory = find_factory(model)
    found = _find_images(dataset)
    train, validation, scaling = found.train, found.validation, None
    if train.images.dtype == torch.uint8:
        train, validation, scaling = _normalised(found)
    _check_images(train, validation, found.name)
    _check_model(factory, model, train, found.classes)
    return Classifier(
        factory=factory,
        model_name=_name_of(model),
        dataset_name=found.name,
        train=train,
        validation=validation,
        classes=found.classes,
        pixel_mean_and_std=scaling,
        images_per_epoch=found.images_per_epoch,
    )


def batch_norms(model: nn.Module) -> list[str]:
    """Names of the model's layers that normalise by the statistics of a batch."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def _name_of(factory: Factory | str) -> str:
    if isinstance(factory, str):
        return factory
    name = getattr(factory, "__qualname__", None)
    return f"{factory.__module__}:{name}" if name else repr(factory)


class _Images(NamedTuple):
    """Images as they were found, uint8 or float; the last two as in `Classifier`."""

    name: str
    train: Split
    validation: Split
    classes: int
    images_per_epoch: int


def _find_images(dataset: Any) -> _Images:
    if isinstance(dataset, (str, Path)):
        return _find_named(str(dataset))
    if isinstance(dataset, tuple):
        return _from_tensors(dataset, "tensors")
    return _from_pairs(dataset, type(dataset).__name__)


def _find_named(name: str) -> _Images:
    if name in DATASETS or name.startswith(KAGGLE):
        data = load_dataset(name)
        classes, images = len(data.class_names), len(data.train.labels)
        return _Images(name, data.train, data.validation, classes, images)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_pairs(_image_folder(folder), name)
    if ":" in name:
        made = _call(f"dataset = {name!r}", find_factory(name))
        read = _from_tensors if isinstance(made, tuple) else _from_pairs
        return read(made, name)
    raise InputError(f"no dataset or folder {name!r}; {suggest(name, DATASETS)}; or a folder")


def _image_folder(folder: Path) -> Any:
    from PIL import Image
    from torchvision.datasets import ImageFolder

    def load(path: str) -> Image.Image:
        with Image.open(path) as image:
            return image.convert("L" if image.mode in ("1", "L") else "RGB")

    try:
        return ImageFolder(folder, loader=load)
    except FileNotFoundError as error:
        raise InputError(
            f"dataset = {str(folder)!r}: {error}; it must hold a folder of images for each class"
        ) from error


def _from_tensors(pair: tuple[Any, ...], name: str) -> _Images:
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise InputError(f"dataset = {name}, but a tuple must be of two tensors: images, labels")
    images, labels = pair
    if images.ndim < 2 or labels.shape != images.shape[:1] or not len(images):
        raise InputError(
            f"dataset = {name}: the images have shape {tuple(images.shape)} and the labels "
            f"{tuple(labels.shape)}, but they must be (n, ...) and (n,), n >= 1"
        )
    part = _part(len(images), images[0].numel())
    return _divided(name, images[part].detach().cpu(), labels[part].cpu(), len(images), 0)


def _from_pairs(pairs: Any, name: str) -> _Images:
    if not hasattr(pairs, "__getitem__") or not hasattr(pairs, "__len__"):
        raise InputError(f"dataset = {name}, but it must have a length, and pairs by index")
    if not len(pairs):
        raise InputError(f"dataset = {name}, but it has no images")
    part = _part(len(pairs), _image_and_label(pairs, name, 0)[0].numel())
    read = [
        _image_and_label(pairs, name, int(index))
        for index in tqdm(part, "images", unit="image", leave=False, disable=no_progress())
    ]
    images = [image for image, _ in read]
    if {image.shape[0] for image in images if image.ndim == 3} == {1, 3}:
        images = [image.expand(3, -1, -1) for image in images]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise InputError(
            f"dataset = {name}: images have the shapes {', '.join(map(str, sorted(shapes)[:3]))};"
            f" bring them to one size, by the dataset's transform for example"
        )
    labels = torch.tensor([label for _, label in read])
    return _divided(
        name, torch.stack(images), labels, len(pairs), len(getattr(pairs, "classes", ()))
    )


def _image_and_label(pairs: Any, name: str, index: int) -> tuple[Tensor, int]:
    from torchvision.transforms.functional import pil_to_tensor

    try:
        image, label = pairs[index]
        image = image if isinstance(image, Tensor) else pil_to_tensor(image)
        return image, int(label)
    except Exception as error:  # whatever the reader's dataset raises
        raise InputError(
            f"dataset = {name}, item {index}: {type(error).__name__}: {error}; it must be a "
            f"pair of an image, tensor or PIL, and its class, a whole number"
        ) from error


def _part(images: int, values: int) -> Tensor:
    """Indices of as many of the images, evenly spread, as may be held."""
    held = min(images, max(1, HELD_BYTES // (4 * values)))
    return torch.arange(held) * images // held


def _divided(name: str, images: Tensor, labels: Tensor, total: int, classes: int) -> _Images:
    """By the project's rule, into training and validation."""
    if labels.is_floating_point() or int(labels.min()) < 0:
        raise InputError(
            f"dataset = {name}: labels are {labels.dtype} from {labels.min().item()}, but they "
            f"must be whole numbers >= 0"
        )
    if len(labels) < VALIDATION_EVERY:
        raise InputError(
            f"dataset = {name} has {len(labels)} images, but every {VALIDATION_EVERY}th is for "
            f"validation: there must be at least {VALIDATION_EVERY}"
        )
    labels = labels.long()
    held_out = for_validation(len(labels))
    return _Images(
        name,
        Split(images[~held_out], labels[~held_out]),
        Split(images[held_out], labels[held_out]),
        max(classes, int(labels.max()) + 1),
        total - total // VALIDATION_EVERY,
    )


def _normalised(found: _Images) -> tuple[Split, Split, tuple[float, float]]:
    nothing = Split(found.train.images[:0], found.train.labels[:0])
    names = tuple(map(str, range(found.classes)))
    data = Dataset(found.name, found.train, found.validation, nothing, names)
    cpu = torch.device("cpu")
    train, validation = (
        Split(data.normalised(split.images, cpu, torch.float32), split.labels)
        for split in (found.train, found.validation)
    )
    return train, validation, data.pixel_mean_and_std


def _check_images(train: Split, validation: Split, name: str) -> None:
    if len(train.labels.unique()) < 2:
        raise InputError(f"dataset = {name}: all training images are of one class")
    for split in (train, validation):
        finite = split.images.isfinite().flatten(1).all(1)
        if not finite.all():
            raise InputError(
                f"dataset = {name}: {int((~finite).sum())} images hold values that are not finite"
            )


def _check_model(factory: Factory, given: Factory | str, train: Split, classes: int) -> None:
    """Make the model and show it some images, as the measurements will."""
    what = f"model = {given!r}"
    model = _call(what, factory)
    if not isinstance(model, nn.Module):
        raise InputError(f"{what} returned {type(model).__name__}, not a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{what} has no parameters to train")
    images, labels = train.images[:CHECKED_IMAGES], train.labels[:CHECKED_IMAGES]
    shape = tuple(images.shape)
    try:
        logits = model.cpu().train()(images)
    except Exception as error:  # whatever the reader's model raises
        raise InputError(
            f"{what} refuses images of shape {shape}: {type(error).__name__}: {error}"
        ) from error
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        raise InputError(
            f"{what} makes {found} of images of shape {shape}, but it must make logits of shape "
            f"({len(images)}, {classes})"
        )
    if logits.shape[1] < classes:
        raise InputError(
            f"{what} gives {logits.shape[1]} logits an image, but labels go up to {classes - 1}: "
            f"there must be a logit for each of {classes} classes"
        )
    loss = F.cross_entropy(logits, labels)
    if not loss.isfinite():
        raise InputError(f"{what}: the loss of its first {len(images)} images is {loss.item()}")


def _call(what: str, factory: Callable[[], Any]) -> Any:
    try:
        return factory()
    except Exception as error:  # whatever the reader's function raises
        raise InputError(f"{what} raised {type(error).__name__}: {error}") from error
