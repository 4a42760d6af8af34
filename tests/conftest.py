from dataclasses import replace

import pytest
import torch
from hypothesis import settings

from nbutils.data.dataset import Dataset, Split
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


def part(split: Split, images: int) -> Split:
    """Some images of a split, spread over its classes."""
    return split.at(torch.linspace(0, len(split.labels) - 1, images).long())


@pytest.fixture(scope="session")
def few_digits(digits: Dataset) -> Dataset:
    """Shrunken for speed: 300 images to train on, 50 to validate, 50 to test."""
    fewer = {"validation": part(digits.validation, 50), "test": part(digits.test, 50)}
    return replace(digits.subset(300), name="few-digits", **fewer)
