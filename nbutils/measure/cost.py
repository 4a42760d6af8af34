"""What an update costs: peak memory and time, measured for any model on the device at hand.

A measurement makes the model afresh in a process of its own and trains it by whole updates, as a
reader's loop would: `accumulate_gradient` over the window's micro-batches, then one step of the
optimizer. The process ends with the measurement, so all memory is free again, also after an
error.

**Peak memory** is what training adds to a process that has torch and the data: weights,
gradients, the optimizer's state, activations, and what the allocator holds on to. Before it is
counted, a first model makes one update with one or two images and is thrown away, so that what
torch takes once a process is not counted. On the CPU it is resident memory: its peak over the
updates, less what was resident before the model was made. On CUDA it is the same of the memory
that torch's allocator has reserved; the CUDA context, some hundred megabytes, comes on top.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import math
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from nbutils.accumulation.window import accumulate_gradient
from nbutils.errors import InputError
from nbutils.machine import device_name, no_progress, peak_resident_memory
from nbutils.training.setup import resolve_device

Factory = Callable[[], nn.Module]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
"""Bytes in each unit that a memory budget may be given in."""

PASSES = 12
"""Forward/backward passes that a measurement makes at least. An allocator hands out freed memory
again, but not all of it: the peak grows over the first passes."""

TOLERANCE = 1 / 16
"""The largest batch size is searched to within this share of it."""


class OutOfMemory(RuntimeError):
    """A measurement needed more memory than there is."""


@dataclass(frozen=True)
class Cost:
    """What an update of `accumulation_steps` micro-batches of `batch_size` images costs.

    Attributes:
        batch_size: Images in a micro-batch.
        accumulation_steps: Micro-batches in an update.
        effective_batch_size: Images in an update.
        peak_memory: Bytes; the module's docstring says of what.
        seconds_per_update: Median over the timed updates.
        images_per_second: Images of an update over its seconds.
        device: "cpu", or the name of the GPU.
    """

    batch_size: int
    accumulation_steps: int
    effective_batch_size: int
    peak_memory: int
    seconds_per_update: float
    images_per_second: float
    device: str


@dataclass(frozen=True)
class LargestBatch:
    """The outcome of `largest_batch_size`.

    Attributes:
        batch_size: The largest micro-batch that was tried and fits.
        peak_memory: Bytes that it needed.
        limit: Bytes that it had to stay within: the budget less the margin.
        tried: Every size that was tried, in that order, and its peak memory; None where memory
            ran out.
    """

    batch_size: int
    peak_memory: int
    limit: int
    tried: dict[int, int | None]


def measure(
    factory: Factory | str,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    accumulation_steps: int = 1,
    *,
    device: str = "auto",
    optimizer: OptimizerFactory = torch.optim.Adam,
    updates: int = 3,
) -> Cost:
    """Measure updates of one setting, after one to warm up.

    The loss is the cross-entropy of the model's logits. There are at least `updates` updates
    and `PASSES` passes.

    Args:
        factory: Makes the model; or where to find what does, as "package.module:name". Like
            `optimizer`, it is pickled: a function or class of a module, or a
            `functools.partial` of one.
        images: What the model takes, shape (n, ...), n >= 1. Where a window needs more than n,
            they are used again.
        labels: Their classes, shape (n,), int64.
        batch_size: Images in a micro-batch, >= 1.
        accumulation_steps: Micro-batches in an update, >= 1.
        device: As in `RunConfig`, but not "mps".
        optimizer: Makes the optimizer from the parameters.
        updates: Timed updates at least, >= 1.

    Raises:
        InputError: An argument is not allowed or cannot be pickled, or the model cannot be
            made or trained; the message has the cause.
        OutOfMemory: It needs more memory than there is.
        RuntimeError: The measuring process ended in another way.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("accumulation_steps", accumulation_steps),
        ("updates", updates),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} = {value!r}, but it must be a whole number >= 1")
    if not 1 <= len(images) == len(labels):
        raise InputError(
            f"{len(images)} images and {len(labels)} labels, but there must be one label an image, "
            f"and 1 image or more"
        )
    place = resolve_device(device)
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"device = {device!r}, but cost is measured on 'cpu' and 'cuda' only")
    effective_batch_size = batch_size * accumulation_steps
    # A copy: pickle would take along the whole tensor that a slice is part of.
    needed = torch.arange(min(effective_batch_size, len(images)))
    job = _Job(
        make_model=_pickled("factory", find_factory(factory)),
        make_optimizer=_pickled("optimizer", optimizer),
        images=images[needed].detach().cpu(),
        labels=labels[needed].detach().cpu(),
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        updates=max(updates, math.ceil(PASSES / accumulation_steps)),
        device=str(place),
        threads=torch.get_num_threads(),
    )
    peak_memory, seconds = _in_own_process(job)
    return Cost(
        batch_size,
        accumulation_steps,
        effective_batch_size,
        peak_memory,
        seconds,
        effective_batch_size / seconds,
        device_name(place),
    )


