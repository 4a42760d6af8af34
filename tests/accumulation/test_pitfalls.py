import pytest
import torch
from torch import nn
from training_loops import loop

from nbutils.accumulation.pitfalls import gradient_errors, measure_damage


def test_gradient_errors_of_a_short_last_window():
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    batches = list(zip(x.split(4), y.split(4), strict=True))  # 10 micro-batches: 8 + 2
    before = model.weight.detach().clone()
    right = gradient_errors(loop(), model, batches, 8)
    assert right == pytest.approx([0, 0] * 2, abs=1e-12)
    wrong = gradient_errors(loop(divisor=lambda *_: 32), model, batches, 8)
    assert wrong == pytest.approx([0, 0.75] * 2, abs=1e-12)
    assert torch.equal(model.weight, before)


def test_the_damage_of_each_loop_is_measured(few_digits):
    loops = {"right": loop(), "never divided": loop(divisor=lambda *_: 1)}
    table = measure_damage(loops, few_digits, seeds=2, epochs=1)
    assert table["loop"].tolist() == ["right", "never divided"] * 2
    errors = table.groupby("loop")["gradient_error"].max()
    assert errors["right"] < 1e-4
    assert errors["never divided"] == pytest.approx(127, rel=1e-3)
    assert table["accuracy"].between(0, 1).all()
