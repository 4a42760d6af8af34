"""What an update of any model costs: its peak memory and time, measured in a process of its own.

**Peak memory** is what training adds to a process that has torch and the data: weights, gradients,
the optimizer's state, activations, and what the allocator keeps. What torch takes once per process
does not count: a first model makes an update before. On the CPU it is resident memory, on CUDA what
torch's allocator has reserved; the CUDA context, some hundred megabytes, comes on top.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from tqdm.auto import tqdm

from nbutils.accumulation import batch
from nbutils.accumulation.window import accumulate_gradient
from nbutils.errors import InputError
from nbutils.machine import device_name, no_progress
from nbutils.measure.memory import begin_peak, peak
from nbutils.measure.process import Factory, OutOfMemory, find_model, in_own_process
from nbutils.training.setup import resolve_device

Losses = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]
Update = Callable[[Sequence[Tensor]], Any]  # from a window of index tensors

PASSES = 12  # the fewest in a measurement: over the first ones the allocator's peak grows


@dataclass(frozen=True)
class Cost:
    """The cost of an update of `accumulation_steps` micro-batches of `batch_size` images."""

    batch_size: int
    accumulation_steps: int
    effective_batch_size: int
    peak_memory: int  # bytes; the module's docstring says of what
    seconds_per_update: float  # the median over the timed updates
    images_per_second: float
    device: str  # "cpu", or the name of the GPU


def cross_entropies(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The cross-entropy of each image, shape (n,)."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def measure(
    factory: Factory | str,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    accumulation_steps: int = 1,
    *,
    updates: int = 3,
    device: str = "auto",
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = torch.optim.Adam,
    losses: Losses = cross_entropies,
) -> Cost:
    """Measure updates of one setting of a model that takes images, after one to warm up.

    Args:
        factory: Makes the model: a function or class, or where it is, as "package.module:name".
        images, labels: Shape (n, ...), and (n,), int64. A larger window uses them again.
        updates: The least number of timed updates. There are also at least `PASSES` passes.
        device: As in `RunConfig`, but not "mps".
        losses: `losses(model, (images, labels))` returns the loss of each image, not reduced.

    Raises:
        InputError, OutOfMemory: An argument is not allowed, or as in `in_own_process`.
    """
    make = find_model(factory)
    check_counts(batch_size=batch_size, accumulation_steps=accumulation_steps, images=len(images))
    if len(images) != len(labels):
        raise InputError(f"there are {len(images)} images, but {len(labels)} labels")
    # Copies: pickling a slice takes along the whole tensor.
    chosen = torch.arange(min(batch_size * accumulation_steps, len(images)))
    data = [torch.as_tensor(each)[chosen].detach().cpu() for each in (images, labels)]

    def prepare(device: torch.device) -> Callable[[], Update]:
        images, labels = (tensor.to(device) for tensor in data)
        first = iter([True])  # only one update is checked, since a check waits for a GPU

        def start() -> Update:
            model = make()
            if not isinstance(model, nn.Module):
                raise TypeError(f"factory returned {type(model).__name__}, not a torch.nn.Module")
            model.to(device)
            if any(isinstance(layer, LazyModuleMixin) for layer in model.modules()):
                with torch.no_grad():
                    losses(model.eval(), (images[:2], labels[:2]))
            stepped = optimizer(model.train().parameters())

            def of_part(part: Tensor) -> Tensor:
                return losses(model, (images[part], labels[part]))

            def update(window: Sequence[Tensor]) -> None:
                stepped.zero_grad()
                accumulate_gradient(model, window, of_part, check_finite=next(first, False))
                stepped.step()

            return update

        return start

    sizes = len(chosen), batch_size, accumulation_steps
    return measure_updates(prepare, *sizes, device=device, updates=updates)


def check_counts(**counts: Any) -> None:
    """Refuse by name what is no whole number of at least 1."""
    try:
        batch.check_counts(**counts)
    except ValueError as error:
        raise InputError(str(error)) from None


def measure_updates(
    prepare: Callable[[torch.device], Callable[[], Update]],
    examples: int,
    batch_size: int,
    accumulation_steps: int = 1,
    *,
    device: str = "auto",
    updates: int = 3,
) -> Cost:
    """Measure updates of any training; all else is as in `measure`.

    `prepare(device)` loads what does not count as memory of training, such as the data, and returns
    a function that starts a new training: it returns what makes an update from a window of index
    tensors, which are in [0, examples).
    """
    check_counts(batch_size=batch_size, accumulation_steps=accumulation_steps, updates=updates)
    resolved = resolve_device(device)
    if resolved.type == "mps":
        raise InputError(f"device = {device!r}, but cost is measured on 'cpu' and 'cuda' only")
    size, threads = batch_size * accumulation_steps, torch.get_num_threads()
    wait = torch.cuda.synchronize if resolved.type == "cuda" else lambda _: None

    def work() -> tuple[int, float]:
        torch.set_num_threads(threads)
        start = prepare(resolved)
        window = (torch.arange(size, device=resolved) % examples).split(batch_size)
        start()([window[0][:2]])
        before = begin_peak(resolved)
        update, seconds = start(), []
        for _ in range(1 + max(updates, math.ceil(PASSES / accumulation_steps))):
            wait(resolved)
            begun = time.perf_counter()
            update(window)
            wait(resolved)
            seconds.append(time.perf_counter() - begun)
        return max(0, peak(resolved) - before), median(seconds[1:])

    memory, seconds = in_own_process(work)
    name = device_name(resolved)
    return Cost(batch_size, accumulation_steps, size, memory, seconds, size / seconds, name)


def measure_grid(
    factory: Factory | str,
    images: Tensor,
    labels: Tensor,
    settings: Sequence[tuple[int, int]],
    *,
    repeats: int = 3,
    **options: Any,
) -> pd.DataFrame:
    """Measure pairs of batch size and accumulation steps in turn, so that drift affects all alike.

    One row per measurement: the fields of `Cost`, and `repeat`, from 0. Memory and times are NaN
    where memory ran out. The other arguments are as in `measure`.
    """
    rows = []
    everything = [(repeat, *setting) for repeat in range(repeats) for setting in settings]
    for repeat, size, steps in tqdm(everything, unit="measurement", disable=no_progress()):
        row = {
            "batch_size": size,
            "accumulation_steps": steps,
            "effective_batch_size": size * steps,
        }
        with suppress(OutOfMemory):
            row = asdict(measure(factory, images, labels, size, steps, **options))
        rows.append(row | {"repeat": repeat})
    return pd.DataFrame(rows, columns=[*Cost.__annotations__, "repeat"])


def settings_up_to(batch_sizes: Iterable[int], images: int) -> list[tuple[int, int]]:
    """Pairs of batch size and accumulation steps 1, 2, 4, ..., of at most `images` per update."""
    powers = [2**power for power in range(images.bit_length())]
    return [(size, steps) for size in batch_sizes for steps in powers if size * steps <= images]
