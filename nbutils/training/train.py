"""One run: `train(config, data) -> RunResult`."""

from __future__ import annotations

import gc
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from nbutils.accumulation.window import accumulate_gradient, updates_per_epoch, windows
from nbutils.data.dataset import Dataset, augment, draw_moves
from nbutils.errors import InputError, suggest
from nbutils.machine import device_name, no_progress, peak_resident_memory, processor_name
from nbutils.paths import write_atomically
from nbutils.training.checkpoint import (
    CHECKPOINT,
    PROGRESS,
    held_condition,
    load_checkpoint,
    save_checkpoint,
)
from nbutils.training.config import RunConfig
from nbutils.training.cuda_graph import GraphedEpoch
from nbutils.training.model import DigitCNN
from nbutils.training.pieces import Pieces

Engine = Literal["auto", "eager", "pieces", "cuda-graph"]
"""How the updates are computed; what they compute is the same, to rounding.

- "eager": the plain loop over `accumulate_gradient`, on any device. The others are held to it.
- "pieces": on the CPU, in pieces that fit the cache, dealt to threads; see `nbutils.training.pieces`.
- "cuda-graph": on a GPU, each update a replayed CUDA graph; see `nbutils.training.cuda_graph`.
- "auto": the fastest that the device and the precision allow.
"""

OnOom = Literal["stop", "split"]
"""What a run does when a batch does not fit a GPU's memory.

- "stop": it ends with a message that says what would fit.
- "split": it begins anew with half the batch and twice the accumulation steps, which is the same
  update; again and again, until it fits.
"""

EVALUATION_BATCH = 500
"""Images at a time in evaluation. It changes memory and speed only."""

