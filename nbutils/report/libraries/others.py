"""Lightning, Keras and other trainers, each used as its own documentation shows."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from nbutils.accumulation.trainers import keras_callback, lightning_callback
from nbutils.report.libraries.task import Task, constant_rate


def lightning(task: Task) -> None:
    """`Trainer(accumulate_grad_batches=3)`."""
    from lightning import pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = task.optimizer()
            schedule = {"scheduler": constant_rate(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    pl.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=task.steps,
        gradient_clip_val=task.clip,
        max_epochs=task.epochs,
        callbacks=[lightning_callback(task.run)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), task.loader)


def keras(task: Task) -> None:
    """`SGD(gradient_accumulation_steps=3)` of Keras on torch."""
    import keras

    keras.config.set_floatx("float64")
    shape = task.dataset.tensors[0].shape[1:]
    model = keras.Sequential([keras.Input(shape), keras.layers.TorchModuleWrapper(task.model)])
    rate = keras.optimizers.schedules.ExponentialDecay(task.rate, decay_steps=1, decay_rate=1.0)
    model.compile(
        keras.optimizers.SGD(rate, gradient_accumulation_steps=task.steps, clipnorm=task.clip),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=task.ignored),
    )
    model.fit(task.loader, epochs=task.epochs, verbose=0, callbacks=[keras_callback(task.run)])


def ignite(task: Task) -> None:
    """`create_supervised_trainer(gradient_accumulation_steps=3)`."""
    from ignite.engine import Events, create_supervised_trainer
    from ignite.metrics import Average

    trainer = create_supervised_trainer(
        task.model, task.optimizer(), F.cross_entropy, gradient_accumulation_steps=task.steps
    )
    Average().attach(trainer, "loss")
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: task.end_epoch(engine.state.metrics["loss"])
    )
    trainer.run(task.loader, max_epochs=task.epochs)


def fastai(task: Task) -> None:
    """`GradientAccumulation(12)`, which counts images, and `GradientClip`."""
    from fastai.callback.core import Callback
    from fastai.callback.schedule import ParamScheduler
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    def rate(_: float) -> float:
        task.run.schedule.append(len(task.run.updates))
        return task.rate

    class EndEpoch(Callback):
        def after_train(self) -> None:
            task.end_epoch(self.learn.smooth_loss.item())

    callbacks = [GradientAccumulation(task.window), EndEpoch(), ParamScheduler({"lr": rate})]
    learner = Learner(
        DataLoaders(task.loader, task.loader),
        task.model,
        loss_func=lambda logits, labels: F.cross_entropy(logits, labels).float(),
        opt_func=lambda *_, **__: OptimWrapper(opt=task.optimizer()),
        cbs=callbacks + ([GradientClip(task.clip)] if task.clip else []),
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(task.epochs)


def poutyne(task: Task) -> None:
    """`Model.fit_generator(batches_per_step=3)`, with its callbacks for clipping and schedule."""
    from poutyne import Callback, ClipNorm, LambdaLR, Model

    def rate(step: int) -> float:
        if step:  # torch asks once before the first step
            task.run.schedule.append(len(task.run.updates))
        return 1.0

    class EndEpoch(Callback):
        def on_epoch_end(self, epoch_number: int, logs: dict[str, float]) -> None:
            task.end_epoch(logs["loss"])

    callbacks = [LambdaLR(lr_lambda=rate), EndEpoch()]
    if task.clip:
        callbacks.append(ClipNorm(task.model.parameters(), task.clip))
    model = Model(task.model, task.optimizer(), F.cross_entropy)
    model.fit_generator(
        task.loader,
        epochs=task.epochs,
        batches_per_step=task.steps,
        callbacks=callbacks,
        verbose=False,
    )


def torchtnt(task: Task) -> None:
    """`AutoUnit(gradient_accumulation_steps=3)`."""
    from torchtnt.framework.auto_unit import AutoUnit
    from torchtnt.framework.train import train

    class Unit(AutoUnit[Any]):
        def compute_loss(self, state: Any, data: Any) -> Any:
            logits = self.module(data[0])
            return F.cross_entropy(logits, data[1]), logits

        def configure_optimizers_and_lr_scheduler(self, module: Any) -> Any:
            optimizer = task.optimizer()
            return optimizer, task.schedule(optimizer)

        def on_train_step_end(self, state: Any, data: Any, step: int, results: Any) -> None:
            task.add_loss(results.loss.item(), len(data[1]))

        def on_train_epoch_end(self, state: Any) -> None:
            super().on_train_epoch_end(state)
            task.end_epoch()

    unit = Unit(
        module=task.model,
        gradient_accumulation_steps=task.steps,
        clip_grad_norm=task.clip,
        step_lr_interval="step",
    )
    train(unit, task.loader, max_epochs=task.epochs)


def pytorch_accelerated(task: Task) -> None:
    """`Trainer.train(gradient_accumulation_steps=3)`; it clips values, not the norm."""
    from pytorch_accelerated.callbacks import TrainerCallback
    from pytorch_accelerated.trainer import Trainer

    class EndEpoch(TrainerCallback):
        def on_train_epoch_end(self, trainer: Any, **_: Any) -> None:
            task.end_epoch(trainer.run_history.get_latest_metric("train_loss_epoch"))

    trainer = Trainer(task.model, F.cross_entropy, task.optimizer(), callbacks=[EndEpoch()])
    trainer.train(
        task.dataset,
        num_epochs=task.epochs,
        per_device_batch_size=task.batch_size,
        gradient_accumulation_steps=task.steps,
        gradient_clip_value=task.clip,
        create_scheduler_fn=lambda optimizer: task.schedule(optimizer),
        train_dataloader_kwargs={"shuffle": False, "num_workers": 0},
    )


def composer(task: Task) -> None:
    """`Trainer(device_train_microbatch_size=4)`, which cuts batches of 12 into micro-batches."""
    from composer import Callback, ComposerModel, DataSpec, Trainer
    from composer.algorithms import GradientClipping

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def forward(self, batch: Any) -> Tensor:
            return self.model(batch[0])

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs, batch[1])

    class MeanLoss(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            task.add_loss(float(state.total_loss_dict["loss/train/total"]), len(state.batch[1]))

        def epoch_end(self, state: Any, logger: Any) -> None:
            task.end_epoch()

    optimizer = task.optimizer()
    Trainer(
        model=Model(),
        train_dataloader=DataSpec(
            DataLoader(task.dataset, batch_size=task.window),
            get_num_tokens_in_batch=lambda batch: int((batch[1] != task.ignored).sum()),
        ),
        accumulate_train_batch_on_tokens=True,
        device_train_microbatch_size=task.batch_size,
        max_duration=f"{task.epochs}ep",
        optimizers=optimizer,
        schedulers=task.schedule(optimizer),
        step_schedulers_every_batch=True,
        algorithms=[GradientClipping("norm", task.clip)] if task.clip else [],
        callbacks=[MeanLoss()],
        progress_bar=False,
        device="cpu",
    ).fit()
