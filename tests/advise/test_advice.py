"""Advice for a reader's own classifier: input checks, measurements, the rule, the report."""

import json
import math
from dataclasses import asdict, replace

import nbformat
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import to_pil_image

from nbutils import InputError, load_runs
from nbutils.__main__ import main
from nbutils.advise.advice import (
    NEAR,
    advise,
    choose,
    format_seconds,
    load_advice,
    parse_time,
    recorded_outcome,
    relative_time,
    save_advice,
)
from nbutils.advise.own_data import batch_norms, read_classifier
from nbutils.advise.trials import RECIPES, trial_costs, trial_rates
from nbutils.measure.cost import Cost, LargestBatch
from nbutils.paths import REFERENCE

CPU = torch.device("cpu")

MODELS = """
import torch
from torch import nn
from torchvision.models import resnet18


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def adapted_resnet():
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    return model


def with_batch_norm():
    layers = nn.Conv2d(1, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(144, 10))


def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 5))


def pixelwise():
    return nn.Conv2d(1, 10, 1)


def not_finite():
    model = mlp()
    nn.init.constant_(model[1].weight, float("inf"))
    return model


def raising():
    raise RuntimeError("no weights here")


def no_model():
    return "a model"


def fixed():
    return mlp().requires_grad_(False)


def digits():
    return torch.zeros(40, 1, 28, 28), torch.arange(40) % 7


def empty():
    return []
"""


