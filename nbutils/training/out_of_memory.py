"""Runs side by side on one device, with smaller micro-batches where its memory runs out."""

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path

import torch

from nbutils.accumulation.out_of_memory import retry_smaller
from nbutils.errors import InputError
from nbutils.training import checkpoint, setup
from nbutils.training.config import RunConfig
from nbutils.training.result import RunResult

Script = Generator[RunResult | None]
"""A training that gives None after every update, and its result at the end."""


def run_within_memory(
    attempt: Callable[[Sequence[RunConfig], list[int]], list[RunResult]],
    configs: Sequence[RunConfig],
    device: torch.device,
    on_oom: setup.OnOom,
    folder: Path | None,
) -> list[RunResult]:
    """Call `attempt(configs, micro_batch_sizes)`; where memory runs out, halve the largest.

    A checkpoint in `folder` may tell the size that an earlier call found.
    """
    sizes = [config.batch_size for config in configs]
    if folder and on_oom == "split":
        with suppress(*checkpoint.UNREADABLE):
            fitted = checkpoint.read(folder)["conditions"]["micro_batch"]
            sizes = [fitted if size % fitted == 0 else size for size in sizes]

    def shrink(error: Exception) -> None:
        size = max(sizes)
        config, half = configs[sizes.index(size)], size // 2
        shared = f", which {len(configs)} runs share" if len(configs) > 1 else ""
        problem = f"a batch of {size} images does not fit the memory of {device}{shared}"
        refused = f"batch_size = {config.batch_size}: {problem}"
        if size % 2:
            advice = "choose a smaller batch_size with more accumulation_steps"
            raise InputError(f"{refused}, and {size} cannot be halved evenly; {advice}") from error
        images = config.effective_batch_size
        smaller = f"batches of {half} and {images // half} accumulation steps"
        if on_oom == "stop":
            rest = f"which with norm = {config.norm!r} trains differently"
            if config.norm in setup.SPLITTABLE:
                rest = "or let on_oom = 'split' do so"
            advice = f"take {smaller}, the same {images} images per update, {rest}"
            raise InputError(f"{refused}; {advice}") from error
        warnings.warn(f"{problem}: the run starts again, with {smaller}", stacklevel=2)
        sizes[:] = [half if each == size else each for each in sizes]

    return retry_smaller(lambda: attempt(configs, sizes), shrink)


def take_turns(scripts: Sequence[Script], device: torch.device) -> list[RunResult]:
    """Advance each script in turn, until all have given their results.

    On a GPU each script has a stream of its own, so that the kernels of one run fill the gaps
    that those of the others leave.
    """
    results: dict[int, RunResult] = {}
    on_cuda = device.type == "cuda"
    while len(results) < len(scripts):
        for slot, script in enumerate(scripts):
            if slot not in results:
                with torch.cuda.stream(_stream(device, slot)) if on_cuda else nullcontext():
                    if result := next(script):
                        results[slot] = result
                        script.close()  # which frees its memory for the others
    return [results[slot] for slot in range(len(scripts))]


@cache
def _stream(device: torch.device, slot: int) -> torch.cuda.Stream:
    """One stream per slot for the life of the process: cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)
