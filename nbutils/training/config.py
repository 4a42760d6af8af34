"""The settings of one run: `RunConfig`, a frozen dataclass that checks itself."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

from nbutils.errors import InputError, suggest

Norm = Literal["batch", "ghost", "group", "none"]
ModelName = Literal["small", "deep"]

# Kinds of settings: a type, what is allowed in words, and the condition.
Count = Annotated[int, "a whole number >= 1", lambda number: number >= 1]
Seed = Annotated[int, "a whole number in [0, 2**63)", lambda number: 0 <= number < 2**63]
Positive = Annotated[float, "a number > 0, and finite", lambda number: 0 < number < math.inf]
NotNegative = Annotated[float, "a number >= 0, and finite", lambda number: 0 <= number < math.inf]
Share = Annotated[float, "a number in [0, 1)", lambda number: 0 <= number < 1]
Switch = Annotated[bool, "true or false", lambda _: True]
Name = Annotated[str, "the name of a dataset", str.strip]
DEVICES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
Device = Annotated[str, '"auto", "cpu", "cuda", "cuda:N" or "mps"', DEVICES.fullmatch]


@dataclass(frozen=True)
class RunConfig:
    """The settings of one training run; InputError for a wrong type or value."""

    dataset: Name = "mnist-5k"  # that `load_dataset` knows
    batch_size: Count = 128  # images in one forward/backward pass: the micro-batch
    accumulation_steps: Count = 1  # forward/backward passes per update
    epochs: Count = 20  # passes over the training images
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Positive = 1e-3  # the peak of it with the schedule "one-cycle"
    momentum: Share = 0.0  # of "sgd"; 0 with "adam", whose betas are fixed
    weight_decay: NotNegative = 0.0  # L2 penalty, which the optimizer adds once per update
    # "one-cycle" goes up for 30 % of the updates, then down to zero.
    schedule: Literal["constant", "one-cycle"] = "constant"
    norm: Norm = "group"  # "ghost" is batch norm over at most `model.GHOST_SIZE` images
    dropout: Share = 0.4  # probability that an input of the classifier is dropped in training
    augment: Switch = False  # rotate, shift and zoom each training image at random
    # The short last window of an epoch: "step" makes an update from the images it has, divided by
    # their true number; "drop" leaves them out.
    last_window: Literal["step", "drop"] = "step"
    seed: Seed = 0  # determines initial weights, order of the images, dropout and augmentation
    device: Device = "auto"  # "auto" is CUDA where there is one, else the CPU
    # "bfloat16" is autocast; the weights stay float32.
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    model: ModelName = "small"  # three convolutions, or "deep", five: see `DigitCNN`

    def __post_init__(self) -> None:
        for name, rule in get_type_hints(RunConfig, include_extras=True).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), rule))
        if self.momentum and self.optimizer != "sgd":
            allowed = 'a setting of "sgd"; leave it 0 with "adam"'
            raise InputError(f"momentum = {self.momentum!r}, but it must be {allowed}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
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


def _checked(name: str, value: Any, rule: Any) -> Any:
    """`value` as the type of its rule, if nothing is lost and the rule allows it."""
    if get_origin(rule) is Literal:
        choices = get_args(rule)
        kind, allowed, holds = str, f"one of: {', '.join(choices)}", choices.__contains__
    else:
        kind, allowed, holds = get_args(rule)
    general = {int: Integral, float: Real}.get(kind, kind)
    if isinstance(value, general) and isinstance(value, bool) == (kind is bool) and holds(value):
        with suppress(OverflowError):  # of a whole number that no float holds
            plain = str.__str__(value) if kind is str else kind(value)  # str() names an enum
            if holds(plain):  # it may be rounded
                return plain
    hint = ""
    if isinstance(value, str) and kind is not str:
        write = (
            "with papermill write True or False"
            if kind is bool
            else "in YAML write 1.0e-3, not 1e-3"
        )
        hint = f"; it is text: leave out the quotes, and {write}"
    raise InputError(f"{name} = {value!r}, but it must be {allowed}{hint}")
