"""What known libraries do with a short last window, found by running them.

42,000 images in batches of 128 are 328 full micro-batches and one of 16. Accumulated by 8 they
make 41 full windows and leave the 16 images over. The classifier is a stand-in that shows the
weight of every image: its loss is `weights @ image`, an image is (1, 0), or (1, 1) if it is one of
the 16, and the optimizer is SGD at rate 1. So an update moves the first weight by the sum of its
images' weights, which is 1 for a mean, and the second by that of the 16.

The libraries come with the extra `peers`; `python -m nbutils peers` runs them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nbutils.accumulation.window import accumulate_gradient, windows_of_batches
from nbutils.paths import REFERENCE

IMAGES, BATCH_SIZE, STEPS, EPOCHS = 42_000, 128, 8, 2
LEFT_OVER = IMAGES % BATCH_SIZE
PEERS_FILE = REFERENCE / "peers" / "peers.csv"


class Weigher(nn.Module):
    """The stand-in: logits that are the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        """The loss of each image, shape (n,), of `images`, shape (n, 2)."""
        return images @ self.weights


def _images() -> Tensor:
    images = torch.zeros(IMAGES, 2, dtype=torch.float64)
    images[:, 0] = 1
    images[-LEFT_OVER:, 1] = 1
    return images


def _loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(_images()), batch_size=BATCH_SIZE)


def ours(record: Callable[[Any], None]) -> None:
    """`accumulate_gradient` of this project."""
    model = Weigher()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(EPOCHS):
        for window in windows_of_batches(_loader(), STEPS):
            optimizer.zero_grad()
            accumulate_gradient(model, window, lambda batch: model(batch[0]))
            optimizer.step()
            record(model.weights)


def accelerate(record: Callable[[Any], None]) -> None:
    """`Accelerator.accumulate`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
    plain = Weigher()
    model, optimizer, loader = accelerator.prepare(
        plain, torch.optim.SGD(plain.parameters(), lr=1.0), _loader()
    )
    for _ in range(EPOCHS):
        for (images,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(images).mean())
                optimizer.step()
                optimizer.zero_grad()
            record(plain.weights)


def lightning(record: Callable[[Any], None]) -> None:
    """`Trainer(accumulate_grad_batches=8)`."""
    from lightning import pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weigher = Weigher()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.weigher(batch[0]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

        def on_train_batch_end(self, *_: Any) -> None:
            record(self.weigher.weights)

    trainer = pl.Trainer(
        accelerator="cpu",
        precision="64-true",
        accumulate_grad_batches=STEPS,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), _loader())


def keras(record: Callable[[Any], None]) -> None:
    """`SGD(gradient_accumulation_steps=8)` of Keras 3 on torch."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.config.set_floatx("float64")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.zeros((2, 1))])
    model.compile(
        keras.optimizers.SGD(1.0, gradient_accumulation_steps=STEPS), loss=lambda _, logits: logits
    )
    images = _images().numpy()

    def after_batch(*_: Any, **__: Any) -> None:
        record(torch.tensor(model.get_weights()[0]).flatten())

    after = keras.callbacks.LambdaCallback(on_train_batch_end=after_batch)
    model.fit(
        *(images, images[:, :1]),
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[after],
    )


PEERS = {"this project": ours, "accelerate": accelerate, "lightning": lightning, "keras": keras}


def observe(name: str) -> dict[str, Any]:
    """Run one library for two epochs and say what became of the 16 images.

    Returns:
        `library`, `version`, `updates` in the first epoch; and of the update in which the 16
        images of the first epoch count: `epoch` and `update` (from 1), `size` (sum of the
        weights of all its images) and `weight` (of each of the 16). All four are missing if
        they never count.
    """
    trajectory = [torch.zeros(2, dtype=torch.float64)]

    def record(weights: Any) -> None:
        trajectory.append(torch.as_tensor(weights).detach().clone().double())

    PEERS[name](record)
    # One entry a micro-batch, or one an update: either way the second half is the second epoch.
    per_epoch = (len(trajectory) - 1) // EPOCHS
    steps = -torch.stack(trajectory).diff(dim=0)
    made = steps[:, 0].abs() > 1e-12
    row: dict[str, Any] = {
        "library": name,
        "version": "" if name == "this project" else version(name),
        "updates": int(made[:per_epoch].sum()),
    }
    with_left_over = (steps[:, 1].abs() > 1e-12).nonzero().flatten().tolist()
    # In the second epoch other images are left over; those count at its very end, if at all.
    for index in with_left_over[:1]:
        epoch = index // per_epoch
        row |= {
            "epoch": epoch + 1,
            "update": int(made[epoch * per_epoch : index + 1].sum()),
            "size": steps[index, 0].item(),
            "weight": steps[index, 1].item() / LEFT_OVER,
        }
    return row


def observe_all() -> Path:
    """Run every library and write `notebooks/reference/peers/peers.csv`; its path."""
    table = pd.DataFrame([observe(name) for name in PEERS])
    PEERS_FILE.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(PEERS_FILE, index=False)
    return PEERS_FILE


def peers_table() -> pd.DataFrame:
    """The committed table as people read it, one row a library."""
    table = pd.read_csv(PEERS_FILE, dtype={"version": str}).fillna({"version": ""})
    places = [f"{row.update} of epoch {row.epoch}" for row in table.itertuples()]
    return pd.DataFrame(
        {
            "library": (table["library"] + " " + table["version"]).str.strip(),
            "updates in epoch 1": table["updates"],
            f"the {LEFT_OVER} images are in update": places,
            "size of that update": table["size"],
            "weight of each of them": [
                "1/" + format(1 / weight, "g") for weight in table["weight"]
            ],
        }
    ).set_index("library")
