"""Records and references: what is saved is loaded, and nothing damaged is taken for whole."""

import hashlib
import itertools
import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from outcomes import Evil, records_of

from nbutils import InputError, RunConfig, load_runs, save_run, train
from nbutils.paths import REFERENCE
from nbutils.studies.record import RECORD_FILES, read_record, read_runs
from nbutils.studies.reference import export, load_tables, save_tables

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


def test_what_was_saved_is_loaded(results, saved):
    runs = load_runs(saved)
    labels, late = read_runs(saved).labels, read_runs(saved).predictions
    for result in results:
        run_id, history = result.config.run_id, result.history
        rows = runs[runs["run_id"] == run_id].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows[list(history)], history, check_exact=True)
        settings = result.config.to_dict() | {
            "effective_batch_size": 100,
            "dataset_fingerprint": result.data.fingerprint,
        }
        for name, value in settings.items():
            assert rows[name].tolist() == [value] * len(rows), name
        assert late[run_id].shape == (result.config.epochs, 50)
        accuracy = (late[run_id] == labels).mean(1)
        assert accuracy.tolist() == history["test_accuracy"].tolist()
        record = read_record(saved / run_id)
        assert record["final"] == history.iloc[-1].to_dict()
        told = {key: record["environment"][key] for key in ("device", "threads", "cuda_graph")}
        assert told == {"device": "cpu", "threads": 1, "cuda_graph": False}


def test_saving_again_replaces_the_earlier_record_only_when_the_new_one_is_whole(
    results, saved, folder, monkeypatch
):
    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", fail)
        with pytest.raises(OSError, match="disk full"):
            save_run(results[0], folder)
    assert records_of(folder) == records_of(saved)
    (folder / TINY.run_id / "history.csv").write_text("damaged")
    save_run(results[0], folder)
    assert records_of(folder) == records_of(saved)
    assert not list(folder.glob(".*"))


def forge(run, **changes):
    """Change `run.json` and renew its checksums, as no accident does."""
    content = json.loads((run / "run.json").read_text())
    files = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in RECORD_FILES}
    content |= {"files": files} | changes
    content = {k: v for k, v in content.items() if v is not None and k != "checksum"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (run / "run.json").write_text(json.dumps(content | {"checksum": digest}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "run.json is missing"),
        (lambda run: (run / "history.csv").write_text("epoch\n"), "history.csv was changed"),
        (lambda run: (run / "run.json").write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda run: (run / "run.json").write_text("[]"), "is damaged"),
        (lambda run: run.rename(run.with_name(f"{run.name}-2")), "it belongs to the run"),
        (lambda run: forge(run, run_id="../elsewhere"), "it belongs to the run"),
        (lambda run: forge(run, schema_version=3), "schema version is 3, and only 1 and 2 can be"),
        (lambda run: forge(run, files={}), "history.csv was changed"),
        (lambda run: forge(run, config={"momentun": 0.9}), "no setting 'momentun'; did you mean"),
    ],
)
def test_a_damaged_record_is_refused_by_name(folder, damage, message):
    damage(folder / TINY.run_id)
    (folder / SHORT.run_id / "history.csv").unlink()
    with pytest.raises(InputError) as error:
        load_runs(folder)
    told = str(error.value)
    assert len(told.splitlines()) == 2  # every damaged record has a line
    assert TINY.run_id in told
    assert f"{SHORT.run_id} is damaged: history.csv is missing" in told
    assert message in told
    assert OTHER.run_id not in told


def test_nothing_in_predictions_is_executed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, objects = folder / TINY.run_id / "predictions.npz", np.array([Evil()], dtype=object)
    np.savez(path, predictions=objects, labels=np.zeros(1, np.uint8))
    forge(path.parent)
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        load_runs(folder)
    assert not (tmp_path / "executed").exists()


def test_runs_on_different_images_are_not_mixed(results, few_digits, folder, tmp_path):
    export(folder, tmp_path / "reference")
    other = replace(few_digits, test=few_digits.validation)
    stranger = replace(results[0], config=replace(TINY, seed=7), data=other)
    save_run(stranger, folder)
    with pytest.raises(InputError, match=f"mixes runs on different.*{stranger.config.run_id}"):
        load_runs(folder)
    save_run(replace(results[0], data=other), tmp_path / "others")  # of the same id
    with pytest.raises(InputError, match="reference hold runs on different images"):
        export(tmp_path / "others", tmp_path / "reference")


