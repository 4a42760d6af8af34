"""Kaggle's files, read and written, and what follows where the test images' classes are unknown."""

import gzip
import io
import math
import zipfile
from dataclasses import replace

import pytest
import torch

from nbutils import InputError, RunConfig, load_dataset, save_run, train
from nbutils.data.kaggle import (
    TEST_COLUMNS,
    TRAIN_COLUMNS,
    read_test,
    read_train,
    write_dataset,
    write_submission,
)
from nbutils.studies.record import read_record, read_runs

TINY = RunConfig(batch_size=64, epochs=1, device="cpu", norm="none")  # shrunken for speed


@pytest.fixture(scope="module")
def folder(few_digits, tmp_path_factory):
    """350 rows to train and validate on, 50 to predict."""
    folder = tmp_path_factory.mktemp("kaggle")
    write_dataset(folder, few_digits)
    return folder


def csv(columns, rows=3):
    """A sound file: label 7 and pixels 200, in every row."""
    row = ",".join("7" if name == "label" else "200" for name in columns)
    return "\n".join([",".join(columns), *[row] * rows, ""]).encode()


def with_field(row, column, field):
    """A file with one field replaced, of a data row from 1 or of the header (row 0)."""
    lines = [line.split(b",") for line in csv(TRAIN_COLUMNS).split(b"\n")]
    lines[row][list(TRAIN_COLUMNS).index(column)] = field
    return b"\n".join(b",".join(line) for line in lines)


def test_files_are_as_kaggles_and_are_read_back_bitwise(few_digits, folder):
    header, first, *_ = (folder / "train.csv").read_bytes().split(b"\n")
    assert header.decode() == ",".join(["label", *(f"pixel{n}" for n in range(784))])
    pixels = few_digits.train.images[0].flatten().tolist()
    assert first.decode() == ",".join(map(str, [few_digits.train.labels[0].item(), *pixels]))
    images, labels = read_train(folder / "train.csv")
    both = (few_digits.train, few_digits.validation)
    assert torch.equal(images, torch.cat([split.images for split in both]))
    assert torch.equal(labels, torch.cat([split.labels for split in both]))
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(read_test(folder / "test.csv"), few_digits.test.images)


