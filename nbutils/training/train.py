"""One run, from its settings to its result. `script` reads from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

from nbutils.accumulation.window import accumulate_gradient, updates_per_epoch, windows
from nbutils.data.augment import augment
from nbutils.data.dataset import Dataset
from nbutils.errors import InputError
from nbutils.machine import no_progress
from nbutils.training import checkpoint, setup
from nbutils.training.config import RunConfig
from nbutils.training.cuda_graph import Window, graphed_updates
from nbutils.training.model import DigitCNN
from nbutils.training.out_of_memory import Script, run_within_memory
from nbutils.training.result import RunResult, evaluate, history_of

AfterUpdate = Callable[[int, DigitCNN], None]


def train(
    config: RunConfig,
    data: Dataset,
    *,
    log_folder: str | Path | None = None,
    progress: bool = True,
    on_oom: setup.OnOom = "stop",
    cuda_graph: bool = True,
    after_update: AfterUpdate | None = None,
) -> RunResult:
    """Train `DigitCNN` as `config` says.

    On one machine, with one number of CPU threads, the same config gives bitwise the same history
    (all but `seconds`). Initial weights and the order of the images depend on the seed alone.

    Args:
        data: From `load_dataset(config.dataset)`.
        log_folder: A folder for this run alone. After every epoch it gets `progress.csv`, the
            history so far, and `checkpoint.pt`. A later call resumes from there, bitwise as if
            never interrupted; if settings, images or machine differ it starts again, and warns.
        on_oom: When a batch does not fit the memory, "stop" with advice, or "split" it.
        cuda_graph: Whether to replay updates as CUDA graphs on a GPU, which is faster.
        after_update: Called after each update with the number of updates and the model, which it
            must leave as it was. It is for the plain loop: use `cuda_graph=False` with it.

    Raises:
        InputError: The device does not exist, an update needs too many images, or to split a batch
            would change what the run computes.
    """
    return train_many([config], data, progress, on_oom, cuda_graph, log_folder, after_update)[0]


def script(
    config: RunConfig,
    data: Dataset,
    device: torch.device,
    micro_batch_size: int,
    folder: Path | None,
    bar: tqdm,
    cuda_graph: bool,
    after_update: AfterUpdate,
) -> Script:
    """The training script. It yields after every update, so that runs can take turns on a GPU."""
    images = len(data.train.labels)
    updates = updates_per_epoch(images, config.effective_batch_size, config.last_window)
    images_per_epoch = min(images, updates * config.effective_batch_size)
    in_graph = cuda_graph and device.type in setup.GRAPH_DEVICES

    def cut(order: Tensor) -> Iterator[Window]:
        steps = config.effective_batch_size // micro_batch_size
        return windows(order, micro_batch_size, steps, config.last_window)

    generators = setup.make_generators(config.seed, device)
    model = setup.make_model(config, data, device, generators["dropout"])
    optimizer = setup.make_optimizer(config, model, in_graph)
    scheduler = None
    if config.schedule == "one-cycle":
        peak, all_updates = config.learning_rate, updates * config.epochs
        scheduler = OneCycleLR(optimizer, peak, all_updates, cycle_momentum=False)
    exact = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(2, dtype=exact, device=device)  # of the epoch: losses, right answers
    update = make_update(config, data, model, optimizer, generators["augment"], sums)
    replayed = in_graph and graphed_updates(update, cut, images, model, optimizer, generators)
    parts = checkpoint.Parts(model, optimizer, scheduler, generators)
    conditions = setup.conditions(config, data, device, micro_batch_size, in_graph)
    done = checkpoint.resume(folder, parts, conditions) if folder else checkpoint.Progress()
    bar.total = (bar.total or 0) + updates * config.epochs
    bar.update(done.updates)
    bar.set_description(f"resumed after epoch {len(done.rows)}" if done.rows else None)
    for epoch in range(len(done.rows) + 1, config.epochs + 1):
        start = time.perf_counter()
        model.train()
        sums.zero_()
        order = torch.randperm(images, generator=generators["order"]).to(device)
        for _ in replayed(order) if replayed else map(update, cut(order)):
            if scheduler:
                scheduler.step()
            done.updates += 1
            after_update(done.updates, model)
            bar.update()
            yield
        loss, accuracy = (total / images_per_epoch for total in sums.tolist())
        done.seconds += time.perf_counter() - start
        scores, predictions = evaluate(config, data, model, device)
        row = {"epoch": epoch, "updates": done.updates, "seconds": done.seconds, **scores}
        done.add(row | {"train_loss": loss, "train_accuracy": accuracy}, predictions)
        bar.set_postfix(epoch=epoch, validation_accuracy=f"{scores['validation_accuracy']:.4f}")
        if folder:
            checkpoint.save(folder, parts, done, conditions)
    history, late = history_of(done.rows), torch.stack(done.predictions)
    where = device, micro_batch_size, in_graph, setup.peak_memory(device)
    return RunResult(config, history, model.eval(), late, data, images_per_epoch, *where)


def make_update(
    config: RunConfig,
    data: Dataset,
    model: DigitCNN,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    sums: Tensor,
) -> Callable[[Window], None]:
    """What makes an update from a window, adding to `sums`: nothing waits for the device."""
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    images = data.normalised(data.train.images, device, dtype)
    labels = data.train.labels.to(device)

    def losses(micro_batch: Tensor) -> Tensor:
        inputs, targets = images[micro_batch], labels[micro_batch]
        if config.augment:
            inputs = augment(inputs, generator)
        with setup.autocast(config, device):
            logits = model(inputs)
        image_losses = F.cross_entropy(logits.to(dtype), targets, reduction="none")
        sums[0].add_(image_losses.detach().sum())
        sums[1].add_((logits.detach().argmax(1) == targets).sum())
        return image_losses

    def update(window: Window) -> None:
        optimizer.zero_grad()
        # A run that diverges goes on, so that its history shows it: losses are not checked.
        accumulate_gradient(model, window, losses, check_finite=False)
        optimizer.step()

    return update


def train_many(
    configs: Sequence[RunConfig],
    data: Dataset,
    progress: bool = True,
    on_oom: setup.OnOom = "stop",
    cuda_graph: bool = True,
    log_folder: str | Path | None = None,
    after_update: AfterUpdate | None = None,
) -> list[RunResult]:
    """Train several networks, such as several seeds, each as `train` would.

    On a GPU the runs share it; `seconds` and `peak_memory` are then those of the group. All must
    name one device; `log_folder` and `after_update` are for a single run. Errors as in `train`.
    """
    if not configs:
        return []
    for config in configs:
        setup.check(config, data, on_oom)
    device, *others = {setup.resolve_device(config.device) for config in configs}
    if others:
        named = ", ".join(sorted(map(str, (device, *others))))
        raise InputError(f"device = {named}, but runs that train together must share one")
    folder = Path(log_folder) if log_folder else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)  # fails now rather than after an epoch

    def start(config: RunConfig, size: int, bar: tqdm) -> Script:
        look = after_update or (lambda *_: None)
        return script(config, data, device, size, folder, bar, cuda_graph, look)

    groups = [configs] if device.type == "cuda" else [[config] for config in configs]
    hidden = not progress or no_progress()
    done = [run_within_memory(start, group, device, on_oom, folder, hidden) for group in groups]
    return [result for results in done for result in results]
