"""Runs side by side on one device, with smaller micro-batches where its memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch
from tqdm.auto import tqdm

from nbutils.accumulation.out_of_memory import retry_smaller
from nbutils.errors import InputError
from nbutils.training import checkpoint, setup
from nbutils.training.config import RunConfig
from nbutils.training.result import RunResult

Script = Generator[None, None, RunResult]


def run_within_memory(
    start: Callable[[RunConfig, int, tqdm], Script],
    configs: Sequence[RunConfig],
    device: torch.device,
    on_oom: setup.OnOom,
    folder: Path | None,
    hidden: bool,
) -> list[RunResult]:
    """Run the scripts of `configs` side by side; where memory runs out, halve the largest batches.

    `start(config, micro_batch_size, bar)` begins a script. A checkpoint in `folder` may tell the
    size that an earlier attempt found; `hidden` shows no progress bar.
    """
    sizes = [config.batch_size for config in configs]
    if folder and on_oom == "split" and (fitted := checkpoint.micro_batch(folder)):
        sizes = [fitted if size % fitted == 0 else size for size in sizes]

    def attempt() -> list[RunResult]:
        with setup.deterministic(device), tqdm(total=0, unit="update", disable=hidden) as bar:
            runs = zip(configs, sizes, strict=True)
            return take_turns([start(config, size, bar) for config, size in runs], device)

    def shrink(error: Exception) -> None:
        largest = max(sizes)
        problem = f"a batch of {largest} images does not fit the memory of {device}"
        if len(configs) > 1:
            problem += f", which {len(configs)} runs share"
        for run, config in enumerate(configs):
            if sizes[run] == largest:
                sizes[run] = _half(config, largest, problem, on_oom, error)

    return retry_smaller(attempt, shrink)


def _half(config: RunConfig, size: int, problem: str, on_oom: setup.OnOom, error: Exception) -> int:
    """Half of the micro-batch that did not fit, and a warning; InputError where that may not be."""
    half, asked = size // 2, f"batch_size = {config.batch_size}: {problem}"
    if size % 2:
        advice = "choose a smaller batch_size with more accumulation_steps"
        raise InputError(f"{asked}, and {size} cannot be halved evenly; {advice}") from error
    smaller = f"batches of {half} and {config.effective_batch_size // half} accumulation steps"
    if on_oom == "stop":
        advice = f"take {smaller}, the same {config.effective_batch_size} images per update"
        if config.norm in setup.SPLITTABLE:
            advice += ", or let on_oom = 'split' do so"
        else:
            advice += f", which with norm = {config.norm!r} trains differently"
        raise InputError(f"{asked}; {advice}") from error
    warnings.warn(f"{problem}: the run starts again, with {smaller}", stacklevel=3)
    return half


def take_turns(scripts: Sequence[Script], device: torch.device) -> list[RunResult]:
    """Advance each script to its next `yield` in turn, until all have returned their results.

    On a GPU each script has a stream of its own, so that the kernels of one run fill the gaps
    that those of the others leave.
    """
    results: dict[int, RunResult] = {}
    on_cuda = device.type == "cuda"
    while len(results) < len(scripts):
        for slot, script in enumerate(scripts):
            if slot in results:
                continue
            with torch.cuda.stream(_stream(device, slot)) if on_cuda else nullcontext():
                try:
                    next(script)
                except StopIteration as end:
                    results[slot] = end.value
    return [results[slot] for slot in range(len(scripts))]


@cache
def _stream(device: torch.device, slot: int) -> torch.cuda.Stream:
    """One stream per slot for the life of the process: cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)
