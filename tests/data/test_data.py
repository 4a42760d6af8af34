import gzip
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision import datasets

from nbutils import InputError, load_dataset
from nbutils.data.augment import augment
from nbutils.data.dataset import VALIDATION_EVERY
from nbutils.data.sources import DATASETS
from nbutils.paths import data_folder


def assert_splits_are_sound(data, train, validation, test):
    for split, images in ((data.train, train), (data.validation, validation), (data.test, test)):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.images.shape == (images, 1, 28, 28)
        assert split.labels.shape == (images,)
        assert split.labels.unique().tolist() == list(range(10))


def test_the_embedded_digits():
    data = load_dataset("mnist-5k")
    assert_splits_are_sound(data, 3600, 400, 1000)
    for split, each in ((data.train, 360), (data.validation, 40), (data.test, 100)):
        assert torch.bincount(split.labels).tolist() == [each] * 10
    assert data.fingerprint.startswith("eaa6db8bda0a")
    splits = (data.train, data.validation, data.test)
    assert len({image.numpy().tobytes() for split in splits for image in split.images}) == 5000


def test_one_changed_pixel_changes_the_fingerprint(few_digits):
    images = few_digits.test.images.clone()
    images[-1, 0, 27, 27] ^= 1
    changed = replace(few_digits, test=few_digits.test._replace(images=images))
    assert changed.fingerprint != few_digits.fingerprint


def test_normalised_training_pixels_have_mean_0_and_deviation_1(few_digits):
    images = few_digits.normalised(few_digits.train.images, torch.device("cpu"), torch.float64)
    assert images.shape == few_digits.train.images.shape
    assert images.mean().item() == pytest.approx(0, abs=1e-12)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-12)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def mnist():
    return load_dataset("mnist")


@pytest.mark.mnist
def test_mnist_equals_torchvisions_and_may_be_decompressed(mnist, tmp_path, monkeypatch):
    assert_splits_are_sound(mnist, 54_000, 6_000, 10_000)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (data_folder() / "MNIST" / "raw").iterdir():
        if path.suffix == ".gz":
            (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        else:
            shutil.copy(path, raw)
    train, test = datasets.MNIST(tmp_path), datasets.MNIST(tmp_path, train=False)
    held_out = torch.arange(60_000) % VALIDATION_EVERY == VALIDATION_EVERY - 1
    assert torch.equal(mnist.train.images[:, 0], train.data[~held_out])
    assert torch.equal(mnist.validation.labels, train.targets[held_out])
    assert torch.equal(mnist.test.images[:, 0], test.data)
    assert torch.equal(mnist.test.labels, test.targets)
    monkeypatch.setenv("NBUTILS_DATA", str(tmp_path))
    assert load_dataset("mnist").fingerprint == mnist.fingerprint


@pytest.mark.mnist
def test_the_kaggle_deal_uses_every_digit_once(mnist):
    dealt = load_dataset("mnist-kaggle")
    assert_splits_are_sound(dealt, 37_800, 4_200, 28_000)

    def sorted_sums(data):
        splits = (data.train, data.validation, data.test)
        return torch.cat([s.images.flatten(1).sum(1) for s in splits]).sort().values

    assert torch.equal(sorted_sums(mnist), sorted_sums(dealt))


@pytest.mark.mnist
@pytest.mark.parametrize("damage", ["truncated", "one bit"])
def test_a_damaged_file_is_refused_by_name(tmp_path, monkeypatch, damage):
    shutil.copytree(data_folder() / "MNIST", tmp_path / "MNIST")
    path = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    if not path.exists():
        path = path.with_suffix("")
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[-20] ^= 1
    path.write_bytes(content if damage == "one bit" else content[:-1000])
    monkeypatch.setenv("NBUTILS_DATA", str(tmp_path))
    with pytest.raises(InputError, match=rf"{path.name} is damaged or not the official file"):
        load_dataset("mnist")


@pytest.mark.parametrize("name", ["MNIST", "KMNIST"])
def test_no_files_and_no_network_names_both_ways_out(tmp_path, monkeypatch, name):
    def fail(dataset):
        Path(dataset.raw_folder).mkdir(parents=True, exist_ok=True)
        raise URLError("no such host")

    monkeypatch.setenv("NBUTILS_DATA", str(tmp_path))
    monkeypatch.setattr(datasets.MNIST, "download", fail)
    if name == "KMNIST":  # no checksum of its decompressed files is known
        (tmp_path / name / "raw").mkdir(parents=True)
        for file, _ in datasets.KMNIST.resources:
            (tmp_path / name / "raw" / file.removesuffix(".gz")).touch()
    with pytest.raises(InputError, match=r"cannot be downloaded. Two ways out: .*'mnist-5k'"):
        load_dataset(name.lower())
    assert (tmp_path / name).exists() == (name == "KMNIST")  # no folder that is empty


def test_an_unknown_dataset_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=f"no dataset 'mnist5k'; .*{', '.join(DATASETS)}"):
        load_dataset("mnist5k")


def test_augmentation_moves_images_a_little_and_repeatably(few_digits):
    images = few_digits.normalised(few_digits.train.images, torch.device("cpu"), torch.float32)

    def augmented(seed):
        return augment(images, torch.Generator().manual_seed(seed))

    moved = augmented(0)
    assert moved.shape == images.shape
    assert torch.equal(moved, augmented(0))
    assert not torch.equal(moved, augmented(1))
    assert moved.amin() >= images.amin() - 1e-5
    # The centre of an image's ink moves by up to 10 % of 28 pixels, and a little by the zoom.
    ink, ink_before = ((each - each.amin()).squeeze(1) for each in (moved, images))
    column = torch.arange(28.0)
    shift = (ink.sum(1) @ column / ink.sum((1, 2))) - (
        ink_before.sum(1) @ column / ink_before.sum((1, 2))
    )
    assert 1 < shift.abs().max() < 4
    assert abs(shift.mean()) < 0.5
