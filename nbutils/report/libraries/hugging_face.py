"""Accelerate and the Trainer of transformers, as `scripts` uses the other libraries."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbutils.accumulation.check.probe import ACCUMULATION_STEPS as STEPS
from nbutils.accumulation.check.probe import BATCH_SIZE, EPOCHS
from nbutils.accumulation.check.watch import AnySchedule, Run
from nbutils.accumulation.trainers import loader_of, transformers_callback, watch_schedule


def accelerate(run: Run, clip: float | None, prepare: bool = True) -> None:
    """`Accelerator.accumulate`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
    model, optimizer = accelerator.prepare(run.probe.model, run.probe.optimizer())
    schedule = accelerator.prepare(watch_schedule(run, AnySchedule(optimizer.optimizer)))
    loader = accelerator.prepare(loader_of(run)) if prepare else loader_of(run)
    for _ in range(EPOCHS):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        run.end_epoch()


def transformers(run: Run, clip: float | None, make: Callable[[nn.Module], nn.Module]) -> None:
    """The Trainer with a model made around that of the run."""
    from transformers import Trainer, TrainingArguments

    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        images, labels = zip(*samples, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}

    optimizer = run.probe.optimizer()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=STEPS,
            num_train_epochs=EPOCHS,
            max_grad_norm=clip or 0.0,
            train_sampling_strategy="sequential",
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(
            *(make(run.probe.model), arguments, collate, run.probe.batches.dataset),
            optimizers=(optimizer, AnySchedule(optimizer)),
            callbacks=[transformers_callback(run)],
        ).train()


class _PlainModel(nn.Module):
    """Returns its own loss, as the Trainer wants it. Takes images and labels only."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.table(pixel_values), labels)}


class _WithKwargs(_PlainModel):
    def forward(self, pixel_values: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:
        return super().forward(pixel_values, labels)


class _WithNumItems(_WithKwargs):
    def forward(self, pixel_values: Tensor, labels: Tensor, **more: Any) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.table(pixel_values), labels, reduction="sum")
        return {"loss": loss / more["num_items_in_batch"]}


def _resnet(table: nn.Module) -> nn.Module:
    """`ResNetForImageClassification`, whose last layer is the model to train."""
    from transformers import ResNetConfig, ResNetForImageClassification
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention

    class Backbone(nn.Module):
        def forward(self, pixel_values: Tensor, **_: Any) -> Any:
            return BaseModelOutputWithPoolingAndNoAttention(pooler_output=pixel_values)

    config = ResNetConfig(num_labels=3, embedding_size=8, hidden_sizes=[8], depths=[1])
    model = ResNetForImageClassification(config)
    model.resnet, model.classifier = Backbone(), table
    return model


MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain model": _PlainModel,
    "model with **kwargs": _WithKwargs,
    "ResNetForImageClassification": _resnet,
    "model with num_items_in_batch": _WithNumItems,
}