def measure_grid(
    factory: Factory | str,
    images: Tensor,
    labels: Tensor,
    settings: Sequence[tuple[int, int]],
    *,
    repeats: int = 3,
    device: str = "auto",
    optimizer: OptimizerFactory = torch.optim.Adam,
    updates: int = 3,
) -> pd.DataFrame:
    """Measure several settings, all of them once, then all again, so that drift meets all alike.

    Args:
        factory: As in `measure`, like the arguments not named here.
        images: The images.
        labels: Their classes.
        settings: Pairs of batch size and accumulation steps.
        repeats: Measurements of each setting, >= 1.
        device: The device.
        optimizer: Makes the optimizer.
        updates: Timed updates of each measurement at least.

    Returns:
        A row a measurement: the fields of `Cost`, and `repeat`, from 0. A setting that needs more
        memory than there is has NaN for its memory and times.

    Raises:
        InputError: As `measure`.
    """
    if repeats < 1:
        raise InputError(f"repeats = {repeats!r}, but it must be a whole number >= 1")
    rows = []
    everything = list(itertools.product(range(repeats), settings))
    for repeat, (batch_size, steps) in tqdm(everything, unit="measurement", disable=no_progress()):
        try:
            cost = measure(
                factory,
                images,
                labels,
                batch_size,
                steps,
                device=device,
                optimizer=optimizer,
                updates=updates,
            )
        except OutOfMemory:
            sizes = {"batch_size": batch_size, "accumulation_steps": steps}
            rows.append(sizes | {"effective_batch_size": batch_size * steps, "repeat": repeat})
        else:
            rows.append(asdict(cost) | {"repeat": repeat})
    return pd.DataFrame(rows, columns=[*Cost.__annotations__, "repeat"])


