import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from nbutils import InputError, RunConfig, load_runs, records, save_run, train
from nbutils.data.dataset import Dataset
from nbutils.studies.record import (
    export_runs,
    load_predictions,
    load_tables,
    read_record,
    save_tables,
)

TINY = RunConfig(batch_size=100, epochs=2, device="cpu", norm="none")  # shrunken for speed


@pytest.fixture(scope="module")
def results(few_digits):
    configs = [TINY, replace(TINY, seed=1), replace(TINY, batch_size=25, accumulation_steps=4)]
    return [train(config, few_digits, progress=False) for config in configs]


@pytest.fixture
def folder(results, tmp_path):
    for result in results:
        save_run(result, tmp_path / "runs")
    return tmp_path / "runs"


def test_what_was_saved_is_loaded(results, folder):
    runs = load_runs(folder)
    assert set(runs["run_id"]) == {result.config.run_id for result in results}
    for result in results:
        rows = runs[runs["run_id"] == result.config.run_id].reset_index(drop=True)
        loaded = rows[list(result.history.columns)]
        pd.testing.assert_frame_equal(loaded, result.history, check_exact=True)
        for name, value in result.config.to_dict().items():
            assert rows[name].tolist() == [value] * len(rows), name
        assert (rows["effective_batch_size"] == 100).all()
        assert (rows["dataset_fingerprint"] == result.data.fingerprint).all()
        assert (rows["test_images"] == 50).all()


def test_the_record_holds_what_is_needed_to_judge_the_run(results, folder):
    record = read_record(folder / results[0].config.run_id)
    assert RunConfig.from_dict(record.config) == results[0].config
    assert record.environment["device"] == "cpu"
    assert record.environment["threads"] == 1
    assert record.environment["torch"]
    assert record.final["test_accuracy"] == results[0].history["test_accuracy"].iloc[-1]
    assert record.images_per_second > 0


def test_predictions_are_loaded_with_their_labels(results, folder):
    labels, predictions = load_predictions(folder)
    for result in results:
        mine = predictions[result.config.run_id]
        assert (mine == result.predictions.numpy()).all()
        assert (mine == labels).mean() == result.history["test_accuracy"].iloc[-1]


def assert_same_predictions(folder, other):
    (labels, predictions), (other_labels, others) = map(load_predictions, (folder, other))
    assert (labels == other_labels).all()
    assert sorted(predictions) == sorted(others)
    assert all((predictions[name] == others[name]).all() for name in predictions)


def test_an_export_is_loaded_as_the_runs_were(folder, tmp_path):
    reference = tmp_path / "reference"
    export_runs(folder, reference)
    pd.testing.assert_frame_equal(load_runs(reference), load_runs(folder), check_exact=True)
    assert_same_predictions(folder, reference)
    before = {path.name: path.read_bytes() for path in reference.iterdir()}
    export_runs(folder, reference)
    assert {path.name: path.read_bytes() for path in reference.iterdir()} == before


def test_saving_again_takes_the_place_of_the_earlier_record(results, folder):
    before = load_runs(folder)
    save_run(results[0], folder)
    pd.testing.assert_frame_equal(load_runs(folder), before)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_save_that_fails_leaves_the_earlier_record(results, folder, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    before = load_runs(folder)
    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        save_run(results[0], folder)
    pd.testing.assert_frame_equal(load_runs(folder), before)


def test_unfinished_work_is_no_record(folder):
    before = load_runs(folder)
    (folder / ".work" / "half").mkdir(parents=True)
    (folder / "study.json").write_text("{}")
    pd.testing.assert_frame_equal(load_runs(folder), before)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "run.json is missing"),
        (lambda run: (run / "history.csv").unlink(), "history.csv is missing"),
        (lambda run: (run / "predictions.npz").unlink(), "predictions.npz is missing"),
        (lambda run: truncate(run / "run.json"), "is damaged"),
        (lambda run: truncate(run / "history.csv"), "history.csv was changed"),
        (lambda run: flip_a_bit(run / "history.csv"), "history.csv was changed"),
        (lambda run: flip_a_bit(run / "predictions.npz"), "predictions.npz was changed"),
        (lambda run: change_json(run / "run.json", images_per_second=1e9), "run.json was changed"),
        (lambda run: change_json(run / "run.json", schema_version=99), "schema version is 99"),
        (lambda run: (run / "run.json").write_text("[]"), "is damaged"),
        (lambda run: (run / "run.json").write_text(""), "is damaged"),
        (lambda run: (run / "run.json").write_bytes(b"\xff\xfe"), "is damaged"),
    ],
)
def test_a_damaged_record_is_refused_by_name(results, folder, damage, message):
    run_id = results[1].config.run_id
    damage(folder / run_id)
    with pytest.raises(InputError, match=rf"{run_id} is damaged.*|.*") as error:
        load_runs(folder)
    assert message in str(error.value)
    assert run_id in str(error.value)
    assert results[0].config.run_id not in str(error.value)