@pytest.fixture(autouse=True)
def own_models(tmp_path, monkeypatch):
    """A .py file in the current directory, as a reader would have it."""
    (tmp_path / "own_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def image_folder(tmp_path, few_digits):
    """A folder a class; grey PNGs."""
    folder = tmp_path / "images"
    for number, (image, label) in enumerate(zip(*few_digits.train, strict=True)):
        path = folder / f"class-{label}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)
    return folder


def test_an_image_folder_is_read_in_file_order_split_and_normalised(image_folder, few_digits):
    found = read_classifier("own_models:mlp", str(image_folder))
    assert found.classes == 10
    assert found.images_per_epoch == len(found.train.labels) == 270
    assert found.train.images.shape == (270, 1, 28, 28)
    assert found.train.images.mean().abs() < 1e-5
    assert (found.train.images.std() - 1).abs() < 1e-3
    by_class = few_digits.train.labels.sort(stable=True)
    assert found.validation.labels.tolist() == by_class[0][9::10].tolist()
    mean, std = found.pixel_mean_and_std
    pixels = (found.validation.images * std + mean) * 255
    original = few_digits.train.images[by_class[1][9::10]]
    assert pixels.round().to(torch.uint8).equal(original)


def test_grey_and_coloured_images_together_become_coloured(image_folder):
    path = next((image_folder / "class-3").glob("*.png"))
    to_pil_image(torch.randint(255, (3, 28, 28), dtype=torch.uint8)).save(path)
    with pytest.raises(InputError, match=r"refuses images of shape \(64, 3, 28, 28\)"):
        read_classifier("own_models:adapted_resnet", image_folder)


def test_tensors_and_pairs_and_names_give_the_same_images(few_digits):
    images, labels = few_digits.train
    whole = read_classifier("own_models:mlp", (images, labels))
    pairs = read_classifier("own_models:mlp", TensorDataset(images, labels))
    assert whole.train.images.equal(pairs.train.images)
    assert whole.validation.labels.equal(pairs.validation.labels)
    named = read_classifier("own_models:mlp", "mnist-5k")
    assert len(named.train.labels) == 3600
    assert read_classifier("own_models:mlp", "own_models:digits").classes == 7


def test_float_images_are_left_as_they_are(few_digits):
    images = few_digits.train.images / 7
    found = read_classifier("own_models:mlp", (images, few_digits.train.labels))
    assert found.pixel_mean_and_std is None
    assert found.validation.images.equal(images[9::10])


def test_of_a_dataset_too_large_to_hold_a_spread_part_is_taken(few_digits, monkeypatch):
    monkeypatch.setattr("nbutils.advise.own_data.HELD_BYTES", 100 * 4 * 784)
    found = read_classifier("own_models:mlp", tuple(few_digits.train))
    assert len(found.train.labels) + len(found.validation.labels) == 100
    assert found.images_per_epoch == 270
    assert found.train.labels[1] == few_digits.train.labels[3]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("own_models:mpl", "no attribute 'mpl'"),
        ("own_model:mlp", "No module named 'own_model'"),
        ("mlp", "must read package.module:name"),
        ("own_models:raising", "no weights here"),
        ("own_models:no_model", "returned str, not a torch.nn.Module"),
        ("own_models:fixed", "no parameters to train"),
        ("own_models:narrow", "5 logits an image, but labels go up to 9"),
        ("own_models:pixelwise", r"\(64, 10, 28, 28\).*must make logits of shape \(64, 10\)"),
        ("own_models:not_finite", "the loss of its first 64 images is nan"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(model, message, few_digits):
    with pytest.raises(InputError, match=message):
        read_classifier(model, tuple(few_digits.train))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(20, 1, 28, 28),
            torch.zeros(20).long(),
            "all training images are of one class",
        ),
        (torch.zeros(20, 1, 28, 28), torch.arange(20) - 1, "whole numbers >= 0"),
        (torch.zeros(20, 1, 28, 28), torch.arange(20) % 2 * 0.5, "whole numbers >= 0"),
        (
            torch.zeros(20, 1, 28, 28),
            torch.arange(20),
            "10 logits an image, but labels go up to 19",
        ),
        (torch.zeros(20, 1, 28, 28), torch.arange(19), r"must be \(n, ...\) and \(n,\)"),
        (torch.zeros(0, 1, 28, 28), torch.arange(0), "n >= 1"),
        (torch.zeros(5, 1, 28, 28), torch.arange(5), "there must be at least 10"),
        (torch.full((20, 1, 28, 28), math.nan), torch.arange(20) % 2, "18 images hold values"),
        (torch.zeros(20, 1, 32, 32), torch.arange(20) % 2, r"refuses images .*\(18, 1, 32, 32\)"),
    ],
)
def test_images_that_cannot_be_learnt_are_refused(images, labels, message):
    with pytest.raises(InputError, match=message):
        read_classifier("own_models:mlp", (images, labels))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("mnist5k", "did you mean 'mnist-5k'"),
        ("own_models:empty", "has no images"),
        ("own_models:raising", "no weights here"),
        (3, "must have a length"),
        ([1, 2], "must be a pair"),
        (
            [(torch.zeros(1, 8, 8), 0), (torch.zeros(1, 9, 9), 1)],
            r"shapes \(1, 8, 8\), \(1, 9, 9\)",
        ),
    ],
)
def test_datasets_that_are_none_are_refused(dataset, message):
    with pytest.raises(InputError, match=message):
        read_classifier("own_models:mlp", dataset)


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder of images for each class"):
        read_classifier("own_models:mlp", "empty")
    (tmp_path / "empty" / "cats").mkdir()
    with pytest.raises(InputError, match="cats"):
        read_classifier("own_models:mlp", "empty")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("time_budget", "soon", "time budget 'soon'"),
        ("time_budget", "0s", "must be a number > 0"),
        ("memory_budget", "lots", "memory 'lots'"),
        ("optimizer", "adem", "did you mean 'adam'"),
    ],
)
def test_settings_are_checked_first(option, value, message):
    with pytest.raises(InputError, match=message):
        advise("own_models:raising", "mnist-5k", **{option: value})


def test_times_are_read_and_written():
    assert [parse_time(text) for text in ("90s", "1.5 min", "2h", 90)] == [90, 90, 7200, 90]
    assert [format_seconds(s) for s in (0.5, 75, 7200)] == ["0.5 s", "1.25 min", "2 h"]


