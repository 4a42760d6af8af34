"""The least time that an epoch can take on a machine, from what its kernels do."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nbutils.data.dataset import Dataset
from nbutils.training.config import RunConfig
from nbutils.training.cuda_graph import record
from nbutils.training.model import DigitCNN


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, on a GPU until it has finished there."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class _Traffic(TorchDispatchMode):
    """Counts the kernels that run inside it, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        seen = {t.untyped_storage().data_ptr() for t in read}
        if func._schema.is_mutable or any(
            t.untyped_storage().data_ptr() not in seen for t in written
        ):  # not a mere view
            self.kernels += 1
            self.bytes += sum(t.numel() * t.element_size() for t in (*read, *written))
        return result


def work_per_image(config: RunConfig, data: Dataset, device: torch.device) -> dict[str, float]:
    """Operations, bytes and kernels per image of a micro-batch, forward and backward."""
    images = data.normalised(data.train.images[: config.batch_size], device, torch.float32)
    model = DigitCNN(config.norm, config.dropout, len(data.class_names), config.model).to(device)
    with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
        model(images).sum().backward()
    totals = {
        "arithmetic": flops.get_total_flops(),
        "memory": traffic.bytes,
        "launch": traffic.kernels,
    }
    return {name: total / len(images) for name, total in totals.items()}


def floor_seconds(
    config: RunConfig, data: Dataset, device: torch.device, images: int
) -> dict[str, float]:
    """Seconds for this number of images, if one kind of work alone took time.

    Returns:
        "arithmetic" and, on a GPU, "memory" and "launch"; see `nbutils.report.bench.Row`.
    """
    seconds = {"arithmetic": _product_seconds_per_operation(device)}
    if device.type == "cuda":
        seconds["memory"] = _copy_seconds_per_byte(device)
        seconds["launch"] = _graph_seconds_per_kernel(device)
    work = work_per_image(config, data, device)
    return {name: work[name] * images * per_unit for name, per_unit in seconds.items()}


def _product_seconds_per_operation(device: torch.device, size: int = 1536) -> float:
    a = torch.rand(size, size, device=device)
    return _best(lambda: torch.mm(a, a), device) / (2 * size**3)


def _copy_seconds_per_byte(device: torch.device, size: int = 2**28) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _best(lambda: target.copy_(source), device) / (2 * size)


def _graph_seconds_per_kernel(device: torch.device, kernels: int = 1000) -> float:
    one = torch.zeros(1, device=device)

    def body() -> None:
        for _ in range(kernels):
            one.add_(1)

    with torch.cuda.stream(torch.cuda.Stream(device)):
        return _best(record(body, []), device) / kernels


def _best(work: Callable[[], object], device: torch.device) -> float:
    return min(seconds_of(work, device) for _ in range(8))
