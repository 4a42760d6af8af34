"""Kaggle's Digit Recognizer: reading its files, writing a submission.

Two files come from Kaggle. Their first line names the columns; every further line is an image.

- `train.csv`: `label` (0 to 9), then `pixel0` to `pixel783` (0 to 255, row by row; 0 is black).
- `test.csv`: the same without `label`.

A submission has a line for each image of `test.csv`: `ImageId`, counted from 1, and `Label`.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nbutils.errors import InputError
from nbutils.paths import write_atomically

if TYPE_CHECKING:
    from nbutils.data.dataset import Dataset

SIDE = 28
CLASSES = 10

TEST_COLUMNS = {f"pixel{pixel}": 255 for pixel in range(SIDE * SIDE)}
"""Columns of `test.csv` in their order, with the largest value of each; the smallest is 0."""

TRAIN_COLUMNS = {"label": CLASSES - 1} | TEST_COLUMNS
"""The same of `train.csv`."""

ROWS_AT_A_TIME = 2000
"""Rows that pandas parses at once, each value in 8 bytes. It changes memory and speed only."""


def read_train(path: str | Path) -> tuple[Tensor, Tensor]:
    """Images and labels of a `train.csv`, in file order.

    Returns:
        uint8, shape (rows, 1, 28, 28); and int64, shape (rows,).

    Raises:
        InputError: The file is not there or not what it must be; the message names the file, the
            row, the line and the column of the first fault.
    """
    table = _read(Path(path), TRAIN_COLUMNS)
    return _images(table[:, 1:]), torch.from_numpy(table[:, 0].astype(np.int64))


def read_test(path: str | Path) -> Tensor:
    """Images of a `test.csv`, in file order: uint8, shape (rows, 1, 28, 28).

    Raises:
        InputError: As `read_train`.
    """
    return _images(_read(Path(path), TEST_COLUMNS))


def write_dataset(folder: str | Path, data: Dataset) -> None:
    """Write `data` as if it came from Kaggle, so that no account is needed to try things out.

    `train.csv` gets the training images and after them the validation images; `test.csv` gets
    the test images, without their labels.

    Args:
        folder: Where they go; made where there is none.
        data: Images of 28 x 28 pixels in at most 10 classes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    splits = (data.train, data.validation)
    labels = torch.cat([split.labels for split in splits]).to(torch.uint8)
    images = torch.cat([split.images for split in splits]).flatten(1)
    _write(folder / "train.csv", TRAIN_COLUMNS, torch.cat([labels.unsqueeze(1), images], 1))
    _write(folder / "test.csv", TEST_COLUMNS, data.test.images.flatten(1))


def write_submission(path: str | Path, predictions: Tensor) -> Path:
    """Write the file that Kaggle scores. Its name appears when it is whole.

    Args:
        path: Where it goes, in place of an earlier one; its folder is made where there is none.
        predictions: Whole numbers, shape (n,), n >= 1: the class, 0 to 9, of each image of
            `test.csv`, in its order.

    Returns:
        The path.

    Raises:
        InputError: The predictions are not as said.
    """
    path = Path(path)
    whole = not predictions.is_floating_point() and predictions.dtype != torch.bool
    if predictions.ndim != 1 or len(predictions) == 0 or not whole:
        raise InputError(
            f"predictions are {predictions.dtype} of shape {tuple(predictions.shape)}, but they "
            f"must be whole numbers, one for each image, of at least one image"
        )
    outside = (predictions < 0) | (predictions >= CLASSES)
    if outside.any():
        image = int(outside.int().argmax())
        raise InputError(
            f"the prediction of image {image + 1} is {predictions[image].item()}, but it must be "
            f"from 0 to {CLASSES - 1}"
        )
    lines = [f"{image},{label}\n" for image, label in enumerate(predictions.tolist(), start=1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(["ImageId,Label\n", *lines]).encode())
    return path


def _images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).view(-1, 1, SIDE, SIDE)


def _write(path: Path, columns: Mapping[str, int], table: Tensor) -> None:
    pd.DataFrame(table.numpy(), columns=list(columns)).to_csv(
        path, index=False, lineterminator="\n"
    )


