"""What batch size and gradient accumulation do to a classifier: the code behind the notebooks.

The names below are imported when first used, so that a process that only reads records or starts
notebooks does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbutils.accumulation.check import check_accumulation
    from nbutils.accumulation.window import accumulate_gradient, windows, windows_of_batches
    from nbutils.advise.advice import advise
    from nbutils.data.dataset import Dataset
    from nbutils.data.sources import load_dataset
    from nbutils.errors import InputError
    from nbutils.measure.largest_batch import largest_batch_size
    from nbutils.measure.noise_scale import noise_scale
    from nbutils.studies.record import load_runs, save_run
    from nbutils.training.config import RunConfig
    from nbutils.training.model import DigitCNN
    from nbutils.training.result import RunResult
    from nbutils.training.train import train, train_many

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