def settings_up_to(batch_sizes: Iterable[int], images: int) -> list[tuple[int, int]]:
    """Pairs of batch size and accumulation steps (1, 2, 4, ...) with at most `images` an update."""
    return [
        (batch_size, 2**power)
        for batch_size in batch_sizes
        for power in range((images // batch_size).bit_length())
    ]


def largest_batch_size(
    factory: Factory | str,
    images: Tensor,
    labels: Tensor,
    *,
    memory_budget: int | None = None,
    margin: float = 0.1,
    largest: int | None = None,
    device: str = "auto",
    optimizer: OptimizerFactory = torch.optim.Adam,
) -> LargestBatch:
    """The largest micro-batch that can be trained within a memory budget, found by trying.

    A try makes updates of two micro-batches each. So at its peak there are weights, the
    optimizer's state, accumulated gradients and activations: what any number of accumulation
    steps needs. Sizes are doubled, but not beyond what a line through the tries so far says
    would fit; after one that does not fit, the gap is halved, to within `TOLERANCE`.

    Args:
        factory: As in `measure`, like the arguments not named here.
        images: The images.
        labels: Their classes.
        memory_budget: Bytes that training may add; by default what the device has free.
        margin: Share of the budget that is to stay free, in [0, 1).
        largest: Where the search ends, >= 1; by default at the number of images.
        device: The device.
        optimizer: Makes the optimizer.

    Raises:
        InputError: As `measure`; or not even one image fits: the message says what it needs.
        RuntimeError: As `measure`.
    """
    if not 0 <= margin < 1:
        raise InputError(f"margin = {margin!r}, but it must be a number in [0, 1)")
    largest = len(images) if largest is None else largest
    if largest < 1:
        raise InputError(f"largest = {largest!r}, but it must be a whole number >= 1")
    budget = free_memory(device) if memory_budget is None else memory_budget
    limit = int(budget * (1 - margin))
    tried: dict[int, int | None] = {}

    def fits(batch_size: int) -> bool:
        try:
            tried[batch_size] = measure(
                factory,
                images,
                labels,
                batch_size,
                2,
                device=device,
                optimizer=optimizer,
                updates=1,
            ).peak_memory
        except OutOfMemory:
            tried[batch_size] = None
        return _within(tried[batch_size], limit)

    if not fits(1):
        needs = tried[1]
        found = "more than there is" if needs is None else format_memory(needs)
        raise InputError(
            f"memory_budget = {format_memory(budget)}, of which {margin:.0%} is to stay free: too "
            f"little for one image, which needs {found}"
        )
    fitting, unfit = 1, largest + 1
    while unfit - fitting > max(1, fitting * TOLERANCE):
        size = _next_size(tried, fitting, unfit, limit)
        if fits(size):
            fitting = size
        else:
            unfit = size
    peak_memory = tried[fitting]
    assert peak_memory is not None
    return LargestBatch(fitting, peak_memory, limit, tried)


def _within(peak_memory: int | None, limit: int) -> bool:
    return peak_memory is not None and peak_memory <= limit


def _next_size(tried: dict[int, int | None], fitting: int, unfit: int, limit: int) -> int:
    """What to try between the largest size that fits and the smallest known not to."""
    if unfit in tried:
        return (fitting + unfit) // 2
    first, last = tried[1], tried[fitting]
    assert first is not None
    assert last is not None
    size = 2 * fitting
    if last > first:
        size = min(size, fitting + int((limit - last) * (fitting - 1) / (last - first)))
    step = max(1, int(fitting * TOLERANCE))
    return min(max(size, fitting + step), unfit - 1)


def free_memory(device: str = "auto") -> int:
    """Bytes that the device has free now, as it tells; a container's own limit may be lower.

    Raises:
        InputError: The device is not there.
    """
    place = resolve_device(device)
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    available = _told_by_linux("/proc/meminfo", "MemAvailable")
    if available is not None:
        return available
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parse_memory(text: str) -> int:
    """The bytes that a text like "500MB", "2 GB" or "1.5GiB" means.

    Raises:
        InputError: It is no such text, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not match or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise InputError(
            f"memory {text!r}: it must be a number > 0 and a unit, such as 500MB, 2GB or 1.5GiB"
        )
    return int(float(match[1]) * UNITS[match[2].upper()])


def format_memory(size: float) -> str:
    """So many bytes as people read them: "1.25 GB"."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter("B", places=2)(size)


def find_factory(factory: Factory | str) -> Factory:
    """What makes the model; where it is text, "package.module:name", that is imported.

    Raises:
        InputError: There is no such module or name, or it cannot be called.
    """
    if isinstance(factory, str):
        module, colon, name = factory.partition(":")
        if not colon or not module or not name:
            raise InputError(f"factory = {factory!r}, but it must read package.module:name")
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except Exception as error:  # whatever a module of the user's raises
            raise InputError(f"factory = {factory!r}: {type(error).__name__}: {error}") from error
    else:
        found = factory
    if not callable(found):
        raise InputError(f"factory = {factory!r}, but it must be callable and return the model")
    return found


def _pickled(name: str, maker: Callable[..., Any]) -> bytes:
    try:
        content = pickle.dumps(maker)
    except Exception as error:  # pickle raises many kinds
        raise InputError(
            f"{name} = {maker!r} cannot be sent to the measuring process ({error}); it must be a "
            f"function or class at the top of a module, or a functools.partial of one"
        ) from error
    if b"__main__" in content:
        raise InputError(
            f"{name} = {maker!r} is defined in a notebook or script, where the measuring process "
            f"cannot find it; put it into a module, a .py file, and import it"
        )
    return content


@dataclass(frozen=True)
class _Job:
    """What the measuring process is told."""

    make_model: bytes
    make_optimizer: bytes
    images: Tensor
    labels: Tensor
    batch_size: int
    accumulation_steps: int
    updates: int
    device: str
    threads: int


def _in_own_process(job: _Job) -> tuple[int, float]:
    """Peak memory and seconds per update, measured in a process that then ends."""
    context = _process_context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, pickle.dumps(job)), daemon=True)
    process.start()
    sender.close()
    try:
        outcome, content = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        # What Linux does to a process when memory runs out.
        if code == -signal.SIGKILL:
            text = "the measuring process was killed, probably for want of memory"
            raise OutOfMemory(text) from None
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
        raise RuntimeError(
            f"the measuring process ended {how} and told no result; its own message is in the "
            f'terminal. A script must measure under `if __name__ == "__main__":`'
        ) from None
    finally:
        receiver.close()
        process.kill()
        process.join()
    if outcome == "memory":
        raise OutOfMemory(content)
    if outcome == "error":
        raise InputError(f"the model cannot be trained: {content}")
    return content


