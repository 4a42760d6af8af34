"""Speed against the usual DataLoader loop and against the machine's arithmetic: `make bench`.

Both loops train `DigitCNN` from the same start on the same images in the same order, with the
same dropout. First both must end at the same weights in float64. Then an epoch of one and an epoch
of the other are timed in turn, so that a change in the machine's speed affects both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from nbutils.accumulation.vectors import relative_difference
from nbutils.accumulation.window import windows_of_batches
from nbutils.analysis.outcomes import setting_name
from nbutils.data.dataset import Dataset
from nbutils.errors import InputError
from nbutils.machine import device_name, no_progress, processor_name, processors
from nbutils.paths import write_json
from nbutils.training.config import RunConfig
from nbutils.training.cuda_graph import record
from nbutils.training.model import DigitCNN
from nbutils.training.setup import deterministic, make_generators, make_model, resolve_device
from nbutils.training.train import train

WHOLE = (32, 64, 128, 256, 512, 1024)
SETTINGS = (*((size, 1) for size in WHOLE), (128, 8), (64, 16), (32, 32))
"""Batch size and accumulation steps: the settings of the study `batch-size`, whose pick takes its
times from here."""

VERIFIED_IMAGES = 2100
"""Images of the epoch in float64 after which the weights must be equal."""

TOLERANCE = 1e-8
"""Allowed difference of the weights in float64, relative to their size. A wrong update makes one
above 1e-4."""

Row = dict[str, Any]
FIGURES = ["baseline_seconds", "seconds", "ratio", "floor_ratio"]
"""What is measured in each row: their medians, see `_time`."""


def run_bench(
    data: Dataset,
    images: int = 13_500,
    repeats: int = 5,
    device: str = "auto",
    settings: Sequence[tuple[int, int]] = SETTINGS,
) -> Iterator[Row]:
    """Time `repeats` epochs of `images` images with both loops; one row of `_time` per setting.

    Raises:
        InputError: `images` or `repeats` is too small, or the device is not there.
        RuntimeError: The two loops end at different weights.
    """
    place, images = resolve_device(device), min(images, len(data.train.labels))
    largest = max(batch_size * steps for batch_size, steps in settings)
    if images < largest or repeats < 1:
        raise InputError(
            f"images = {images} and repeats = {repeats}, but there must be {largest} images or "
            f"more, and 1 repeat or more"
        )
    verified, timed = data.subset(max(VERIFIED_IMAGES, largest + 7)), data.subset(images)
    for batch_size, steps in tqdm(settings, unit="setting", disable=no_progress()):
        # A GPU holds the rate in float32, so the rate is one that float32 holds exactly.
        config = RunConfig(data.name, batch_size, steps, learning_rate=2**-10, device=device)
        differ = verify(replace(config, precision="float64"), verified, place)
        row = _time(config, timed, place, len(data.train.labels), repeats)
        yield row | {"weights_differ": differ}


class UsualLoop:
    """The loop of a tutorial: torchvision's MNIST and transforms, a DataLoader, eager layers."""

    def __init__(self, config: RunConfig, data: Dataset, device: torch.device, workers: int):
        from torchvision import datasets, transforms

        mean, std = data.pixel_mean_and_std
        digits = datasets.MNIST.__new__(datasets.MNIST)  # with these images, not read from files
        digits.data, digits.targets = data.train.images.squeeze(1), data.train.labels
        self.config, self.device = config, device
        to_tensor = [transforms.ToTensor()]
        if config.precision == "float64":  # ToTensor rounds to float32
            to_tensor = [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float64)]
        digits.transform = transforms.Compose([*to_tensor, transforms.Normalize((mean,), (std,))])
        digits.target_transform = None
        generators = make_generators(config.seed, device)
        self.loader = DataLoader(
            digits,
            config.batch_size,
            sampler=RandomSampler(digits, generator=generators["order"]),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        model = make_model(config, data, device, generators["dropout"])
        self.model = model.to(memory_format=torch.contiguous_format)
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.learning_rate)

    def epoch(self) -> None:
        """Train on every image once."""
        self.model.train()
        for window in windows_of_batches(self.loader, self.config.accumulation_steps):
            images_in_window = sum(len(labels) for _, labels in window)
            self.optimizer.zero_grad()
            for images, labels in window:
                images = images.to(self.device, non_blocking=True)
                labels = labels.to(self.device, non_blocking=True)
                loss = F.cross_entropy(self.model(images), labels)
                (loss * len(labels) / images_in_window).backward()
            self.optimizer.step()


def verify(config: RunConfig, data: Dataset, device: torch.device) -> float:
    """Largest relative difference of a weight tensor after one epoch of each loop.

    Raises:
        RuntimeError: It is above `TOLERANCE`.
    """
    with deterministic(device):
        usual = UsualLoop(config, data, device, workers=0)
        usual.epoch()
    ours = train(replace(config, epochs=1), data, progress=False)
    pairs = zip(ours.model.parameters(), usual.model.parameters(), strict=True)
    difference = max(relative_difference(*pair) for pair in pairs)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{setting_name(config.batch_size, config.accumulation_steps)}: after an epoch in "
            f"{config.precision} the weights of the two loops differ by {difference:.1e} of their "
            f"size; their times cannot be compared"
        )
    return difference