def costs_table(rows):
    table = pd.DataFrame(rows, columns=["batch_size", "accumulation_steps", "images_per_second"])
    table["effective_batch_size"] = table["batch_size"] * table["accumulation_steps"]
    return table


def test_the_smallest_size_that_makes_near_full_use_is_chosen():
    costs = costs_table([(8, 1, 50.0), (32, 1, 95.0), (128, 1, 100.0), (32, 4, 110.0)])
    assert choose(costs, math.inf, accumulate=True)["batch_size"] == 32
    # Where most of 32 images is one signal, the speed of larger batches is spent in vain.
    assert choose(costs, 8.0, accumulate=True)["batch_size"] == 8
    # Accumulated micro-batches are no way to an update that fits as a whole.
    assert choose(costs, math.inf, accumulate=True)["accumulation_steps"] == 1


def test_accumulation_is_chosen_only_where_the_update_does_not_fit_and_pays():
    costs = costs_table([(1, 1, 10.0), (2, 1, 18.0), (2, 2, 30.0), (2, 4, 31.0)])
    chosen = choose(costs, 1000.0, accumulate=True)
    assert (chosen["batch_size"], chosen["accumulation_steps"]) == (2, 2)
    # The update of few images is as good: what pays in speed is lost in images.
    assert choose(costs, 1.0, accumulate=True)["accumulation_steps"] == 1
    assert choose(costs, 1000.0, accumulate=False)["accumulation_steps"] == 1


speeds = st.lists(st.floats(1, 1000), min_size=1, max_size=8)


@given(speeds, st.floats(1, 1e6))
def test_no_smaller_size_is_as_near_to_the_least_time(speeds, scale):
    costs = costs_table([(2**power, 1, speed) for power, speed in enumerate(speeds)])
    times = relative_time(costs, scale)
    chosen = choose(costs, scale, accumulate=True)
    smaller = costs["batch_size"] < chosen["batch_size"]
    assert (times[smaller] > NEAR).all()
    assert times[costs["batch_size"] == chosen["batch_size"]].item() <= NEAR


def test_rates_are_judged_from_one_start_and_divergence_is_seen(few_digits):
    classifier = read_classifier("own_models:mlp", tuple(few_digits.train))
    recipe = replace(RECIPES["sgd"], rates=(1e-4, 1e-1, 1e7))
    table, left_out = trial_rates(classifier, recipe, CPU, 32, 2, 10_000.0, 20.0)
    assert table["outcome"].tolist() == ["learnt", "learnt", "diverged"]
    assert table["best"].tolist() == [False, True, False]
    assert table["within_noise"].tolist()[1:] == [True, False]
    assert left_out == []
    again, _ = trial_rates(classifier, recipe, CPU, 64, 1, 10_000.0, 20.0)
    # The same updates, in other pieces.
    assert again["validation_loss"][:2].tolist() == pytest.approx(
        table["validation_loss"][:2].tolist(), rel=1e-4
    )
    hopeless = replace(recipe, rates=(1e38,))
    with pytest.raises(InputError, match=r"not finite at any learning rate tried: 1e\+38"):
        trial_rates(classifier, hopeless, CPU, 32, 1, 10_000.0, 20.0)


def test_without_time_the_usual_rate_is_tried_and_the_rest_said_to_be_left_out(few_digits):
    classifier = read_classifier("own_models:mlp", tuple(few_digits.train))
    table, left_out = trial_rates(classifier, RECIPES["adam"], CPU, 32, 1, 1000.0, 0.0)
    assert table["learning_rate"].tolist() == [RECIPES["adam"].usual_rate]
    assert "did not reach for: 0.0001, 0.0003, 0.003" in left_out[0]


