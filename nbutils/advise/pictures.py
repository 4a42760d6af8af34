"""Image files of every usual kind, as the picture that a person sees: uint8, grey or RGB."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nbutils.errors import InputError

TRAIN = {"train", "training", "trainset"}
PARTS = TRAIN | {"val", "valid", "validation", "dev", "test", "testing", "testset", "eval"}
PARTS |= {"evaluation", "holdout", "unlabeled", "unlabelled", "fold"}
"""A folder whose name has one of these words, such as `seg_train` or `test1`, may be a part of a
dataset rather than a class."""

NOT_READ = {"MPEG", "HDF5", "GRIB", "BUFR"}  # formats of which Pillow knows the name alone


class ImageFolder:
    """The pictures of a folder with one folder per class; they are read as they are asked for.

    Hidden files and folders and `__MACOSX` are left out. Of a root that holds parts of a dataset,
    `train/` is read, and `notes` tells so.
    """

    def __init__(self, folder: Path) -> None:
        what = f"dataset = {str(folder)!r}"
        self.notes: tuple[str, ...] = ()
        folder = _within(folder)
        parts = {path: _words(path) & PARTS for path in _folders(folder)}
        train = [path for path, words in parts.items() if words & TRAIN]
        is_root = len(train) < sum(map(bool, parts.values()))  # a part besides those to train on
        if parts and ((is_root and train) or all(parts.values())):
            names = ", ".join(path.name for path in parts)
            if len(train) != 1 or not _folders(train[0]):
                raise InputError(
                    f"{what}: it holds {names}, which are parts of a dataset, not classes; give "
                    f"the folder that holds one folder per class"
                )
            self.notes = (f"of {names} only {train[0].name} was read",)
            folder = _within(train[0])
        self.classes = [path.name for path in _folders(folder)]
        self._files: list[tuple[Path, int]] = []
        kinds = Image.registered_extensions().items()
        endings = {ending for ending, kind in kinds if kind in Image.OPEN and kind not in NOT_READ}
        for number, name in enumerate(self.classes):
            paths = [path for path in _visible(folder / name, "**/*") if path.is_file()]
            of_class = [(path, number) for path in paths if path.suffix.lower() in endings]
            if not of_class:
                raise InputError(f"{what}: no image in {name}; each folder in it is a class")
            self._files += of_class
        if not self.classes:
            raise InputError(f"{what}: it must hold a folder of images for each class")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self._files[index]
        try:
            with Image.open(path) as picture:
                return read_picture(picture), label
        except Exception as error:  # a damaged file raises many kinds
            raise InputError(f"{path}: no picture: {type(error).__name__}: {error}") from error


def _within(folder: Path) -> Path:
    """The folder, or the only one in it that has folders, as unpacking leaves it."""
    inner = _folders(folder)
    return _within(inner[0]) if len(inner) == 1 and _folders(inner[0]) else folder


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.name.lower()))


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder, "*") if path.is_dir()]


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        path
        for path in folder.glob(pattern)
        if not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    )


def read_picture(picture: Any) -> Tensor:
    """A PIL image as a person sees it, uint8, shape (1 or 3, height, width).

    It is turned as its camera says; what is transparent lies on white. Grey values of 16 bits or
    floats stay as they are, float32, for `as_bytes`.
    """
    if not isinstance(picture, Image.Image):
        raise TypeError(f"the image is {type(picture).__name__}")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.array(picture, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        return torch.from_numpy(values)[None]
    grey = picture.mode in ("1", "L", "LA")
    if picture.has_transparency_data:
        over = Image.new("RGBA", picture.size, "white")
        over.alpha_composite(picture.convert("RGBA"))
        picture = over
    picture = picture.convert("L" if grey else "RGB")
    return torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1).contiguous()


def as_bytes(pictures: Sequence[Tensor]) -> list[Tensor]:
    """Pictures of `read_picture` as uint8: those of float32 on one scale, so they can be compared.

    It reaches from 0, or the least value if that is negative, to the largest of all.
    """
    deep = [picture for picture in pictures if picture.is_floating_point()]
    if not deep:
        return [*pictures]
    low = min(0.0, *(float(picture.min()) for picture in deep))
    top = max(float(picture.max()) for picture in deep)
    scale = 255 / (top - low or 1.0)
    return [
        ((picture - low) * scale).round().to(torch.uint8)
        if picture.is_floating_point()
        else picture
        for picture in pictures
    ]
