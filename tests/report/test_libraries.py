from functools import partial
from importlib.metadata import PackageNotFoundError, version

import pandas as pd
import pytest

from nbutils.errors import InputError
from nbutils.measure.process import in_own_process
from nbutils.report import libraries
from nbutils.report.libraries import libraries_notes, libraries_table, measure, observe_all
from nbutils.report.libraries.measure import LIBRARIES, package_of

RECORD = pd.read_csv(libraries.FOLDER / "libraries.csv")
VERSIONS = pd.read_csv(libraries.FOLDER / "versions.csv", dtype=str, index_col="package")
PACKAGES = sorted({*map(package_of, LIBRARIES)} - {""})


def test_this_project_is_right_in_every_probe():
    rows = measure.observe("this project")
    assert {row["probe"]: row["verdict"] for row in rows} == dict.fromkeys(measure.PROBES, "right")


def test_the_record_has_every_library_and_probe():
    expected = [(name, probe) for name in LIBRARIES for probe in measure.PROBES]
    assert list(zip(RECORD["library"], RECORD["probe"], strict=True)) == expected
    assert len(PACKAGES) >= 8
    assert VERSIONS.loc[PACKAGES, ["version", "torch"]].notna().all(axis=None)


@pytest.mark.parametrize(
    ("library", "probe", "verdict"),
    [
        ("accelerate", "short last window", "divided by a full window"),
        ("accelerate, loader not prepared", "short last window", "carried over"),
        ("transformers, ResNetForImageClassification", "full window", "not divided"),
        ("transformers, ResNetForImageClassification", "logged loss", "multiplied by the steps"),
        ("transformers, model with num_items_in_batch", "unequal tokens", "right"),
        ("keras", "schedule", "each micro-batch"),
        ("fastai", "unequal micro-batches", "carried over"),
        ("poutyne", "clipping", "each micro-batch"),
        ("composer", "unequal tokens", "right"),
    ],
)
def test_the_notes_say_what_is_in_the_record(library, probe, verdict):
    recorded = RECORD.set_index(["library", "probe"])["verdict"]
    assert recorded[library, probe] == verdict
    assert library.partition(",")[0] in libraries_notes().lower()


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_a_library_does_again_what_is_in_the_record(package):
    try:
        installed = version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed; it comes with the extra 'peers'")
    if installed != VERSIONS.loc[package, "version"]:
        pytest.skip(f"the record is of {package} {VERSIONS.loc[package, 'version']}")
    rows = pd.DataFrame(in_own_process(partial(libraries._observe, package)))
    expected = RECORD[RECORD["library"].isin(rows["library"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, expected, rtol=1e-4)


def rows_of(package: str, verdict: str) -> list[dict[str, object]]:
    return [
        {"library": name, "probe": probe, "measured": 0.6667, "verdict": verdict}
        for name in LIBRARIES
        if package_of(name) == package
        for probe in measure.PROBES
    ]


def test_a_crash_is_recorded_and_a_missing_library_keeps_its_rows(tmp_path, monkeypatch):
    found: dict[str, object] = {
        "": rows_of("", "right"),
        "keras": rows_of("keras", "carried over"),
        "lightning": rows_of("lightning", "divided by a full window"),
    }

    def work_of(work):
        rows = found[work.args[0]]
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setattr(libraries, "in_own_process", work_of)
    monkeypatch.setattr(libraries, "_version", lambda package: "1.0" if package in found else None)
    observe_all(tmp_path)
    assert libraries_table(tmp_path).to_dict("index") == {
        "this project 1.0": dict.fromkeys(measure.PROBES, "✓"),
        "lightning 1.0": dict.fromkeys(measure.PROBES, "0.667")
        | dict.fromkeys(["clipping", "schedule"], "divided by a full window"),
        "keras 1.0": dict.fromkeys(measure.PROBES, "carried over"),
    }
    assert "Not run: fastai, because it is not installed." in libraries_notes(tmp_path)

    found["lightning"] = InputError("ValueError: no CPU")
    del found["keras"]
    before = libraries_table(tmp_path)
    observe_all(tmp_path)
    pd.testing.assert_frame_equal(libraries_table(tmp_path), before.drop("lightning 1.0"))
    assert "Not run: lightning, because ValueError: no CPU." in libraries_notes(tmp_path)


def test_without_any_library_the_record_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "_version", lambda package: None if package else "")
    with pytest.raises(InputError, match=r"pip install -e '\.\[peers\]'"):
        observe_all(tmp_path)
    assert not list(tmp_path.iterdir())