@pytest.fixture
def imagined(monkeypatch):
    """Measurements of a device on which a pass takes 10 ms and an image one, and 1 KB each."""
    made = []

    def measure(factory, images, labels, batch_size, steps, **options):
        made.append((batch_size, steps))
        seconds = steps * (0.01 + 0.001 * batch_size)
        size = batch_size * steps
        return Cost(batch_size, steps, size, 1000 * batch_size, seconds, size / seconds, "cpu")

    def largest(factory, images, labels, *, memory_budget, margin, largest, **options):
        limit = int(memory_budget * (1 - margin))
        return LargestBatch(min(largest, limit // 1000), limit, limit, {})

    monkeypatch.setattr("nbutils.advise.trials.measure", measure)
    monkeypatch.setattr("nbutils.advise.trials.largest_batch_size", largest)
    return made


def settings_of(table):
    return set(zip(table["batch_size"], table["accumulation_steps"], strict=True))


def test_costs_are_measured_up_to_what_the_images_allow(few_digits, imagined):
    classifier = read_classifier("own_models:mlp", tuple(few_digits.train))
    table, bounded, left_out = trial_costs(classifier, torch.optim.Adam, CPU, 10**6, 0.1, 60)
    assert imagined[:2] == [(8, 1), (32, 1)]
    assert settings_of(table) == {(8, 1), (16, 1), (32, 1), (8, 4)}
    assert (table["measurements"] == 3).all()
    assert not bounded
    assert left_out == []


def test_where_memory_is_the_limit_the_largest_micro_batch_is_accumulated(few_digits, imagined):
    classifier = read_classifier("own_models:mlp", tuple(few_digits.train))
    table, bounded, _ = trial_costs(classifier, torch.optim.Adam, CPU, 22_300, 0.1, 60)
    assert bounded
    assert settings_of(table) == {(8, 1), (16, 1), (20, 1), (20, 2)}
    assert table["peak_memory"].max() <= 0.9 * 22_300


def test_without_time_one_size_is_measured_and_the_rest_said_to_be_left_out(few_digits, imagined):
    classifier = read_classifier("own_models:mlp", tuple(few_digits.train))
    table, _, left_out = trial_costs(classifier, torch.optim.Adam, CPU, 10**6, 0.1, 0.0)
    assert settings_of(table) == {(8, 1)}
    assert left_out == ["batch sizes from 32 on: the time budget did not reach for them"]


def test_a_budget_too_small_for_one_image_says_what_one_needs(few_digits):
    classifier = read_classifier("own_models:mlp", tuple(few_digits.train))
    with pytest.raises(InputError, match="too little for one image, which needs"):
        trial_costs(classifier, torch.optim.Adam, CPU, 1000, 0.1, 1.0)


def test_advice_is_made_kept_and_its_loop_learns(few_digits, tmp_path):
    advice = advise("own_models:mlp", tuple(few_digits.train), time_budget="6s")
    assert advice.batch_size * advice.accumulation_steps == advice.effective_batch_size
    assert advice.accumulation_steps == 1
    assert "do not accumulate" in advice.answer
    assert advice.learning_rate in RECIPES["adam"].rates
    assert advice.peak_memory <= advice.memory_budget
    low, high = advice.seconds_per_epoch_range
    assert 0 < low <= advice.seconds_per_epoch <= high

    path = tmp_path / "advice.json"
    save_advice(advice, path)
    assert load_advice(path) == advice
    assert set(json.loads(path.read_text())) == set(asdict(advice))
    path.write_text("{}")
    with pytest.raises(InputError, match="is no advice"):
        load_advice(path)

    space = {}
    exec(advice.code, space)
    data = read_classifier("own_models:mlp", tuple(few_digits.train))
    torch.manual_seed(0)
    model = data.make(CPU)
    before = space["losses"](model, *data.train).mean().item()
    space["train"](model, TensorDataset(*data.train), epochs=3)
    assert space["losses"](model, *data.train).mean().item() < before


def test_batch_norm_is_named_and_never_accumulated(few_digits):
    data = tuple(few_digits.train)
    assert batch_norms(read_classifier("own_models:with_batch_norm", data).make(CPU)) == ["1"]
    assert len(batch_norms(read_classifier("own_models:adapted_resnet", data).make(CPU))) == 20
    advice = advise("own_models:with_batch_norm", data, time_budget=4, optimizer="sgd")
    assert advice.accumulation_steps == 1
    assert advice.noise_scale is None
    assert "put GroupNorm in its place, or do not accumulate" in advice.warnings[0]
    assert any("noise scale" in line for line in advice.not_checked)


def test_from_the_command_to_the_report(image_folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["advise", "--model", "own_models:mlp", "--dataset", str(image_folder)]
    arguments += ["--time-budget", "4s", "--memory-budget", "1GB", "--out", str(out)]
    assert main(arguments) == 0
    advice = load_advice(out / "advice.json")
    assert advice.memory_budget == 10**9
    assert advice.answer in capsys.readouterr().out
    cells = nbformat.read(out / "report.ipynb", as_version=4).cells
    assert any(advice.answer in str(cell.get("outputs")).replace("\\n", "\n") for cell in cells)
    assert "do not accumulate" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "own_models:narrow"], "5 logits"),
        (["--model", "own_models:mlp", "--time-budget", "soon"], "time budget"),
        (["--model", "own_models:mlp", "--memory-budget", "1 cup"], "memory"),
    ],
)
def test_bad_input_on_the_command_line_ends_with_status_2(options, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["advise", "--dataset", "mnist-5k", "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not out.exists()


@pytest.fixture
def advice():
    """Advice as it was recorded for the project's own network."""
    return load_advice(REFERENCE / "advice" / "mnist-5k.json")


def test_advice_is_looked_up_at_the_nearest_setting_of_a_study(advice):
    rows = []
    for size, rate, accuracies, seconds in (
        (32, 1e-3, (0.9, 0.98), 2.0),
        (32, 1e-2, (0.98, 0.98), 4.0),
        (256, 1e-3, (0.5, 0.6), 1.0),
    ):
        for seed in (0, 1):
            for epoch, accuracy in enumerate(accuracies, start=1):
                rows.append(
                    {
                        "run_id": f"{size} {rate} {seed}",
                        "optimizer": "adam",
                        "effective_batch_size": size,
                        "learning_rate": rate,
                        "seed": seed,
                        "epoch": epoch,
                        "validation_accuracy": accuracy,
                        "validation_images": 10_000,
                        "updates": 10 * epoch,
                        "images_per_epoch": 320,
                        "seconds": seconds * epoch,
                    }
                )
    runs = pd.DataFrame(rows)
    advised = replace(advice, effective_batch_size=48, learning_rate=8e-3)
    outcome = recorded_outcome(advised, runs)
    assert (outcome.effective_batch_size, outcome.learning_rate) == (32, 1e-2)
    assert outcome.within_noise
    assert outcome.seconds == outcome.cheapest_seconds == 2.0  # the faster of both rates' epochs
    assert outcome.relative_seconds == 1

    late = recorded_outcome(replace(advised, learning_rate=2e-3), runs)
    assert late.within_noise
    assert 1.9 < late.relative_seconds <= 2
    poor = recorded_outcome(replace(advised, effective_batch_size=1024), runs)
    assert not poor.within_noise
    assert math.isnan(poor.relative_seconds)
    with pytest.raises(InputError, match="no runs have the optimizer 'sgd'"):
        recorded_outcome(replace(advised, optimizer="sgd"), runs)


@pytest.mark.parametrize(
    ("dataset", "study"), [("mnist-5k", "learning-rate"), ("mnist", "batch-size")]
)
def test_the_advice_for_the_projects_network_is_good_by_the_studies(dataset, study):
    advice = load_advice(REFERENCE / "advice" / f"{dataset}.json")
    assert (advice.model, advice.dataset) == ("nbutils.model:DigitCNN", dataset)
    outcome = recorded_outcome(advice, load_runs(REFERENCE / study))
    assert outcome.within_noise
    assert outcome.relative_seconds <= 1.25
