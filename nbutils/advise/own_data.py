"""A reader's own images and classes: from tensors, from the items of a dataset, or from a folder.

Images of uint8 stay as they are; the loss scales them. A third of what follows refuses, with the
cause, what would otherwise become a training on noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nbutils.advise.pictures import image_folder, read_picture
from nbutils.data.sources import DATASETS, KAGGLE, load_dataset
from nbutils.errors import InputError, suggest
from nbutils.machine import no_progress
from nbutils.measure.factory import describe, find_factory

HELD_BYTES = 2**29
"""Bytes of images that are held in memory. Of a larger dataset, evenly spread images are taken."""

FEWEST_IMAGES = 10
"""A tenth is for validation."""

IMAGE_KEYS = ("image", "img", "images", "pixel_values", "picture", "input", "x")
LABEL_KEYS = ("label", "labels", "target", "class", "fine_label", "targets", "y")
"""Keys of an item that is a mapping, in the order in which they are looked for."""

Pair = tuple[Tensor, Tensor]


class OwnImages(NamedTuple):
    """Images and labels, divided.

    Attributes:
        name: Of the dataset.
        train: Images, shape (n, ...), and labels, int64, shape (n,).
        validation: As `train`.
        classes: The name of each class.
        images_per_epoch: Training images of the whole dataset, of which `train` may be a part.
        item: How a loop finds image and label in a batch: two keys, or two positions.
        text_labels: Whether the labels of the items are the names of the classes.
        notes: What the reader should know about how the images were read.
    """

    name: str
    train: Pair
    validation: Pair
    classes: list[str]
    images_per_epoch: int
    item: tuple[Any, Any] = (0, 1)
    text_labels: bool = False
    notes: tuple[str, ...] = ()


def read_images(dataset: Any, columns: Sequence[str] | None = None) -> OwnImages:
    """Read the images of a classifier.

    Args:
        dataset: A name that `load_dataset` knows, whose own validation images are used; a folder
            with one folder of images per class, or with `train/` that has them; a tuple of two
            tensors or arrays, images (n, ...) and labels (n,); any map-style dataset whose items
            are pairs, longer tuples, or mappings; or "package.module:name", which returns one
            of the last two. A tenth of each class, drawn with a fixed seed, is for validation.
        columns: The keys of image and label, where the items are mappings with unusual keys.

    Raises:
        InputError: Something of this cannot be used; the message says what and why.
    """
    if not isinstance(dataset, (str, Path)):
        return _checked(_from_object(dataset, type(dataset).__name__, columns))
    name = str(dataset)
    if name in DATASETS or name.startswith(KAGGLE):
        data = load_dataset(name)
        return _checked(
            OwnImages(
                name, data.train, data.validation, list(data.class_names), len(data.train.labels)
            )
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        found, notes = image_folder(folder)
        return _checked(_from_items(found, name, None)._replace(notes=tuple(notes)))
    if ":" in name:
        return _checked(_from_object(call(f"dataset = {name!r}", name), name, columns))
    raise InputError(f"no dataset or folder {name!r}; {suggest(name, DATASETS)}; or a folder")


def _from_object(dataset: Any, name: str, columns: Sequence[str] | None) -> OwnImages:
    if isinstance(dataset, tuple):
        return _from_tensors(dataset, name)
    return _from_items(dataset, name, columns)


def _from_tensors(pair: tuple[Any, ...], name: str) -> OwnImages:
    if len(pair) != 2 or not all(isinstance(part, (Tensor, np.ndarray)) for part in pair):
        raise InputError(
            f"dataset = {name}, but a tuple must hold two tensors or arrays: images and labels"
        )
    images, labels = (torch.as_tensor(part).detach().cpu() for part in pair)
    if labels.ndim == 2 and len(labels) == len(images):
        raise InputError(
            f"dataset = {name}: the labels have shape {tuple(labels.shape)}; one-hot labels "
            f"become classes by labels.argmax(1)"
        )
    if images.ndim < 2 or labels.shape != images.shape[:1] or not len(images):
        raise InputError(
            f"dataset = {name}: the images have shape {tuple(images.shape)} and the labels "
            f"{tuple(labels.shape)}, but they must be (n, ...) and (n,), n >= 1"
        )
    held = spread(len(images), images[0].numel() * images.element_size())
    return _divided(name, images[held], labels[held].tolist(), len(images))


def _from_items(items: Any, name: str, columns: Sequence[str] | None) -> OwnImages:
    if not hasattr(items, "__getitem__") or not hasattr(items, "__len__"):
        raise InputError(f"dataset = {name}, but it must have a length, and items by index")
    if not len(items):
        raise InputError(f"dataset = {name}, but it has no images")
    keys = _keys(items[0], name, columns)
    first, _ = _image_and_label(items, name, 0, keys)
    held = spread(len(items), first.numel() * first.element_size())
    bar = tqdm(held.tolist(), "images", unit="image", leave=False, disable=no_progress())
    read = [_image_and_label(items, name, index, keys) for index in bar]
    images = [image for image, _ in read]
    if {image.shape[0] for image in images if image.ndim == 3} == {1, 3}:
        images = [image.expand(3, -1, -1) for image in images]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise InputError(
            f"dataset = {name}: images have the shapes {', '.join(map(str, sorted(shapes)[:3]))};"
            f" bring them to one size, for example by the dataset's transform"
        )
    names = [str(each) for each in getattr(items, "classes", None) or ()]
    divided = _divided(name, torch.stack(images), [label for _, label in read], len(items), names)
    return divided._replace(item=keys)


def _keys(item: Any, name: str, columns: Sequence[str] | None) -> tuple[Any, Any]:
    if not isinstance(item, Mapping):
        return 0, 1
    if columns:
        found = list(columns)
    else:
        first = [
            next((key for key in keys if key in item), None) for keys in (IMAGE_KEYS, LABEL_KEYS)
        ]
        found = [key for key in first if key]
    if len(found) != 2 or not all(key in item for key in found):
        raise InputError(
            f"dataset = {name}: its items have the keys {', '.join(map(str, item))}; give those of "
            f"the image and of the label as columns, such as columns = ('image', 'label')"
        )
    return found[0], found[1]


def _image_and_label(
    items: Any, name: str, index: int, keys: tuple[Any, Any]
) -> tuple[Tensor, Any]:
    try:
        item = items[index]
        if item is None or isinstance(item, (str, bytes)) or len(item) < 2:
            raise TypeError(f"it is {item!r:.80}")
        image, label = item[keys[0]], item[keys[1]]
        if not isinstance(image, (Tensor, np.ndarray)):
            image = read_picture(image)
        return torch.as_tensor(image).detach().cpu(), _label(label)
    except InputError:
        raise
    except Exception as error:  # whatever the reader's dataset raises
        raise InputError(
            f"dataset = {name}, item {index}: {describe(error)}; it must be an image (a "
            f"tensor, array or PIL image) and its class, as a pair or mapping"
        ) from error


def _label(label: Any) -> Any:
    """A whole number or a text; a float as it is, which is refused later with all the others."""
    if isinstance(label, str):
        return label
    value = np.asarray(label)
    if value.size != 1:
        raise TypeError(
            f"the label has shape {value.shape}; one-hot labels become classes by argmax"
        )
    if value.item() is None:
        raise TypeError("the label is missing")
    return value.item()


def spread(number: int, bytes_each: int) -> Tensor:
    """Indices of as many of the examples, evenly spread, as may be held in memory."""
    held = min(number, max(1, HELD_BYTES // max(1, bytes_each)))
    return torch.arange(held) * number // held


def _divided(
    name: str, images: Tensor, labels: list[Any], total: int, names: Sequence[str] = ()
) -> OwnImages:
    """Into training and validation: a tenth of each class, at least one of two images."""
    text_labels = any(isinstance(label, str) for label in labels)
    if text_labels:
        names = sorted(set(map(str, labels)))
        labels = [names.index(str(label)) for label in labels]
    wrong = next((i for i, each in enumerate(labels) if isinstance(each, float) or each < 0), None)
    if wrong is not None:
        raise InputError(
            f"dataset = {name}: label {wrong} is {labels[wrong]!r}, but labels must be whole "
            f"numbers >= 0, or names of classes"
        )
    if len(labels) < FEWEST_IMAGES:
        raise InputError(
            f"dataset = {name} has {len(labels)} images, but a tenth is for validation: there must "
            f"be at least {FEWEST_IMAGES}"
        )
    classes = torch.tensor(labels).long()
    number = max(len(names), int(classes.max()) + 1)
    names = [*names, *map(str, range(len(names), number))]
    held_out = torch.zeros(len(classes), dtype=torch.bool)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    lonely = []
    for value in classes.unique().tolist():
        of_class = order[classes[order] == value]
        held_out[of_class[: max(len(of_class) > 1, round(len(of_class) / 10))]] = True
        lonely += [names[value]] if len(of_class) == 1 else []
    notes = [f"class {', '.join(lonely[:3])}: validation has none of it, as there is one image"]
    return OwnImages(
        name,
        (images[~held_out], classes[~held_out]),
        (images[held_out], classes[held_out]),
        list(names),
        round(total * (~held_out).double().mean().item()),
        text_labels=text_labels,
        notes=tuple(notes if lonely else ()),
    )


def _checked(found: OwnImages) -> OwnImages:
    """As they are, if a classifier can learn from them."""
    images, labels = found.train
    if len(labels.unique()) < 2:
        raise InputError(f"dataset = {found.name}: all training images are of one class")
    for part, _ in (found.train, found.validation):
        finite = part.isfinite().flatten(1).all(1)
        if not finite.all():
            raise InputError(
                f"dataset = {found.name}: {int((~finite).sum())} images hold values that are not "
                f"finite"
            )
    if (images == images[:1]).all():
        raise InputError(f"dataset = {found.name}: all {len(images)} training images are the same")
    return found


def call(what: str, factory: Any) -> Any:
    """What a reader's factory returns, found by its name if need be.

    Raises:
        InputError: It is not there or raised something; the message has the reader's own line.
    """
    made = find_factory(factory)
    try:
        return made()
    except Exception as error:  # whatever the reader's function raises
        raise InputError(f"{what} raised {describe(error)}") from error
