import pytest
import torch

from nbutils.accumulation.equivalence import OPTIMIZERS, cross_entropies, drift, ladder, small_cnn


@pytest.fixture(scope="module")
def losses():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 1, 28, 28, dtype=torch.float64, generator=generator)
    return cross_entropies(images, torch.randint(10, (40,), generator=generator))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small_cnn("group").double()


def test_drift_is_zero_for_large_batches(model, losses):
    table = drift(model, "Adam", losses, 40, 16, [16], epochs=2)
    assert table["images"].tolist() == [16, 16, 8] * 2
    assert (table["weights"] == 0).all()
    assert (table["gradient"] == 0).all()


def test_drift_is_rounding_for_micro_batches_and_leaves_the_start_alone(model, losses):
    before = [p.clone() for p in model.parameters()]
    table = drift(model, "SGD", losses, 40, 16, [8, 3])
    assert table["setting"].unique().tolist() == ["2 x 8", "6 x 3"]
    assert 0 < table["weights"].max() < 1e-12
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_drift_sees_a_loss_that_is_not_the_same(model, losses):
    def twice(model, indices):
        return 2 * losses(model, indices)

    table = drift(model, "SGD", losses, 40, 16, [8], losses_accumulated=twice)
    assert table["gradient"].iloc[0] == pytest.approx(1)


def test_the_ladder_has_one_row_per_model_optimizer_and_setting(model, losses):
    table = ladder({"group": model}, losses, 40, {16: [8, 4], 15: [2]}, epochs=2)
    assert len(table) == len(OPTIMIZERS) * 3
    assert list(table.columns) == ["first gradient", "one update", "one epoch", "2 epochs"]
    assert table.index.get_level_values("setting").unique().tolist() == ["2 x 8", "4 x 4", "8 x 2"]


@pytest.mark.parametrize("norm", ["batch", "group", "none", torch.nn.InstanceNorm2d])
def test_the_small_network_takes_every_norm(norm):
    assert small_cnn(norm, dropout=0.5)(torch.randn(4, 1, 28, 28)).shape == (4, 10)
