import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbutils import check_accumulation
from nbutils.accumulation.check import RULES, gradient_errors
from nbutils.accumulation.pitfalls import PITFALLS, classic, correct, describe, measure_damage

EXAMPLE = (torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 3)


@pytest.mark.parametrize("loop", PITFALLS, ids=lambda loop: loop.__name__)
def test_each_pitfall_breaks_its_rule_and_no_other(loop):
    assert check_accumulation(loop).rules == [PITFALLS[loop]]


def test_every_rule_has_a_pitfall():
    # A window of the wrong length and batch norm have tests of their own below.
    assert set(RULES) - set(PITFALLS.values()) == {"window length", "batch norm"}


def test_the_correct_loop_breaks_none():
    report = check_accumulation(correct)
    assert report.rules == []
    assert str(report) == "This loop breaks no rule of accumulation."


def by_hand(model, optimizer, scheduler, batches, steps, *, drop=False, clip=None, per_epoch=False):
    batches = list(batches)
    for first in range(0, len(batches), steps):
        window = batches[first : first + steps]
        if drop and len(window) < steps:
            break
        images = sum(len(y) for _, y in window)
        optimizer.zero_grad()
        for x, y in window:
            (F.cross_entropy(model(x), y, reduction="sum") / images).backward()
        if clip:
            clip(model.parameters(), 0.1)
        optimizer.step()
        if not per_epoch:
            scheduler.step()
    if per_epoch:
        scheduler.step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"drop": True},
        {"per_epoch": True},
        {"clip": torch.nn.utils.clip_grad_norm_},
        {"clip": torch.nn.utils.clip_grad_value_},
    ],
)
def test_correct_loops_of_other_kinds_break_none(options):
    report = check_accumulation(lambda *a: by_hand(*a, **options))
    assert report.rules == []
    assert ("are dropped" in str(report)) == ("drop" in options)
    assert "logged loss was not checked" in str(report)


def test_the_loop_of_the_tutorials_breaks_two_rules():
    assert check_accumulation(classic).rules == ["equal weight", "short window"]


def test_a_counter_that_runs_on_into_the_next_epoch_is_a_carry_over():
    class Loop:
        seen = 0

        def __call__(self, model, optimizer, scheduler, batches, steps):
            for x, y in batches:
                (F.cross_entropy(model(x), y) / steps).backward()
                self.seen += 1
                if self.seen % steps == 0:
                    optimizer.step()
                    optimizer.zero_grad()

    assert "one epoch" in check_accumulation(Loop()).rules


def test_an_update_after_the_first_micro_batch_is_a_wrong_window():
    def loop(model, optimizer, scheduler, batches, steps):
        for number, (x, y) in enumerate(batches):
            (F.cross_entropy(model(x), y) / steps).backward()
            if number % steps == 0:
                optimizer.step()
                optimizer.zero_grad()

    report = check_accumulation(loop)
    assert report.rules == ["window length"]
    assert "updates after 1, 3 micro-batches" in str(report)


def test_a_loop_that_never_updates():
    def loop(model, optimizer, scheduler, batches, steps):
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()

    assert "updates after no micro-batches" in str(check_accumulation(loop))


def test_a_mistake_without_a_name_is_found_all_the_same():
    def loop(model, optimizer, scheduler, batches, steps):
        def twisted(parameters, _):
            for p in parameters:
                p.grad[0] *= 2

        by_hand(model, optimizer, scheduler, batches, steps, clip=twisted)

    report = check_accumulation(loop)
    assert report.rules == ["other"]
    assert "none of the rules explains" in str(report)


def test_a_sum_that_is_never_divided():
    def loop(model, optimizer, scheduler, batches, steps):
        for first in range(0, len(batches), steps):
            optimizer.zero_grad()
            for x, y in batches[first : first + steps]:
                F.cross_entropy(model(x), y, reduction="sum").backward()
            optimizer.step()

    report = check_accumulation(loop)
    assert report.rules == ["division"]


@pytest.mark.parametrize(("norm", "rules"), [(nn.BatchNorm1d, ["batch norm"]), (None, [])])
def test_batch_norm_statistics(norm, rules):
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)]
    model = nn.Sequential(*([layers[0], norm(8), *layers[1:]] if norm else layers)).double()
    before = [p.clone() for p in model.state_dict().values()]
    report = check_accumulation(correct, model, EXAMPLE)
    assert report.rules == rules
    after = model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_bad_input_is_refused():
    model = nn.BatchNorm1d(6).double()
    with pytest.raises(ValueError, match="an example of its images and labels is needed"):
        check_accumulation(correct, model)
    with pytest.raises(ValueError, match="at least 6 images; it has 3"):
        check_accumulation(correct, model, (EXAMPLE[0][:3], EXAMPLE[1][:3]))

    def changes_images(model, optimizer, scheduler, batches, steps):
        return correct(model, optimizer, scheduler, [(x + 1, y) for x, y in batches], steps)

    with pytest.raises(ValueError, match="must pass them on as they are"):
        check_accumulation(changes_images)


def test_the_damage_of_each_pitfall_is_measured(few_digits):
    table = measure_damage(few_digits, seeds=1, epochs=1)
    assert table["loop"].tolist() == [
        loop.__name__.replace("_", " ") for loop in (correct, *PITFALLS)
    ]
    errors = table.set_index("loop")["gradient_error"]
    assert errors["correct"] < 1e-4
    assert errors["no division"] == pytest.approx(7, rel=1e-3)
    assert table["accuracy"].between(0, 1).all()


def test_a_description_shows_the_loop_and_the_verdict():
    text = describe(classic)
    assert "def classic(" in text
    assert "Broken: A short last window" in text


def test_gradient_errors_of_a_short_last_window():
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    batches = list(zip(x.split(4), y.split(4), strict=True))  # 10 micro-batches: 8 + 2
    assert gradient_errors(correct, model, batches, 8) == pytest.approx([0, 0], abs=1e-12)
    full_factor = next(loop for loop in PITFALLS if loop.__name__ == "full_factor")
    assert gradient_errors(full_factor, model, batches, 8) == pytest.approx([0, 0.75], abs=1e-12)
