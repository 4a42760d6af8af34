"""A short training with each library, as its own documentation shows.

Each function trains the model of a watched run with plain SGD, clipped to the norm `clip`. A
trainer is made once for both epochs: one made anew each epoch cannot carry anything over.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nbutils.accumulation import accumulate_gradient, windows_of_batches
from nbutils.accumulation.check.probe import ACCUMULATION_STEPS as STEPS
from nbutils.accumulation.check.probe import BATCH_SIZE, EPOCHS
from nbutils.accumulation.check.watch import AnySchedule, Run
from nbutils.accumulation.trainers import (
    keras_callback,
    lightning_callback,
    loader_of,
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


def composer(run: Run, clip: float | None) -> None:
    """`Trainer(device_train_microbatch_size=4)`, which cuts batches of 12 into micro-batches."""
    from composer import Callback, ComposerModel, DataSpec, Trainer
    from composer.algorithms import GradientClipping

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = run.probe.model

        def forward(self, batch: Any) -> Tensor:
            return self.model(batch[0])

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs, batch[1])

    class MeanLoss(Callback):
        logged: list[float]

        def epoch_start(self, *_: Any) -> None:
            self.logged = []

        def batch_end(self, state: Any, _: Any) -> None:
            loss = float(state.total_loss_dict["loss/train/total"])
            self.logged += [loss] * len(state.batch[1])

        def epoch_end(self, *_: Any) -> None:
            run.end_epoch(sum(self.logged) / len(self.logged))

    optimizer = run.probe.optimizer()
    batches = DataLoader(run.probe.batches.dataset, batch_size=STEPS * BATCH_SIZE)
    Trainer(
        model=Model(),
        train_dataloader=DataSpec(
            batches, get_num_tokens_in_batch=lambda batch: int((batch[1] != IGNORED).sum())
        ),
        accumulate_train_batch_on_tokens=True,
        device_train_microbatch_size=BATCH_SIZE,
        max_duration=f"{EPOCHS}ep",
        optimizers=optimizer,
        schedulers=watch_schedule(run, AnySchedule(optimizer)),
        step_schedulers_every_batch=True,
        algorithms=[GradientClipping("norm", clip)] if clip else [],
        callbacks=[MeanLoss()],
        progress_bar=False,
        device="cpu",
    ).fit()
