"""What this machine and process have: processors, memory, a place to show progress."""

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
    """Processors that this process may use; not every system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def device_name(device: torch.device) -> str:
    """The name of a GPU; elsewhere the kind of device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def no_progress() -> bool:
    """Whether `$TQDM_DISABLE` asks for no progress: tqdm's bar for notebooks overlooks it."""
    return bool(os.environ.get("TQDM_DISABLE"))


def peak_resident_memory() -> int:
    """Bytes: the most that this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


PACKAGES = ("torch", "torchvision", "numpy", "pandas", "papermill", "jupyterlab")
"""Packages whose versions a record keeps."""


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware, for a record; `device` names what did the computing."""
    import torch

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "device": device,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
