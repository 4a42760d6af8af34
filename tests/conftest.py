from dataclasses import replace

import pytest
import torch
from hypothesis import settings

from nbutils.data.dataset import Dataset
from nbutils.data.sources import load_dataset
from nbutils.paths import data_folder

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # A download that failed leaves an empty folder.
    if item.get_closest_marker("mnist") and not any((data_folder() / "MNIST").glob("raw/t10k-*")):
        pytest.skip(f"the full MNIST files are not in {data_folder()}")


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("mnist-5k")


@pytest.fixture(scope="session")
def few_digits(digits: Dataset) -> Dataset:
    """Shrunken for speed: 300 images to train on, 50 to validate, 50 to test."""
    validation, test = (
        split.at(torch.linspace(0, len(split.labels) - 1, 50).long())  # spread over the classes
        for split in (digits.validation, digits.test)
    )
    return replace(digits.subset(300), name="few-digits", validation=validation, test=test)
