"""Speed against the usual DataLoader loop and against the machine's arithmetic: `make bench`.

Both loops train `DigitCNN` from the same start on the same images in the same order, with the
same dropout. First both must end at the same weights in float64. Then an epoch of one and an epoch
of the other are timed in turn, so that a change in the machine's speed affects both.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
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
from nbutils.studies.study import load_study
from nbutils.training.config import RunConfig
from nbutils.training.model import DigitCNN
from nbutils.training.setup import deterministic, make_generators, make_model, resolve_device
from nbutils.training.train import train

VERIFIED_IMAGES = 2100
"""Images of the epoch in float64 after which the weights must be equal."""

TOLERANCE = 1e-8
"""Allowed difference of the weights in float64, relative to their size. A wrong update makes one
above 1e-4."""

Row = dict[str, Any]
FIGURES = {
    "baseline_seconds": "usual loop, s/epoch",
    "seconds": "ours, s/epoch",
    "ratio": "times as fast",
    "floor_ratio": "ours / floor",
}
"""What is measured, and its heading."""


def run_bench(
    data: Dataset,
    images: int = 13_500,
    repeats: int = 5,
    device: str = "auto",
    settings: Sequence[tuple[int, int]] = (),
) -> Iterator[Row]:
    """Time `repeats` epochs of `images` images with both loops.

    Settings are batch sizes and accumulation steps; by default those of the study `batch-size`,
    whose pick takes its times from here.

    Yields:
        The medians of `FIGURES`, in `spread` their lowest and highest values, and the conditions.
        Seconds are scaled to an epoch of all images; `ratio` is that of epochs in turn.

    Raises:
        InputError: `images` or `repeats` is too small, or the device is not there.
        RuntimeError: The two loops end at different weights.
    """
    place, images = resolve_device(device), min(images, len(data.train.labels))
    planned = [run.config for run in load_study("batch-size").runs]
    settings = settings or [(each.batch_size, each.accumulation_steps) for each in planned]
    largest = max(batch_size * steps for batch_size, steps in settings)
    if images < largest or repeats < 1:
        raise InputError(
            f"images = {images} and repeats = {repeats}, but there must be {largest} images or "
            f"more, and 1 repeat or more"
        )
    verified, timed = data.subset(max(VERIFIED_IMAGES, largest + 7)), data.subset(images)
    scale = len(data.train.labels) / images
    cpu = f"cpu ({processor_name()}, {torch.get_num_threads()} threads)"
    for batch_size, steps in tqdm(settings, unit="setting", disable=no_progress()):
        # A GPU holds the rate in float32, so the rate is one that float32 holds exactly.
        config = RunConfig(data.name, batch_size, steps, learning_rate=2**-10, device=device)
        difference = verify(replace(config, precision="float64"), verified, place)
        # One epoch each warms up, and finds the DataLoader's best number of processes.
        choices = sorted({0, 1, processors()})
        loops = [usual_loop(config, timed, place, workers)[1] for workers in choices]
        usual = min(loops, key=lambda epoch: seconds_of(epoch, place))
        del loops  # the processes of the others end
        measured = [(seconds_of(usual, place), second_epoch(config, timed)) for _ in range(repeats)]
        figures = pd.DataFrame(measured, columns=["baseline_seconds", "seconds"]) * scale
        figures["ratio"] = figures["baseline_seconds"] / figures["seconds"]
        figures["floor_ratio"] = figures["seconds"] / floor_seconds(config, data, place)
        yield {
            "setting": setting_name(batch_size, steps),
            "device": cpu if place.type == "cpu" else device_name(place),
            **{str(name): median for name, median in figures.median().items()},
            "spread": figures.agg(["min", "max"]).to_dict("list"),
            "repeats": repeats,
            "images": images,
            "weights_differ": difference,
        }


def usual_loop(
    config: RunConfig, data: Dataset, device: torch.device, workers: int
) -> tuple[nn.Module, Callable[[], None]]:
    """The loop of a tutorial: torchvision's MNIST and transforms, a DataLoader, eager layers.

    Returns the network, and what trains it for an epoch.
    """
    from torchvision import datasets, transforms

    mean, std = data.pixel_mean_and_std
    to_tensor = [transforms.ToTensor()]
    if config.precision == "float64":  # ToTensor rounds to float32
        to_tensor = [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float64)]
    digits = datasets.MNIST.__new__(datasets.MNIST)  # with these images, not read from files
    digits.data, digits.targets = data.train.images.squeeze(1), data.train.labels
    digits.transform = transforms.Compose([*to_tensor, transforms.Normalize((mean,), (std,))])
    digits.target_transform = None
    generators = make_generators(config.seed, device)
    loader = DataLoader(
        digits,
        config.batch_size,
        sampler=RandomSampler(digits, generator=generators["order"]),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    model: nn.Module = make_model(config, data, device, generators["dropout"])
    model = model.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)

    def epoch() -> None:
        model.train()
        for window in windows_of_batches(loader, config.accumulation_steps):
            images_in_window = sum(len(labels) for _, labels in window)
            optimizer.zero_grad()
            for images, labels in window:
                logits = model(images.to(device, non_blocking=True))
                labels = labels.to(device, non_blocking=True)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                (loss / images_in_window).backward()
            optimizer.step()

    return model, epoch


def verify(config: RunConfig, data: Dataset, device: torch.device) -> float:
    """Largest relative difference of a weight tensor after one epoch of each loop.

    Raises:
        RuntimeError: It is above `TOLERANCE`.
    """
    with deterministic(device):
        model, epoch = usual_loop(config, data, device, workers=0)
        epoch()
    ours = train(replace(config, epochs=1), data, progress=False).model
    difference = max(map(relative_difference, ours.parameters(), model.parameters()))
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{setting_name(config.batch_size, config.accumulation_steps)}: after an epoch in "
            f"{config.precision} the weights of the two loops differ by {difference:.1e} of their "
            f"size; their times cannot be compared"
        )
    return difference


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


def floor_seconds(config: RunConfig, data: Dataset, device: torch.device) -> float:
    """Seconds of an epoch's arithmetic alone, at the speed of a float32 matrix product."""
    size = 1536
    matrix = torch.rand(size, size, device=device)
    fastest = min(seconds_of(lambda: torch.mm(matrix, matrix), device) for _ in range(8))
    operations = operations_per_image(config, data) * len(data.train.labels)
    return operations * fastest / (2 * size**3)


def operations_per_image(config: RunConfig, data: Dataset) -> float:
    """Multiplications and additions, forward and backward."""
    cpu = torch.device("cpu")
    images = data.normalised(data.train.images[:2], cpu, torch.float32)
    model = DigitCNN(config.norm, config.dropout, len(data.class_names), config.model)
    with FlopCounterMode(display=False) as flops:
        model(images).sum().backward()
    return flops.get_total_flops() / len(images)


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows for reading: median and range of each figure."""

    def text(row: Row, figure: str) -> str:
        low, high = row["spread"][figure]
        return f"{row[figure]:.2f} ({low:.2f} to {high:.2f})"

    columns = {heading: [text(row, name) for row in rows] for name, heading in FIGURES.items()}
    return pd.DataFrame(columns, index=pd.Index([row["setting"] for row in rows], name="setting"))


def save(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)
