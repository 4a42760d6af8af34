"""What readers bring: models, tensors, datasets, folders, losses; read, or refused with a cause."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from nbutils import InputError
from nbutils.advise.own_data import read_examples, read_images
from nbutils.advise.pictures import as_bytes, read_picture
from nbutils.advise.task import ClassLosses, read_task

CPU = torch.device("cpu")


def pictures(n=60, shape=(1, 8, 8), classes=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = torch.rand(classes, *shape, generator=generator)
    images = centres[labels] * 0.6 + torch.rand(n, *shape, generator=generator) * 0.4
    return (images * 255).to(torch.uint8), labels


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


class Items:
    """A dataset whose items are whatever `item` makes of an index."""

    def __init__(self, item, n=60, **attributes):
        self.item, self.n = item, n
        vars(self).update(attributes)

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return self.item(index)


IMAGES, LABELS = pictures()
NAMES = ("cat", "dog", "eel")


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ((IMAGES, LABELS), {}),
        ((IMAGES.squeeze(1).numpy(), LABELS.numpy()), {}),
        (TensorDataset(IMAGES, LABELS), {}),
        (Items(lambda i: (IMAGES[i], int(LABELS[i]), "meta")), {}),
        (Items(lambda i: {"img": IMAGES[i], "label": int(LABELS[i])}), {}),
        (Items(lambda i: {"scan": IMAGES[i], "kind": LABELS[i]}), {"columns": ("scan", "kind")}),
        (Items(lambda i: (IMAGES[i], NAMES[LABELS[i]])), {}),
        (Items(lambda i: (IMAGES[i], NAMES[LABELS[i]].encode())), {}),
        (Items(lambda i: (Image.fromarray(IMAGES[i, 0].numpy()), np.int64(LABELS[i]))), {}),
        ((IMAGES.numpy(), np.array(NAMES)[LABELS]), {}),
        ((IMAGES.flip(3).numpy()[..., ::-1], LABELS.numpy()), {}),  # negative strides
        ([IMAGES, LABELS.tolist()], {}),
        (Items(lambda i: (IMAGES[i], LABELS[i].item()), classes=3, notes="scanned"), {}),
    ],
)
def test_the_same_images_in_every_form(dataset, options):
    task = read_task(linear, dataset, **options)
    images, labels = task.data.train.items
    expected = read_images((IMAGES, LABELS)).train.items
    assert (len(task.data.classes), task.data.notes) == (3, ())
    assert images.flatten(1).equal(expected[0].flatten(1))
    assert labels.equal(expected[1])
    mean, deviation = task.losses.scaling
    assert mean == pytest.approx((images / 255).mean().item(), abs=1e-4)
    assert deviation == pytest.approx((images / 255).std().item(), abs=1e-4)


def test_the_same_tenth_of_each_class_is_for_validation_and_a_lone_image_is_told():
    dataset = torch.rand(101, 4), torch.tensor([0] * 80 + [1] * 20 + [2])
    found, again = read_images(dataset), read_images(dataset)
    assert found.validation.items[1].bincount(minlength=3).tolist() == [8, 2, 0]
    assert found.validation.items[0].equal(again.validation.items[0])
    assert found.train.items[1][:20].unique().tolist()[:2] == [0, 1]  # shuffled
    assert found.notes == ("class 2: validation has none of it, as there is one image",)


def test_a_reference_dataset_keeps_its_own_validation_images(digits):
    found = read_images("mnist-5k")
    assert found.validation.items[0].equal(digits.validation.images)
    assert found.train.items[0].equal(digits.train.images)


def test_a_dataset_made_with_seed_0_shares_no_numbers_with_the_model():
    torch.manual_seed(0)
    drawn = linear()[1].weight
    assert not read_task(linear, (IMAGES, LABELS)).make(CPU, 0)[1].weight.equal(drawn)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ((torch.rand(20, 8), torch.arange(20) / 2), "item 0: .*label is 0.0, but"),
        ((torch.rand(20, 8), torch.eye(20)), "one-hot: take labels.argmax"),
        ((torch.rand(20, 8), torch.arange(19)), r"\(20, 8\) and \(19,\), which"),
        ((torch.rand(20, 8), torch.zeros(20).long()), "all training images are of one class"),
        ((torch.rand(5, 8), torch.arange(5)), "has 5 examples; it must be 10 or more"),
        ((torch.ones(20, 8), torch.arange(20) % 2), "training images are the same"),
        ((torch.full((20, 8), math.nan), torch.arange(20) % 2), "values that are not finite"),
        (
            Items(lambda i: None if i == 7 else (IMAGES[i], 1)),
            "item 7: TypeError.* must be an image",
        ),
        (Items(lambda i: (IMAGES[i], None)), "the label is None, but labels must be whole"),
        (Items(lambda i: (IMAGES[i], np.eye(3)[0])), "one-hot: take labels.argmax"),
        (Items(lambda i: {"scan": 1, "kind": 2}), "keys scan, kind; give those"),
        (Items(lambda i: (torch.rand(1, 8, 8 + i % 2), i % 3)), r"one size: .*, 8\] .*, 9\]"),
        (Items(lambda i: (IMAGES[i], math.nan if i == 7 else "cat")), "item 7: .*label is nan"),
        (Items(lambda i: (IMAGES[i], 1 if i == 7 else "cat")), "the label 'cat' beside numbers"),
        (Items(lambda i: (IMAGES[i], [1])), r"the label is \[1\], but"),
        ((torch.rand(20, 8), torch.arange(20) + 1_700_000_000), "label is 1700000000"),
        ((torch.rand(20, 8), torch.arange(20)), "no class has two images"),
        (3, "must have a length"),
        ("mnist5k", "did you mean 'mnist-5k'"),
    ],
)
def test_images_that_cannot_be_learnt_are_refused(dataset, message):
    with pytest.raises(InputError, match=message):
        read_images(dataset)


def checker(mode, size=(16, 8)):
    """A picture with a white square in its upper left corner on black, in a mode of PIL."""
    grey = np.zeros(size, np.uint8)
    grey[:4, :4] = 255
    picture = Image.fromarray(grey)
    if mode == "alpha":
        return Image.merge("LA", (Image.new("L", picture.size), Image.fromarray(255 - grey)))
    if mode == "palette":
        return picture.convert("RGB").quantize(2)
    if mode == "turned":
        turned = picture.transpose(Image.Transpose.ROTATE_90)
        turned.getexif()[0x0112] = 6
        return turned
    if mode in ("I;16", "F"):
        values = grey.astype(np.uint16) * 257 if mode == "I;16" else grey.astype(np.float32) / 255
        return Image.fromarray(values)
    return picture.convert(mode)


@pytest.mark.parametrize(
    "mode", ["1", "L", "I", "I;16", "F", "RGB", "CMYK", "palette", "alpha", "turned"]
)
def test_a_picture_is_read_as_a_person_sees_it(mode):
    seen = as_bytes([read_picture(checker(mode))])[0]
    assert seen.shape == (3 if mode in ("RGB", "CMYK", "palette") else 1, 16, 8)
    expected = torch.zeros(16, 8, dtype=torch.uint8)
    expected[:4, :4] = 255
    assert (seen.int() - expected.int()).abs().max() <= 1


@pytest.fixture
def folder(tmp_path):
    for index, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        path = tmp_path / "all" / NAMES[label] / f"{index:03}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    return tmp_path / "all"


def test_folders_beside_the_classes_are_no_classes(folder):
    for stray in (".ipynb_checkpoints", "__MACOSX"):
        (folder / stray).mkdir()
        (folder / stray / "0.png").write_bytes(b"no picture")
    (folder / "cat" / "._000.PNG").write_bytes(b"no picture")
    assert read_images(folder).classes == list(NAMES)
    root = folder.parent / "root"
    (root / "test").mkdir(parents=True)
    with pytest.raises(InputError, match="test, which are parts of a dataset, not classes"):
        read_images(root)
    folder.rename(root / "train")
    found = read_images(root)
    assert found.classes == list(NAMES)
    assert found.notes == ("of test, train only train was read",)
    (root / "train").rename(root / "seg_train")
    (root / "test").rename(root / "test1")
    assert read_images(root.parent).classes == list(NAMES)


def test_deep_pictures_of_a_dataset_are_on_one_scale():
    values = np.random.default_rng(0).integers(0, 4096, (20, 16, 16)).astype(np.uint16)
    values[::2] //= 8
    images = read_images(Items(lambda i: (Image.fromarray(values[i]), i % 2), 20)).train.items[0]
    assert images.dtype == torch.uint8
    assert len(images.unique()) > 200
    means = images.float().flatten(1).mean(1).sort()[0]
    assert 6 < means[9:].mean() / means[:9].mean() < 10


def test_a_large_dataset_is_held_in_part_and_no_class_is_missed(monkeypatch):
    monkeypatch.setattr("nbutils.advise.own_data.HELD_BYTES", 2**15)
    images = np.arange(1024)[:, None, None, None] % 7 * np.ones((1, 1, 8, 8), np.uint8)
    found = read_images(Items(lambda i: (images[i].astype(np.uint8), i % 2), 1024))
    assert len(found.train.items[1].unique()) == 2
    made = read_examples(Items(lambda i: {"x": images[i].astype(np.uint8)}, 1024), lambda b: b)
    assert made.train.number + made.validation.number == 2**15 // 64


def test_a_list_of_tensors_is_one_of_examples():
    made = read_examples([torch.rand(4) for _ in range(60)], None)
    assert made.train.number + made.validation.number == 60


def test_texts_stay_with_their_examples():
    items = [{"x": torch.rand(4), "name": str(i)} for i in range(60)]
    batch = read_examples(items, None).train.batch(torch.arange(4))
    assert [items[int(name)]["x"][0] for name in batch["name"]] == batch["x"][:, 0].tolist()


def test_a_damaged_file_and_an_empty_class_are_named(folder):
    broken = next((folder / "dog").iterdir())
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(InputError, match=f"dog.{broken.name}: no picture"):
        read_images(folder)
    (folder / "fox").mkdir()
    with pytest.raises(InputError, match="no image in fox"):
        read_images(folder)


class Output(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = linear(), wrap

    def forward(self, images):
        logits = self.inner(images)
        return self.wrap(logits) if self.training else logits


def tied():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3))
    model[2].weight = model[1].weight
    model[3].weight.requires_grad_(False)
    return model


def normed(norm):
    return nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 3))


MODELS = {
    "tuple": lambda: Output(lambda logits: (logits, logits)),
    "mapping": lambda: Output(lambda logits: {"logits": logits}),
    "logits": lambda: Output(lambda logits: SimpleNamespace(logits=logits)),
    "lazy": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)),
    "weight_norm": lambda: normed(nn.utils.weight_norm),
    "spectral_norm": lambda: normed(nn.utils.parametrizations.spectral_norm),
    "tied": tied,
    "double": lambda: linear().double(),
    "half": lambda: linear().bfloat16(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_kind_are_made_alike_and_have_losses(name):
    task = read_task(MODELS[name], (IMAGES, LABELS))
    batch = task.data.train.batch(torch.arange(8))
    with torch.no_grad():
        losses = [task.losses(task.make(CPU, start), batch) for start in (0, 0, 1)]
    assert losses[0].shape == (8,)
    assert losses[0].equal(losses[1])
    assert not losses[0].equal(losses[2])


SHARED = linear()


def raising():
    return nn.Linear(8, 1 // 0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (raising, r"raised ZeroDivisionError: .*test_own_data.py, line \d+: `return nn.Linear\(8"),
        (lambda: "a model", "returned str, not a torch.nn.Module"),
        (lambda: linear().requires_grad_(False), "no parameters to train"),
        (lambda: SHARED, "must make a new model each time"),
        (
            lambda: linear()[:1].append(nn.Linear(64, 2)),
            r"makes Tensor of shape \(54, 2\) .* one for each of the 3 classes",
        ),
        (lambda: nn.Conv2d(1, 3, 1), r"must make logits of shape \(\d+, 3\)"),
        (lambda: nn.Linear(9, 3), r"refuses images of shape \(\d+, 1, 8, 8\)"),
        (linear(), "Sequential is given as a model; give a function"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(model, message):
    with pytest.raises(InputError, match=message):
        read_task(model, (IMAGES, LABELS))


def regression(model, batch):
    return F.mse_loss(model(batch[0]), batch[1], reduction="none").mean(1)


def test_any_training_is_read_with_its_losses_and_weights():
    data = TensorDataset(torch.rand(50, 4), torch.rand(50, 2))
    task = read_task(lambda: nn.Linear(4, 2), data, regression)
    assert (task.data.train.number, task.data.validation.number, task.noun) == (45, 5, "examples")
    assert not isinstance(task.losses, ClassLosses)
    ragged = Items(lambda i: torch.ones(1 + i % 5, 4))

    def collate(items):
        return nn.utils.rnn.pad_sequence(items, batch_first=True)

    def by_length(model, batch):
        return model(batch).mean((1, 2)), batch.sum((1, 2))

    assert read_task(lambda: nn.Linear(4, 2), ragged, by_length, collate).weighted
    with pytest.raises(InputError, match="unequal shapes need a collate function"):
        read_task(lambda: nn.Linear(4, 2), ragged, by_length)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda m, b: m(b[0]).mean(), r"one loss per example, \(45,\)"),
        (lambda m, b: None, "returned NoneType for 45 examples, but it must return a tensor"),
        (lambda m, b: (m(b[0]).mean(1), [1]), r"returned \(45,\) and list for 45"),
        (
            lambda m, b: m(b[0]).sum(1) + torch.autograd.grad(m(b[0]).sum(), m.weight)[0].sum(),
            "in evaluation mode, without gradients: RuntimeError",
        ),
    ],
)
def test_losses_that_cannot_be_used_are_refused(losses, message):
    data = TensorDataset(torch.rand(50, 4), torch.rand(50, 2))
    with pytest.raises(InputError, match=message):
        read_task(lambda: nn.Linear(4, 2), data, losses)


def test_a_collate_function_without_losses_is_refused():
    with pytest.raises(InputError, match="collate is used with losses only"):
        read_task(linear, (IMAGES, LABELS), collate=list)
