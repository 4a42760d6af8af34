"""Records and references, damaged in a thousand ways: none is taken for whole."""

import hashlib
import io
import itertools
import json
import os
import random
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest

from nbutils import InputError, RunConfig, load_runs, save_run, train
from nbutils.data.dataset import Dataset
from nbutils.studies.record import (
    RECORD_FILES,
    export_runs,
    load_predictions,
    read_record,
)

TINY = RunConfig(batch_size=100, epochs=2, device="cpu", norm="none")  # shrunken for speed
ROUNDS = 60


@pytest.fixture(scope="module")
def runs(few_digits, tmp_path_factory):
    """A folder of two records."""
    folder = tmp_path_factory.mktemp("runs")
    for config in (TINY, replace(TINY, seed=1)):
        save_run(train(config, few_digits, progress=False), folder)
    return folder


def flip_bit(content, draw):
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def truncate(content, draw):
    return content[: draw.randrange(len(content))]


def cut_out(content, draw):
    start = draw.randrange(len(content))
    return content[:start] + content[start + draw.randrange(1, 20) :]


def insert(content, draw):
    place = draw.randrange(len(content))
    return content[:place] + draw.randbytes(draw.randrange(1, 20)) + content[place:]


def zero_a_block(content, draw):
    start = draw.randrange(len(content))
    return content[:start] + bytes(len(content[start : start + 64])) + content[start + 64 :]


def change_a_digit(content, draw):
    places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    place = draw.choice(places)
    digit = draw.choice([d for d in b"0123456789" if d != content[place]])
    return content[:place] + bytes([digit]) + content[place + 1 :]


def swap_lines(content, draw):
    lines = content.split(b"\n")
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    return b"\n".join(lines)


DAMAGES = (flip_bit, truncate, cut_out, insert, zero_a_block, change_a_digit, swap_lines)


def record_content(folder, run_id):
    """What a reader gets of a record."""
    record = read_record(folder / run_id)
    with np.load(folder / run_id / "predictions.npz") as arrays:
        predictions = {name: array.tobytes() for name, array in arrays.items()}
    return asdict(record), (folder / run_id / "history.csv").read_bytes(), predictions


def reference_content(folder, _):
    labels, predictions = load_predictions(folder)
    environments = json.loads((folder / "environment.json").read_text())["environments"]
    arrays = {name: array.tobytes() for name, array in predictions.items()}
    return load_runs(folder).to_csv(), labels.tobytes(), arrays, environments


def accepted_changes(folder, file, read, name, seed):
    """Damage `file` in each way, again and again.

    Returns:
        Corruptions tried, those refused, and the ways that were accepted with content changed.
    """
    draw = random.Random(seed)
    before, whole = read(folder, name), file.read_bytes()
    tried, refused, accepted = 0, 0, []
    for damage, _ in itertools.product(DAMAGES, range(ROUNDS)):
        damaged = damage(whole, draw)
        if damaged == whole:
            continue
        file.write_bytes(damaged)
        tried += 1
        try:
            if read(folder, name) != before:
                accepted.append((file.name, damage.__name__))
        except InputError as error:
            refused += (name or folder.name) in str(error)
    file.write_bytes(whole)
    assert read(folder, name) == before
    return tried, refused, accepted


def test_no_damaged_record_is_taken_for_whole(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    files = [tmp_path / "runs" / TINY.run_id / name for name in ("run.json", *RECORD_FILES)]
    results = [
        accepted_changes(tmp_path / "runs", file, record_content, TINY.run_id, seed)
        for seed, file in enumerate(files)
    ]
    assert [accepted for *_, accepted in results] == [[], [], []]
    assert sum(tried for tried, *_ in results) >= 1000
    # What is accepted changes white space in run.json, at most.
    assert all(refused > 0.95 * tried for tried, refused, _ in results)


def test_no_damaged_reference_is_taken_for_whole(runs, tmp_path):
    reference = tmp_path / "reference"
    export_runs(runs, reference)
    results = [
        accepted_changes(reference, file, reference_content, "", seed)
        for seed, file in enumerate(sorted(reference.iterdir()))
    ]
    assert [accepted for *_, accepted in results] == [[]] * 4
    assert sum(tried for tried, *_ in results) >= 1000


@pytest.fixture
def copy(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


OTHER = replace(TINY, seed=1).run_id


@pytest.mark.parametrize("name", ["run.json", *RECORD_FILES])
def test_files_swapped_between_records_are_refused(copy, name):
    mine, other = copy / TINY.run_id / name, copy / OTHER / name
    content = mine.read_bytes()
    mine.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_runs(copy)
    # Two runs may predict the same: then nothing was swapped that could be told.
    assert {run_id for run_id in (TINY.run_id, OTHER) if run_id in str(error.value)} == {
        TINY.run_id,
        OTHER,
    }


def forge(folder, **changes):
    """Change `run.json` and mend its checksum, as only ill will does."""
    content = json.loads((folder / "run.json").read_text()) | changes
    content.pop("checksum")
    content = {name: value for name, value in content.items() if value is not None}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "run.json").write_text(json.dumps(content | {"checksum": digest}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "its schema version is 2, not 1"),
        ({"schema_version": "1"}, "its schema version is '1', not 1"),
        ({"comment": "more"}, "unexpected keyword argument 'comment'"),
        ({"dataset": None}, "missing 1 required positional argument: 'dataset'"),
        ({"files": {}}, "'history.csv'"),
        ({"files": {"../../secret": "0"}}, "'history.csv'"),
        ({"run_id": "../elsewhere"}, "it belongs to the run"),
        ({"config": {"batch_size": 100}}, "it belongs to the run"),
        ({"config": {"batch_size": -1}}, "batch_size = -1, but it must be"),
        ({"config": {"momentun": 0.9}}, "no setting 'momentun'; did you mean 'momentum'?"),
        ({"config": [1]}, "is damaged"),
    ],
)
def test_a_record_of_another_make_is_refused_by_name(copy, changes, message):
    forge(copy / TINY.run_id, **changes)
    with pytest.raises(InputError) as error:
        load_runs(copy)
    assert f"{TINY.run_id} is damaged: " in str(error.value)
    assert message in str(error.value)


def test_a_record_made_on_other_images_is_refused_by_name(copy, few_digits):
    other = Dataset(
        few_digits.name,
        few_digits.train,
        few_digits.test,
        few_digits.validation,
        few_digits.class_names,
    )
    result = train(replace(TINY, seed=7), other, progress=False)
    save_run(result, copy)
    with pytest.raises(
        InputError, match=f"mixes runs on different images: .*{result.config.run_id}"
    ):
        load_runs(copy)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_predictions_is_executed(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    np.savez(buffer, predictions=np.array([Evil()], dtype=object), labels=np.zeros(1, np.uint8))
    folder = copy / TINY.run_id
    (folder / "predictions.npz").write_bytes(buffer.getvalue())
    files = json.loads((folder / "run.json").read_text())["files"]
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    forge(folder, files=files | {"predictions.npz": digest})
    with pytest.raises(InputError, match=r"predictions.npz holds more than arrays of numbers"):
        load_predictions(copy)
    assert not (tmp_path / "executed").exists()


def test_a_reference_names_no_files_outside_it(runs, tmp_path):
    reference = tmp_path / "reference"
    export_runs(runs, reference)
    content = json.loads((reference / "environment.json").read_text())
    content.pop("checksum")
    content["files"]["../runs.csv"] = "0"
    (reference / "environment.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"reference is damaged: '../runs.csv' is not the name of"):
        load_runs(reference)