HISTORY_COLUMNS = {
    "epoch": "int64",
    "train_loss": "float64",
    "train_accuracy": "float64",
    "validation_accuracy": "float64",
    "test_loss": "float64",
    "test_accuracy": "float64",
    "updates": "int64",
    "seconds": "float64",
}
"""Columns of a history, a row an epoch.

`train_loss` (mean cross-entropy, nats) and `train_accuracy` are as seen during the epoch, with
dropout and while the weights change; validation and test are evaluated after it. Accuracies are
fractions in [0, 1]; `test_loss` and `test_accuracy` are NaN where the test images' classes are
unknown. `updates` and `seconds` count from the start of the run; seconds are of
training alone, without evaluation.
"""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        config: The settings it ran with.
        history: A row an epoch, with the columns `HISTORY_COLUMNS`.
        model: The trained network, in evaluation mode, on `device`.
        predictions: uint8, shape (test images,), predicted class of every test image.
        data: The dataset it was trained on.
        images_per_epoch: Training images that take part in an epoch's updates.
        device: Where it ran.
        engine: What computed its updates; one of `Engine`.
        micro_batch: Images in one forward/backward pass: `config.batch_size`, or less where
            `on_oom="split"` made it so.
        peak_memory: Bytes: CUDA's peak of allocated memory during the run; elsewhere the peak
            resident memory of the process so far.
    """

    config: RunConfig
    history: pd.DataFrame = field(repr=False)
    model: nn.Module = field(repr=False)
    predictions: Tensor = field(repr=False)
    data: Dataset = field(repr=False)
    images_per_epoch: int
    device: torch.device
    engine: str
    micro_batch: int
    peak_memory: int


def train(
    config: RunConfig,
    data: Dataset,
    *,
    log_folder: str | Path | None = None,
    progress: bool = True,
    engine: Engine = "auto",
    on_oom: OnOom = "stop",
) -> RunResult:
    """Train `DigitCNN` as `config` says.

    The seed decides everything random: on one machine, with one number of CPU threads, the same
    config gives bitwise the same history (all but `seconds`). Initial weights and the order of
    the images depend on the seed alone, not on batch size or accumulation steps.

    Args:
        config: The settings.
        data: The images, from `load_dataset(config.dataset)`.
        log_folder: A folder of this run's own, made where there is none. After every epoch it
            gets `progress.csv`, the history so far, and `checkpoint.pt`. A run that finds its
            checkpoint there goes on from it and ends as if it had never been interrupted, which
            takes the same settings, images, engine, processor, number of threads and version of
            torch; where they differ, it begins anew and warns. The last epoch's checkpoint
            stays: remove it when the result is safe.
        progress: Whether to show a progress bar.
        engine: How the updates are computed: a matter of speed, not of what is computed.
        on_oom: What to do when a batch does not fit the GPU's memory.

    Raises:
        InputError: The device is not there, or the engine does not run on it, or an update needs
            more images than there are, or than fit the GPU's memory; or `on_oom="split"` would
            change what the run computes.
    """
    (run,) = _prepared([config], data, engine, on_oom)
    return _train_within_memory([run], progress, on_oom, log_folder)[0]


def train_many(
    configs: Sequence[RunConfig],
    data: Dataset,
    *,
    progress: bool = True,
    engine: Engine = "auto",
    on_oom: OnOom = "stop",
) -> list[RunResult]:
    """Train several networks on the same data: seeds, or different settings.

    On a GPU the runs share it, each on a stream of its own, since one small network leaves most
    of it idle; `seconds` are then those of the whole group, and `peak_memory` too. Elsewhere
    they run one after the other. Each result equals that of `train` with the same config.

    Args:
        configs: The settings of each, all on one device.
        data: The images.
        progress: Whether to show a progress bar.
        engine: As in `train`.
        on_oom: As in `train`; of runs that share a GPU, those with the largest batches are split.

    Raises:
        InputError: As in `train`, or the configs name several devices.
    """
    runs = _prepared(configs, data, engine, on_oom)
    if runs and runs[0].device.type == "cuda":
        return _train_within_memory(runs, progress, on_oom)
    return [_train_within_memory([run], progress, on_oom)[0] for run in runs]


def _prepared(
    configs: Iterable[RunConfig], data: Dataset, engine: Engine, on_oom: OnOom
) -> list[Run]:
    """The runs, checked but not begun."""
    runs = []
    for config in configs:
        check_on_oom(on_oom, config)
        device = resolve_device(config.device)
        check_fits(config, data)
        runs.append(Run(config, data, device, resolve_engine(engine, config, device)))
    devices = sorted({str(run.device) for run in runs})
    if len(devices) > 1:
        raise InputError(f"device = {devices}, but runs trained together must share one")
    return runs


def _train_within_memory(
    runs: Sequence[Run], progress: bool, on_oom: OnOom, log_folder: str | Path | None = None
) -> list[RunResult]:
    """Train all `runs` at once; where they do not fit, do as `on_oom` says."""
    sizes = [run.micro_batch for run in runs]
    if on_oom == "split" and log_folder:  # a run that goes on has found out already what fits
        held = held_condition(Path(log_folder) / CHECKPOINT, "micro_batch")
        sizes = [held if held and not size % held else size for size in sizes]
    while True:
        # New ones for each attempt, so that nothing of a failed one is held on the device.
        attempt = [
            Run(run.config, run.data, run.device, run.engine, size)
            for run, size in zip(runs, sizes, strict=True)
        ]
        try:
            return _train_together(attempt, progress, log_folder)
        except torch.OutOfMemoryError as error:
            largest = max(sizes)
            for number, run in enumerate(attempt):
                if run.micro_batch == largest:
                    sizes[number] = _smaller_micro_batch(run, len(runs), on_oom, error)
        del attempt, run
        gc.collect()
        torch.cuda.empty_cache()


def _train_together(
    runs: Sequence[Run], progress: bool, log_folder: str | Path | None = None
) -> list[RunResult]:
    """Train all `runs` at once, their updates in turn."""
    hidden = not progress or no_progress()
    if log_folder:
        Path(log_folder).mkdir(parents=True, exist_ok=True)  # fails now rather than later
    with ExitStack() as stack:
        stack.enter_context(deterministic(runs[0].device))
        for run in runs:
            stack.enter_context(run)
            if log_folder and run.resume(Path(log_folder)) and progress:
                print(f"goes on after epoch {len(run.rows)} of {run.config.epochs}")
        total, done = sum(run.total_updates for run in runs), sum(run.updates for run in runs)
        bar = stack.enter_context(tqdm(total=total, initial=done, unit="update", disable=hidden))
        epochs = max(run.config.epochs for run in runs)
        for epoch in range(1, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}")
            training = [run for run in runs if len(run.rows) < epoch <= run.config.epochs]
            for run in training:
                run.begin_epoch()
            going = training
            while going:
                going = [run for run in going if run.next_update()]
                bar.update(len(going))
            for run in training:
                run.end_epoch()
            for run in training:
                row = run.evaluate()
                bar.set_postfix(validation_accuracy=f"{row['validation_accuracy']:.4f}")
                if log_folder:
                    run.save(Path(log_folder))
        return [run.result() for run in runs]


def resolve_device(name: str) -> torch.device:
    """The device that `RunConfig.device` means on this machine.

    Raises:
        InputError: It is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    cuda_devices = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= cuda_devices:
        found = f"{cuda_devices} CUDA devices" if cuda_devices else "no CUDA device"
        raise InputError(f"device = {name!r}, but this machine has {found}; use 'auto' or 'cpu'")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device = {name!r}, but this machine has none; use 'auto' or 'cpu'")
    return device


