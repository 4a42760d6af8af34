"""Image files of every usual kind, as the picture that a person sees: uint8, grey or RGB."""

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


class ImageFolder(list[tuple[Path, int]]):
    """The image files of a folder with one folder per class, and the number of their class.

    Hidden files and folders and `__MACOSX` are left out. Of a root that holds parts of a dataset,
    `train/` is taken, and `notes` tells so.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        what, folder = f"dataset = {str(folder)!r}", _within(folder)
        self.notes: list[str] = []
        words = {path: set(re.split(r"[^a-z]+", path.name.lower())) for path in _visible(folder)}
        train = [path for path in words if words[path] & TRAIN]
        parts = [path for path in words if words[path] & PARTS]
        if parts and (len(parts) == len(words) or len(parts) > len(train) > 0):
            names = ", ".join(path.name for path in words)
            if len(train) != 1 or not _visible(train[0]):
                raise InputError(
                    f"{what}: it holds {names}, which are parts of a dataset, not classes; give "
                    f"the folder that holds one folder per class"
                )
            self.notes.append(f"of {names} only {train[0].name} was read")
            folder = _within(train[0])
        self.classes = [path.name for path in _visible(folder)]
        if not self.classes:
            raise InputError(f"{what}: it must hold a folder of images for each class")
        kinds = Image.registered_extensions().items()
        endings = {ending for ending, kind in kinds if kind in Image.OPEN and kind not in NOT_READ}
        for number, name in enumerate(self.classes):
            paths = [path for path in _visible(folder / name, "**/*") if path.is_file()]
            images = [path for path in paths if path.suffix.lower() in endings]
            if not images:
                raise InputError(f"{what}: no image in {name}; each folder in it is a class")
            self += [(path, number) for path in images]


def _within(folder: Path) -> Path:
    """The folder, or the only one in it that has folders, as unpacking leaves it."""
    inner = _visible(folder)
    return _within(inner[0]) if len(inner) == 1 and _visible(inner[0]) else folder


def _visible(folder: Path, pattern: str = "*/") -> list[Path]:
    """What is not hidden in a folder; by default its folders."""
    found = sorted(folder.glob(pattern))
    return [p for p in found if not re.search(r"(^|/)(\.|__)", p.relative_to(folder).as_posix())]


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
    low = min([0.0, *(float(picture.min()) for picture in deep)])
    top = max((float(picture.max()) for picture in deep), default=low)
    scale = 255 / (top - low or 1.0)
    return [
        ((each - low) * scale).round().to(torch.uint8) if each.is_floating_point() else each
        for each in pictures
    ]
