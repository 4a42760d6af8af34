"""Kaggle's Digit Recognizer: reading its files, writing a submission.

Kaggle gives two files. Their first line names the columns; every further line is an image.

- `train.csv`: `label` (0 to 9), then `pixel0` to `pixel783` (0 to 255, row by row; 0 is black).
- `test.csv`: the same without `label`.

A submission has one line for each image of `test.csv`: `ImageId`, counted from 1, and `Label`.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nbutils.data.dataset import Dataset
from nbutils.errors import InputError
from nbutils.paths import write_atomically

SIDE = 28
CLASSES = 10

TEST_COLUMNS = {f"pixel{pixel}": 255 for pixel in range(SIDE * SIDE)}
"""The columns of `test.csv` in order, with the largest value of each. The smallest is 0."""

TRAIN_COLUMNS = {"label": CLASSES - 1} | TEST_COLUMNS

DOWNLOAD = "digit-recognizer.zip"
"""What Kaggle calls the download of all files."""


def read_train(path: str | Path) -> tuple[Tensor, Tensor]:
    """Images (uint8, shape (rows, 1, 28, 28)) and labels (int64) of a `train.csv`, in file order.

    The file may be compressed: under its own name, as `train.csv.gz` or `train.csv.zip` beside it,
    or within `digit-recognizer.zip`.

    Raises:
        InputError: There is no such file, or it has another form; the message names the file, and
            the line, column and value of the first fault.
    """
    table = _read(Path(path), TRAIN_COLUMNS)
    return table[:, 1:].reshape(-1, 1, SIDE, SIDE), table[:, 0].long()


def read_test(path: str | Path) -> Tensor:
    """The images of a `test.csv`, read as those of `read_train`."""
    return _read(Path(path), TEST_COLUMNS).view(-1, 1, SIDE, SIDE)


def write_dataset(folder: str | Path, data: Dataset) -> None:
    """Write images of 28 x 28 pixels in Kaggle's format, to try things out without an account.

    `train.csv` gets the training images and then the validation images, `test.csv` the test images
    without their labels.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    splits = (data.train, data.validation)
    labels = torch.cat([split.labels for split in splits]).to(torch.uint8)
    images = torch.cat([split.images for split in splits]).flatten(1)
    tables = {
        "train.csv": (TRAIN_COLUMNS, torch.cat([labels.unsqueeze(1), images], 1)),
        "test.csv": (TEST_COLUMNS, data.test.images.flatten(1)),
    }
    for name, (columns, table) in tables.items():
        frame = pd.DataFrame(table.numpy(), columns=list(columns))
        frame.to_csv(folder / name, index=False, lineterminator="\n")


def write_submission(path: str | Path, predictions: Tensor) -> Path:
    """Write the file that Kaggle scores, whole or not at all.

    Args:
        path: Where it goes, in place of an earlier one; its folder is made if there is none.
        predictions: Whole numbers, shape (n,), n >= 1: the class, 0 to 9, of each image of
            `test.csv`, in its order.

    Raises:
        InputError: The predictions are of another form.
    """
    path, lines = Path(path), []
    for image, label in enumerate(predictions.tolist(), start=1):
        if type(label) is not int or not 0 <= label < CLASSES:
            raise InputError(
                f"the prediction of image {image} is {label}, but it must be a whole number from "
                f"0 to {CLASSES - 1}"
            )
        lines.append(f"{image},{label}\n")
    if not lines:
        raise InputError("there are no predictions to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(["ImageId,Label\n", *lines]).encode())
    return path


def _read(path: Path, columns: Mapping[str, int]) -> Tensor:
    """The values in a file: uint8, shape (rows, columns)."""
    path, content = _content(path)
    header, _, rows = content.partition(b"\n")
    if fault := _header_fault(next(_rows(header), []), list(columns)):
        raise InputError(f"{path}, line 1: {fault}")
    if not rows:
        raise InputError(f"{path} has a line of column names, but no rows")
    try:
        file = io.BytesIO(rows)
        table = pd.read_csv(file, header=None, dtype=np.int64, skip_blank_lines=False).to_numpy()
        sound = table.shape[1] == len(columns)
        sound = sound and bool(((table >= 0) & (table <= list(columns.values()))).all())
    except (ValueError, OverflowError):
        sound = False
    if not sound:
        fault = _first_fault(rows, columns) or "there are values that are not whole numbers"
        raise InputError(f"{path}, {fault}")
    return torch.from_numpy(table.astype(np.uint8))


def _content(path: Path) -> tuple[Path, bytes]:
    """The file that holds the CSV file called `path`, and the CSV's bytes, decompressed."""
    beside = [path.with_name(f"{path.name}.gz"), path.with_name(f"{path.name}.zip")]
    archives = [path.with_name(DOWNLOAD), *([path.parent] if path.parent.suffix == ".zip" else [])]
    found = next((each for each in (path, *beside, *archives) if each.is_file()), path)
    try:
        content = found.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        elif content.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                names = [n for n in archive.namelist() if Path(n).name == path.name]
                content = archive.read(names[0] if names else path.name)
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, RuntimeError) as error:
        raise InputError(f"{found} is damaged ({error}); download it again") from error
    except KeyError:
        raise InputError(f"{found} holds no {path.name}; unpack it by hand") from None
    except OSError as error:
        reason = f"{path} cannot be read: {error.strerror}"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            reason = f"no file {path}" if path.parent.is_dir() else f"no folder {path.parent}"
        raise InputError(
            f"{reason}; it must hold what Kaggle's competition Digit Recognizer calls {path.name} "
            f"(or {path.name}.gz, {path.name}.zip or {DOWNLOAD})"
        ) from error
    if not content:
        raise InputError(f"{found} is empty")
    return found, content.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n") + b"\n"


def _rows(content: bytes) -> Any:
    return csv.reader(io.StringIO(content.decode(errors="backslashreplace"), newline=""))


def _header_fault(found: list[str], columns: list[str]) -> str | None:
    for number, (name, wanted) in enumerate(itertools.zip_longest(found, columns), start=1):
        if name != wanted:
            return (
                f"column {number} is {_shortened(name)}, but it must be {wanted!r}; the file has "
                f"{len(found)} columns, and must have {len(columns)}, as UTF-8 text separated by "
                f"commas"
            )
    return None


def _first_fault(content: bytes, columns: Mapping[str, int]) -> str | None:
    """The line of the first fault in the rows after the header, and what it is."""
    for number, row in enumerate(_rows(content), start=2):
        if len(row) != len(columns):  # comes first: after a lost field all columns are wrong
            return f"line {number}: it has {len(row)} values, and must have {len(columns)}"
        for (name, largest), value in zip(columns.items(), row, strict=True):
            whole = value.isascii() and value.strip().isdigit() and len(value) < 100
            if not whole or int(value) > largest:
                what = f"{_shortened(value)} is not a whole number from 0 to {largest}"
                return f"line {number}, column {name}: {what}"
    return None


def _shortened(text: str | None) -> str:
    return "missing" if text is None else repr(text if len(text) <= 20 else f"{text[:20]}...")
