"""One run, from its settings to its result. `script` reads from top to bottom."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

from nbutils.accumulation.window import accumulate_gradient, updates_per_epoch, windows
from nbutils.data.augment import augment
from nbutils.data.dataset import Dataset
from nbutils.machine import no_progress, peak_resident_memory
from nbutils.training import checkpoint, setup
from nbutils.training.config import RunConfig
from nbutils.training.cuda_graph import Window, graphed_updates
from nbutils.training.model import DigitCNN
from nbutils.training.out_of_memory import Script, run_within_memory, take_turns
from nbutils.training.result import KEPT_EPOCHS, RunResult, evaluate

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
    """Train `DigitCNN` on `load_dataset(config.dataset)`; InputError for what cannot run.

    On one machine, with one number of CPU threads, the same config gives bitwise the same history
    (all but `seconds`). Initial weights and the order of the images depend on the seed alone.

    Args:
        log_folder: A folder for this run alone. After every epoch it gets `progress.csv`, the
            history so far, and `checkpoint.pt`. A later call resumes from there, bitwise as if
            never interrupted; if settings, images or machine differ it starts again, and warns.
        on_oom: When a batch does not fit the memory, "stop" with advice, or "split" it.
        cuda_graph: Whether to replay updates as CUDA graphs on a GPU, which is faster.
        after_update: Called after each update with the number of updates and the model, which it
            must leave as it was. It is for the plain loop: use `cuda_graph=False` with it.
    """
    return train_many([config], data, progress, on_oom, cuda_graph, log_folder, after_update)[0]


def script(
    config: RunConfig,
    micro_batch_size: int,
    bar: tqdm,
    data: Dataset,
    device: torch.device,
    folder: Path | None,
    cuda_graph: bool,
    after_update: AfterUpdate | None,
) -> Script:
    """The training script. After each update it yields, so that runs can take turns on a GPU."""
    images, window_size = len(data.train.labels), config.effective_batch_size
    updates = updates_per_epoch(images, window_size, config.last_window)
    images_per_epoch, all_updates = min(images, updates * window_size), updates * config.epochs
    in_graph = cuda_graph and device.type in setup.GRAPH_DEVICES
    sizes = micro_batch_size, window_size // micro_batch_size, config.last_window
    generators = setup.make_generators(config.seed, device)
    model = setup.make_model(config, data, device, generators["dropout"])
    optimizer = setup.make_optimizer(config, model, in_graph)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, **generators}
    if config.schedule == "one-cycle":
        rate = config.learning_rate
        parts["scheduler"] = OneCycleLR(optimizer, rate, all_updates, cycle_momentum=False)
    conditions = setup.conditions(config, data, device, micro_batch_size, in_graph)
    rows, late = checkpoint.resume(folder, parts, conditions) if folder else ([], [])
    bar.total = (bar.total or 0) + all_updates
    bar.update(updates * len(rows))
    bar.set_description(f"resumed after epoch {len(rows)}" if rows else None)

    autocast = torch.autocast(device.type, torch.bfloat16, config.precision == "bfloat16")
    update, sums = make_update(config, data, parts, autocast)
    replayed = in_graph and graphed_updates(update, images, sizes, parts)
    for epoch in range(len(rows) + 1, config.epochs + 1):
        start = time.perf_counter()
        model.train()
        sums.zero_()
        order = torch.randperm(images, generator=generators["order"]).to(device)
        made = replayed(order) if replayed else map(update, windows(order, *sizes))
        for number, _ in enumerate(made, start=(epoch - 1) * updates + 1):
            if "scheduler" in parts:
                parts["scheduler"].step()
            if after_update:
                after_update(number, model)
            bar.update()
            yield None
        loss, accuracy = (total / images_per_epoch for total in sums.tolist())
        seconds = time.perf_counter() - start + (rows[-1]["seconds"] if rows else 0)
        scores, predictions = evaluate(model, data, device, autocast)
        row = {"epoch": epoch, "train_loss": loss, "train_accuracy": accuracy, **scores}
        rows.append(row | {"updates": epoch * updates, "seconds": seconds})
        late = [*late, predictions][-KEPT_EPOCHS:]
        bar.set_postfix(epoch=epoch, validation_accuracy=f"{scores['validation_accuracy']:.4f}")
        if folder:
            checkpoint.save(folder, parts, (rows, late), conditions)
    history, on_cuda = pd.DataFrame(rows), device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) if on_cuda else peak_resident_memory()
    what = history, model.eval(), torch.stack(late), data, images_per_epoch
    yield RunResult(config, *what, device, micro_batch_size, in_graph, memory)


def make_update(
    config: RunConfig, data: Dataset, parts: dict[str, Any], autocast: torch.autocast
) -> tuple[Callable[[Window], None], Tensor]:
    """What makes an update without waiting for the device, and the sums that it adds to.

    They are those of the losses and of the right answers, to be cleared before an epoch.
    """
    model, optimizer = parts["model"], parts["optimizer"]
    device, dtype = model.classifier.weight.device, model.classifier.weight.dtype
    images = data.normalised(data.train.images, device, dtype)
    labels = data.train.labels.to(device)
    exact = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(2, dtype=exact, device=device)

    def losses(micro_batch: Tensor) -> Tensor:
        inputs, targets = images[micro_batch], labels[micro_batch]
        if config.augment:
            inputs = augment(inputs, parts["augment"])
        with autocast:
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

    return update, sums


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
    device = setup.shared_device(configs)
    folder = Path(log_folder) if log_folder else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)  # fails now rather than after an epoch
    hidden = not progress or no_progress()

    def attempt(group: Sequence[RunConfig], sizes: Sequence[int]) -> list[RunResult]:
        with setup.deterministic(device), tqdm(total=0, unit="update", disable=hidden) as bar:
            scripts = [
                script(config, size, bar, data, device, folder, cuda_graph, after_update)
                for config, size in zip(group, sizes, strict=True)
            ]
            return take_turns(scripts, device)

    groups = [configs] if device.type == "cuda" else [[config] for config in configs]
    done = [run_within_memory(attempt, group, device, on_oom, folder) for group in groups]
    return [result for results in done for result in results]
