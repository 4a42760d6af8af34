"""A reader's own examples: images and classes from tensors, a dataset or a folder, or any others.

Images of uint8 stay as they are; the loss scales them. What would become a training on noise is
refused with the cause.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from nbutils.advise.pictures import ImageFolder, as_bytes, read_picture
from nbutils.data.sources import DATASETS, KAGGLE, load_dataset
from nbutils.errors import InputError, suggest
from nbutils.machine import no_progress
from nbutils.measure.process import describe, find_factory
from nbutils.training.setup import generator_for

CPU = torch.device("cpu")
ARRAYS = (Tensor, np.ndarray)
HELD_BYTES = 2**29  # in memory; of a larger dataset, a random part is taken
FEWEST = 10  # examples of a dataset, as a tenth is for validation
MOST_CLASSES = 1_000_000  # a larger label is a name or a time, not the number of a class

IMAGE_KEYS = ("image", "img", "images", "pixel_values", "picture", "input", "x")
LABEL_KEYS = ("label", "labels", "target", "class", "fine_label", "targets", "y")
"""Keys of an item that is a mapping, in the order in which they are looked for."""


class Examples(NamedTuple):
    """Examples in memory: a list of items with `collate`, or without it one batch of them all."""

    items: Any
    collate: Callable[[list[Any]], Any] | None = None

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.items if self.collate else tree_leaves(self.items)[0])

    def batch(self, chosen: Tensor, device: torch.device = CPU) -> Any:
        """The batch of the examples with these indices, on `device`."""
        chosen = chosen.cpu()
        if not self.collate:
            return tree_map_only(Tensor, lambda part: part[chosen].to(device), self.items)
        made = self.collate([self.items[index] for index in chosen.tolist()])
        made = dict(made) if isinstance(made, Mapping) else made  # also what is like a mapping
        return tree_map_only(Tensor, lambda part: part.to(device), made)

    def take(self, chosen: Tensor) -> "Examples":
        """Those with these indices; tensors are copied, so that no others are pickled with them."""
        if self.collate:
            return Examples([self.items[index] for index in chosen.tolist()], self.collate)
        return Examples(self.batch(chosen))


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


@contextmanager
def told(before: str, after: str = "") -> Iterator[None]:
    """An error of a reader's code becomes an `InputError` that tells it with its own line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{before}{describe(error)}{after}") from error


def read_examples(dataset: Any, collate: Callable[[list[Any]], Any] | None) -> Data:
    """Read a map-style dataset of any kind; a tenth, drawn with a fixed seed, is for validation.

    It may also be a tuple of tensors or arrays, or "package.module:name" of what returns one.
    """
    name, items = _opened(dataset)
    held = _held(name, items, lambda item: item)
    with told(f"dataset = {name}: ", "; items of unequal shapes need a collate function"):
        together = None if collate else default_collate(held)
    number = (len(held),)
    as_one = all(getattr(part, "shape", ())[:1] == number for part in tree_leaves(together))
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
        name, folder = str(dataset), Path(dataset).expanduser()
        if name in DATASETS or name.startswith(KAGGLE):
            data = load_dataset(name)
            train, validation = (Examples(tuple(part)) for part in (data.train, data.validation))
            return _checked(Data(name, train, validation, train.number, list(data.class_names)))
        if folder.is_dir():
            dataset = ImageFolder(folder)
        elif ":" not in name:
            raise InputError(f"no dataset or folder {name!r}; {suggest(name, DATASETS)}")
    return _checked(_from_items(*_opened(dataset, name), columns))


def _opened(dataset: Any, name: str = "") -> tuple[str, Any]:
    """Name and items of a dataset."""
    name = name or (dataset if isinstance(dataset, str) else type(dataset).__name__)
    if isinstance(dataset, str):
        with told(f"dataset = {name!r} raised "):
            dataset = find_factory(dataset)()
    pair = isinstance(dataset, list) and len(dataset) == 2  # a longer list is one of examples
    if (pair or isinstance(dataset, tuple)) and isinstance(next(iter(dataset), None), ARRAYS):
        shapes = " and ".join(str(tuple(np.shape(part))) for part in dataset)
        with told(f"dataset = {name} of the shapes {shapes}, which must begin with the same n: "):
            dataset = list(zip(*map(_tensor_or_texts, dataset), strict=True))
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(f"dataset = {name}, but it must have a length, and items by index")
    if len(dataset) < FEWEST:
        raise InputError(
            f"dataset = {name} has {len(dataset)} examples; it must be {FEWEST} or more"
        )
    return name, dataset


