"""Records and references: what is saved is loaded, and nothing damaged is taken for whole."""

import hashlib
import io
import itertools
import json
import os
import random
import shutil
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from nbutils import InputError, RunConfig, load_runs, save_run, train
from nbutils.paths import REFERENCE
from nbutils.studies import reference as references
from nbutils.studies.record import (
    RECORD_FILES,
    load_late_predictions,
    load_predictions,
    read_record,
)
from nbutils.studies.reference import export_runs, export_tables, load_tables, save_tables

TINY = RunConfig(batch_size=100, epochs=2, device="cpu", norm="none")  # shrunken for speed
OTHER, SHORT = replace(TINY, seed=1), replace(TINY, batch_size=25, accumulation_steps=4, epochs=1)


@pytest.fixture(scope="module")
def results(few_digits):
    return [train(config, few_digits, progress=False) for config in (TINY, OTHER, SHORT)]


@pytest.fixture(scope="module")
def saved(results, tmp_path_factory):
    """A folder of three records; to be left as it is."""
    folder = tmp_path_factory.mktemp("saved")
    for result in results:
        save_run(result, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it."""
    return shutil.copytree(saved, tmp_path / "runs")


def assert_same_runs(folder, other):
    pd.testing.assert_frame_equal(load_runs(folder), load_runs(other), check_exact=True)
    (labels, late), (other_labels, others) = map(load_late_predictions, (folder, other))
    assert labels.tolist() == other_labels.tolist()
    assert {k: v.tolist() for k, v in late.items()} == {k: v.tolist() for k, v in others.items()}


def test_what_was_saved_is_loaded(results, saved):
    runs = load_runs(saved)
    labels, late = load_late_predictions(saved)
    _, final = load_predictions(saved)
    for result in results:
        run_id, history = result.config.run_id, result.history
        rows = runs[runs["run_id"] == run_id].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows[list(history)], history, check_exact=True)
        for name, value in result.config.to_dict().items():
            assert rows[name].tolist() == [value] * len(rows), name
        assert (rows["effective_batch_size"] == 100).all()
        assert (rows["dataset_fingerprint"] == result.data.fingerprint).all()
        assert late[run_id].shape == (result.config.epochs, 50)
        assert late[run_id].dtype == np.uint8
        accuracy = (late[run_id] == labels).mean(1)
        assert accuracy.tolist() == history["test_accuracy"].tolist()
        assert final[run_id].tolist() == late[run_id][-1].tolist()
        record = read_record(saved / run_id)
        assert RunConfig.from_dict(record.config) == result.config
        assert record.final == history.iloc[-1].to_dict()
        assert record.environment["device"] == "cpu"
        assert record.environment["threads"] == 1
        assert record.environment["cuda_graph"] is False


def test_saving_again_replaces_the_earlier_record_only_when_the_new_one_is_whole(
    results, saved, folder, monkeypatch
):
    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", fail)
        with pytest.raises(OSError, match="disk full"):
            save_run(results[0], folder)
    assert_same_runs(folder, saved)
    (folder / TINY.run_id / "history.csv").write_text("damaged")
    save_run(results[0], folder)
    assert_same_runs(folder, saved)
    assert not list(folder.glob(".*"))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def forge(run, **changes):
    """Change `run.json` and renew its checksum, as no accident does."""
    content = json.loads((run / "run.json").read_text()) | changes
    content = {k: v for k, v in content.items() if v is not None and k != "checksum"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (run / "run.json").write_text(json.dumps(content | {"checksum": digest}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "run.json is missing"),
        (lambda run: (run / "predictions.npz").unlink(), "predictions.npz is missing"),
        (lambda run: flip_a_bit(run / "history.csv"), "history.csv was changed"),
        (lambda run: flip_a_bit(run / "predictions.npz"), "predictions.npz was changed"),
        (lambda run: (run / "run.json").write_text("[]"), "is damaged"),
        (lambda run: (run / "run.json").write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda run: run.rename(run.with_name(f"{run.name}-2")), "it belongs to the run"),
        (lambda run: forge(run, schema_version=3), "schema version is 3, and only 1 and 2 can be"),
        (lambda run: forge(run, comment="more"), "unexpected keyword argument 'comment'"),
        (lambda run: forge(run, dataset=None), "missing 1 required positional argument: 'dataset'"),
        (lambda run: forge(run, files={"../../secret": "0"}), "'history.csv'"),
        (lambda run: forge(run, run_id="../elsewhere"), "it belongs to the run"),
        (lambda run: forge(run, config={"momentun": 0.9}), "no setting 'momentun'; did you mean"),
    ],
)
def test_a_damaged_record_is_refused_by_name(folder, damage, message):
    damage(folder / TINY.run_id)
    (folder / SHORT.run_id / "history.csv").unlink()
    with pytest.raises(InputError) as error:
        load_runs(folder)
    first, second = str(error.value).splitlines()  # every damaged record has a line
    assert {TINY.run_id in first, SHORT.run_id in first} == {True, False}
    assert f"{SHORT.run_id} is damaged: history.csv is missing" in str(error.value)
    assert message in str(error.value)
    assert OTHER.run_id not in str(error.value)
    assert second


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_predictions_is_executed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer, run = io.BytesIO(), folder / TINY.run_id
    np.savez(buffer, predictions=np.array([Evil()], dtype=object), labels=np.zeros(1, np.uint8))
    (run / "predictions.npz").write_bytes(buffer.getvalue())
    files = json.loads((run / "run.json").read_text())["files"]
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    forge(run, files=files | {"predictions.npz": digest})
    with pytest.raises(InputError, match=r"predictions.npz holds more than arrays of numbers"):
        load_predictions(folder)
    assert not (tmp_path / "executed").exists()


def test_runs_on_different_images_are_not_mixed(results, few_digits, folder, tmp_path):
    export_runs(folder, tmp_path / "reference")
    other = replace(few_digits, test=few_digits.validation)
    stranger = replace(results[0], config=replace(TINY, seed=7), data=other)
    save_run(stranger, folder)
    run_id = stranger.config.run_id
    with pytest.raises(InputError, match=f"mixes runs on different images: .*{run_id}"):
        load_runs(folder)
    save_run(stranger, tmp_path / "others")
    with pytest.raises(InputError, match="hold runs on different images"):
        export_runs(tmp_path / "others", tmp_path / "reference")


def test_nothing_to_load(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        load_runs(tmp_path / "nowhere")
    (tmp_path / ".work").mkdir()  # unfinished work is no record
    with pytest.raises(InputError, match="no runs in"):
        load_predictions(tmp_path)


def test_an_export_grows_a_reference_that_is_loaded_as_the_runs_were(results, saved, tmp_path):
    reference = tmp_path / "reference"
    for number, part in enumerate((results[:2], results[1:])):
        for result in part:
            save_run(result, tmp_path / str(number))
        export_runs(tmp_path / str(number), reference)
    assert_same_runs(reference, saved)
    before = {path.name: path.read_bytes() for path in reference.iterdir()}
    export_runs(saved, reference)
    assert {path.name: path.read_bytes() for path in reference.iterdir()} == before
    assert sorted(before) == ["environment.json", "history.csv", "predictions.npz", "runs.csv"]


def test_older_records_and_references_are_read(results, folder, tmp_path):
    """They hold the final predictions only."""
    run = folder / TINY.run_id
    with np.load(run / "predictions.npz") as arrays:
        labels, late = arrays["labels"], arrays["predictions"]
    np.savez_compressed(run / "predictions.npz", labels=labels, predictions=late[-1])
    digest = hashlib.sha256((run / "predictions.npz").read_bytes()).hexdigest()
    files = json.loads((run / "run.json").read_text())["files"]
    forge(run, schema_version=1, files=files | {"predictions.npz": digest})
    export_runs(folder, tmp_path / "reference")
    for place in (folder, tmp_path / "reference"):
        assert load_late_predictions(place)[1][TINY.run_id].tolist() == [late[-1].tolist()]
        assert load_predictions(place)[1][TINY.run_id].tolist() == late[-1].tolist()
    committed = load_runs(REFERENCE / "batch-size")
    _, predictions = load_late_predictions(REFERENCE / "batch-size")
    assert set(predictions) == set(committed["run_id"])
    assert {late.shape[1] for late in predictions.values()} == {10_000}


def test_a_reference_names_no_files_outside_it(saved, tmp_path):
    reference = tmp_path / "reference"
    export_runs(saved, reference)
    content = json.loads((reference / "environment.json").read_text())
    del content["checksum"]
    content["files"]["../runs.csv"] = "0"
    (reference / "environment.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"reference is damaged: '../runs.csv' is not the name of"):
        load_runs(reference)


def test_tables_are_saved_and_exported_whole_or_not_at_all(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("the disk is full")

    table, folder = pd.DataFrame({"norm": ["none", "gruppe ä"], "x": [0.1, 2.0]}), tmp_path / "t"
    save_tables({"cost": table}, folder, "cpu")
    with pytest.raises(InputError, match="holds other tables: cost"):
        save_tables({"noise": table}, folder, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(references, "write_json", full_disk)
        with pytest.raises(OSError, match="full"):
            save_tables({"cost": table[:1]}, folder, "cpu")
    with pytest.raises(InputError, match=r"holds no whole tables: environment\.json is missing"):
        load_tables(folder)
    save_tables({"cost": table}, folder, "cpu")
    export_tables(folder, tmp_path / "reference")
    pd.testing.assert_frame_equal(load_tables(tmp_path / "reference")["cost"], table)


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
    place = draw.choice([i for i, byte in enumerate(content) if chr(byte).isdigit()])
    digit = draw.choice([d for d in b"0123456789" if d != content[place]])
    return content[:place] + bytes([digit]) + content[place + 1 :]


def swap_lines(content, draw):
    lines = content.split(b"\n")
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    return b"\n".join(lines)


DAMAGES = (flip_bit, truncate, cut_out, insert, zero_a_block, change_a_digit, swap_lines)


def record_content(run):
    record = read_record(run)
    with np.load(run / "predictions.npz") as arrays:
        predictions = {name: array.tobytes() for name, array in arrays.items()}
    return asdict(record), (run / "history.csv").read_bytes(), predictions


def reference_content(folder):
    labels, late = load_late_predictions(folder)
    environments = json.loads((folder / "environment.json").read_text())["environments"]
    arrays = {name: array.tobytes() for name, array in late.items()}
    return load_runs(folder).to_csv(), labels.tobytes(), arrays, environments


@pytest.mark.parametrize("rounds", [3, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["record", "reference"])
def test_no_corruption_is_taken_for_whole(folder, tmp_path, kind, rounds):
    target, read = folder / TINY.run_id, record_content
    files = [target / name for name in ("run.json", *RECORD_FILES)]
    if kind == "reference":
        target, read = tmp_path / "reference", reference_content
        export_runs(folder, target)
        files = sorted(target.iterdir())
    draw, before, tried, refused = random.Random(rounds), read(target), 0, 0
    for file, damage, _ in itertools.product(files, DAMAGES, range(rounds)):
        whole = file.read_bytes()
        damaged = damage(whole, draw)
        if damaged == whole:
            continue
        file.write_bytes(damaged)
        tried += 1
        try:
            assert read(target) == before, (file.name, damage.__name__)  # white space, at most
        except InputError as error:
            refused += target.name in str(error)
        file.write_bytes(whole)
    assert tried > 15 * rounds
    assert refused > 0.9 * tried