def _read(path: Path, columns: Mapping[str, int]) -> np.ndarray:
    """The values in a file, uint8, shape (rows, columns).

    pandas parses fast but forgives much: a short row, a long row, a blank line, quotes. So the
    lines are looked at first; and what pandas or the ranges refuse is named by a slow search.
    """
    content = _content(path)
    header, *lines = content.removesuffix(b"\n").split(b"\n")
    _check_header(path, header, list(columns))
    if not lines:
        raise InputError(f"{path} has a line of column names, but no rows")
    separators = len(columns) - 1
    regular = all(line.count(b",") == separators for line in lines)
    digits_only = not content[len(header) :].translate(None, b"0123456789,\n")
    table = _parse(content, columns) if regular and digits_only else None
    if table is None:
        raise InputError(f"{path}, {_first_fault(lines, columns)}")
    return table


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = f"{path} cannot be read: {error.strerror}"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            reason = f"no file {path}" if path.parent.is_dir() else f"no folder {path.parent}"
        raise InputError(
            f"{reason}; it must hold what Kaggle's competition Digit Recognizer calls {path.name}"
        ) from error
    if not content:
        raise InputError(f"{path} is empty")
    return content.replace(b"\r\n", b"\n")


def _check_header(path: Path, header: bytes, columns: list[str]) -> None:
    try:
        found = header.decode().split(",")
    except UnicodeDecodeError as error:
        column = header.count(b",", 0, error.start) + 1
        raise InputError(f"{path}, line 1, column {column}: the name is not UTF-8 text") from error
    for number, (name, wanted) in enumerate(itertools.zip_longest(found, columns), start=1):
        if name == wanted:
            continue
        if name is None:
            fault = f"column {number}, {wanted!r}, is missing"
        elif wanted is None:
            fault = f"column {number}, {_shortened(name)}, is one too many"
        else:
            fault = f"column {number} is {_shortened(name)}, but it must be {wanted!r}"
        count = f"{len(found)} columns, and must have {len(columns)}"
        raise InputError(f"{path}, line 1: {fault}; the file has {count}")


def _parse(content: bytes, columns: Mapping[str, int]) -> np.ndarray | None:
    """The values, or None where one is missing or too large."""
    largest = np.array(list(columns.values()))
    chunks = pd.read_csv(
        io.BytesIO(content), skiprows=1, header=None, dtype=np.int64, chunksize=ROWS_AT_A_TIME
    )
    parts = []
    try:
        for chunk in chunks:
            values = chunk.to_numpy()
            if (values > largest).any():
                return None
            parts.append(values.astype(np.uint8))
    except (ValueError, OverflowError):  # an empty field, or a number beyond 64 bits
        return None
    return np.concatenate(parts)


def _first_fault(lines: list[bytes], columns: Mapping[str, int]) -> str:
    """Where the first fault is, and what."""
    names = list(columns)
    for row, line in enumerate(lines, start=1):
        where = f"row {row} (line {row + 1})"
        fields = line.split(b",")
        # The length goes first: where a field is lost, all after it are in wrong columns.
        if len(fields) != len(names):
            end = f"goes on after column {names[-1]}"
            if len(fields) < len(names):
                end = f"ends before column {names[len(fields)]}" if line else "is blank"
            count = f"{len(fields) if line else 0} fields, and must have {len(names)}"
            return f"{where}: it {end}; it has {count}"
        for (name, largest), field in zip(columns.items(), fields, strict=True):
            fault = _fault(field, largest)
            if fault:
                return f"{where}, column {name}: {fault}"
    raise AssertionError("rows were refused, but none has a fault")


@functools.lru_cache(maxsize=1024)  # few values fill a whole file
def _fault(field: bytes, largest: int) -> str | None:
    """What is wrong with one value, if anything is."""
    if not field:
        return "the field is empty"
    if field.isdigit():
        # Python refuses to read numbers of thousands of digits, but those are long enough to tell.
        digits = field.lstrip(b"0") or b"0"
        if len(digits) <= len(str(largest)) and int(digits) <= largest:
            return None
    try:
        return f"{_shortened(field.decode())} is not a whole number from 0 to {largest}"
    except UnicodeDecodeError:
        return f"{field[:20]!r} is not UTF-8 text"


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 20 else f"{text[:20]}...")
