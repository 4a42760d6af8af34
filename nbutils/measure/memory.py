"""Memory: budgets as people write them, what a device has free, and the peak of a process."""

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from nbutils.errors import InputError
from nbutils.machine import peak_resident_memory
from nbutils.training.setup import resolve_device


def parse_memory(text: str) -> int:
    """The bytes, at least 1, in a text such as "500MB", "2 GB" or "1.5GiB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B\s*", text.upper())
    number, letter, binary = match.groups() if match else ("0", "", "")
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(letter or " "))
    if size < 1:
        allowed = "a number > 0 and a unit, such as 500MB, 2GB or 1.5GiB"
        raise InputError(f"memory {text!r}: it must be {allowed}")
    return size


def format_memory(size: float) -> str:
    """Bytes as people read them, such as "1.25 GB"."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter("B", places=2)(size)


def resolve_budget(budget: int | str | None, device: str) -> int:
    """The bytes that a memory budget means, more than 0.

    None is what the device reports as free now; the limit of a container may be lower.
    """
    if isinstance(budget, str):
        return parse_memory(budget)
    if budget is None:
        place = resolve_device(device)
        if place.type == "cuda":
            return torch.cuda.mem_get_info(place)[0]
        return psutil.virtual_memory().available
    if not budget >= 1:
        raise InputError(f"memory_budget = {budget!r}, but it must be a number of bytes > 0")
    return int(budget)


def begin_peak(device: torch.device) -> int:
    """Give free memory back and start a new peak; returns the bytes held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    with suppress(OSError, AttributeError):  # only the GNU library has it
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # on Linux the peak starts anew, from the memory now resident
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: torch.device) -> int:
    """Bytes: the peak of torch's reserved memory on CUDA, else of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:  # on Linux this is more precise than getrusage
        status = Path("/proc/self/status").read_text()
    except OSError:
        return peak_resident_memory()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