def _tensor_or_texts(part: Any) -> Any:
    array = part if isinstance(part, Tensor) else np.ascontiguousarray(part)
    numbers = isinstance(array, np.ndarray) and array.dtype.kind not in "USO"
    return torch.from_numpy(array) if numbers else array


def _held(name: str, items: Any, read: Callable[[Any], Any], hint: str = "") -> list[Any]:
    """What is read of as many items, drawn with a fixed seed, as memory may hold."""

    def at(index: int) -> Any:
        with told(f"dataset = {name}, item {index}: ", hint):
            return read(items[index])

    with told(f"dataset = {name}, item 0: ", hint):
        size = sum(part.nbytes for part in tree_leaves(at(0)) if isinstance(part, ARRAYS))
    order = torch.randperm(len(items), generator=generator_for(CPU, 0, "examples held in memory"))
    held = order[: max(1, HELD_BYTES // max(1, size))].sort()[0].tolist()
    return [at(index) for index in tqdm(held, "reading", leave=False, disable=no_progress())]


def _from_items(name: str, items: Any, columns: Sequence[str] | None) -> Data:
    hint = "; an item must be an image (a tensor, array or PIL image) and its class, or a mapping"
    read = _held(name, items, lambda item: _image_and_label(item, columns), hint)
    images, labels = (list(part) for part in zip(*read, strict=True))
    first, keys = items[0], _keys(items[0], columns)
    if not isinstance(first[keys[0]], ARRAYS):
        images = as_bytes(images)
    if {image.shape[0] for image in images if image.ndim == 3} == {1, 3}:
        images = [image.expand(3, -1, -1) for image in images]
    with told(f"dataset = {name}: images must be of one size: "):
        stacked = torch.stack(images)
    names: Any = getattr(items, "classes", None)  # as torchvision's datasets have them
    names = list(map(str, names)) if isinstance(names, (list, tuple, np.ndarray)) else []
    texts = [label for label in labels if isinstance(label, str)]
    if texts:
        names, labels = (part.tolist() for part in np.unique(labels, return_inverse=True))
    if 0 < len(texts) < len(labels):
        raise InputError(
            f"dataset = {name} has the label {texts[0]!r} beside numbers, but labels must be whole "
            f"numbers, or all names of classes"
        )
    classes = torch.tensor(labels)
    names += map(str, range(len(names), int(classes.max()) + 1))
    notes = items.notes if isinstance(items, ImageFolder) else []
    lonely = ", ".join(names[value] for value in (classes.bincount() == 1).nonzero()[:3])
    if lonely:
        notes.append(f"class {lonely}: validation has none of it, as there is one image")
    if texts and len(texts) < len(items):
        notes.append(f"{len(texts)} of {len(items)} images were read; others may have more classes")
    data = _divided(name, Examples((stacked, classes)), classes, len(items))
    return data._replace(classes=names, keys=keys, text_labels=bool(texts), notes=tuple(notes))


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


def _image_and_label(item: Any, columns: Sequence[str] | None) -> tuple[Tensor, str | int]:
    image, label = (item[key] for key in _keys(item, columns))
    if isinstance(image, Path):
        with told(f"{image}: no picture: "), Image.open(image) as picture:
            image = read_picture(picture)
    image = torch.as_tensor(image if isinstance(image, ARRAYS) else read_picture(image))
    if not image.ndim:
        raise TypeError("the image is a single number")
    if isinstance(label, (*ARRAYS, np.generic)):
        if math.prod(label.shape) != 1:
            shape = tuple(label.shape)
            raise TypeError(f"the label has shape {shape}; one-hot: take labels.argmax(1)")
        label = label.item()
    label = label.decode() if isinstance(label, bytes) else label
    if not isinstance(label, str) and not (isinstance(label, int) and 0 <= label < MOST_CLASSES):
        raise TypeError(
            f"the label is {label!r:.80}, but labels must be whole numbers from 0, or names"
        )
    return image.detach().cpu(), label if isinstance(label, str) else int(label)


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
    images, labels = data.train.items
    parts = images, data.validation.items[0]
    wrong = sum(int((~part.isfinite()).flatten(1).any(1).sum()) for part in parts)
    problems = {
        "no class has two images, so none is left for validation": not data.validation.number,
        "all training images are of one class": len(labels.unique()) < 2,
        f"{wrong} images hold values that are not finite": wrong,
        f"all {len(images)} training images are the same": (images == images[:1]).all(),
    }
    for problem, is_so in problems.items():
        if is_so:
            raise InputError(f"dataset = {data.name}: {problem}")
    return data
