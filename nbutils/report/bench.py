"""Speed against the usual DataLoader loop and against the machine's arithmetic: `make bench`.

Both loops train `DigitCNN` from the same start on the same images in the same order, with the
same dropout. First both run in float64 and must end at the same weights. Then they are timed in
float32, an epoch of one and an epoch of the other in turn, so that a change in the machine's
speed affects both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from nbutils.accumulation.window import windows_of_batches
from nbutils.data.dataset import Dataset
from nbutils.errors import InputError
from nbutils.machine import device_name, no_progress, processor_name, processors
from nbutils.paths import write_atomically
from nbutils.report.floors import floor_seconds, seconds_of
from nbutils.training.config import RunConfig
from nbutils.training.model import DigitCNN
from nbutils.training.setup import deterministic, generator_for, resolve_device
from nbutils.training.train import train

SETTINGS = ((32, 1), (64, 1), (128, 1), (256, 1), (512, 1), (1024, 1), (128, 8))
"""Batch size and accumulation steps of the rows."""

VERIFIED_IMAGES = 2100
"""Images of the epoch in float64 after which the weights must be equal."""

TOLERANCE = 1e-8
"""Allowed difference of the weights in float64, relative to their size. Adam enlarges rounding
where gradients are small; a wrong update makes a difference above 1e-4."""


@dataclass(frozen=True)
class Row:
    """The result of one setting. Seconds are for an epoch of all training images.

    Attributes:
        setting: The batch size; "8 x 128" is 8 accumulation steps of 128.
        device: Where it ran.
        baseline_seconds: Median of the usual loop.
        seconds: Median of ours.
        ratio: Median of the quotients of neighbouring epochs.
        floor_ratio: Median of our seconds over the largest floor.
        floors: Seconds that an epoch takes at least: "arithmetic", its operations at the speed of
            a float32 matrix product. On a GPU also "memory", the bytes that its kernels read and
            write at the speed of a copy, and "launch", its kernels at the pace of a graph of
            empty ones.
        spread: Lowest and highest of each of the four figures.
        repeats: Timed epochs of each loop.
        images: Images in a timed epoch; the seconds are scaled to all of them.
        workers: Processes of the DataLoader: the fastest of 0, 1 and the number of processors.
        weights_differ: Largest relative difference of the weights in float64.
    """

    setting: str
    device: str
    baseline_seconds: float
    seconds: float
    ratio: float
    floor_ratio: float
    floors: dict[str, float]
    spread: dict[str, tuple[float, float]]
    repeats: int
    images: int
    workers: int
    weights_differ: float


def run_bench(
    data: Dataset,
    images: int = 13_500,
    repeats: int = 5,
    device: str = "auto",
    settings: Sequence[tuple[int, int]] = SETTINGS,
) -> list[Row]:
    """Time both loops at every setting.

    Args:
        data: Its training images are used, `images` of them per epoch (all, where it has fewer).
        images: At least the largest effective batch size.
        repeats: Timed epochs of each loop at each setting, >= 1.
        device: As in `RunConfig`.
        settings: Pairs of batch size and accumulation steps.

    Raises:
        InputError: `images` or `repeats` is too small, or the device is not there.
        RuntimeError: The two loops end at different weights.
    """
    place = resolve_device(device)
    largest = max(batch_size * steps for batch_size, steps in settings)
    images = min(images, len(data.train.labels))
    if images < largest or repeats < 1:
        raise InputError(
            f"images = {images} and repeats = {repeats}, but there must be {largest} images or "
            f"more, and 1 repeat or more"
        )
    rows = []
    with tqdm(total=len(settings) * repeats, unit="pair", disable=no_progress()) as bar:
        for batch_size, steps in settings:
            # A GPU holds the rate in float32, so the rate is one that float32 holds exactly.
            config = RunConfig(
                data.name,
                batch_size,
                steps,
                learning_rate=2**-10,
                device=device,
                precision="float64",
            )
            bar.set_description(setting_name(config))
            verified = data.subset(max(VERIFIED_IMAGES, largest + 7))
            difference = verify(config, verified, place)
            config = replace(config, precision="float32")
            few = data.subset(images)
            all_images = len(data.train.labels)
            rows.append(_time(config, few, place, all_images, difference, repeats, bar))
    return rows


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows for reading: median and range of each figure."""

    def text(row: Row, figure: str, digits: int) -> str:
        low, high = row.spread[figure]
        return f"{getattr(row, figure):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    return pd.DataFrame(
        {
            "setting": [row.setting for row in rows],
            "usual loop, s/epoch": [text(row, "baseline_seconds", 1) for row in rows],
            "ours, s/epoch": [text(row, "seconds", 2) for row in rows],
            "times as fast": [text(row, "ratio", 1) for row in rows],
            "ours / floor": [f"{row.floor_ratio:.2f}" for row in rows],
        }
    ).set_index("setting")


