"""Kaggle's Digit Recognizer: reading its files, writing a submission.

A row of `train.csv` is a `label` (0 to 9), then `pixel0` to `pixel783` (0 to 255, row by row; 0 is
black); `test.csv` has no labels. A submission gives its images, counted from 1, a `Label`.
"""

import csv
import gzip
import io
import re
import reprlib
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from itertools import zip_longest
from lzma import LZMAError
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nbutils.data.dataset import Dataset
from nbutils.errors import InputError
from nbutils.paths import write_atomically

SIDE, CLASSES = 28, 10

# The columns of the files in order, with the largest value of each; the smallest is 0.
TEST_COLUMNS = {f"pixel{pixel}": 255 for pixel in range(SIDE * SIDE)}
TRAIN_COLUMNS = {"label": CLASSES - 1} | TEST_COLUMNS
DOWNLOAD = "digit-recognizer.zip"


def read_train(path: str | Path) -> tuple[Tensor, Tensor]:
    """Images (uint8, shape (rows, 1, 28, 28)) and labels (int64) of a `train.csv`, in file order.

    The file may be compressed: under its own name, as `train.csv.gz` or `train.csv.zip` beside it,
    or within `digit-recognizer.zip`. InputError names the line, column and value of a fault.
    """
    table = _read(Path(path), TRAIN_COLUMNS)
    return table[:, 1:].reshape(-1, 1, SIDE, SIDE), table[:, 0].long()


def read_test(path: str | Path) -> Tensor:
    """The images of a `test.csv`, read as those of `read_train`."""
    return _read(Path(path), TEST_COLUMNS).view(-1, 1, SIDE, SIDE)


def write_dataset(folder: str | Path, data: Dataset) -> None:
    """Write images of 28 x 28 pixels in Kaggle's format, to try things out without an account.

    `train.csv` gets the training images and then the validation images.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = (torch.cat(parts) for parts in zip(data.train, data.validation, strict=True))
    train, test = (
        pd.DataFrame(pixels.flatten(1).numpy(), columns=list(TEST_COLUMNS))
        for pixels in (images, data.test.images)
    )
    train.insert(0, "label", labels.numpy())
    train.to_csv(folder / "train.csv", index=False, lineterminator="\n")
    test.to_csv(folder / "test.csv", index=False, lineterminator="\n")


def write_submission(path: str | Path, predictions: Tensor) -> Path:
    """Write the file that Kaggle scores, whole or not at all, in place of an earlier one.

    `predictions`, whole numbers of shape (n,), n >= 1, are the classes of `test.csv`'s images.
    """
    path, lines = Path(path), ["ImageId,Label\n"]
    for image, label in enumerate(predictions.tolist(), start=1):
        if type(label) is not int or not 0 <= label < CLASSES:
            raise InputError(
                f"the prediction of image {image} is {label}, but it must be a whole number from "
                f"0 to {CLASSES - 1}"
            )
        lines.append(f"{image},{label}\n")
    if len(lines) == 1:
        raise InputError("there are no predictions to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(lines).encode())
    return path


def _read(path: Path, columns: Mapping[str, int]) -> Tensor:
    """The values in a file: uint8, shape (rows, columns)."""
    path, content = _content(path)
    with suppress(ValueError, OverflowError):  # the hunt for the first fault says more
        table = pd.read_csv(io.BytesIO(content), dtype=np.int64, skip_blank_lines=False)
        # Rows with more values than the header would give the table an index.
        in_form = list(table) == list(columns) and isinstance(table.index, pd.RangeIndex)
        if in_form and table.min().ge(0).all() and table.max().le(pd.Series(columns)).all():
            return torch.from_numpy(table.to_numpy(np.uint8))
    raise InputError(f"{path}, {_first_fault(content, columns)}")


def _content(path: Path) -> tuple[Path, bytes]:
    """The file that holds the CSV file called `path`, and the CSV's bytes, decompressed."""
    names = (path.name, f"{path.name}.gz", f"{path.name}.zip", DOWNLOAD)
    found = next((file for file in map(path.with_name, names) if file.is_file()), None)
    if found is None:
        reason = f"no file {path}" if path.parent.is_dir() else f"no folder {path.parent}"
        raise InputError(
            f"{reason}; it must hold what Kaggle's competition Digit Recognizer calls {path.name} "
            f"(or {path.name}.gz, {path.name}.zip or {DOWNLOAD})"
        )
    content = found.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        elif content.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = [n for n in archive.namelist() if Path(n).name == path.name]
                top = min(members, key=lambda member: member.count("/"), default=path.name)
                content = archive.read(top)
    except (EOFError, OSError, RuntimeError, zlib.error, zipfile.BadZipFile, LZMAError) as error:
        raise InputError(f"{found} is damaged ({error}); download it again") from error
    except KeyError:
        raise InputError(f"{found} holds no {path.name}; unpack it by hand") from None
    if not content:
        raise InputError(f"{found} is empty")
    return found, content.rstrip(b"\r\n") + b"\n"


def _first_fault(content: bytes, columns: Mapping[str, int]) -> str:
    """The line of the first fault in a file, and what it is."""
    text = content.decode("utf-8-sig", errors="backslashreplace")
    rows = csv.reader(io.StringIO(text, newline=""))
    try:
        names = next(rows)
        for place, (name, wanted) in enumerate(zip_longest(names, columns), start=1):
            if name != wanted:
                found = "missing" if name is None else reprlib.repr(name)
                right = f"it must be {wanted!r}" if wanted else "it must not be there"
                return (
                    f"line 1: column {place} is {found}, but {right}; "
                    f"the file has {len(names)} columns, and must have {len(columns)}, as UTF-8 "
                    f"text separated by commas"
                )
        for number, row in enumerate(rows, start=2):
            if len(row) != len(columns):  # comes first: after a lost field all columns are wrong
                return f"line {number}: it has {len(row)} values, and must have {len(columns)}"
            for (name, largest), value in zip(columns.items(), row, strict=True):
                if (
                    not re.fullmatch(r"\s*0{0,99}\d{1,3}\s*", value, re.ASCII)
                    or int(value) > largest
                ):
                    what = f"{reprlib.repr(value)} is not a whole number from 0 to {largest}"
                    return f"line {number}, column {name}: {what}"
    except csv.Error as error:  # such as a quote that is never closed
        return f"line {rows.line_num}: it is no CSV: {error}"
    return "below the column names there must be rows of whole numbers"