def resolve_engine(
    engine: Engine, config: RunConfig, device: torch.device
) -> Literal["eager", "pieces", "cuda-graph"]:
    """The engine that `engine` means for this config on this device.

    Raises:
        InputError: It is unknown, or does not run there.
    """
    if engine not in get_args(Engine):
        raise InputError(f"no engine {engine!r}; {suggest(engine, get_args(Engine))}")
    fits = {"pieces": device.type == "cpu" and config.precision != "bfloat16"}
    fits["cuda-graph"] = device.type == "cuda"
    if engine == "auto":
        return next((name for name in ("pieces", "cuda-graph") if fits[name]), "eager")
    if not fits.get(engine, True):
        raise InputError(
            f"engine = {engine!r}, but it does not run on {device.type!r} in {config.precision}; "
            f"use 'auto' or 'eager'"
        )
    return engine


def check_fits(config: RunConfig, data: Dataset) -> None:
    """Refuse a config whose update needs more images than `data` has to train on.

    Raises:
        InputError: As said.
    """
    images = len(data.train.labels)
    for name, wanted in (
        ("batch_size", config.batch_size),
        ("effective_batch_size (batch_size * accumulation_steps)", config.effective_batch_size),
    ):
        if wanted > images:
            raise InputError(
                f"{name} = {wanted}, but {data.name!r} has only {images} images to train on"
            )


def check_on_oom(on_oom: str, config: RunConfig) -> None:
    """Refuse to split batches whose images see each other.

    Raises:
        InputError: As said, or `on_oom` is unknown.
    """
    if on_oom not in get_args(OnOom):
        raise InputError(f"no on_oom {on_oom!r}; {suggest(on_oom, get_args(OnOom))}")
    if on_oom == "split" and not _may_split(config):
        raise InputError(
            f"on_oom = 'split', but with norm = {config.norm!r} each image is normalised with the "
            f"others of its batch, so a smaller one trains differently; use norm = 'group' or "
            f"'none', or on_oom = 'stop'"
        )


def _may_split(config: RunConfig) -> bool:
    return config.norm in ("group", "none")


