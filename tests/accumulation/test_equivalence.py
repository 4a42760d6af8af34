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


def test_drift_is_rounding_for_micro_batches_and_leaves_the_start_alone(model, losses):
    before = [p.clone() for p in model.parameters()]
    table = drift(model, "Adam", losses, 40, 16, [16, 8, 3], epochs=2)
    assert table["setting"].unique().tolist() == ["1 x 16", "2 x 8", "6 x 3"]
    assert table["images"].tolist() == [16] * 6 + [8] * 3 + [16] * 6 + [8] * 3
    same, *apart = (rows for _, rows in table.groupby("setting"))
    assert (same[["gradient", "weights"]] == 0).all(axis=None)
    assert all(0 < rows["weights"].max() < 1e-10 for rows in apart)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_drift_sees_a_loss_that_is_not_the_same(model, losses):
    def twice(model, indices):
        return 2 * losses(model, indices)

    table = drift(model, "SGD", losses, 40, 16, [8], losses_accumulated=twice)
    assert table["gradient"].iloc[0] == pytest.approx(1)


def test_the_ladder_has_one_row_per_model_optimizer_and_setting(model, losses):
    table = ladder({"group": model}, losses, 20, {16: [8], 15: [2]}, epochs=2)
    assert list(table.columns) == ["first gradient", "one update", "one epoch", "2 epochs"]
    settings = ["2 x 8", "8 x 2"]
    assert table.index.tolist() == [("group", o, s) for o in OPTIMIZERS for s in settings]


@pytest.mark.parametrize("norm", ["batch", "none", torch.nn.InstanceNorm2d])
def test_the_small_network_takes_every_norm(norm):
    assert small_cnn(norm)(torch.randn(4, 1, 28, 28)).shape == (4, 10)