def test_a_record_under_another_name_is_refused(results, folder):
    (folder / results[1].config.run_id).rename(folder / "best")
    with pytest.raises(InputError, match="belongs to the run"):
        load_runs(folder)


def test_every_damaged_record_is_named(results, folder):
    for result in results[:2]:
        (folder / result.config.run_id / "history.csv").unlink()
    with pytest.raises(InputError) as error:
        load_runs(folder)
    assert all(result.config.run_id in str(error.value) for result in results[:2])


def test_runs_on_different_images_are_not_mixed(few_digits, folder):
    other = Dataset(
        "other",
        few_digits.train,
        few_digits.test,
        few_digits.validation,
        few_digits.class_names,
    )
    result = train(replace(TINY, seed=7), other, progress=False)
    save_run(result, folder)
    with pytest.raises(InputError, match="mixes runs on different images"):
        load_runs(folder)
    with pytest.raises(InputError, match="mixes runs on different images"):
        load_predictions(folder)


def test_an_export_adds_to_a_reference(results, few_digits, folder, tmp_path):
    reference = tmp_path / "reference"
    first, second = tmp_path / "first", tmp_path / "second"
    for result in results[:2]:
        save_run(result, first)
    for result in results[1:]:
        save_run(result, second)
    export_runs(first, reference)
    export_runs(second, reference)
    at_once = tmp_path / "at-once"
    export_runs(folder, at_once)
    pd.testing.assert_frame_equal(load_runs(reference), load_runs(at_once), check_exact=True)
    assert_same_predictions(reference, at_once)


def test_an_export_does_not_mix_images(results, few_digits, folder, tmp_path):
    export_runs(folder, tmp_path / "reference")
    before = load_runs(tmp_path / "reference")
    other = replace(few_digits, test=few_digits.validation)
    save_run(train(TINY, other, progress=False), tmp_path / "others")
    with pytest.raises(InputError, match="hold runs on different images"):
        export_runs(tmp_path / "others", tmp_path / "reference")
    pd.testing.assert_frame_equal(load_runs(tmp_path / "reference"), before)


@pytest.mark.parametrize("name", ["runs.csv", "history.csv", "predictions.npz"])
def test_a_damaged_reference_is_refused_by_name(folder, tmp_path, name):
    reference = tmp_path / "reference"
    export_runs(folder, reference)
    flip_a_bit(reference / name)
    with pytest.raises(InputError, match=f"reference is damaged: {name} was changed"):
        load_runs(reference)


def test_tables_that_a_full_disk_cut_short_are_none_and_are_made_again(tmp_path, monkeypatch):
    table = pd.DataFrame({"a": [1, 2]})
    save_tables({"t": table}, tmp_path, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(records, "write_atomically", full_disk)
        with pytest.raises(OSError, match="full"):
            save_tables({"t": 2 * table}, tmp_path, "cpu")
    with pytest.raises(InputError, match=r"holds no whole tables: environment\.json is missing"):
        load_tables(tmp_path)
    save_tables({"t": 2 * table}, tmp_path, "cpu")
    pd.testing.assert_frame_equal(load_tables(tmp_path)["t"], 2 * table)


def full_disk(*_):
    raise OSError("the disk is full")


def test_nothing_to_load(tmp_path, folder):
    with pytest.raises(InputError, match="no folder"):
        load_runs(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no folder"):
        load_predictions(tmp_path / "nowhere")
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(InputError, match="no runs in"):
        load_runs(folder)