def _time(
    config: RunConfig, data: Dataset, device: torch.device, all_images: int, repeats: int
) -> Row:
    """Time one setting; all seconds are scaled to an epoch of `all_images`.

    In the row are the medians `baseline_seconds` of the usual loop, `seconds` of ours, `ratio` of
    neighbouring epochs, and `floor_ratio`, our seconds over the largest of `floors`; `spread` has
    the lowest and highest of these. `workers` are those of the DataLoader.
    """
    # One epoch each warms up, and finds the DataLoader's best number of processes.
    loops = [UsualLoop(config, data, device, workers) for workers in sorted({0, 1, processors()})]
    trials = [seconds_of(loop.epoch, device) for loop in loops]
    usual = loops[trials.index(min(trials))]
    del loops  # their processes end
    floors = floor_seconds(config, data, device, all_images)
    images, rows = len(data.train.labels), []
    for _ in range(repeats):
        ours = second_epoch(config, data) * all_images / images
        theirs = seconds_of(usual.epoch, device) * all_images / images
        rows.append((theirs, ours, theirs / ours, ours / max(floors.values())))
    timed = pd.DataFrame(rows, columns=FIGURES)
    cpu = f"cpu ({processor_name()}, {torch.get_num_threads()} threads)"
    return {
        "setting": setting_name(config.batch_size, config.accumulation_steps),
        "device": cpu if device.type == "cpu" else device_name(device),
        **{name: timed[name].median() for name in FIGURES},
        "floors": floors,
        "spread": {name: [timed[name].min(), timed[name].max()] for name in FIGURES},
        "repeats": repeats,
        "images": images,
        "workers": usual.loader.num_workers,
    }


def second_epoch(config: RunConfig, data: Dataset, **options: Any) -> float:
    """Seconds of training in the second epoch of a run, after one that warms up."""
    history = train(replace(config, epochs=2), data, progress=False, **options).history
    return history["seconds"].diff().iloc[-1]


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
        new = any(t.untyped_storage().data_ptr() not in seen for t in written)
        if func._schema.is_mutable or new:  # not a mere view
            self.kernels += 1
            self.bytes += sum(t.numel() * t.element_size() for t in (*read, *written))
        return result


def work_per_image(config: RunConfig, data: Dataset, device: torch.device) -> dict[str, float]:
    """Operations, bytes and kernels per image of a micro-batch, forward and backward."""
    images = data.normalised(data.train.images[: config.batch_size], device, torch.float32)
    model = DigitCNN(config.norm, config.dropout, len(data.class_names), config.model).to(device)
    with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
        model(images).sum().backward()
    return {
        "arithmetic": flops.get_total_flops() / len(images),
        "memory": traffic.bytes / len(images),
        "launch": traffic.kernels / len(images),
    }


def floor_seconds(
    config: RunConfig, data: Dataset, device: torch.device, images: int
) -> dict[str, float]:
    """Seconds for this number of images, if one kind of work alone took time.

    "arithmetic" is at the speed of a float32 matrix product. On a GPU "memory" is what kernels read
    and write, at the speed of a copy, and "launch" is at the pace of a graph of empty kernels.
    """

    def best(work: Callable[[], object]) -> float:
        return min(seconds_of(work, device) for _ in range(8))

    size, copied, kernels = 1536, 2**28, 1000
    matrix = torch.rand(size, size, device=device)
    per_unit = {"arithmetic": best(lambda: torch.mm(matrix, matrix)) / (2 * size**3)}
    if device.type == "cuda":
        source = torch.zeros(copied, dtype=torch.uint8, device=device)
        target, one = torch.empty_like(source), torch.zeros(1, device=device)

        def launches() -> None:
            for _ in range(kernels):
                one.add_(1)

        per_unit["memory"] = best(lambda: target.copy_(source)) / (2 * copied)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            per_unit["launch"] = best(record(launches, [])) / kernels
    work = work_per_image(config, data, device)
    return {name: work[name] * images * seconds for name, seconds in per_unit.items()}


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows for reading: median and range of each figure."""

    def text(row: Row, figure: str, digits: int) -> str:
        low, high = row["spread"][figure]
        return f"{row[figure]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    return pd.DataFrame(
        {
            "setting": [row["setting"] for row in rows],
            "usual loop, s/epoch": [text(row, "baseline_seconds", 1) for row in rows],
            "ours, s/epoch": [text(row, "seconds", 2) for row in rows],
            "times as fast": [text(row, "ratio", 1) for row in rows],
            "ours / floor": [f"{row['floor_ratio']:.2f}" for row in rows],
        }
    ).set_index("setting")


def save(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)
