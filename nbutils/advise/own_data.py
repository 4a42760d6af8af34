"""A reader's own examples: images and classes from tensors, a dataset or a folder, or any others.

Images of uint8 stay as they are; the loss scales them. What would become a training on noise is
refused with the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import TensorDataset, default_collate
from tqdm.auto import tqdm

from nbutils.advise.pictures import ImageFolder, read_picture
from nbutils.data.sources import DATASETS, KAGGLE, load_dataset
from nbutils.errors import InputError, suggest
from nbutils.machine import no_progress
from nbutils.measure.process import describe, find_factory
from nbutils.training.setup import generator_for

HELD_BYTES = 2**29  # in memory; of a larger dataset, evenly spread examples are taken
FEWEST = 10  # examples of a dataset, as a tenth is for validation

IMAGE_KEYS = ("image", "img", "images", "pixel_values", "picture", "input", "x")
LABEL_KEYS = ("label", "labels", "target", "class", "fine_label", "targets", "y")
"""Keys of an item that is a mapping, in the order in which they are looked for."""

CPU = torch.device("cpu")


class Examples(NamedTuple):
    """Examples in memory: a list of items with `collate`, or without it one batch of them all."""

    items: Any
    collate: Callable[[list[Any]], Any] | None = None

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.items if self.collate else tensors(self.items)[0])

    def batch(self, chosen: Tensor, device: torch.device = CPU) -> Any:
        """The batch of the examples with these indices, on `device`."""
        if self.collate:
            made = self.collate(self.take(chosen).items)
            return mapped(made, lambda part: part.to(device))
        return mapped(self.items, lambda part: part[chosen].to(device))

    def take(self, chosen: Tensor) -> Examples:
        """Those with these indices; tensors are copied, so that no others are pickled with them."""
        if self.collate:
            return Examples([self.items[index] for index in chosen.tolist()], self.collate)
        return Examples(self.batch(chosen))

    def first(self, number: int) -> Examples:
        """The first ones, at most as many as there are."""
        return self.take(torch.arange(min(number, self.number)))


def mapped(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """A batch, any nesting of tuples, lists and mappings, with each of its tensors changed."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch  # also what is like a mapping
    return tree_map_only(Tensor, change, batch)


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch."""
    found: list[Tensor] = []
    mapped(batch, found.append)
    return found


class Data(NamedTuple):
    """A dataset, divided into examples to train on and to judge by."""

    name: str
    train: Examples  # of a classifier: images, shape (n, ...), and labels, int64, shape (n,)
    validation: Examples
    examples_per_epoch: int  # of the whole dataset, of which `train` may be a part
    classes: Sequence[str] = ()  # the names of a classifier's
    keys: tuple[Any, ...] = (0, 1)  # of image and label in an item or batch
    text_labels: bool = False  # whether the labels of the items are names of classes
    notes: tuple[str, ...] = ()  # what the reader should know about the reading


def read_examples(dataset: Any, collate: Callable[[list[Any]], Any] | None) -> Data:
    """Read a map-style dataset of any kind; a tenth, drawn with a fixed seed, is for validation.

    It may also be a tuple of tensors, or "package.module:name" of what returns one.
    """
    name, items = _opened(dataset)
    try:
        held = [items[index] for index in _spread(len(items), items[0])]
        together = None if collate else default_collate(held)
        as_one = {len(part) for part in tensors(together)} == {len(held)}
    except Exception as error:  # whatever the reader's dataset raises
        raise InputError(
            f"dataset = {name}: {describe(error)}; items of unequal shapes need a collate function"
        ) from error
    examples = Examples(together) if as_one else Examples(held, collate or default_collate)
    return _divided(name, examples, torch.zeros(len(held)), len(items))


def read_images(dataset: Any, columns: Sequence[str] | None = None) -> Data:
    """Read the images of a classifier.

    Args:
        dataset: A name that `load_dataset` knows, whose own validation images are used. Of others
            a tenth of each class, drawn with a fixed seed, is for validation: a folder with one
            folder of images per class, or with `train/` that has them; a tuple of two tensors or
            arrays, images (n, ...) and labels (n,); a map-style dataset whose items are pairs,
            longer tuples, or mappings; or "package.module:name", which returns one of the last two.
        columns: The keys of image and label, where the items are mappings with unusual keys.
    """
    name = ""
    if isinstance(dataset, (str, Path)):
        name = str(dataset)
        if name in DATASETS or name.startswith(KAGGLE):
            data = load_dataset(name)
            parts = Examples(tuple(data.train)), Examples(tuple(data.validation))
            return _checked(Data(name, *parts, parts[0].number, list(data.class_names)))
        if Path(name).expanduser().is_dir():
            dataset = ImageFolder(Path(name).expanduser())
        elif ":" not in name:
            raise InputError(f"no dataset or folder {name!r}; {suggest(name, DATASETS)}")
    return _checked(_from_items(*_opened(dataset, name), columns))


def _opened(dataset: Any, name: str = "") -> tuple[str, Any]:
    """Name and items of a dataset."""
    name = name or (dataset if isinstance(dataset, str) else type(dataset).__name__)
    if isinstance(dataset, str):
        dataset = call(f"dataset = {name!r}", dataset)
    if isinstance(dataset, tuple) and all(isinstance(p, (Tensor, np.ndarray)) for p in dataset):
        try:
            dataset = TensorDataset(*map(torch.as_tensor, dataset))
        except Exception as error:  # torch raises many kinds
            shapes = " and ".join(str(tuple(part.shape)) for part in dataset)
            raise InputError(
                f"dataset = {name} of the shapes {shapes}, but they must begin with the same n"
            ) from error
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(f"dataset = {name}, but it must have a length, and items by index")
    if len(dataset) < FEWEST:
        raise InputError(
            f"dataset = {name} has {len(dataset)} examples, but a tenth is for validation: there "
            f"must be at least {FEWEST}"
        )
    return name, dataset


def call(what: str, factory: Any) -> Any:
    """What a reader's factory, or that of a name, returns; errors are told with their own line."""
    made = find_factory(factory)
    try:
        return made()
    except Exception as error:  # whatever the reader's function raises
        raise InputError(f"{what} raised {describe(error)}") from error


