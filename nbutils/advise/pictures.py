"""Image files of every usual kind, as the picture that a person sees: uint8, grey or RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nbutils.errors import InputError

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
"""Names of folders, in small letters, that are parts of a dataset rather than classes."""


class ImageFolder:
    """Paths and classes; the pictures are read as they are asked for.

    Args:
        classes: Each class's name and its files.
    """

    def __init__(self, classes: dict[str, list[Path]]) -> None:
        self.classes = list(classes)
        self._files = [(path, n) for n, paths in enumerate(classes.values()) for path in paths]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self._files[index]
        try:
            with Image.open(path) as picture:
                return read_picture(picture), label
        except Exception as error:  # a damaged file raises many kinds
            raise InputError(f"{path}: no picture: {type(error).__name__}: {error}") from error


def image_folder(folder: Path) -> tuple[ImageFolder, list[str]]:
    """The images of a folder that holds one folder per class, and what to tell about it.

    Hidden files and folders and `__MACOSX` are left out. Of a root that holds parts of a dataset,
    `train/` is read.

    Raises:
        InputError: There are no classes, or one without images.
    """
    parts = {path.name.lower(): path for path in _folders(folder)}
    if parts and set(parts) <= SPLITS:
        train = parts.get("train") or parts.get("training")
        if train is None or not _folders(train):
            raise InputError(
                f"dataset = {str(folder)!r}: it holds {', '.join(sorted(parts))}, which are parts "
                f"of a dataset, not classes; give the folder that holds one folder per class"
            )
        others = ", ".join(sorted(set(parts) - {train.name.lower()}))
        images, notes = image_folder(train)
        return images, [
            *notes,
            f"only {train.name}/ was read, not {others or 'anything beside it'}",
        ]
    classes = {path.name: _pictures(path) for path in _folders(folder)}
    empty = [name for name, files in classes.items() if not files]
    if empty or not classes:
        found = f"no image in {', '.join(empty[:3])}" if empty else "no folder in it"
        raise InputError(
            f"dataset = {str(folder)!r}: {found}; it must hold a folder of images for each class"
        )
    return ImageFolder(classes), []


def _folders(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name != "__MACOSX"
    )


def _pictures(folder: Path) -> list[Path]:
    from PIL import Image

    endings = Image.registered_extensions()
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_picture(picture: Any) -> Tensor:
    """A PIL image as a person sees it, uint8, shape (1 or 3, height, width).

    It is turned as its camera says; what is transparent lies on white; 16 bits and floats are
    scaled to 8 bits.
    """
    from PIL import Image, ImageOps

    if not isinstance(picture, Image.Image):
        raise TypeError(f"the image is {type(picture).__name__}")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        return _scaled(np.array(picture, dtype=np.float64))
    if picture.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in picture.info:
        grey = picture.mode in ("L", "LA", "La")
        over = Image.new("RGBA", picture.size, "white")
        over.alpha_composite(picture.convert("RGBA"))
        picture = over.convert("L" if grey else "RGB")
    picture = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    values = np.array(picture)
    return torch.from_numpy(values[None] if values.ndim == 2 else values.transpose(2, 0, 1).copy())


def _scaled(values: np.ndarray) -> Tensor:
    """Grey values from 0 to 1, to 255, or to 65535, whichever holds the largest, to 8 bits."""
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    top = next((top for top in (1.0, 255.0, 65535.0) if values.max() <= top), values.max())
    return torch.from_numpy((values.clip(0) / top * 255).round().astype(np.uint8))[None]
