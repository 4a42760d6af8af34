import pytest
import torch
from torch import nn

from nbutils.training.config import RunConfig
from nbutils.training.model import GHOST_SIZE, DigitCNN, GhostBatchNorm2d, norm_layer


@pytest.mark.parametrize("norm", ["batch", "ghost", "group", "none"])
def test_every_norm_gives_logits(norm):
    model = DigitCNN(norm=norm)
    assert model(torch.randn(5, 1, 28, 28)).shape == (5, 10)
    assert sum(p.numel() for p in model.parameters()) < 30_000


def test_ghost_norm_is_batch_norm_of_each_ghost_batch_in_turn():
    images = torch.randn(2 * GHOST_SIZE + 7, 3, 4, 4, dtype=torch.float64)
    ghost, batch = GhostBatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    expected = torch.cat([batch(piece) for piece in images.split(GHOST_SIZE)])
    assert torch.equal(ghost(images), expected)
    assert torch.equal(ghost.running_var, batch.running_var)
    assert torch.equal(ghost.eval()(images), batch.eval()(images))


@pytest.mark.parametrize(("norm", "mixes"), [("batch", True), ("group", False), ("none", False)])
def test_only_batch_norm_lets_images_of_a_batch_see_each_other(norm, mixes):
    layer = norm_layer(norm, 8).double()
    images = torch.randn(6, 8, 4, 4, dtype=torch.float64)
    together, apart = layer(images), torch.cat([layer(image) for image in images.split(1)])
    assert torch.allclose(together, apart, atol=1e-12) != mixes


def test_dropout_acts_in_training_only():
    model, images = DigitCNN(dropout=0.5), torch.randn(3, 1, 28, 28)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_the_deep_model_has_five_convolutions_and_the_same_interface():
    deep = DigitCNN("batch", model="deep")
    convolutions = [layer for layer in deep.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [16, 32, 32, 64, 64]
    assert deep(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_run_ids_of_the_small_model_are_those_from_before_there_was_another():
    assert RunConfig().run_id == "mnist-5k_128x1_group_seed0_44136fa3"
    assert RunConfig(model="deep").run_id != RunConfig().run_id