def test_an_export_grows_a_reference_that_is_loaded_as_the_runs_were(results, saved, tmp_path):
    reference = tmp_path / "reference"
    for number, part in enumerate((results[:2], results[1:])):
        for result in part:
            save_run(result, tmp_path / str(number))
        export(tmp_path / str(number), reference)
    assert records_of(reference) == records_of(saved)
    before = {path.name: path.read_bytes() for path in reference.iterdir()}
    for source in (saved, reference):
        export(source, reference)
        assert {path.name: path.read_bytes() for path in reference.iterdir()} == before
    assert sorted(before) == ["environment.json", "history.csv", "predictions.npz", "runs.csv"]


def test_older_records_and_references_are_read(folder, tmp_path):
    """They hold the final predictions only, and no settings that came later."""
    run, reference = folder / TINY.run_id, tmp_path / "reference"
    expected = load_runs(folder)
    with np.load(run / "predictions.npz") as arrays:
        labels, late = arrays["labels"], arrays["predictions"]
    np.savez_compressed(run / "predictions.npz", labels=labels, predictions=late[-1])
    config = json.loads((run / "run.json").read_text())["config"]
    del config["model"]
    forge(run, schema_version=1, micro_batch=None, config=config)
    export(folder, reference)
    pd.read_csv(reference / "runs.csv").drop(columns="model").to_csv(
        reference / "runs.csv", index=False
    )
    content = json.loads((reference / "environment.json").read_text())
    del content["checksum"]
    digest = hashlib.sha256((reference / "runs.csv").read_bytes()).hexdigest()
    content["files"]["runs.csv"] = digest
    (reference / "environment.json").write_text(json.dumps(content))
    for place in (folder, reference):
        pd.testing.assert_frame_equal(load_runs(place), expected, check_exact=True)
        assert read_runs(place).predictions[TINY.run_id].tolist() == [late[-1].tolist()]
    committed = load_runs(REFERENCE / "batch-size")
    assert set(committed["model"]) == {"small"}
    predictions = read_runs(REFERENCE / "batch-size").predictions
    assert set(predictions) == set(committed["run_id"])


def test_tables_are_loaded_and_exported_only_when_whole(saved, tmp_path):
    table, folder = pd.DataFrame({"norm": ["none", "gruppe ä"], "x": [0.1, 2.0]}), tmp_path / "t"
    with pytest.raises(InputError, match=r"is damaged: environment\.json is missing"):
        load_tables(folder)
    save_tables({"cost": table}, folder, "cpu")
    export(folder, tmp_path / "reference")
    pd.testing.assert_frame_equal(load_tables(tmp_path / "reference")["cost"], table)
    export(saved, tmp_path / "runs")
    with pytest.raises(InputError, match=r"holds runs, and .* tables"):
        export(folder, tmp_path / "runs")
    (folder / "cost.csv").write_text("norm,x\nnone,0.2\n")
    with pytest.raises(InputError, match=r"is damaged: cost\.csv was changed"):
        export(folder, tmp_path / "reference")


def flip_bit(content, place, draw):
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def cut_out(content, place, draw):
    return content[:place] + content[place + draw.randrange(1, 20) :]


def insert(content, place, draw):
    return content[:place] + draw.randbytes(draw.randrange(1, 20)) + content[place:]


def zero_a_block(content, place, _):
    return content[:place] + bytes(len(content[place : place + 64])) + content[place + 64 :]


DAMAGES = (flip_bit, cut_out, insert, zero_a_block)


@pytest.mark.parametrize("rounds", [2, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["record", "reference"])
def test_no_corruption_is_taken_for_whole(results, tmp_path, kind, rounds):
    target, folder = save_run(results[0], tmp_path / "runs"), tmp_path / "runs"
    files = [target / name for name in ("run.json", *RECORD_FILES)]
    if kind == "reference":
        target = folder = tmp_path / "reference"
        export(tmp_path / "runs", folder)
        files = sorted(folder.iterdir())
    draw, before, tried, refused = random.Random(rounds), records_of(folder), 0, 0
    for file, damage, _ in itertools.product(files, DAMAGES, range(rounds)):
        whole = file.read_bytes()
        damaged = damage(whole, draw.randrange(len(whole)), draw)
        if damaged == whole:
            continue
        file.write_bytes(damaged)
        tried += 1
        try:
            assert records_of(folder) == before, (file.name, damage)  # white space, at most
        except InputError as error:
            refused += target.name in str(error)
        file.write_bytes(whole)
    assert tried > 9 * rounds
    assert refused > 0.9 * tried
