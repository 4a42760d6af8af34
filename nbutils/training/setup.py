"""What a run is set up with: the device, deterministic kernels, generators, the optimizer."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from nbutils.data.dataset import Dataset
from nbutils.errors import InputError, suggest
from nbutils.machine import device_name, processor_name
from nbutils.training.config import RunConfig
from nbutils.training.model import DigitCNN

OnOom = Literal["stop", "split"]
"""When a batch does not fit the memory, stop with advice, or start again with half the batch and
twice the accumulation steps, which makes the same update, until it fits."""

GRAPH_DEVICES = ("cuda",)  # where updates may be replays of CUDA graphs
SPLITTABLE = ("group", "none")  # norms with which images do not influence each other


def resolve_device(name: str) -> torch.device:
    """The device that `RunConfig.device` names; InputError if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", name):
        raise InputError(f"device = {name!r}; it must be auto, cpu, mps, cuda or cuda:N")
    device, mps = torch.device(name), int(torch.backends.mps.is_available())
    found = {"cpu": 1, "mps": mps, "cuda": torch.cuda.device_count()}[device.type]
    if (device.index or 0) >= found:
        what = f"{found or 'no'} {device.type.upper()} device{'s' if found else ''}"
        raise InputError(f"device = {name!r}, but this machine has {what}; use 'auto' or 'cpu'")
    return device


def shared_device(configs: Sequence[RunConfig]) -> torch.device:
    """The device that all of them name, as `resolve_device` finds it."""
    devices = {str(resolve_device(config.device)) for config in configs}
    if len(devices) > 1:
        named = ", ".join(sorted(devices))
        raise InputError(f"device = {named}, but runs that train together must share one")
    return torch.device(*devices)


def check(config: RunConfig, data: Dataset, on_oom: str) -> None:
    """Refuse, by an InputError, updates of more images than there are, and a wrong `on_oom`."""
    if on_oom not in get_args(OnOom):
        raise InputError(f"no on_oom {on_oom!r}; {suggest(on_oom, get_args(OnOom))}")
    if on_oom == "split" and config.norm not in SPLITTABLE:
        raise InputError(
            f"on_oom = 'split', but norm = {config.norm!r} normalises each image with its batch, "
            f"so a smaller one trains differently; use norm = 'group' or 'none', or on_oom = 'stop'"
        )
    images, both = len(data.train.labels), "effective_batch_size (batch_size * accumulation_steps)"
    for name, wanted in (("batch_size", config.batch_size), (both, config.effective_batch_size)):
        if wanted > images:
            raise InputError(
                f"{name} = {wanted}, but {data.name!r} has only {images} images to train on"
            )


def conditions(
    config: RunConfig, data: Dataset, device: torch.device, micro_batch: int, cuda_graph: bool
) -> dict[str, Any]:
    """All that decides a run's history to the last bit, as plain values."""
    return {
        **config.to_dict(),
        "images": data.fingerprint,
        "micro_batch": micro_batch,
        "cuda_graph": cuda_graph,
        "hardware": device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def generator_for(device: torch.device, seed: int, purpose: str) -> torch.Generator:
    """A generator on `device` whose numbers are independent of those for other purposes."""
    words = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0]) >> 1)


def make_generators(seed: int, device: torch.device) -> dict[str, torch.Generator]:
    """The generators of a run: for the order of the images (on the CPU), augmentation, dropout."""
    drawn = {name: generator_for(device, seed, name) for name in ("augment", "dropout")}
    return {"order": torch.Generator().manual_seed(seed), **drawn}


def make_model(
    config: RunConfig, data: Dataset, device: torch.device, dropout: torch.Generator
) -> DigitCNN:
    """The network of `config`, its weights drawn on the CPU: one start per seed on any device."""
    torch.manual_seed(config.seed)
    model = DigitCNN(config.norm, config.dropout, len(data.class_names), config.model)
    model.dropout.generator = dropout
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return model.to(device, dtype).to(memory_format=torch.channels_last)


def make_optimizer(config: RunConfig, model: nn.Module, in_graph: bool) -> torch.optim.Optimizer:
    """The optimizer of `config`; `in_graph` says whether a CUDA graph will hold its step."""
    device = next(model.parameters()).device
    rate: float | Tensor = config.learning_rate
    if device.type == "cuda" or in_graph:
        # A graph reads it from the device. So does the plain loop there, for the same updates.
        rate = torch.tensor(rate, dtype=torch.float32, device=device)
    common: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), capturable=in_graph, **common)
    return torch.optim.SGD(model.parameters(), momentum=config.momentum, **common)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic kernels; afterwards restore torch's settings and its own generators.

    On CUDA the count of peak memory begins here, and convolutions do not round float32 to TF32.
    """
    settings: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    on_cuda = device.type == "cuda"
    if on_cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.init()  # the next line fails where CUDA has not been used yet
        torch.cuda.reset_peak_memory_stats(device)
    cudnn = torch.backends.cudnn.flags
    exact = cudnn(enabled=True, allow_tf32=False) if on_cuda else nullcontext()
    with torch.random.fork_rng([device] if on_cuda else []), exact:
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False  # else every torch.empty is filled
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
            settings.fill_uninitialized_memory = fill
