"""Accelerate, and transformers' Trainer with four kinds of model, as their documentation shows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbutils.accumulation.trainers import transformers_callback
from nbutils.report.libraries.task import Task, constant_rate


def accelerate(task: Task, prepare_loader: bool = True) -> None:
    """`Accelerator.accumulate`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=task.steps)
    model, optimizer = accelerator.prepare(task.model, task.optimizer())
    schedule = accelerator.prepare(task.schedule(optimizer.optimizer))
    loader = accelerator.prepare(task.loader) if prepare_loader else task.loader
    for _ in range(task.epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                if task.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), task.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        task.end_epoch()


def transformers(task: Task, make: Callable[[Task], nn.Module]) -> None:
    """The Trainer with a model made around that of the task."""
    from transformers import Trainer, TrainingArguments

    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        images, labels = zip(*samples, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}

    optimizer = task.optimizer()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=task.batch_size,
            gradient_accumulation_steps=task.steps,
            num_train_epochs=task.epochs,
            max_grad_norm=task.clip or 0.0,
            train_sampling_strategy="sequential",
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(
            *(make(task), arguments, collate, task.dataset),
            optimizers=(optimizer, constant_rate(optimizer)),
            callbacks=[transformers_callback(task.run)],
        ).train()


class _PlainModel(nn.Module):
    """Returns its own loss, as the Trainer wants it. Takes images and labels only."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.table = task.model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.table(pixel_values), labels)}


class _WithKwargs(_PlainModel):
    def forward(self, pixel_values: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:
        return super().forward(pixel_values, labels)


class _WithNumItems(_PlainModel):
    def forward(
        self, pixel_values: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        if num_items_in_batch is None:
            return super().forward(pixel_values, labels)
        loss = F.cross_entropy(self.table(pixel_values), labels, reduction="sum")
        return {"loss": loss / num_items_in_batch}


def _resnet(task: Task) -> nn.Module:
    """`ResNetForImageClassification`, whose last layer is the model to train."""
    from transformers import ResNetConfig, ResNetForImageClassification
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention

    class Backbone(nn.Module):
        def forward(self, pixel_values: Tensor, **_: Any) -> Any:
            return BaseModelOutputWithPoolingAndNoAttention(pooler_output=pixel_values)

    config = ResNetConfig(num_labels=3, embedding_size=8, hidden_sizes=[8], depths=[1])
    model = ResNetForImageClassification(config)
    model.resnet, model.classifier = Backbone(), task.model
    return model


MODELS: dict[str, Callable[[Task], nn.Module]] = {
    "plain model": _PlainModel,
    "model with **kwargs": _WithKwargs,
    "ResNetForImageClassification": _resnet,
    "model with num_items_in_batch": _WithNumItems,
}
