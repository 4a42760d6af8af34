import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbutils import DigitCNN, InputError, RunConfig, train
from nbutils.measure.along_training import noise_along_training
from nbutils.measure.noise_scale import noise_scale, noise_scale_of_batches

CLASSES = 3


@pytest.fixture(scope="module")
def problem():
    """A logistic regression in float64 on 40 images of 5 pixels, with its exact trace and |G|^2."""
    torch.manual_seed(0)
    images = torch.randn(40, 5, dtype=torch.float64)
    labels = (images[:, 0] + 0.5 * torch.randn(40) > 0).long()
    model = nn.Linear(5, CLASSES).double()
    gradients = per_image_gradients(model, images, labels)
    mean = gradients.mean(0)
    trace = (gradients - mean).square().sum() / len(images)
    return model, images, labels, trace.item(), mean.square().sum().item()


def per_image_gradients(model, images, labels):
    rows = []
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def losses_of(model, images, labels):
    return lambda chosen: F.cross_entropy(model(images[chosen]), labels[chosen], reduction="none")


def halves(batch):
    return batch.split(len(batch) // 2)


def draws(problem, sizes, count, split=None):
    """Noise scales of `count` windows of images drawn with replacement, or of split batches."""
    model, images, labels, *_ = problem
    generator = torch.Generator().manual_seed(1)
    losses = losses_of(model, images, labels)
    for _ in range(count):
        window = torch.randint(len(images), (sum(sizes),), generator=generator).split(sizes)
        if split:
            yield noise_scale_of_batches(model, window, losses, lambda b: b.split(split))
        else:
            yield noise_scale(model, window, losses)


@pytest.mark.parametrize(("sizes", "split"), [([9, 3, 1, 5, 2], None), ([10] * 4, 4)])
def test_both_estimates_are_unbiased_whatever_the_sizes(problem, sizes, split):
    *_, trace, squared = problem
    table = pd.DataFrame([vars(scale) for scale in draws(problem, sizes, 100, split)])
    for column, exact in (("trace", trace), ("gradient_norm_squared", squared)):
        error = (table[column].mean() - exact) / table[column].sem()
        assert abs(error) < 3.5, column
        # And precise enough for the test to see a factor such as K / (K - 1), or |g|^2 for |G|^2.
        assert table[column].sem() < 0.05 * exact


@pytest.mark.parametrize(
    ("sizes", "split"), [([16] * 12 + [4] * 4, None), ([16] * 6, 4)], ids=["window", "batches"]
)
def test_the_interval_covers_the_exact_ratio_about_as_often_as_it_says(problem, sizes, split):
    *_, trace, squared = problem
    scales = draws(problem, sizes, 120, split)
    inside = [scale.low <= trace / squared <= scale.high for scale in scales]
    assert 0.88 < np.mean(inside) < 0.998


@pytest.mark.parametrize(("sizes", "split"), [([50] * 60, None), ([100] * 30, 4)])
def test_many_images_give_the_exact_ratio(problem, sizes, split):
    *_, trace, squared = problem
    (scale,) = draws(problem, sizes, 1, split)
    assert scale.value == pytest.approx(trace / squared, rel=0.15)
    assert scale.low < trace / squared < scale.high < 1.8 * scale.low
    assert scale.images == 3000


def test_it_equals_the_formulas_applied_to_the_images_gradients():
    torch.manual_seed(3)
    sizes = [4, 1, 3, 2, 2]
    images = torch.randn(sum(sizes), 5, dtype=torch.float64)
    labels = torch.randint(CLASSES, (sum(sizes),))
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    gradients = per_image_gradients(model, images, labels)
    means = torch.stack([part.mean(0) for part in gradients.split(sizes)])
    mean = gradients.mean(0)
    spread = (torch.tensor(sizes) * (means - mean).square().sum(1)).sum()
    trace = spread / (len(sizes) - 1)
    squared = mean.square().sum() - trace / sum(sizes)

    window = torch.arange(sum(sizes)).split(sizes)
    scale = noise_scale(model, window, losses_of(model, images, labels))
    assert scale.trace == pytest.approx(trace.item())
    assert scale.gradient_norm_squared == pytest.approx(squared.item(), abs=1e-12)
    assert (scale.images, scale.micro_batches) == (sum(sizes), len(sizes))
    assert 0 <= scale.low <= scale.value <= scale.high


class Centre(nn.Module):
    """Its loss is half the squared distance of an image: the gradient is zero at their mean."""

    def __init__(self, images):
        super().__init__()
        self.centre = nn.Parameter(images.mean(0))

    def forward(self, images):
        return (images - self.centre).square().sum(1) / 2


def test_without_a_mean_gradient_there_is_no_upper_end(problem):
    images = problem[1]
    model = Centre(images)
    chosen = torch.randint(40, (400,), generator=torch.Generator().manual_seed(0))
    scale = noise_scale(model, chosen.split(20), lambda chosen: model(images[chosen]))
    assert scale.trace == pytest.approx(images.var(0, correction=0).sum().item(), rel=0.5)
    assert scale.high == math.inf
    assert scale.low > 400 / 10


def test_equal_images_make_no_noise(problem):
    model, images, labels, *_ = problem
    window = torch.zeros(12, dtype=torch.long).split(4)
    scale = noise_scale(model, window, losses_of(model, images, labels))
    assert scale.trace == pytest.approx(0, abs=1e-12)
    assert scale.value == pytest.approx(0, abs=1e-12)


def test_the_model_stays_as_it_was_also_after_an_error():
    images, labels = torch.rand(24, 1, 28, 28), torch.arange(24) % 10
    model = DigitCNN("batch")
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before = copy.deepcopy(model.state_dict())
    losses = losses_of(model, images, labels)
    batches = torch.arange(24).split(8)
    assert noise_scale_of_batches(model, batches, losses, halves).trace > 0
    with pytest.raises(InputError, match="not finite"):
        noise_scale_of_batches(model, batches, lambda b: losses(b) * math.nan, halves)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.classifier.weight.grad.eq(1).all()
    assert model.classifier.bias.grad is None


class Moving(nn.Module):
    """With a scalar parameter, a sparse gradient, and buffers that are replaced in each pass."""

    def __init__(self):
        super().__init__()
        self.words, self.scale = nn.EmbeddingBag(9, 3, sparse=True), nn.Parameter(torch.tensor(1.0))
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("seen", torch.zeros(0, 3))

    def forward(self, texts):
        logits = self.words(texts) * self.scale
        self.centre = 0.9 * self.centre + 0.1 * logits.detach().mean(0)
        self.seen = torch.cat([self.seen, logits.detach()])
        return logits - self.centre


def test_scalar_parameters_sparse_gradients_and_replaced_buffers():
    model, texts, labels = Moving(), torch.randint(9, (24, 4)), torch.arange(24) % 3
    losses = losses_of(model, texts, labels)
    assert noise_scale(model, torch.arange(24).split(8), losses).trace > 0
    assert model.centre.eq(0).all()
    assert model.seen.shape == (0, 3)
    for wrong in (lambda b: losses(b).mean(), lambda b: None, lambda b: (losses(b), 1)):
        with pytest.raises(InputError, match="must return one loss per image"):
            noise_scale(model, torch.arange(24).split(8), wrong)
    with pytest.raises(InputError, match="no parameters that require a gradient"):
        noise_scale(model.requires_grad_(False), torch.arange(24).split(8), losses)


def test_frozen_and_unused_parameters_do_not_count(problem):
    model, images, labels, *_ = problem
    wider = nn.ModuleDict({"used": model, "frozen": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    wider["frozen"].requires_grad_(False)
    window = torch.arange(12).split(4)
    losses = losses_of(model, images, labels)
    assert noise_scale(wider, window, losses) == noise_scale(model, window, losses)


@pytest.mark.parametrize("norm", ["batch", "ghost"])
def test_one_window_refuses_batch_norm_in_training_mode(norm):
    images, labels = torch.rand(12, 1, 28, 28), torch.arange(12) % 10
    model = DigitCNN(norm)
    with pytest.raises(InputError, match=r"features\.0\.2.*use noise_scale_of_batches"):
        noise_scale(model, torch.arange(12).split(4), losses_of(model, images, labels))
    model.eval()  # then each image is normalised by the same, known statistics
    assert noise_scale(model, torch.arange(12).split(4), losses_of(model, images, labels)).trace > 0


class Root(nn.Linear):
    """The square root has an infinite slope at 0, while its value is finite."""

    def forward(self, images):
        return (super().forward(images) * 0).abs().sqrt()


class Flat(nn.Linear):
    """Its outputs do not depend on its weights."""

    def forward(self, images):
        return super().forward(images) * 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": 2}, "2 batches, but at least 3"),
        ({"confidence": 95}, r"confidence = 95, but it must be in \(0, 1\)"),
        ({"model": Root(5, CLASSES).double()}, "a gradient is not finite"),
        ({"model": Flat(5, CLASSES).double()}, "all gradients are zero"),
    ],
)
@pytest.mark.parametrize("extra", [(), (halves,)])
def test_what_gives_no_number_is_an_error(problem, settings, message, extra):
    model, images, labels, *_ = problem
    model = settings.get("model", model)
    losses = losses_of(model, images, labels)
    batches = torch.arange(12).split(4)[: settings.get("batches", 3)]
    confidence = settings.get("confidence", 0.95)
    estimate = noise_scale_of_batches if extra else noise_scale
    with pytest.raises(InputError, match=message):
        estimate(model, batches, losses, *extra, confidence=confidence)


@pytest.mark.parametrize(
    ("sizes", "split"),
    [
        ([4, 4, 3], halves),
        ([4, 4, 4], lambda batch: [batch]),
        ([4, 4, 4], lambda batch: [batch[:1], batch[:1]]),
    ],
)
def test_batches_must_be_alike_and_split_whole(problem, sizes, split):
    model, images, labels, *_ = problem
    batches = torch.arange(sum(sizes)).split(sizes)
    with pytest.raises(InputError, match="but all must be alike"):
        noise_scale_of_batches(model, batches, losses_of(model, images, labels), split)


def test_measuring_leaves_no_trace_in_the_training(few_digits):
    config = RunConfig(batch_size=100, epochs=2, dropout=0.4)
    table = noise_along_training(config, few_digits, [1, 3, 6], batch_size=10, micro_batches=5)
    assert table["update"].tolist() == [1, 3, 6]
    assert (table["images"] == 50).all()
    assert table["trace"].nunique() == 3
    history = train(config, few_digits, progress=False).history
    assert table["validation_accuracy"].tolist()[1:] == history["validation_accuracy"].tolist()


@pytest.mark.parametrize("updates", [[], [0], [13]])
def test_only_updates_of_the_run_can_be_measured(few_digits, updates):
    with pytest.raises(InputError, match="they must be in 1 to 12"):
        noise_along_training(RunConfig(batch_size=50, epochs=2), few_digits, updates)
