"""What batch size and gradient accumulation do to a classifier: the code behind the notebooks.

The names below are imported when first used, so that a process that only reads records or starts
notebooks does not wait for torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Dataset": "data.dataset",
    "DigitCNN": "training.model",
    "InputError": "errors",
    "RunConfig": "training.config",
    "RunResult": "training.result",
    "accumulate_gradient": "accumulation.window",
    "advise": "advise.advice",
    "check_accumulation": "accumulation.check",
    "largest_batch_size": "measure.largest_batch",
    "load_dataset": "data.sources",
    "load_runs": "studies.record",
    "noise_scale": "measure.noise_scale",
    "save_run": "studies.record",
    "train": "training.train",
    "train_many": "training.train",
    "windows": "accumulation.window",
    "windows_of_batches": "accumulation.window",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nbutils' has no attribute {name!r}")
    return getattr(import_module(f"nbutils.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