def _smaller_micro_batch(
    run: Run, together: int, on_oom: str, error: torch.OutOfMemoryError
) -> int:
    """Half the micro-batch that did not fit, of so many runs; a warning says so.

    Raises:
        InputError: It is not to be halved, or cannot be; the message says what to do.
    """
    config, size, half = run.config, run.micro_batch, run.micro_batch // 2
    steps = config.effective_batch_size // half if half else 0
    problem = f"a batch of {size} images does not fit the memory of {run.device}"
    if together > 1:
        problem += f", which {together} runs share"
    if size % 2:
        raise InputError(
            f"batch_size = {config.batch_size}: {problem}, and {size} cannot be halved evenly; "
            f"choose a smaller batch_size with more accumulation_steps"
        ) from error
    smaller = f"batches of {half} and {steps} accumulation steps"
    if on_oom == "stop":
        advice = f"take {smaller}, the same {config.effective_batch_size} images per update"
        if _may_split(config):
            advice += ", or let on_oom = 'split' do so"
        else:
            advice += f", which with norm = {config.norm!r} trains differently"
        raise InputError(f"batch_size = {config.batch_size}: {problem}; {advice}") from error
    warnings.warn(f"{problem}: the run begins anew, with {smaller}", stacklevel=4)
    return half


class Run:
    """The moving parts of one run, for callers that time or interleave epochs; else use `train`.

    A context manager: inside it, `begin_epoch`, `next_update` until it returns False, `end_epoch`
    and `evaluate`, again and again. `micro_batch` is the images in a pass where that is not to
    be `config.batch_size` but a divisor of it.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        device: torch.device,
        engine: str,
        micro_batch: int | None = None,
    ) -> None:
        self.config = config
        self.data = data
        self.device = device
        self.engine = engine
        self.micro_batch = micro_batch or config.batch_size
        images = len(data.train.labels)
        updates = updates_per_epoch(images, config.effective_batch_size, config.last_window)
        self.total_updates = updates * config.epochs
        self.images_per_epoch = min(images, updates * config.effective_batch_size)
        self.updates = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []

    def __enter__(self) -> Run:
        config, data, device = self.config, self.data, self.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.pieces: Pieces | None = None
        self.graphed: GraphedEpoch | None = None
        with ExitStack() as stack, self._place():
            self.train_images = data.normalised(data.train.images, device, dtype)
            self.train_labels = data.train.labels.to(device)
            self.validation_images = data.normalised(data.validation.images, device, dtype)
            self.test_images = data.normalised(data.test.images, device, dtype)
            # Of the epoch so far, on the device: nothing waits for it before the epoch's end.
            exact = torch.float32 if device.type == "mps" else torch.float64
            self.loss_sum = torch.zeros((), dtype=exact, device=device)
            self.correct = torch.zeros((), dtype=torch.int64, device=device)

            # Weights are drawn on the CPU so that a seed means the same start on every device.
            torch.manual_seed(config.seed)
            model = DigitCNN(config.norm, config.dropout, classes=len(data.class_names))
            self.model = model.to(device, dtype).to(memory_format=torch.channels_last)
            self.order_generator = torch.Generator().manual_seed(config.seed)
            self.augment_generator = generator_for(device, config.seed, "augment")
            self.dropout_generator = generator_for(device, config.seed, "dropout")
            self.model.dropout.generator = self.dropout_generator
            self.optimizer = _optimizer(config, self.model, self.engine)
            self.scheduler = _scheduler(config, self.optimizer, self.total_updates)

            if self.engine == "pieces":
                self.pieces = stack.enter_context(
                    Pieces(
                        self.model,
                        separable=config.norm in ("group", "none"),
                        threads=torch.get_num_threads(),
                    )
                )
            if self.engine == "cuda-graph":
                self.graphed = GraphedEpoch(
                    self._update,
                    self._windows,
                    len(self.train_labels),
                    self.model,
                    self.optimizer,
                    [self.augment_generator, self.dropout_generator],
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _place(self) -> AbstractContextManager[Any]:
        """Inside it, the run has its own stream on a GPU, or the cores as its pieces need them."""
        if self._stream:
            return torch.cuda.stream(self._stream)
        return self.pieces.cores() if self.pieces else nullcontext()

    def begin_epoch(self) -> None:
        """Put the images in a new order."""
        with self._place():
            self._start = time.perf_counter()
            self.model.train()
            self.loss_sum.zero_()
            self.correct.zero_()
            order = torch.randperm(len(self.train_labels), generator=self.order_generator)
            order = order.to(self.device)
            self._epoch = self.graphed.epoch(order) if self.graphed else self._eager_epoch(order)

    def next_update(self) -> bool:
        """Launch the epoch's next update; False where there is none left."""
        with self._place():
            if next(self._epoch, "over") == "over":
                return False
            self.updates += 1
            if self.scheduler:
                self.scheduler.step()
            return True

    def end_epoch(self) -> None:
        """Wait for the updates; begin the history's row."""
        with self._place():
            row = {
                "epoch": len(self.rows) + 1,
                "train_loss": self.loss_sum.item() / self.images_per_epoch,
                "train_accuracy": self.correct.item() / self.images_per_epoch,
            }
        self.seconds += time.perf_counter() - self._start
        self.rows.append(row | {"updates": self.updates, "seconds": self.seconds})

    def evaluate(self) -> dict[str, float]:
        """Complete the history's row, with the weights as they are now."""
        with self._place():
            self.model.eval()
            validation_logits = self.logits(self.validation_images)
            test_logits = self.logits(self.test_images)
            self.predictions = test_logits.argmax(1).to(torch.uint8)
        labels = self.data.test.labels
        self.rows[-1] |= {
            "validation_accuracy": _accuracy(validation_logits, self.data.validation.labels),
            "test_loss": math.nan,
            "test_accuracy": math.nan,
        }
        if len(labels):  # else they are unknown
            self.rows[-1] |= {
                "test_loss": F.cross_entropy(test_logits.double(), labels).item(),
                "test_accuracy": _accuracy(test_logits, labels),
            }
        return self.rows[-1]

    def history(self) -> pd.DataFrame:
        """A row for each epoch so far."""
        return pd.DataFrame(self.rows, columns=list(HISTORY_COLUMNS)).astype(HISTORY_COLUMNS)

    def save(self, folder: Path) -> None:
        """Write `progress.csv` and the checkpoint, after an evaluation."""
        write_atomically(folder / PROGRESS, self.history().to_csv(index=False).encode())
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "generators": [generator.get_state() for generator in self._generators()],
            "updates": self.updates,
            "seconds": self.seconds,
            "rows": self.rows,
            "predictions": self.predictions,
        }
        save_checkpoint(folder / CHECKPOINT, state, self._conditions())

    def resume(self, folder: Path) -> bool:
        """Go to where the checkpoint in `folder` left the run; False where none can be used."""
        state = load_checkpoint(folder / CHECKPOINT, self._conditions())
        if state is None:
            return False
        with self._place():
            self.model.load_state_dict(state["model"])
            self.model.eval()
            _load_in_place(self.optimizer, state["optimizer"])
            if self.scheduler:
                self.scheduler.load_state_dict(state["scheduler"])
            for generator, before in zip(self._generators(), state["generators"], strict=True):
                generator.set_state(before)
        self.updates, self.seconds = state["updates"], state["seconds"]
        self.rows, self.predictions = state["rows"], state["predictions"]
        return True

    def _generators(self) -> list[torch.Generator]:
        """All that it draws from while training."""
        return [self.order_generator, self.augment_generator, self.dropout_generator]

    def _conditions(self) -> dict[str, Any]:
        """What decides the history to the last bit."""
        on_cuda = self.device.type == "cuda"
        return {
            **self.config.to_dict(),
            "images": self.data.fingerprint,
            "micro_batch": self.micro_batch,
            "engine": self.engine,
            "hardware": device_name(self.device) if on_cuda else processor_name(),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }

    def result(self) -> RunResult:
        """The run as it is now, after its last evaluation."""
        return RunResult(
            config=self.config,
            history=self.history(),
            model=self.model,
            predictions=self.predictions,
            data=self.data,
            images_per_epoch=self.images_per_epoch,
            device=self.device,
            engine=self.engine,
            micro_batch=self.micro_batch,
            peak_memory=_peak_memory(self.device),
        )

    def _eager_epoch(self, order: Tensor) -> Iterator[None]:
        for window in self._windows(order):
            self._update(window)
            yield

    def _windows(self, order: Tensor) -> Iterator[tuple[Tensor, ...]]:
        steps = self.config.effective_batch_size // self.micro_batch
        return windows(order, self.micro_batch, steps, self.config.last_window)

    def _update(self, window: tuple[Tensor, ...]) -> None:
        self.optimizer.zero_grad()
        if self.pieces:
            self._gradient_in_pieces(self.pieces, window)
        else:
            self._gradient(window)
        self.optimizer.step()

    def _gradient(self, window: tuple[Tensor, ...]) -> None:
        """The window's gradient, by the plain loop."""

        def losses(micro_batch: Tensor) -> Tensor:
            images, labels = self.train_images[micro_batch], self.train_labels[micro_batch]
            if self.config.augment:
                images = augment(images, self.augment_generator)
            with self._autocast():
                logits = self.model(images)
            image_losses = F.cross_entropy(logits.to(images.dtype), labels, reduction="none")
            self.loss_sum += image_losses.detach().sum()
            self.correct += (logits.detach().argmax(1) == labels).sum()
            return image_losses

        # A diverged run goes on: its history is to show that it diverged.
        accumulate_gradient(self.model, window, losses, check_finite=False)

    def _gradient_in_pieces(self, pieces: Pieces, window: tuple[Tensor, ...]) -> None:
        """The same, in pieces."""
        moves = None
        if self.config.augment:
            moves = draw_moves(sum(map(len, window)), self.augment_generator)
        loss_sum, correct = pieces.gradient(window, self.train_images, self.train_labels, moves)
        self.loss_sum += loss_sum
        self.correct += correct

    def logits(self, images: Tensor) -> Tensor:
        """Logits, shape (n, classes), of all `images`; on the CPU."""
        batches = images.split(EVALUATION_BATCH)
        if self.pieces:
            return self.pieces.logits(batches)
        with torch.inference_mode(), self._autocast():
            return torch.cat([self.model(batch) for batch in batches]).cpu()

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def generator_for(device: torch.device, seed: int, purpose: str) -> torch.Generator:
    """A generator whose numbers have nothing to do with those for other purposes."""
    words = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0]) >> 1)


