"""What batch size and gradient accumulation do to a classifier: the code behind the notebooks.

The names below are imported when first used, so that a process that only reads records or starts
notebooks does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbutils.check import check_accumulation
    from nbutils.config import InputError, RunConfig
    from nbutils.data import Dataset, load_dataset
    from nbutils.model import DigitCNN
    from nbutils.records import load_runs, save_run
    from nbutils.training import RunResult, train, train_many

__all__ = [
    "Dataset",
    "DigitCNN",
    "InputError",
    "RunConfig",
    "RunResult",
    "check_accumulation",
    "load_dataset",
    "load_runs",
    "save_run",
    "train",
    "train_many",
]

_HOME = {
    "Dataset": "data",
    "DigitCNN": "model",
    "InputError": "config",
    "RunConfig": "config",
    "RunResult": "training",
    "check_accumulation": "check",
    "load_dataset": "data",
    "load_runs": "records",
    "save_run": "records",
    "train": "training",
    "train_many": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nbutils' has no attribute {name!r}")
    return getattr(import_module(f"nbutils.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
