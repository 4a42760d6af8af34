"""Speed against the usual DataLoader loop and against the machine's arithmetic: `make bench`.

Both loops train `DigitCNN` from the same start on the same images in the same order, with the
same dropout. First they are run in float64 and must end at the same weights; then they are timed
in float32, an epoch of one and an epoch of the other in turn, so that a change in the machine's
speed meets both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Sampler
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from nbutils.accumulation.window import windows_of_batches
from nbutils.data.dataset import Dataset, Split
from nbutils.errors import InputError
from nbutils.machine import device_name, processor_name, processors
from nbutils.training.config import RunConfig
from nbutils.training.cuda_graph import record
from nbutils.training.model import DigitCNN
from nbutils.training.train import Run, deterministic, generator_for, resolve_device, resolve_engine

SETTINGS = ((32, 1), (64, 1), (128, 1), (256, 1), (512, 1), (1024, 1), (128, 8))
"""Batch size and accumulation steps of the rows."""

VERIFIED_IMAGES = 2100
"""Images of the epoch in float64 after which the weights must be equal."""

TOLERANCE = 1e-8
"""Allowed difference of the weights in float64, relative to their size. Adam enlarges rounding
where gradients are small; a wrong update makes a difference above 1e-4."""


@dataclass(frozen=True)
class Row:
    """One setting's result. Seconds are for an epoch of all training images.

    Attributes:
        setting: Batch size; "128x8" is 8 accumulation steps of 128.
        device: Where it ran.
        baseline_seconds: Median of the usual loop.
        seconds: Median of ours.
        ratio: Median of the quotients of neighbouring epochs.
        floor_ratio: Median of our seconds over the largest floor.
        floors: Seconds that an epoch takes at least, medians: "arithmetic", its operations at
            the speed of a float32 matrix product, measured after each epoch. On a GPU also
            "memory", the bytes that its kernels read and write at the speed of a copy, and
            "launch", its kernels at the pace of a graph of empty ones.
        spread: Lowest and highest of each of the four figures.
        repeats: Timed epochs of each loop.
        images: Images of a timed epoch; the seconds are scaled up to all.
        workers: The DataLoader's processes: the fastest of none, one, and one a processor.
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
        data: Its training images are used, `images` of them an epoch (all, where it has fewer).
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
    with deterministic(place), tqdm(total=len(settings) * repeats, unit="pair") as bar:
        for batch_size, steps in settings:
            config = RunConfig(
                data.name, batch_size, steps, epochs=repeats + 1, device=device, precision="float64"
            )
            bar.set_description(_name(config))
            difference = verify(config, _first(data, max(VERIFIED_IMAGES, largest + 7)), place)
            config = replace(config, precision="float32")
            few = _first(data, images)
            rows.append(_time(config, few, place, len(data.train.labels), difference, bar))
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
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def load(path: Path) -> list[Row]:
    """The rows that `save` wrote."""
    return [Row(**row) for row in json.loads(path.read_text())]


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
        self.model = DigitCNN(config.norm, config.dropout, len(data.class_names))
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
    """A new order of the images for each epoch, the same as in `Run`."""

    def __init__(self, images: int, seed: int) -> None:
        self.images = images
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.images, generator=self.generator).tolist())

    def __len__(self) -> int:
        return self.images


def our_epoch(run: Run) -> None:
    """Train on every image once, and wait for the device."""
    run.begin_epoch()
    while run.next_update():
        pass
    run.end_epoch()


def verify(config: RunConfig, data: Dataset, device: torch.device) -> float:
    """Largest relative difference of a weight tensor after one epoch of each loop.

    Raises:
        RuntimeError: It is above `TOLERANCE`.
    """
    usual = UsualLoop(config, data, device, workers=0)
    usual.epoch()
    with Run(config, data, device, resolve_engine("auto", config, device)) as run:
        our_epoch(run)
        pairs = list(zip(run.model.parameters(), usual.model.parameters(), strict=True))
    difference = max(((ours - usual).norm() / usual.norm()).item() for ours, usual in pairs)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{_name(config)}: after an epoch in {config.precision} the weights of the two loops "
            f"differ by {difference:.1e} of their size; their times cannot be compared"
        )
    return difference


def _time(
    config: RunConfig,
    data: Dataset,
    device: torch.device,
    all_images: int,
    weights_differ: float,
    bar: tqdm,
) -> Row:
    images = len(data.train.labels)
    scale = all_images / images
    # One epoch each warms up, and finds the DataLoader's best number of processes.
    candidates = [
        UsualLoop(config, data, device, workers) for workers in sorted({0, 1, processors()})
    ]
    trials = [_seconds(loop.epoch, device) for loop in candidates]
    usual = candidates[trials.index(min(trials))]
    del candidates  # their processes end
    counts = _counts(config, data, device)
    floors: list[dict[str, float]] = []
    figures: dict[str, list[float]] = {
        name: [] for name in ("baseline_seconds", "seconds", "ratio", "floor_ratio")
    }
    with Run(config, data, device, resolve_engine("auto", config, device)) as run:
        our_epoch(run)
        for _ in range(config.epochs - 1):
            ours = _seconds(lambda: our_epoch(run), device) * scale
            theirs = _seconds(usual.epoch, device) * scale
            floors.append(_floors(counts, all_images, device))
            values = (theirs, ours, theirs / ours, ours / max(floors[-1].values()))
            for name, value in zip(figures, values, strict=True):
                figures[name].append(value)
            bar.update()
    return Row(
        setting=_name(config),
        device=_processor(device),
        **{name: median(values) for name, values in figures.items()},
        floors={name: median(floor[name] for floor in floors) for name in floors[0]},
        spread={name: (min(values), max(values)) for name, values in figures.items()},
        repeats=config.epochs - 1,
        images=images,
        workers=usual.loader.num_workers,
        weights_differ=weights_differ,
    )


def _processor(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({processor_name()}, {torch.get_num_threads()} threads)"
    return device_name(device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
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


def _counts(config: RunConfig, data: Dataset, device: torch.device) -> dict[str, float]:
    """Operations, bytes and kernels of one image's share of a micro-batch, both passes."""
    images = data.normalised(data.train.images[: config.batch_size], device, torch.float32)
    model = DigitCNN(config.norm, config.dropout, len(data.class_names)).to(device)
    with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
        model(images).sum().backward()
    totals = {
        "arithmetic": flops.get_total_flops(),
        "memory": traffic.bytes,
        "launch": traffic.kernels,
    }
    return {name: total / len(images) for name, total in totals.items()}


def _floors(counts: dict[str, float], images: int, device: torch.device) -> dict[str, float]:
    """Seconds for so many images, if one thing alone took time."""
    seconds = {"arithmetic": _product_seconds_per_operation(device)}
    if device.type == "cuda":
        seconds["memory"] = _copy_seconds_per_byte(device)
        seconds["launch"] = _graph_seconds_per_kernel(device)
    return {name: counts[name] * images * per_unit for name, per_unit in seconds.items()}


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
    return min(_seconds(work, device) for _ in range(8))


def _first(data: Dataset, images: int) -> Dataset:
    return replace(data, train=Split(data.train.images[:images], data.train.labels[:images]))


def _name(config: RunConfig) -> str:
    steps = config.accumulation_steps
    return f"{config.batch_size}" + (f"x{steps}" if steps > 1 else "")
