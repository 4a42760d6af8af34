import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nbutils import DigitCNN, InputError, RunConfig, train
from nbutils.measure.noise_scale import noise_along_training, noise_scale

CLASSES = 3


@pytest.fixture(scope="module")
def problem():
    """A logistic regression in float64 on 40 images of 5 pixels, and what is exactly true of it."""
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


def draws(problem, sizes, count):
    """The noise scale of `count` windows of images drawn with replacement."""
    model, images, labels, *_ = problem
    generator = torch.Generator().manual_seed(1)
    losses = losses_of(model, images, labels)
    for _ in range(count):
        chosen = torch.randint(len(images), (sum(sizes),), generator=generator)
        yield noise_scale(model, chosen.split(sizes), losses)


@pytest.mark.parametrize("sizes", [[4] * 8, [4, 4, 4, 1], [9, 3, 1, 5, 2]])
def test_both_estimates_are_unbiased_whatever_the_sizes(problem, sizes):
    *_, trace, squared = problem
    table = pd.DataFrame([vars(scale) for scale in draws(problem, sizes, 500)])
    for column, exact in (("trace", trace), ("gradient_norm_squared", squared)):
        error = (table[column].mean() - exact) / table[column].sem()
        assert abs(error) < 3.5, column
        # And precise enough for the test to see a factor such as K / (K - 1), or |g|^2 for |G|^2.
        assert table[column].sem() < 0.12 * exact


def test_many_images_give_the_exact_ratio(problem):
    *_, trace, squared = problem
    (scale,) = draws(problem, [50] * 300, 1)
    assert scale.value == pytest.approx(trace / squared, rel=0.05)
    assert scale.low < trace / squared < scale.high
    assert scale.high / scale.low < 1.3


@pytest.mark.parametrize("sizes", [[16] * 16, [16] * 12 + [4] * 4])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(problem, sizes):
    *_, trace, squared = problem
    inside = [scale.low <= trace / squared <= scale.high for scale in draws(problem, sizes, 250)]
    assert 0.90 < np.mean(inside) < 0.995


@given(
    st.lists(st.integers(1, 4), min_size=3, max_size=6),
    st.integers(0, 2**31),
)
def test_it_equals_the_formulas_applied_to_the_images_gradients(sizes, seed):
    torch.manual_seed(seed)
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


@pytest.mark.parametrize("seed", range(5))
def test_without_a_mean_gradient_there_is_no_upper_end(problem, seed):
    images = problem[1]
    model = Centre(images)
    chosen = torch.randint(40, (400,), generator=torch.Generator().manual_seed(seed))
    scale = noise_scale(model, chosen.split(20), lambda chosen: model(images[chosen]))
    assert scale.trace == pytest.approx(images.var(0, correction=0).sum().item(), rel=0.5)
    assert scale.high == math.inf
    assert scale.low > 400 / 10
    assert scale.value == math.inf or scale.gradient_norm_squared > 0


def test_equal_images_make_no_noise(problem):
    model, images, labels, *_ = problem
    window = torch.zeros(12, dtype=torch.long).split(4)
    scale = noise_scale(model, window, losses_of(model, images, labels))
    assert scale.trace == pytest.approx(0, abs=1e-12)
    assert scale.value == pytest.approx(0, abs=1e-12)


def test_weights_and_gradients_stay_as_they_were(problem):
    model, images, labels, *_ = problem
    model = copy.deepcopy(model)
    model.weight.grad = torch.ones_like(model.weight)
    before = model.weight.detach().clone()
    noise_scale(model, torch.arange(12).split(4), losses_of(model, images, labels))
    assert model.weight.equal(before)
    assert model.weight.grad.equal(torch.ones_like(before))
    assert model.bias.grad is None

    with pytest.raises(ValueError, match="loss is nan"):
        noise_scale(
            model, torch.arange(12).split(4), lambda chosen: model(images[chosen])[:, 0] * math.nan
        )
    assert model.weight.grad.equal(torch.ones_like(before))


def test_frozen_and_unused_parameters_do_not_count(problem):
    model, images, labels, *_ = problem
    wider = nn.ModuleDict({"used": model, "frozen": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    wider["frozen"].requires_grad_(False)
    window = torch.arange(12).split(4)
    alone = noise_scale(model, window, losses_of(model, images, labels))
    losses = losses_of(model, images, labels)
    assert noise_scale(wider, window, losses) == alone


def test_too_few_micro_batches_are_refused(problem):
    model, images, labels, *_ = problem
    with pytest.raises(InputError, match="the window has 2 micro-batches"):
        noise_scale(model, torch.arange(8).split(4), losses_of(model, images, labels))


@pytest.mark.parametrize("norm", ["batch", "ghost"])
def test_batch_norm_is_refused(norm):
    images, labels = torch.rand(12, 1, 28, 28), torch.arange(12) % 10
    model = DigitCNN(norm)
    with pytest.raises(InputError, match=r"features\.0\.2.*statistics of a batch"):
        noise_scale(model, torch.arange(12).split(4), losses_of(model, images, labels))
    model.eval()  # then each image is normalised by the same, known statistics
    assert noise_scale(model, torch.arange(12).split(4), losses_of(model, images, labels)).trace > 0


def test_measuring_leaves_no_trace_in_the_training(few_digits):
    config = RunConfig(batch_size=50, epochs=2)
    table = noise_along_training(config, few_digits, [1, 6, 12], batch_size=10, micro_batches=5)
    assert table["update"].tolist() == [1, 6, 12]
    assert (table["images"] == 50).all()
    assert table["trace"].nunique() == 3
    history = train(config, few_digits, progress=False, engine="eager").history
    assert table["validation_accuracy"].tolist()[1:] == history["validation_accuracy"].tolist()


@pytest.mark.parametrize("updates", [[], [0], [13]])
def test_only_updates_of_the_run_can_be_measured(few_digits, updates):
    with pytest.raises(InputError, match="they must be in 1 to 12"):
        noise_along_training(RunConfig(batch_size=50, epochs=2), few_digits, updates)
