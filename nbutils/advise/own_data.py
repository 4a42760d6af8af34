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
from torch.utils.data import TensorDataset, default_collate
from tqdm.auto import tqdm

from nbutils.advise.examples import CPU, Examples, leaves, tensors
from nbutils.advise.pictures import ImageFolder, as_bytes, read_picture
from nbutils.data.sources import DATASETS, KAGGLE, load_dataset
from nbutils.errors import InputError, suggest
from nbutils.machine import no_progress
from nbutils.measure.process import describe, find_factory
from nbutils.training.setup import generator_for

HELD_BYTES = 2**29  # in memory; of a larger dataset, a random part is taken
FEWEST = 10  # examples of a dataset, as a tenth is for validation
MOST_CLASSES = 1_000_000  # a larger label is a name or a time, not the number of a class

IMAGE_KEYS = ("image", "img", "images", "pixel_values", "picture", "input", "x")
LABEL_KEYS = ("label", "labels", "target", "class", "fine_label", "targets", "y")
"""Keys of an item that is a mapping, in the order in which they are looked for."""

ARRAYS = (Tensor, np.ndarray)


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

    It may also be a tuple of tensors or arrays, or "package.module:name" of what returns one.
    """
    name, items = _opened(dataset)
    try:
        held = [items[index] for index in _drawn(len(items), items[0])]
        together = None if collate else default_collate(held)
        found = tensors(together)
        as_one = {len(part) for part in found} == {len(held)} and len(found) == len(
            leaves(together)
        )
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
    pair = isinstance(dataset, list) and len(dataset) == 2  # a longer list is one of examples
    if (pair or isinstance(dataset, tuple)) and isinstance(next(iter(dataset), None), ARRAYS):
        try:
            *parts, labels = (_tensor_or_texts(part) for part in dataset)
            texts = isinstance(labels, list)
            dataset = (
                list(zip(*parts, labels, strict=True)) if texts else TensorDataset(*parts, labels)
            )
        except Exception as error:  # torch raises many kinds
            shapes = " and ".join(str(tuple(np.shape(part))) for part in dataset)
            raise InputError(
                f"dataset = {name} of the shapes {shapes}, but they must hold numbers, and begin "
                f"with the same n: {describe(error)}"
            ) from error
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(f"dataset = {name}, but it must have a length, and items by index")
    if len(dataset) < FEWEST:
        raise InputError(
            f"dataset = {name} has {len(dataset)} examples, but a tenth is for validation: there "
            f"must be at least {FEWEST}"
        )
    return name, dataset


def _tensor_or_texts(part: Any) -> Any:
    if isinstance(part, Tensor):
        return part
    array = np.ascontiguousarray(part)
    return array.tolist() if array.dtype.kind in "USO" else torch.from_numpy(array)


def call(what: str, factory: Any) -> Any:
    """What a reader's factory, or that of a name, returns; errors are told with their own line."""
    made = find_factory(factory)
    try:
        return made()
    except Exception as error:  # whatever the reader's function raises
        raise InputError(f"{what} raised {describe(error)}") from error


def _drawn(number: int, item: Any) -> list[int]:
    """Indices of as many of the items, drawn with a fixed seed, as may be held in memory."""
    size = sum(part.nbytes for part in leaves(item) if isinstance(part, ARRAYS))
    held = min(number, max(1, HELD_BYTES // max(1, size)))
    order = torch.randperm(number, generator=generator_for(CPU, 0, "examples held in memory"))
    return order[:held].sort()[0].tolist()


def _from_items(name: str, items: Any, columns: Sequence[str] | None) -> Data:
    index, read = 0, []
    try:
        first = items[0]
        keys = _keys(first, columns)
        indices = _drawn(len(items), _image_and_label(first, keys)[0])
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
    if isinstance(items, ImageFolder) or not isinstance(first[keys[0]], ARRAYS):
        images = as_bytes(images)
    if {image.shape[0] for image in images if image.ndim == 3} == {1, 3}:
        images = [image.expand(3, -1, -1) for image in images]
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        found = ", ".join(map(str, shapes[:3]))
        raise InputError(f"dataset = {name}: images have the shapes {found}; make them of one size")
    names = _class_names(items)
    text_labels = all(isinstance(label, str) for label in labels)
    if text_labels:
        names = sorted(set(labels))
        labels = [names.index(label) for label in labels]
    for index, label in zip(indices, labels, strict=True):
        if not isinstance(label, int) or not 0 <= label < MOST_CLASSES:
            raise InputError(
                f"dataset = {name}: label {index} is {label!r}, but labels must be whole numbers "
                f"from 0, or all names of classes"
            )
    classes = torch.tensor(labels).long()
    names += map(str, range(len(names), int(classes.max()) + 1))
    notes = [*items.notes] if isinstance(items, ImageFolder) else []
    lonely = ", ".join(names[value] for value in (classes.bincount() == 1).nonzero()[:3])
    if lonely:
        notes.append(f"class {lonely}: validation has none of it, as there is one image")
    if text_labels and len(labels) < len(items):
        notes.append(
            f"{len(labels)} of {len(items)} images were read; others may have more classes"
        )
    data = _divided(name, Examples((torch.stack(images), classes)), classes, len(items))
    return data._replace(classes=names, keys=keys, text_labels=text_labels, notes=tuple(notes))


def _class_names(items: Any) -> list[str]:
    """Those that a dataset tells, as torchvision's do."""
    names = getattr(items, "classes", None)
    names = names.tolist() if isinstance(names, ARRAYS) else names
    return list(map(str, names)) if isinstance(names, (list, tuple)) else []


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
    if not isinstance(image, ARRAYS):
        image = read_picture(image)
    image = torch.as_tensor(image).detach().cpu()
    if not image.ndim:
        raise TypeError("the image is a single number")
    label = label.decode() if isinstance(label, bytes) else label
    if isinstance(label, str):
        return image, str(label)
    if isinstance(label, (list, tuple, set, dict)):
        raise TypeError(f"the label is a {type(label).__name__}; it must be one class")
    value = np.asarray(label.cpu() if isinstance(label, Tensor) else label)
    if value.size != 1:
        raise TypeError(f"the label has shape {value.shape}; one-hot: take labels.argmax(1)")
    found = value.item()
    if found is None or found != found:  # NaN, as pandas has it
        raise TypeError("the label is missing")
    return image, int(found) if isinstance(found, bool) else found


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
    if not data.validation.number:
        raise InputError(f"{what}: no class has two images, so none is left for validation")
    if len(labels.unique()) < 2:
        raise InputError(f"{what}: all training images are of one class")
    for part in (images, data.validation.items[0]):
        wrong = int((~part.isfinite()).flatten(1).any(1).sum())
        if wrong:
            raise InputError(f"{what}: {wrong} images hold values that are not finite")
    if (images == images[:1]).all():
        raise InputError(f"{what}: all {len(images)} training images are the same")
    return data
