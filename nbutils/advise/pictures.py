"""Image files of every usual kind, as the picture that a person sees: uint8, grey or RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nbutils.errors import InputError

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
"""Folders of these names, in any letters, are parts of a dataset rather than classes."""


class ImageFolder:
    """The pictures of a folder with one folder per class; they are read as they are asked for.

    Hidden files and folders and `__MACOSX` are left out. Of a root that holds parts of a dataset,
    `train/` is read, and `notes` tells so.
    """

    def __init__(self, folder: Path) -> None:
        what = f"dataset = {str(folder)!r}"
        self.notes: tuple[str, ...] = ()
        parts = {path.name.lower(): path for path in _folders(folder)}
        if parts and set(parts) <= SPLITS:
            train = parts.get("train", parts.get("training"))
            if train is None or not _folders(train):
                raise InputError(
                    f"{what}: it holds {', '.join(sorted(parts))}, which are parts of a dataset, "
                    f"not classes; give the folder that holds one folder per class"
                )
            others = ", ".join(sorted(set(parts) - {train.name.lower()}))
            self.notes = (f"only {train.name}/ was read, not {others or 'anything beside it'}",)
            folder = train
        self.classes = [path.name for path in _folders(folder)]
        self._files: list[tuple[Path, int]] = []
        endings = Image.registered_extensions()
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


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder, "*") if path.is_dir()]


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        path
        for path in folder.glob(pattern)
        if not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
    )


def read_picture(picture: Any) -> Tensor:
    """A PIL image as a person sees it, uint8, shape (1 or 3, height, width).

    It is turned as its camera says; what is transparent lies on white. Grey values of 16 bits or
    floats are scaled: from 0 to 1, to 255 or to 65535, whichever holds the largest.
    """
    if not isinstance(picture, Image.Image):
        raise TypeError(f"the image is {type(picture).__name__}")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.array(picture, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        top = next((top for top in (1.0, 255.0, 65535.0) if values.max() <= top), values.max())
        return torch.from_numpy((values.clip(0) / top * 255).round().astype(np.uint8))[None]
    grey = picture.mode in ("1", "L", "LA", "La")
    if picture.has_transparency_data:
        over = Image.new("RGBA", picture.size, "white")
        over.alpha_composite(picture.convert("RGBA"))
        picture = over
    picture = picture.convert("L" if grey else "RGB")
    return torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1).contiguous()
