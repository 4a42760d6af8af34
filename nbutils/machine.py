"""What this machine and this process have: processors, memory, a terminal for progress bars."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def device_name(device: torch.device) -> str:
    """The name of a GPU; elsewhere the kind of device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def no_progress() -> bool:
    """Whether `$TQDM_DISABLE` is set, which tqdm's bar for notebooks ignores."""
    return bool(os.environ.get("TQDM_DISABLE"))


def peak_resident_memory() -> int:
    """The peak of the memory that this process has had resident so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware, for a record; `device` is the name of what computed."""
    import torch

    packages = ("torch", "torchvision", "numpy", "pandas", "papermill", "jupyterlab")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "device": device,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