def save(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as JSON, a list of objects with the attributes of `Row`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())


def load(path: Path) -> list[Row]:
    """The rows that `save` wrote."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


class UsualLoop:
    """The loop of a tutorial: torchvision's MNIST and transforms, a DataLoader, eager layers."""

    def __init__(self, config: RunConfig, data: Dataset, device: torch.device, workers: int):
        from torchvision import datasets, transforms

        mean, std = data.pixel_mean_and_std
        digits = datasets.MNIST.__new__(datasets.MNIST)  # with these images, not read from files
        digits.data, digits.targets = data.train.images.squeeze(1), data.train.labels
        self.config, self.device = config, device
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        to_tensor = [transforms.ToTensor()]
        if self.dtype == torch.float64:  # ToTensor rounds to float32
            to_tensor = [transforms.PILToTensor(), transforms.ConvertImageDtype(self.dtype)]
        digits.transform = transforms.Compose([*to_tensor, transforms.Normalize((mean,), (std,))])
        digits.target_transform = None
        self.order = _Order(len(digits), config.seed)
        self.loader = DataLoader(
            digits,
            config.batch_size,
            sampler=self.order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        torch.manual_seed(config.seed)
        self.model = DigitCNN(config.norm, config.dropout, len(data.class_names), config.model)
        self.model = self.model.to(device, self.dtype)
        self.model.dropout.generator = generator_for(device, config.seed, "dropout")
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


class _Order(Sampler[int]):
    """A new order of the images for each epoch, the same as in `train`."""

    def __init__(self, images: int, seed: int) -> None:
        self.images = images
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.images, generator=self.generator).tolist())

    def __len__(self) -> int:
        return self.images


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
    difference = max(((ours - usual).norm() / usual.norm()).item() for ours, usual in pairs)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{setting_name(config)}: after an epoch in {config.precision} the weights of the two "
            f"loops differ by {difference:.1e} of their size; their times cannot be compared"
        )
    return difference


def _time(
    config: RunConfig,
    data: Dataset,
    device: torch.device,
    all_images: int,
    weights_differ: float,
    repeats: int,
    bar: tqdm,
) -> Row:
    scale = all_images / len(data.train.labels)
    # One epoch each warms up, and finds the DataLoader's best number of processes.
    candidates = [
        UsualLoop(config, data, device, workers) for workers in sorted({0, 1, processors()})
    ]
    trials = [seconds_of(loop.epoch, device) for loop in candidates]
    usual = candidates[trials.index(min(trials))]
    del candidates  # their processes end
    floors = floor_seconds(config, data, device, all_images)
    figures: dict[str, list[float]] = {
        name: [] for name in ("baseline_seconds", "seconds", "ratio", "floor_ratio")
    }
    for _ in range(repeats):
        ours = _second_epoch(config, data) * scale
        theirs = seconds_of(usual.epoch, device) * scale
        values = (theirs, ours, theirs / ours, ours / max(floors.values()))
        for name, value in zip(figures, values, strict=True):
            figures[name].append(value)
        bar.update()
    return Row(
        setting=setting_name(config),
        device=_processor(device),
        **{name: median(values) for name, values in figures.items()},
        floors=floors,
        spread={name: (min(values), max(values)) for name, values in figures.items()},
        repeats=repeats,
        images=len(data.train.labels),
        workers=usual.loader.num_workers,
        weights_differ=weights_differ,
    )


def _second_epoch(config: RunConfig, data: Dataset) -> float:
    """Seconds of training in the second epoch of a run, after one that warms up."""
    history = train(replace(config, epochs=2), data, progress=False).history
    return history["seconds"].diff().iloc[-1]


def _processor(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({processor_name()}, {torch.get_num_threads()} threads)"
    return device_name(device)


def setting_name(config: RunConfig) -> str:
    """The one spelling of a setting: "128", or "8 x 128" with accumulation."""
    steps = config.accumulation_steps
    return f"{config.batch_size}" if steps == 1 else f"{steps} x {config.batch_size}"
