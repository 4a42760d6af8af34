"""Loops that live in a trainer: adapters with which the checker watches them.

A trainer runs all epochs itself and may make its own optimizer. So the adapter takes a function
that trains the model of one run, and a callback that says where an epoch ends and which loss was
logged:

    def fit(run):
        trainer = Trainer(accumulate_grad_batches=3, max_epochs=2,
                          callbacks=[lightning_callback(run)])
        trainer.fit(MyModule(run.probe.model), loader_of(run))

    print(check_accumulation(TrainerLoop(fit)))

Let the trainer accumulate 3 micro-batches for 2 epochs, keep the order of the batches, and use
plain SGD at `run.probe.learning_rate`. A loop with Accelerate needs no callback: it calls
`watch_schedule(run, schedule)` before it begins, and `run.end_epoch(loss)` after each epoch.
"""

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader

from nbutils.accumulation.check.probe import BATCH_SIZE, EPOCHS, Probe
from nbutils.accumulation.check.watch import Run, watch, watch_schedule


class TrainerLoop:
    """A whole training for `check_accumulation`: `fit(run)` trains as the module's text shows."""

    def __init__(self, fit: Callable[[Run], Any]) -> None:
        self.fit = fit

    def run_on(self, probe: Probe) -> Run:
        """Train the model of a probe and watch."""
        with watch(probe) as run:
            self.fit(run)
        if len(run.returned) != EPOCHS:
            raise ValueError(
                f"the trainer ended {len(run.returned)} epochs, not {EPOCHS}: give it the "
                f"callback of this run, or call run.end_epoch(loss) after each epoch"
            )
        return run


def loader_of(run: Run) -> DataLoader[Any]:
    """The images and labels of a probe as a DataLoader, in micro-batches of 4, not shuffled."""
    return DataLoader(run.probe.batches.dataset, batch_size=BATCH_SIZE)


def lightning_callback(run: Run) -> Any:
    """A callback for Lightning's Trainer; reads the first metric whose name has "loss" in it."""
    from lightning.pytorch import Callback

    class Watch(Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            for config in trainer.lr_scheduler_configs:
                watch_schedule(run, config.scheduler)

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            metrics = trainer.callback_metrics
            run.end_epoch(next((metrics[name] for name in metrics if "loss" in name), None))

    return Watch()


def transformers_callback(run: Run) -> Any:
    """A callback for transformers' Trainer with `train_sampling_strategy="sequential"`."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        losses: list[float]

        def on_train_begin(self, *_: Any, lr_scheduler: Any = None, **__: Any) -> None:
            watch_schedule(run, lr_scheduler)

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.losses = []

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            run.end_epoch(self.losses)  # the loss of an epoch is logged into it after this call

    return Watch()


def keras_callback(run: Run) -> Any:
    """A callback for Keras on torch.

    Its model wraps `run.probe.model` in `keras.layers.TorchModuleWrapper`, after
    `keras.config.set_floatx("float64")`.
    """
    import keras
    from keras.optimizers.schedules import LearningRateSchedule

    class Counted(LearningRateSchedule):
        """Records how far Keras has counted when it asks for the rate."""

        def __init__(self, schedule: Any) -> None:
            self.schedule, self.steps = schedule, 0

        def __call__(self, step: Any) -> Any:
            run.schedule.extend([len(run.updates)] * (int(step) - self.steps))
            self.steps = int(step)
            return self.schedule(step)

    class Watch(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            optimizer = self.model.optimizer
            if isinstance(optimizer._learning_rate, LearningRateSchedule):
                optimizer._learning_rate = Counted(optimizer._learning_rate)
            update = optimizer._backend_update_step

            def recorded_update(gradients: Any, *args: Any) -> None:
                run.record_update(gradients[0])  # hooks on torch's optimizers do not see Keras's
                update(gradients, *args)

            optimizer._backend_update_step = recorded_update

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            _ = self.model.optimizer.learning_rate  # asks the schedule

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            run.end_epoch((logs or {}).get("loss"))

    return Watch()
