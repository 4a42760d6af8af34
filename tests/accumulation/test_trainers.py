from importlib.util import find_spec

import pytest
import torch

from nbutils.accumulation import check_accumulation
from nbutils.accumulation.check.probe import Probe
from nbutils.accumulation.check.watch import watch, watch_schedule
from nbutils.accumulation.trainers import TrainerLoop
from nbutils.report.libraries.measure import LIBRARIES, package_of


def test_steps_of_a_schedule_that_the_trainer_made_are_counted():
    probe = Probe("full")
    optimizer = torch.optim.SGD(probe.model.parameters(), probe.learning_rate)
    with watch(probe) as run:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        watch_schedule(run, schedule)
        probe.model(probe.batches[0][0]).pow(2).sum().backward()
        optimizer.step()
        schedule.step()
        schedule.step()
    assert run.schedule == [1, 1]


def test_an_epoch_that_is_not_told_is_an_error():
    with pytest.raises(ValueError, match="ended 1 epochs, not 2"):
        check_accumulation(TrainerLoop(lambda run: run.end_epoch()))


RULES = {
    "this project": set(),
    "lightning": {"equal weight", "short window"},
    "transformers, ResNetForImageClassification": {"division", "equal weight", "logged loss"},
    "accelerate": {"equal weight", "short window"},
    "keras": {"equal weight", "one epoch", "schedule"},
}


@pytest.mark.parametrize("name", RULES)
def test_the_mistakes_of_real_trainers_are_named(name, monkeypatch):
    package = package_of(name)
    if package and find_spec(package) is None:
        pytest.skip(f"{package} is not installed; it comes with the extra 'peers'")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    train, _ = LIBRARIES[name]
    assert set(check_accumulation(TrainerLoop(lambda run: train(run, None))).rules) == RULES[name]
