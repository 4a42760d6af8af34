"""What to do when a batch does not fit the memory: stop with advice, or split it."""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar, get_args

import torch

from nbutils.errors import InputError, suggest
from nbutils.training.config import RunConfig

OnOom = Literal["stop", "split"]
"""What a run does when a batch does not fit the memory of its device.

- "stop": it ends with a message that says what would fit.
- "split": it starts again with half the batch and twice the accumulation steps, which makes the
  same update, until the batch fits.
"""

NAMES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "unable to find an engine",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Texts of errors that mean too little memory: of CUDA, the CPU's allocator, cuDNN and cuBLAS."""

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device had too little memory, under any of its names."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in NAMES)


def check_on_oom(on_oom: str, config: RunConfig) -> None:
    """Refuse to split batches whose images influence each other.

    Raises:
        InputError: Such a batch would be split, or `on_oom` is unknown.
    """
    if on_oom not in get_args(OnOom):
        raise InputError(f"no on_oom {on_oom!r}; {suggest(on_oom, get_args(OnOom))}")
    if on_oom == "split" and not _may_split(config):
        raise InputError(
            f"on_oom = 'split', but norm = {config.norm!r} normalises each image with the others "
            f"of its batch, so a smaller batch trains differently; use norm = 'group' or 'none', "
            f"or on_oom = 'stop'"
        )


def split_until_it_fits(
    attempt: Callable[[list[int]], Result],
    configs: Sequence[RunConfig],
    sizes: Sequence[int],
    device: torch.device,
    on_oom: OnOom,
) -> Result:
    """Call `attempt(micro_batch_sizes)`; when memory runs out, halve the largest and try again.

    Args:
        attempt: Trains one run for each of the sizes, from the start.
        configs: The settings of the runs.
        sizes: Images in one pass of each run, at first.
        device: For the messages.
        on_oom: What to do when memory runs out.

    Raises:
        InputError: Memory ran out and the batch is not to be split or cannot be; the message
            says what to do.
    """
    sizes = list(sizes)
    while True:
        try:
            return attempt(sizes)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Frames of the failed attempt hold its tensors, and IPython keeps the last error.
            traceback.clear_frames(error.__traceback__)
            largest = max(sizes)
            for run, config in enumerate(configs):
                if sizes[run] == largest:
                    sizes[run] = _half(config, largest, device, len(configs), on_oom, error)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _half(
    config: RunConfig,
    size: int,
    device: torch.device,
    together: int,
    on_oom: OnOom,
    error: Exception,
) -> int:
    """Half of the micro-batch that did not fit; a warning says so."""
    half = size // 2
    steps = config.effective_batch_size // half if half else 0
    problem = f"a batch of {size} images does not fit the memory of {device}"
    if together > 1:
        problem += f", which {together} runs share"
    if size % 2:
        raise InputError(
            f"batch_size = {config.batch_size}: {problem}, and {size} cannot be halved evenly; "
            f"choose a smaller batch_size with more accumulation_steps"
        ) from error
    smaller = f"batches of {half} and {steps} accumulation steps"
    if on_oom == "stop":
        advice = f"take {smaller}, the same {config.effective_batch_size} images per update"
        if _may_split(config):
            advice += ", or let on_oom = 'split' do so"
        else:
            advice += f", which with norm = {config.norm!r} trains differently"
        raise InputError(f"batch_size = {config.batch_size}: {problem}; {advice}") from error
    warnings.warn(f"{problem}: the run starts again, with {smaller}", stacklevel=3)
    return half


def _may_split(config: RunConfig) -> bool:
    return config.norm in ("group", "none")
