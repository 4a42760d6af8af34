"""A short training with each library, as its own documentation shows.

Each function trains the model of a watched run with plain SGD, clipped to the norm `clip`. A
trainer is made once for both epochs: one made anew each epoch cannot carry anything over.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbutils.accumulation import accumulate_gradient, windows_of_batches
from nbutils.accumulation.check.probe import ACCUMULATION_STEPS as STEPS
from nbutils.accumulation.check.probe import BATCH_SIZE, EPOCHS
from nbutils.accumulation.check.watch import AnySchedule, Run
from nbutils.accumulation.trainers import (
    keras_callback,
    lightning_callback,
    loader_of,
    transformers_callback,
    watch_schedule,
)

IGNORED = -100
"""The label of what a loss leaves out, such as padding."""


def this_project(run: Run, clip: float | None) -> None:
    """`accumulate_gradient` over `windows_of_batches`."""
    model, optimizer, logged = run.probe.model, run.probe.optimizer(), []
    schedule = watch_schedule(run, AnySchedule(optimizer))

    def losses(batch: list[Tensor]) -> Tensor:
        logged.append(F.cross_entropy(model(batch[0]), batch[1], reduction="none"))
        return logged[-1]

    def count(batch: list[Tensor]) -> Tensor:
        return (batch[1] != IGNORED).sum()

    for _ in range(EPOCHS):
        logged.clear()
        for window in windows_of_batches(loader_of(run), STEPS):
            optimizer.zero_grad()
            accumulate_gradient(model, window, losses, weight=count)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
        run.end_epoch(torch.cat(logged).mean().item())


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


def lightning(run: Run, clip: float | None) -> None:
    """`Trainer(accumulate_grad_batches=3)`."""
    from lightning import pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = run.probe.model

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = run.probe.optimizer()
            schedule = {"scheduler": AnySchedule(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    pl.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=STEPS,
        gradient_clip_val=clip,
        max_epochs=EPOCHS,
        callbacks=[lightning_callback(run)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), loader_of(run))


def keras(run: Run, clip: float | None) -> None:
    """`SGD(gradient_accumulation_steps=3)` of Keras on torch."""
    import keras

    keras.config.set_floatx("float64")
    shape = run.probe.batches[0][0].shape[1:]
    rate = keras.optimizers.schedules.ExponentialDecay(
        run.probe.learning_rate, decay_steps=1, decay_rate=1.0
    )
    model = keras.Sequential([keras.Input(shape), keras.layers.TorchModuleWrapper(run.probe.model)])
    model.compile(
        keras.optimizers.SGD(rate, gradient_accumulation_steps=STEPS, clipnorm=clip),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=IGNORED),
    )
    model.fit(loader_of(run), epochs=EPOCHS, verbose=0, callbacks=[keras_callback(run)])


def ignite(run: Run, _: float | None) -> None:
    """`create_supervised_trainer(gradient_accumulation_steps=3)`, which does not clip."""
    from ignite.engine import Events, create_supervised_trainer
    from ignite.metrics import Average

    trainer = create_supervised_trainer(
        *(run.probe.model, run.probe.optimizer(), F.cross_entropy),
        gradient_accumulation_steps=STEPS,
    )
    Average().attach(trainer, "loss")
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: run.end_epoch(engine.state.metrics["loss"])
    )
    trainer.run(loader_of(run), max_epochs=EPOCHS)


def fastai(run: Run, clip: float | None) -> None:
    """`GradientAccumulation(12)`, which counts images, and `GradientClip`."""
    from fastai.callback.core import Callback
    from fastai.callback.schedule import ParamScheduler
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    def rate(_: float) -> float:
        run.schedule.append(len(run.updates))
        return run.probe.learning_rate

    class EndEpoch(Callback):
        def after_train(self) -> None:
            run.end_epoch(self.learn.smooth_loss.item())

    accumulation = GradientAccumulation(STEPS * BATCH_SIZE)
    callbacks = [accumulation, EndEpoch(), ParamScheduler({"lr": rate})]
    learner = Learner(
        DataLoaders(loader_of(run), loader_of(run)),
        run.probe.model,
        loss_func=lambda logits, labels: F.cross_entropy(logits, labels).float(),
        opt_func=lambda *_, **__: OptimWrapper(opt=run.probe.optimizer()),
        cbs=callbacks + ([GradientClip(clip)] if clip else []),
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(EPOCHS)


def poutyne(run: Run, clip: float | None) -> None:
    """`Model.fit_generator(batches_per_step=3)`, with its callbacks for clipping and schedule."""
    from poutyne import Callback, ClipNorm, LambdaLR, Model

    def rate(step: int) -> float:
        if step:  # torch asks once before the first step
            run.schedule.append(len(run.updates))
        return 1.0

    class EndEpoch(Callback):
        def on_epoch_end(self, epoch_number: int, logs: dict[str, float]) -> None:
            run.end_epoch(logs["loss"])

    callbacks = [LambdaLR(lr_lambda=rate), EndEpoch()]
    if clip:
        callbacks.append(ClipNorm(run.probe.model.parameters(), clip))
    Model(run.probe.model, run.probe.optimizer(), F.cross_entropy).fit_generator(
        loader_of(run),
        epochs=EPOCHS,
        batches_per_step=STEPS,
        callbacks=callbacks,
        verbose=False,
    )


def pytorch_accelerated(run: Run, clip: float | None) -> None:
    """`Trainer.train(gradient_accumulation_steps=3)`; it clips values, not the norm."""
    from pytorch_accelerated.callbacks import TrainerCallback
    from pytorch_accelerated.trainer import Trainer

    class EndEpoch(TrainerCallback):
        def on_train_epoch_end(self, trainer: Any, **_: Any) -> None:
            run.end_epoch(trainer.run_history.get_latest_metric("train_loss_epoch"))

    given = run.probe.model, F.cross_entropy, run.probe.optimizer()
    Trainer(*given, callbacks=[EndEpoch()]).train(
        run.probe.batches.dataset,
        num_epochs=EPOCHS,
        per_device_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=STEPS,
        gradient_clip_value=clip,
        create_scheduler_fn=lambda optimizer: watch_schedule(run, AnySchedule(optimizer)),
        train_dataloader_kwargs={"shuffle": False, "num_workers": 0},
    )
