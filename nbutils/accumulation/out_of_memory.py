"""Too little memory: how to tell it, and how to go on with smaller micro-batches."""

import copy
import gc
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nbutils.accumulation.batch import Weight, couples_images
from nbutils.accumulation.distributed import Ranks

Result = TypeVar("Result")

NAMES = (  # in errors that mean too little memory: of CUDA, the CPU's allocator, cuDNN and cuBLAS
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "unable to find an engine",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

FITTING: MutableMapping[nn.Module, int] = WeakKeyDictionary()
"""Images in a micro-batch that fit the memory, for each model that was too large for its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device had too little memory, under any of its names."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in NAMES)


def retry_smaller(attempt: Callable[[], Result], shrink: Callable[[Exception], None]) -> Result:
    """Call `attempt` until memory suffices; `shrink(error)` makes the next smaller, or raises."""
    while True:
        try:
            return attempt()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Frames of the failed attempt hold its tensors, and IPython keeps the last error.
            traceback.clear_frames(error.__traceback__)
            shrink(error)
        gc.collect()
        torch.cuda.empty_cache()


def until_it_fits(
    attempt: Callable[[list[Any], Callable[[Any], Tensor]], Tensor],
    model: nn.Module,
    window: list[Any],
    losses: Callable[[Any], Tensor],
    weight: Weight | None,
) -> Tensor:
    """Call `attempt(micro_batches, losses)` with the window cut until it fits the memory.

    The size that fits is remembered for the model, and a change of it is warned of. Raises a
    `ValueError` if smaller micro-batches would change the update, or cannot be cut.
    """
    if Ranks(model).number > 1:
        raise ValueError('on_oom = "split" works in one process only: other ranks would wait')
    for name, layer in model.named_modules():
        if couples_images(layer):
            raise ValueError(
                f'on_oom = "split" would change the update: the BatchNorm layer {name!r} normalises'
                " each image with the others of its micro-batch; use GroupNorm, or freeze the layer"
            )
    before, earlier = FITTING.get(model), [(p, p.grad) for p in model.parameters()]
    model.zero_grad()

    def pieces() -> list[Any]:
        return [piece for each in window for piece in _cut(each, FITTING.get(model), weight)]

    def counted(piece: Any) -> Tensor:
        each = losses(piece)
        if not weight and model in FITTING and len(each) != images_in(piece):
            raise ValueError(
                f'on_oom = "split" cuts the rows of tensors, but there are {len(each)} losses for '
                f"{images_in(piece)} rows; give batches whose tensors have one row per image"
            )
        return each

    def from_the_start() -> Tensor:
        micro_batches = pieces()
        for parameter, gradient in earlier:  # which a failed attempt takes away
            parameter.grad = None if gradient is None else gradient.detach().clone()
        return attempt(micro_batches, counted)

    def shrink(error: Exception) -> None:
        largest = max(map(images_in, pieces()))
        if largest == 1:
            raise error
        FITTING[model] = largest // 2

    loss = retry_smaller(from_the_start, shrink)
    if FITTING.get(model) != before:
        warnings.warn(
            f"a micro-batch of {images_in(window[0])} images does not fit the memory, so it is cut "
            f"into pieces of at most {FITTING[model]}; the update stays the same, up to rounding",
            stacklevel=3,
        )
    return loss


def images_in(micro_batch: Any) -> int:
    """The number of images: the length of the first tensor or array in a micro-batch."""
    for length in _lengths(micro_batch):
        return length
    raise ValueError(
        f'on_oom = "split" cannot cut a micro-batch of type {type(micro_batch).__name__} without a '
        f"tensor that has one row per image"
    )


def _lengths(part: Any) -> Iterator[int]:
    if getattr(part, "shape", ()):
        yield int(part.shape[0])
    elif isinstance(part, (list, tuple, Mapping)):
        for each in part.values() if isinstance(part, Mapping) else part:
            yield from _lengths(each)


def _cut(micro_batch: Any, size: int | None, weight: Weight | None) -> list[Any]:
    """The micro-batch in pieces of at most `size` images each; None leaves it whole."""
    if size is None or (images := images_in(micro_batch)) <= size:
        return [micro_batch]
    if len(found := set(_lengths(micro_batch))) > 1:
        raise ValueError(
            f'on_oom = "split" cuts tensors that have one row per image, but those of a '
            f"micro-batch have unequal lengths: {sorted(found)}"
        )
    starts = range(0, images, size)
    pieces = [_rows(micro_batch, images, slice(start, start + size)) for start in starts]
    if weight:
        whole, *parts = (float(weight(part)) for part in (micro_batch, *pieces))
        if not math.isclose(whole, sum(parts), rel_tol=1e-6):
            raise ValueError(
                f'on_oom = "split": a micro-batch weighs {whole:g}, but its pieces {sum(parts):g}; '
                f"weight must count what is in the piece that it is given"
            )
    return pieces


def _rows(part: Any, images: int, rows: slice) -> Any:
    """These rows of everything in a micro-batch that has one per image."""
    plain = isinstance(part, (list, tuple)) and not hasattr(part, "_fields")
    texts = plain and len(part) == images and not any(_lengths(part))
    if getattr(part, "shape", ()) or texts:
        return part[rows]
    if isinstance(part, Mapping):
        piece: Any = copy.copy(part)
        for key, value in part.items():
            piece[key] = _rows(value, images, rows)
        return piece
    if isinstance(part, (list, tuple)):
        parts = [_rows(each, images, rows) for each in part]
        return type(part)(*parts) if hasattr(part, "_fields") else type(part)(parts)
    return part
