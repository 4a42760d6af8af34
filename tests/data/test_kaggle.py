"""Kaggle's files, read and written, and what follows where the test images' classes are unknown."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nbutils import InputError, RunConfig, load_dataset, load_runs, plots, save_run, train
from nbutils.analysis.effects import load_answers
from nbutils.analysis.pick import pick
from nbutils.analysis.summary import format_table, summary_table
from nbutils.data.dataset import Dataset, Split
from nbutils.data.kaggle import (
    TEST_COLUMNS,
    TRAIN_COLUMNS,
    read_test,
    read_train,
    write_dataset,
    write_submission,
)
from nbutils.studies.record import load_predictions, read_record
from nbutils.studies.reference import export_runs
from nbutils.studies.status import run_status
from nbutils.studies.study import PlannedRun, Study

TINY = RunConfig(batch_size=64, epochs=1, device="cpu", norm="none")  # shrunken for speed


@pytest.fixture(scope="module")
def folder(few_digits, tmp_path_factory):
    """350 rows to train and validate on, 50 to predict."""
    folder = tmp_path_factory.mktemp("kaggle")
    write_dataset(folder, few_digits)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    data = load_dataset(f"kaggle:{folder}")
    return train(replace(TINY, dataset=data.name), data, progress=False)


def test_what_was_written_is_read(few_digits, folder):
    images, labels = read_train(folder / "train.csv")
    splits = (few_digits.train, few_digits.validation)
    assert torch.equal(images, torch.cat([split.images for split in splits]))
    assert torch.equal(labels, torch.cat([split.labels for split in splits]))
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(read_test(folder / "test.csv"), few_digits.test.images)


def test_the_files_are_as_kaggles(few_digits, folder):
    header, first, *_ = (folder / "train.csv").read_bytes().split(b"\n")
    assert header.decode() == ",".join(["label", *(f"pixel{n}" for n in range(784))])
    pixels = few_digits.train.images[0].flatten().tolist()
    assert first.decode() == ",".join(map(str, [few_digits.train.labels[0].item(), *pixels]))
    header, *rows, end = (folder / "test.csv").read_bytes().split(b"\n")
    assert header.decode() == ",".join(f"pixel{n}" for n in range(784))
    assert (len(rows), end) == (50, b"")


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    labels=arrays(np.int64, st.integers(1, 3), elements=st.integers(0, 9)),
    seed=st.integers(0, 99),
    extreme=st.sampled_from([0, 9, 99, 255]),
)
def test_any_images_are_read_back_bitwise(tmp_path, labels, seed, extreme):
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 1, 28, 28), np.uint8)
    images[:, 0, ::27, ::27] = extreme
    split = Split(torch.from_numpy(images), torch.from_numpy(labels))
    nothing = Split(split.images[:0], split.labels[:0])
    write_dataset(tmp_path, Dataset("any", split, nothing, split, tuple("0123456789")))
    read_images, read_labels = read_train(tmp_path / "train.csv")
    assert torch.equal(read_images, split.images)
    assert torch.equal(read_labels, split.labels)
    assert torch.equal(read_test(tmp_path / "test.csv"), split.images)


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.removesuffix(b"\n"),
        lambda text: text.replace(b"\n7,", b"\n0000000000000000000000000007,"),
    ],
    ids=["Windows", "no last newline", "leading zeros"],
)
def test_other_spellings_of_the_same_values(tmp_path, rewrite):
    path = tmp_path / "train.csv"
    path.write_bytes(rewrite(csv(TRAIN_COLUMNS)))
    images, labels = read_train(path)
    assert labels.tolist() == [7, 7, 7]
    assert images.flatten(1).tolist() == [[200] * 784] * 3


def csv(columns, rows=3):
    """A sound file: label 7 and pixels 200, in every row."""
    row = ",".join("7" if name == "label" else "200" for name in columns)
    return "\n".join([",".join(columns), *[row] * rows, ""]).encode()


def with_field(row, column, field, columns=TRAIN_COLUMNS):
    """A file with one field, of a data row from 1, or of the header (row 0), replaced."""
    lines = [line.split(b",") for line in csv(columns).split(b"\n")]
    lines[row][list(columns).index(column)] = field
    return b"\n".join(b",".join(line) for line in lines)


def with_line(number, change):
    """A file with one line changed; number 1 is the header."""
    lines = csv(TRAIN_COLUMNS).split(b"\n")
    lines[number - 1] = change(lines[number - 1])
    return b"\n".join(lines)


def with_columns(names):
    return csv(dict.fromkeys(names))


PIXELS = list(TEST_COLUMNS)
VALUE = "is not a whole number from 0 to"
FAULTS = {
    "empty file": (b"", "is empty"),
    "only a header": (csv(TRAIN_COLUMNS, rows=0), "has a line of column names, but no rows"),
    "no header": (csv(TRAIN_COLUMNS).partition(b"\n")[2], "line 1: column 1 is '7', but it must"),
    "missing label": (csv(TEST_COLUMNS), "line 1: column 1 is 'pixel0', but it must be 'label'"),
    "missing pixel": (
        with_columns(["label", *PIXELS[:5], *PIXELS[6:]]),
        "line 1: column 7 is 'pixel6', but it must be 'pixel5'; the file has 784 columns",
    ),
    "missing last": (
        with_columns(["label", *PIXELS[:-1]]),
        "line 1: column 785, 'pixel783', is missing; the file has 784 columns, and must have 785",
    ),
    "extra column": (
        with_columns(["label", *PIXELS, "pixel784"]),
        "line 1: column 786, 'pixel784', is one too many; the file has 786 columns",
    ),
    "misnamed": (
        with_field(0, "pixel3", b"Pixel3"),
        "column 5 is 'Pixel3', but it must be 'pixel3",
    ),
    "reordered": (
        with_columns([*PIXELS[::-1], "label"]),
        "line 1: column 1 is 'pixel783', but it must be 'label'",
    ),
    "header not UTF-8": (
        with_field(0, "pixel1", b"pix\xff"),
        "line 1, column 3: the name is not UTF-8 text",
    ),
    "UTF-16": (
        csv(TRAIN_COLUMNS).decode().encode("utf-16"),
        "line 1, column 1: the name is not UTF",
    ),
    "text": (with_field(2, "pixel9", b"ink"), f"row 2 (line 3), column pixel9: 'ink' {VALUE} 255"),
    "not UTF-8": (
        with_field(2, "pixel9", b"\xe4"),
        "row 2 (line 3), column pixel9: b'\\xe4' is not UTF-8 text",
    ),
    "other digits": (with_field(1, "pixel0", "٣".encode()), f"column pixel0: '٣' {VALUE} 255"),
    "underscore": (with_field(1, "pixel0", b"1_0"), f"column pixel0: '1_0' {VALUE} 255"),
    "quoted": (with_field(1, "pixel0", b'"10"'), f"column pixel0: '\"10\"' {VALUE} 255"),
    "space": (with_field(1, "pixel0", b" 10"), f"column pixel0: ' 10' {VALUE} 255"),
    "not a number": (with_field(1, "pixel0", b"nan"), f"column pixel0: 'nan' {VALUE} 255"),
    "empty field": (
        with_field(3, "pixel783", b""),
        "row 3 (line 4), column pixel783: the field is empty",
    ),
    "empty label": (
        with_field(1, "label", b""),
        "row 1 (line 2), column label: the field is empty",
    ),
    "fraction": (with_field(1, "pixel0", b"0.5"), f"column pixel0: '0.5' {VALUE} 255"),
    "whole, as a fraction": (with_field(1, "pixel0", b"5.0"), f"column pixel0: '5.0' {VALUE} 255"),
    "negative": (with_field(1, "pixel0", b"-1"), f"column pixel0: '-1' {VALUE} 255"),
    "256": (with_field(1, "pixel0", b"256"), f"row 1 (line 2), column pixel0: '256' {VALUE} 255"),
    "label 10": (with_field(3, "label", b"10"), f"row 3 (line 4), column label: '10' {VALUE} 9"),
    "wraps to 5 in 8 bits": (with_field(1, "pixel0", b"65541"), f"'65541' {VALUE} 255"),
    "beyond 64 bits": (with_field(1, "pixel0", b"9" * 30), f"'{'9' * 20}...' {VALUE} 255"),
    "beyond Python": (with_field(1, "pixel0", b"9" * 5000), f"'{'9' * 20}...' {VALUE} 255"),
    "short row": (
        with_line(3, lambda line: line[:-4]),
        "row 2 (line 3): it ends before column pixel783; it has 784 fields, and must have 785",
    ),
    "truncated": (
        csv(TRAIN_COLUMNS)[:-401],
        "row 3 (line 4): it ends before column pixel684; it has 685 fields",
    ),
    "long row": (
        with_line(4, lambda line: line + b",200"),
        "row 3 (line 4): it goes on after column pixel783; it has 786 fields, and must have 785",
    ),
    "long first row": (with_line(2, lambda line: b"1," + line), "row 1 (line 2): it goes on after"),
    "all rows long": (
        csv(TRAIN_COLUMNS).replace(b"\n7,", b"\n1,7,"),
        "row 1 (line 2): it goes on after",
    ),
    "trailing commas": (
        csv(TRAIN_COLUMNS).replace(b"200\n", b"200,\n"),
        "row 1 (line 2): it goes on after",
    ),
    "blank line": (with_line(3, lambda _: b""), "row 2 (line 3): it is blank; it has 0 fields"),
    "blank end": (csv(TRAIN_COLUMNS) + b"\n", "row 4 (line 5): it is blank"),
    "another separator": (csv(TRAIN_COLUMNS).replace(b",", b";"), "column 1 is 'label;pixel0;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_and_named(tmp_path, fault):
    content, message = FAULTS[fault]
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_train(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_fault_late_in_a_long_test_file_is_found(tmp_path):
    path = tmp_path / "test.csv"
    path.write_bytes(csv(TEST_COLUMNS, rows=4100))
    assert len(read_test(path)) == 4100
    path.write_bytes(path.read_bytes()[:-4] + b"999\n")
    with pytest.raises(InputError, match=r"row 4100 \(line 4101\), column pixel783: '999' is not"):
        read_test(path)


def test_missing_files_and_folders_are_named(tmp_path, folder):
    with pytest.raises(InputError, match=rf"no folder {tmp_path}/none; .*calls train.csv"):
        load_dataset(f"kaggle:{tmp_path}/none")
    (tmp_path / "train.csv").write_bytes((folder / "train.csv").read_bytes())
    with pytest.raises(InputError, match=rf"no file {tmp_path}/test.csv; .*Digit Recognizer"):
        load_dataset(f"kaggle:{tmp_path}")
    with pytest.raises(InputError, match=rf"no folder {tmp_path}/train.csv;"):
        load_dataset(f"kaggle:{tmp_path}/train.csv")
    (tmp_path / "test.csv").mkdir()
    with pytest.raises(InputError, match=r"test.csv cannot be read: Is a directory"):
        load_dataset(f"kaggle:{tmp_path}")


@pytest.mark.parametrize("name", ["kaggle:", "kaggle: "])
def test_a_name_without_a_folder_is_refused(name):
    with pytest.raises(InputError, match=r"lacks the folder of train\.csv and test\.csv"):
        load_dataset(name)


def test_the_name_without_its_colon_gets_a_hint():
    with pytest.raises(InputError, match="did you mean 'kaggle:FOLDER'"):
        load_dataset("kaggle")


def test_too_few_rows_to_validate_on_are_refused(tmp_path):
    (tmp_path / "train.csv").write_bytes(csv(TRAIN_COLUMNS, rows=9))
    (tmp_path / "test.csv").write_bytes(csv(TEST_COLUMNS))
    with pytest.raises(InputError, match=r"train.csv has 9 rows, .* at least 10"):
        load_dataset(f"kaggle:{tmp_path}")


def test_the_dataset_is_split_like_others_and_its_test_classes_are_unknown(few_digits, folder):
    data = load_dataset(f"kaggle:{folder}")
    images, labels = read_train(folder / "train.csv")
    assert data.name == f"kaggle:{folder}"
    assert torch.equal(data.validation.images, images[9::10])
    assert torch.equal(data.validation.labels, labels[9::10])
    held_out = torch.arange(350) % 10 == 9
    assert torch.equal(data.train.images, images[~held_out])
    assert torch.equal(data.train.labels, labels[~held_out])
    assert torch.equal(data.test.images, few_digits.test.images)
    assert (data.test.labels.shape, data.test.labels.dtype) == ((0,), torch.int64)
    assert data.fingerprint == load_dataset(f"kaggle:{folder}").fingerprint
    images = data.test.images.clone()
    images[-1, 0, 27, 27] ^= 1
    changed = replace(data, test=data.test._replace(images=images))
    assert changed.fingerprint != data.fingerprint


def test_a_run_without_known_test_classes_predicts_but_is_not_scored(few_digits, result):
    row = result.history.iloc[-1]
    assert math.isnan(row["test_loss"])
    assert math.isnan(row["test_accuracy"])
    assert row.drop(["test_loss", "test_accuracy"]).notna().all()
    assert result.predictions.shape == (50,)
    # The same network as trained with the classes at hand.
    known = replace(result.data, test=few_digits.test)
    other = train(result.config, known, progress=False)
    assert torch.equal(other.predictions, result.predictions)
    assert other.history["train_loss"].tolist() == result.history["train_loss"].tolist()
    assert other.history["test_accuracy"].notna().all()


def test_its_record_is_saved_loaded_and_exported(result, tmp_path):
    save_run(result, tmp_path / "runs")
    record = read_record(tmp_path / "runs" / result.config.run_id)
    assert math.isnan(record.final["test_accuracy"])
    assert record.dataset["test"] == 50
    runs = load_runs(tmp_path / "runs")
    pd.testing.assert_frame_equal(
        runs[list(result.history.columns)], result.history, check_exact=True
    )
    labels, predictions = load_predictions(tmp_path / "runs")
    assert labels.shape == (0,)
    assert (predictions[result.config.run_id] == result.predictions.numpy()).all()
    export_runs(tmp_path / "runs", tmp_path / "reference")
    pd.testing.assert_frame_equal(load_runs(tmp_path / "reference"), runs, check_exact=True)
    plan = Study("any", "any", (PlannedRun("02_train_batch_size", result.config),), "04_summary")
    (tmp_path / "runs" / "study.json").write_text(json.dumps(asdict(plan)))
    assert list(run_status(tmp_path / "runs").values()) == ["done: test accuracy unknown"]


def test_its_study_is_summed_up(result, tmp_path):
    save_run(result, tmp_path)
    other = replace(result, config=replace(result.config, batch_size=32))
    save_run(other, tmp_path)
    answers = load_answers(tmp_path)
    assert list(format_table(summary_table(answers)))[1] == "validation accuracy"
    assert set(pick(answers.runs).settings) <= {"32", "64"}


def test_its_figures_show_what_is_known(result, tmp_path):
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("agg")
    plots.use_style()
    figure, axes = plt.subplots(1, 3)
    plots.plot_history(axes[0], result.history)
    shown = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert shown == ["training accuracy", "validation accuracy"]
    save_run(result, tmp_path)
    plots.plot_accuracy(axes[1], load_runs(tmp_path), "validation_accuracy")
    lowest = result.history[["train_accuracy", "validation_accuracy"]].min(axis=None)
    assert axes[1].get_ylim()[0] == pytest.approx(lowest, abs=0.02)
    plots.plot_class_balance(axes[2], result.data)
    assert len(axes[2].get_legend().get_texts()) == 2
    figure.canvas.draw()
    plt.close(figure)


def test_a_submission_is_exactly_as_kaggle_wants_it(tmp_path):
    path = tmp_path / "new" / "submission.csv"
    assert write_submission(path, torch.tensor([7, 0, 9], dtype=torch.uint8)) == path
    assert path.read_bytes() == b"ImageId,Label\n1,7\n2,0\n3,9\n"
    write_submission(path, torch.tensor([1]))
    assert path.read_bytes() == b"ImageId,Label\n1,1\n"
    assert [each.name for each in path.parent.iterdir()] == ["submission.csv"]


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (torch.tensor([], dtype=torch.uint8), r"of shape \(0,\), but"),
        (torch.tensor([1.0]), r"torch.float32 of shape \(1,\), but they must be whole numbers"),
        (torch.tensor([True]), r"torch.bool"),
        (torch.tensor([[1]]), r"of shape \(1, 1\)"),
        (torch.tensor([3, 10, 11]), "the prediction of image 2 is 10, but it must be from 0 to 9"),
        (torch.tensor([3, 9, -1]), "the prediction of image 3 is -1"),
    ],
)
def test_other_predictions_are_refused_and_nothing_is_written(tmp_path, predictions, message):
    path = tmp_path / "submission.csv"
    path.write_text("an earlier one")
    with pytest.raises(InputError, match=message):
        write_submission(path, predictions)
    assert path.read_text() == "an earlier one"
    assert list(tmp_path.iterdir()) == [path]
