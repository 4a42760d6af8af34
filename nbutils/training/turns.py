"""Runs side by side on one device, one update of each in turn, within its memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from nbutils.training import checkpoint, setup
from nbutils.training.config import RunConfig
from nbutils.training.out_of_memory import OnOom, split_until_it_fits
from nbutils.training.result import RunResult

Script = Generator[None, None, RunResult]
Start = Callable[[RunConfig, int, tqdm], Script]
"""Begins the script of a run, given its micro-batch size and the progress bar."""


def run_within_memory(
    start: Start,
    configs: Sequence[RunConfig],
    device: torch.device,
    on_oom: OnOom,
    folder: Path | None,
    hidden: bool,
) -> list[RunResult]:
    """Run the scripts of `configs` side by side, with smaller micro-batches where they must be.

    Args:
        start: Begins a script.
        configs: The settings of the runs.
        device: What they share.
        on_oom: What to do when a batch does not fit the memory.
        folder: Where a checkpoint may tell the micro-batch size that an earlier attempt found.
        hidden: Whether to show no progress bar.
    """
    sizes = [config.batch_size for config in configs]
    if folder and on_oom == "split" and (fitted := checkpoint.micro_batch(folder)):
        sizes = [fitted if size % fitted == 0 else size for size in sizes]

    def attempt(sizes: list[int]) -> list[RunResult]:
        with setup.deterministic(device), tqdm(total=0, unit="update", disable=hidden) as bar:
            runs = zip(configs, sizes, strict=True)
            return take_turns([start(config, size, bar) for config, size in runs], device)

    return split_until_it_fits(attempt, configs, sizes, device, on_oom)


def take_turns(scripts: Sequence[Script], device: torch.device) -> list[RunResult]:
    """Advance each script to its next `yield` in turn, until all have returned.

    On a GPU each script has a stream of its own, so that the kernels of one run fill the gaps
    that those of the others leave.

    Returns:
        What each script returned.
    """
    results: dict[int, RunResult] = {}
    while len(results) < len(scripts):
        for slot, script in enumerate(scripts):
            if slot in results:
                continue
            with stream_of(device, slot):
                try:
                    next(script)
                except StopIteration as end:
                    results[slot] = end.value
    return [results[slot] for slot in range(len(scripts))]


def stream_of(device: torch.device, slot: int) -> AbstractContextManager[Any]:
    """The context in which the run with this number works: on a GPU, on its stream."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(_cached_stream(device, slot))


@cache
def _cached_stream(device: torch.device, slot: int) -> torch.cuda.Stream:
    """One stream per slot for the life of the process: cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)
