"""The settings of one run: `RunConfig`, a frozen dataclass that checks itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_type_hints

from nbutils.errors import InputError, suggest

Norm = Literal["batch", "ghost", "group", "none"]
ModelName = Literal["small", "deep"]


@dataclass(frozen=True)
class RunConfig:
    """The settings of one training run; InputError for a wrong type or value.

    Attributes:
        dataset: A name that `load_dataset` knows.
        batch_size: Images in one forward/backward pass, >= 1. When gradients are accumulated
            this is the micro-batch.
        accumulation_steps: Forward/backward passes per update, >= 1.
        epochs: Passes over the training images, >= 1.
        optimizer: "adam" or "sgd".
        learning_rate: Step size, > 0; the peak of it with the "one-cycle" schedule.
        momentum: Of "sgd", in [0, 1); must be 0 with "adam", whose betas are fixed.
        weight_decay: L2 penalty that the optimizer adds to the gradient once an update, >= 0.
        schedule: "constant", or "one-cycle": up for 30 % of the updates, then down to zero.
        norm: What normalises the channels: "batch", "ghost" (batch norm over at most
            `nbutils.training.model.GHOST_SIZE` images), "group", or "none".
        dropout: Probability that an input of the classifier is dropped in training, in [0, 1).
        augment: Whether each training image is rotated, shifted and zoomed at random.
        last_window: What happens to the short last window of an epoch: "step" makes an update from
            the images it has, divided by their true number; "drop" leaves them out.
        seed: Determines initial weights, order of the images, dropout and augmentation;
            in [0, 2**63).
        device: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda", "cuda:1", "mps".
        precision: "float32", "float64", or "bfloat16" (autocast; the weights stay float32).
        model: "small" (three convolutions) or "deep" (five), see `DigitCNN`.
    """

    dataset: str = "mnist-5k"
    batch_size: int = 128
    accumulation_steps: int = 1
    epochs: int = 20
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Literal["constant", "one-cycle"] = "constant"
    norm: Norm = "group"
    dropout: float = 0.4
    augment: bool = False
    last_window: Literal["step", "drop"] = "step"
    seed: int = 0
    device: str = "auto"
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    model: ModelName = "small"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(RunConfig).items():
            value = _as_kind(name, getattr(self, name), kind)
            object.__setattr__(self, name, value)
        known_device = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device) is not None
        may_have_momentum = self.optimizer == "sgd" or self.momentum == 0
        for name, holds, allowed in (
            ("batch_size", self.batch_size >= 1, "a whole number >= 1"),
            ("accumulation_steps", self.accumulation_steps >= 1, "a whole number >= 1"),
            ("epochs", self.epochs >= 1, "a whole number >= 1"),
            ("learning_rate", self.learning_rate > 0, "a number > 0"),
            ("weight_decay", self.weight_decay >= 0, "a number >= 0"),
            ("momentum", 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("momentum", may_have_momentum, 'a setting of "sgd"; leave it 0 with "adam"'),
            ("dropout", 0 <= self.dropout < 1, "a number in [0, 1)"),
            ("seed", 0 <= self.seed < 2**63, "a whole number in [0, 2**63)"),
            ("device", known_device, '"auto", "cpu", "cuda", "cuda:N" or "mps"'),
            ("dataset", self.dataset.strip() != "", "the name of a dataset"),
        ):
            if not holds:
                raise InputError(f"{name} = {getattr(self, name)!r}, but it must be {allowed}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> RunConfig:
        """A config from field names and values; fields left out take their defaults."""
        for name in settings:
            if name not in cls.field_names():
                raise InputError(f"no setting {name!r}; {suggest(name, cls.field_names())}")
        return cls(**settings)

    @classmethod
    def field_names(cls) -> list[str]:
        """Names of all settings, in order."""
        return [field.name for field in dataclasses.fields(cls)]

    def to_dict(self) -> dict[str, Any]:
        """Field names and plain Python values, in order."""
        return dataclasses.asdict(self)

    @property
    def effective_batch_size(self) -> int:
        """Images per update: `batch_size * accumulation_steps`."""
        return self.batch_size * self.accumulation_steps

    @property
    def run_id(self) -> str:
        """A folder name: readable, and unique to the settings."""
        # Defaults are left out, so that ids stay the same when a later version adds a setting.
        defaults = RunConfig().to_dict()
        changed = {k: v for k, v in self.to_dict().items() if v != defaults[k]}
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
        dataset = re.sub(r"[^A-Za-z0-9]+", "-", self.dataset).strip("-")[-40:]
        sizes = f"{self.batch_size}x{self.accumulation_steps}"
        return f"{dataset}_{sizes}_{self.norm}_seed{self.seed}_{digest}"


def _as_kind(name: str, value: Any, kind: Any) -> Any:
    """`value`, checked to be of the annotated `kind`; converted where nothing is lost."""
    if choices := get_args(kind):
        if isinstance(value, str) and value in choices:
            return value
        raise InputError(f"{name} = {value!r}, but it must be one of: {', '.join(choices)}")
    general = {int: Integral, float: Real}.get(kind)
    if general and isinstance(value, general) and not isinstance(value, bool):
        value = kind(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        hint = ""
        if isinstance(value, str):
            wanted = "with papermill write True or False"
            wanted = wanted if kind is bool else "in YAML write 1.0e-3, not 1e-3"
            hint = f"; it is text: leave out the quotes, and {wanted}"
        raise InputError(f"{name} = {value!r}, but it must be {words[kind]}{hint}")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{name} = {value!r}, but it must be finite")
    return value
