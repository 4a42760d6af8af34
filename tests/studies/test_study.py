"""Study files: what they plan, and what is refused."""

import pytest
import yaml

from nbutils import InputError
from nbutils.paths import STUDIES
from nbutils.studies.study import load_study

MAIN = yaml.safe_load((STUDIES / "batch-size.yaml").read_text())
BLOCK = MAIN["runs"][0]


def write(folder, content):
    path = folder / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_the_main_study():
    runs = load_study("batch-size").runs
    assert [(r.config.batch_size, r.config.accumulation_steps) for r in runs] == [
        *((size, 1) for size in (32, 64, 128, 256, 512, 1024)),
        *((128, 8), (64, 16), (32, 32)),
    ]
    assert {r.config.epochs for r in runs} == {20}
    assert {(r.config.norm, r.config.optimizer, r.config.learning_rate) for r in runs} == {
        ("group", "adam", 1e-3)
    }
    assert [r.notebook for r in runs] == ["02_train_batch_size"] * 6 + ["03_train_accumulation"] * 3


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_can_be_planned(path):
    study = load_study(path.stem)
    assert study.default_folder.parts == ("runs", f"{path.stem}-{study.dataset}")


def test_a_users_own_study_with_a_grid_and_overrides(tmp_path):
    block = {
        "notebook": "03_train_accumulation",
        "grid": {"batch_size": [16, 32], "accumulation_steps": [1, 4], "norm": ["none", "batch"]},
        "fixed": {"epochs": 2},
    }
    path = write(tmp_path, {"runs": [block], "fixed": {"seed": 3}, "summary": "04_summary"})
    mine = load_study(path)
    assert mine.name == "mine"
    assert len({r.config for r in mine.runs}) == 8
    assert {(r.config.epochs, r.config.seed) for r in mine.runs} == {(2, 3)}
    mine = load_study(path, {"seed": [0, 1], "batch_size": [64], "dataset": ["kaggle:../../etc"]})
    assert {(r.config.batch_size, r.config.seed) for r in mine.runs} == {(64, 0), (64, 1)}
    assert len(mine.runs) == 8
    assert mine.default_folder.parts == ("runs", "mine-kaggle-etc")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MAIN | {"sumary": "04_summary"}, "a study has no 'sumary'; did you mean 'summary'?"),
        (MAIN | {"runs": []}, "runs must be a list of blocks"),
        (MAIN | {"runs": [BLOCK | {"gird": {}}]}, "no 'gird'; did you mean 'grid'?"),
        (MAIN | {"runs": [{"grid": {}}]}, "lacks 'notebook'"),
        (MAIN | {"runs": [BLOCK | {"notebook": "02_train"}]}, "no notebook '02_train'; did you"),
        (MAIN | {"runs": [BLOCK | {"grid": {"batchsize": [1]}}]}, "grid has no 'batchsize'"),
        (MAIN | {"runs": [BLOCK | {"grid": {"batch_size": 32}}]}, "it must be a list of values"),
        (MAIN | {"runs": [BLOCK, BLOCK]}, "are planned twice"),
        (MAIN | {"fixed": [1]}, "fixed must be a mapping"),
        (MAIN | {"summary": "02_train_batch_size"}, "has no parameter 'runs'"),
        (MAIN | {"runs": [BLOCK | {"notebook": "04_summary"}]}, "has no parameter 'out'"),
        (
            MAIN | {"runs": [BLOCK | {"fixed": {"accumulation_steps": 2}}]},
            "notebook 02_train_batch_size has no parameter 'accumulation_steps'",
        ),
        ("runs: &a [*a]\nsummary: 04_summary", "a block of runs must be a mapping"),
        ("runs: [", "cannot be read"),
        ("", "a study must be a mapping"),
        ("summary: 04_summary\nparameters: 3", "parameters must be a mapping"),
        ("!!python/object/apply:os.mkdir [executed]", "cannot be read"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^study ") as error:
        load_study(write(tmp_path, content))
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