def _spread(number: int, item: Any) -> list[int]:
    """Indices of as many of the items, evenly spread, as may be held in memory."""
    size = sum(part.nbytes for part in tensors(item))
    held = min(number, max(1, HELD_BYTES // max(1, size)))
    return (torch.arange(held) * number // held).tolist()


def _from_items(name: str, items: Any, columns: Sequence[str] | None) -> Data:
    index, read = 0, []
    try:
        keys = _keys(items[0], columns)
        indices = _spread(len(items), _image_and_label(items[0], keys)[0])
        for index in tqdm(indices, "images", leave=False, disable=no_progress()):
            read.append(_image_and_label(items[index], keys))
    except InputError:
        raise
    except Exception as error:  # whatever the reader's dataset raises
        raise InputError(
            f"dataset = {name}, item {index}: {describe(error)}; it must be an image (a "
            f"tensor, array or PIL image) and its class, as a pair or mapping"
        ) from error
    images, labels = (list(part) for part in zip(*read, strict=True))
    if {image.shape[0] for image in images if image.ndim == 3} == {1, 3}:
        images = [image.expand(3, -1, -1) for image in images]
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        found = ", ".join(map(str, shapes[:3]))
        raise InputError(f"dataset = {name}: images have the shapes {found}; make them of one size")
    names = list(map(str, getattr(items, "classes", None) or ()))
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
    classes = torch.tensor(labels).long()
    names += map(str, range(len(names), int(classes.max()) + 1))
    lonely = ", ".join(names[value] for value in (classes.bincount() == 1).nonzero()[:3])
    told = f"class {lonely}: validation has none of it, as there is one image"
    data = _divided(name, Examples((torch.stack(images), classes)), classes, len(items))
    notes = (*getattr(items, "notes", ()), *([told] if lonely else []))
    return data._replace(classes=names, keys=keys, text_labels=text_labels, notes=notes)


def _keys(item: Any, columns: Sequence[str] | None) -> tuple[Any, ...]:
    """Where an item has image and label."""
    if not isinstance(item, Mapping):
        return 0, 1
    choices = [[column] for column in columns] if columns else [IMAGE_KEYS, LABEL_KEYS]
    found = [next((key for key in keys if key in item), None) for keys in choices]
    if len(found) != 2 or None in found:
        raise TypeError(
            f"it has the keys {', '.join(map(str, item))}; give those of image and label as "
            f"columns, such as columns = ('image', 'label')"
        )
    return tuple(found)


def _image_and_label(item: Any, keys: tuple[Any, ...]) -> tuple[Tensor, Any]:
    if item is None or isinstance(item, (str, bytes)) or len(item) < 2:
        raise TypeError(f"it is {item!r:.80}")
    image, label = (item[key] for key in keys)
    if not isinstance(image, (Tensor, np.ndarray)):
        image = read_picture(image)
    image = torch.as_tensor(image).detach().cpu()
    if not image.ndim:
        raise TypeError("the image is a single number")
    if isinstance(label, str):
        return image, label
    value = np.asarray(label.cpu() if isinstance(label, Tensor) else label)
    if value.size != 1:
        raise TypeError(f"the label has shape {value.shape}; one-hot: take labels.argmax(1)")
    if value.item() is None:
        raise TypeError("the label is missing")
    return image, value.item()


def _divided(name: str, examples: Examples, classes: Tensor, total: int) -> Data:
    """Into training and validation, shuffled: a tenth of each class, at least one of two."""
    order = torch.randperm(len(classes), generator=generator_for(CPU, 0, "validation examples"))
    held_out = torch.zeros(len(classes), dtype=torch.bool)
    for value in classes.unique():
        of_class = order[classes[order] == value]
        held_out[of_class[: max(len(of_class) > 1, round(len(of_class) / 10))]] = True
    train, validation = (examples.take(order[held_out[order] == part]) for part in (False, True))
    return Data(name, train, validation, round(total * train.number / len(classes)))


def _checked(data: Data) -> Data:
    """As it is, if a classifier can learn from it."""
    what, (images, labels) = f"dataset = {data.name}", data.train.items
    if len(labels.unique()) < 2:
        raise InputError(f"{what}: all training images are of one class")
    for part in (images, data.validation.items[0]):
        wrong = int((~part.isfinite()).flatten(1).any(1).sum())
        if wrong:
            raise InputError(f"{what}: {wrong} images hold values that are not finite")
    if (images == images[:1]).all():
        raise InputError(f"{what}: all {len(images)} training images are the same")
    return data