def _optimizer(config: RunConfig, model: nn.Module, engine: str) -> torch.optim.Optimizer:
    device = next(model.parameters()).device
    rate: float | Tensor = config.learning_rate
    if device.type == "cuda" or engine == "cuda-graph":
        # A graph reads the rate from the device; the other engines then do as well, in float32.
        rate = torch.tensor(rate, dtype=torch.float32, device=device)
    if config.optimizer == "adam":
        return torch.optim.Adam(
            model.parameters(),
            rate,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=engine == "cuda-graph",
        )
    return torch.optim.SGD(
        model.parameters(),
        rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _load_in_place(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what its `state_dict` gave, into the tensors it holds: graphs know their addresses."""
    held = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for parameter, tensors in held.items():
        for name, tensor in tensors.items():
            tensor.copy_(optimizer.state[parameter][name])
            optimizer.state[parameter][name] = tensor
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        rate = group["lr"]  # the only setting that changes
        group.update(before)
        if isinstance(before["lr"], Tensor):
            before["lr"].copy_(rate)
        else:
            group["lr"] = rate


def _scheduler(
    config: RunConfig, optimizer: torch.optim.Optimizer, total_updates: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    if config.schedule == "constant":
        return None
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_updates, cycle_momentum=False
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_memory()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Choose deterministic kernels; put that and torch's own generators back afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            settings.fill_uninitialized_memory = fill