def zipped(content, name="train.csv"):
    """A zip of one file as macOS makes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._train.csv", b"\0")
        archive.writestr(f"digit-recognizer/old/{name}", csv(TRAIN_COLUMNS, rows=1))
        archive.writestr(f"digit-recognizer/{name}", content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", csv(TRAIN_COLUMNS).replace(b"\n", b"\r\n")),
        ("train.csv", csv(TRAIN_COLUMNS) + b"\n\n"),
        ("train.csv", csv(TRAIN_COLUMNS).replace(b"\n7,", b"\n00000000000000000000007,")),
        ("train.csv", b"\xef\xbb\xbf" + csv(TRAIN_COLUMNS)),
        (
            "train.csv",
            b'"' + csv(TRAIN_COLUMNS).replace(b",", b'","')[:-1].replace(b"\n", b'"\n"') + b'"',
        ),
        ("train.csv.gz", gzip.compress(csv(TRAIN_COLUMNS))),
        ("train.csv", zipped(csv(TRAIN_COLUMNS))),
        ("train.csv.zip", zipped(csv(TRAIN_COLUMNS))),
        ("digit-recognizer.zip", zipped(csv(TRAIN_COLUMNS))),
    ],
)
def test_other_forms_of_the_same_values(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    images, labels = read_train(tmp_path / "train.csv")
    assert labels.tolist() == [7, 7, 7]
    assert images.flatten(1).tolist() == [[200] * 784] * 3


PIXELS = list(TEST_COLUMNS)
VALUE = "is not a whole number from 0 to"
FAULTS = {
    "empty file": (b"", "is empty"),
    "only a header": (csv(TRAIN_COLUMNS, rows=0), "there must be rows"),
    "no header": (csv(TRAIN_COLUMNS).partition(b"\n")[2], "line 1: column 1 is '7', but it must"),
    "missing pixel": (
        csv(["label", *PIXELS[:5], *PIXELS[6:]]),
        "line 1: column 7 is 'pixel6', but it must be 'pixel5'; the file has 784 columns",
    ),
    "UTF-16": (csv(TRAIN_COLUMNS).decode().encode("utf-16"), "must be 'label'"),
    "another separator": (csv(TRAIN_COLUMNS).replace(b",", b";"), "column 1 is 'label;pixel0..."),
    "not UTF-8": (with_field(2, "pixel9", b"\xe4"), f"line 3, column pixel9: '\\\\xe4' {VALUE}"),
    "not a number": (with_field(1, "pixel0", b"nan"), f"column pixel0: 'nan' {VALUE} 255"),
    "empty field": (with_field(3, "pixel783", b""), f"line 4, column pixel783: '' {VALUE} 255"),
    "256": (with_field(1, "pixel0", b"256"), f"line 2, column pixel0: '256' {VALUE} 255"),
    "label 10": (with_field(3, "label", b"10"), f"line 4, column label: '10' {VALUE} 9"),
    "wraps to 5 in 8 bits": (with_field(1, "pixel0", b"65541"), f"'65541' {VALUE} 255"),
    "beyond Python": (with_field(1, "pixel0", b"9" * 5000), f"999...{'9' * 13}' {VALUE} 255"),
    "truncated": (csv(TRAIN_COLUMNS)[:-401], "line 4: it has 685 values, and must have 785"),
    "long row": (csv(TRAIN_COLUMNS)[:-1] + b",200\n", "line 4: it has 786 values"),
    "truncated gz": (gzip.compress(csv(TRAIN_COLUMNS))[:-9], "is damaged"),
    "extra column": (
        csv(TRAIN_COLUMNS).replace(b"\n", b",\n"),
        "column 786 is '', but it must not be there; the file has 786 columns",
    ),
    "a quote that is never closed": (b'"' + csv(TRAIN_COLUMNS, rows=200), "it is no CSV"),
    "zip of another file": (zipped(csv(TRAIN_COLUMNS), "a.csv"), "holds no train.csv"),
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


def test_missing_files_and_folders_are_named(tmp_path, folder):
    with pytest.raises(InputError, match=rf"no folder {tmp_path}/none; .*calls train.csv"):
        load_dataset(f"kaggle:{tmp_path}/none")
    (tmp_path / "train.csv").write_bytes((folder / "train.csv").read_bytes())
    with pytest.raises(InputError, match=rf"no file {tmp_path}/test.csv; .*test.csv.zip or digit-"):
        load_dataset(f"kaggle:{tmp_path}")
    with pytest.raises(InputError, match=rf"no folder {tmp_path}/train.csv;"):
        load_dataset(f"kaggle:{tmp_path}/train.csv")
    with pytest.raises(InputError, match=r"lacks the folder of train\.csv and test\.csv"):
        load_dataset("kaggle: ")


def test_too_few_rows_to_validate_on_are_refused(tmp_path):
    (tmp_path / "train.csv").write_bytes(csv(TRAIN_COLUMNS, rows=9))
    (tmp_path / "test.csv").write_bytes(csv(TEST_COLUMNS))
    with pytest.raises(InputError, match=r"train.csv has 9 rows, .* at least 10,"):
        load_dataset(f"kaggle:{tmp_path}")


def test_the_dataset_is_split_like_others_and_its_test_classes_are_unknown(few_digits, folder):
    data = load_dataset(f"kaggle:{folder}")
    images, labels = read_train(folder / "train.csv")
    assert data.name == f"kaggle:{folder}"
    held_out = torch.arange(350) % 10 == 9
    for split, chosen in ((data.validation, held_out), (data.train, ~held_out)):
        assert torch.equal(split.images, images[chosen])
        assert torch.equal(split.labels, labels[chosen])
    assert torch.equal(data.test.images, few_digits.test.images)
    assert (data.test.labels.shape, data.test.labels.dtype) == ((0,), torch.int64)


def test_a_run_without_known_test_classes_predicts_but_is_not_scored(few_digits, folder, tmp_path):
    data = load_dataset(f"kaggle:{folder}")
    result = train(replace(TINY, dataset=data.name), data, progress=False)
    row = result.history.iloc[-1]
    assert row[["test_loss", "test_accuracy"]].isna().all()
    assert row.drop(["test_loss", "test_accuracy"]).notna().all()
    # The same network as trained with the classes at hand.
    other = train(result.config, replace(data, test=few_digits.test), progress=False)
    assert torch.equal(other.predictions, result.predictions)
    assert other.history["test_accuracy"].notna().all()
    save_run(result, tmp_path)
    record = read_record(tmp_path / result.config.run_id)
    assert math.isnan(record["final"]["test_accuracy"])
    assert record["dataset"]["test"] == 50
    labels, late = read_runs(tmp_path).labels, read_runs(tmp_path).predictions
    assert labels.shape == (0,)
    assert (late[result.config.run_id][-1] == result.predictions.numpy()).all()


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
        (torch.tensor([], dtype=torch.uint8), "there are no predictions"),
        (torch.tensor([1.0]), "the prediction of image 1 is 1.0, but it must be a whole number"),
        (torch.tensor([True]), "the prediction of image 1 is True, but"),
        (torch.tensor([[1]]), r"the prediction of image 1 is \[1\], but"),
        (torch.tensor([3, 10, 11]), "the prediction of image 2 is 10, but"),
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