def _process_context() -> Any:
    """Fresh processes; where it is safe, forked from a server that has imported torch, fast."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    # Every optimizer imports torch._dynamo when it is made, which takes seconds.
    multiprocessing.forkserver.set_forkserver_preload([__name__, "torch._dynamo"])
    return multiprocessing.get_context("forkserver")


def _report(sender: Connection, content: bytes) -> None:
    """The measuring process: do the job, tell how it went."""
    try:
        sender.send(("done", _do(pickle.loads(content))))
    except Exception as error:  # whatever the user's model raises
        # The CPU's allocator has no error class of its own.
        kinds = torch.OutOfMemoryError, MemoryError
        short = isinstance(error, kinds) or "can't allocate memory" in str(error)
        sender.send(("memory" if short else "error", f"{type(error).__name__}: {error}"))


def _do(job: _Job) -> tuple[int, float]:
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    images, labels = job.images.to(device), job.labels.to(device)
    make_model, make_optimizer = pickle.loads(job.make_model), pickle.loads(job.make_optimizer)
    images_per_update = job.batch_size * job.accumulation_steps
    order = torch.arange(images_per_update, device=device) % len(images)

    def train(window: Sequence[Tensor], updates: int) -> list[float]:
        """A new model's updates, and the seconds of each."""
        model = make_model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"the factory returned {type(model).__name__}, not a torch.nn.Module")
        model.to(device).train()
        optimizer = make_optimizer(model.parameters())

        def losses(batch: Tensor) -> Tensor:
            return F.cross_entropy(model(images[batch]), labels[batch], reduction="none")

        seconds = []
        for update in range(updates):
            _wait_for(device)
            start = time.perf_counter()
            optimizer.zero_grad()
            accumulate_gradient(model, window, losses, update=update)
            optimizer.step()
            _wait_for(device)
            seconds.append(time.perf_counter() - start)
        return seconds

    train([order[: min(2, job.batch_size)]], updates=1)
    before = _begin_peak(device)
    seconds = train(order.split(job.batch_size), 1 + job.updates)
    return max(0, _peak(device) - before), median(seconds[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _begin_peak(device: torch.device) -> int:
    """Give free memory back and forget the peak so far; the bytes that are held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    with suppress(OSError, AttributeError):  # only the GNU library has it
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # Linux: VmHWM begins again from the memory now resident
        Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    """Bytes: the peak of reserved memory on CUDA, else of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    high = _told_by_linux("/proc/self/status", "VmHWM")
    # Not on Linux the latter, which there also counts what the parent held when it forked.
    return peak_resident_memory() if high is None else high


def _told_by_linux(path: str, name: str) -> int | None:
    """Bytes that a file of Linux's `/proc` has under `name`; None on other systems."""
    try:
        found = re.search(rf"{name}:\s*(\d+) kB", Path(path).read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
