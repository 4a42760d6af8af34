import json
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import part

from nbutils import InputError, RunConfig, data, load_runs, save_run, study, train
from nbutils.studies.study import load_study, make_run, run_status, run_study

MAIN = yaml.safe_load((study.STUDIES / "batch-size.yaml").read_text())


def write(folder, content, name="mine"):
    path = folder / f"{name}.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def changed(**changes):
    return MAIN | changes


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


def test_a_users_own_study_works_the_same_way(tmp_path):
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


def test_overrides_take_the_place_of_the_files_values():
    runs = load_study("batch-size", {"seed": [0, 1, 2], "batch_size": [64], "epochs": [1]}).runs
    assert len(runs) == 12  # with 1, 8, 16 and 32 accumulation steps
    assert {(r.config.batch_size, r.config.epochs) for r in runs} == {(64, 1)}
    assert {r.config.seed for r in runs} == {0, 1, 2}


BLOCK = MAIN["runs"][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(sumary="04_summary"), "a study has no key 'sumary'; did you mean 'summary'?"),
        ({"runs": [BLOCK]}, "a study lacks the key 'summary'"),
        (changed(runs=[]), "runs must be a list of blocks"),
        (changed(runs={"notebook": "02"}), "runs must be a list of blocks"),
        (changed(runs=[BLOCK | {"gird": {}}]), "no key 'gird'; did you mean 'grid'?"),
        (changed(runs=[{"grid": {}}]), "lacks the key 'notebook'"),
        (changed(runs=[BLOCK | {"notebook": "02_train"}]), "no notebook '02_train'; did you"),
        (changed(runs=[BLOCK | {"notebook": "../x"}]), "no notebook '../x'"),
        (changed(runs=[BLOCK | {"grid": {"batchsize": [1]}}]), "grid: no setting 'batchsize'"),
        (changed(runs=[BLOCK | {"grid": {"batch_size": 32}}]), "it must be a list of values"),
        (changed(runs=[BLOCK | {"grid": {"batch_size": []}}]), "it must be a list of values"),
        (changed(runs=[BLOCK | {"grid": {"batch_size": [0]}}]), "batch_size = 0, but it must be"),
        (changed(runs=[BLOCK | {"grid": {"batch_size": [32, 32]}}]), "are planned twice"),
        (changed(runs=[BLOCK, BLOCK]), "are planned twice"),
        (changed(fixed={"learning_rate": "1e-3"}), "in YAML write 1.0e-3"),
        (changed(fixed={"epoch": 3}), "no setting 'epoch'; did you mean 'epochs'?"),
        (changed(fixed=[1]), "fixed must be a mapping"),
        (changed(summary="05_summary"), "no notebook '05_summary'; did you mean '04_summary'?"),
        (changed(summary="02_train_batch_size"), "has no parameter 'runs'"),
        (changed(runs=[BLOCK | {"notebook": "04_summary"}]), "has no parameter 'out'"),
        (
            changed(runs=[BLOCK | {"fixed": {"accumulation_steps": 2}}]),
            "notebook 02_train_batch_size has no parameter 'accumulation_steps'",
        ),
        ("runs: [", "cannot be read"),
        ("- 1", "a study must be a mapping"),
        ("", "a study must be a mapping"),
        ("!!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match="study") as error:
        load_study(write(tmp_path, content))
    assert message in str(error.value)


def test_an_unknown_study_is_refused(tmp_path):
    with pytest.raises(InputError, match="no study 'batchsize'; did you mean 'batch-size'"):
        load_study("batchsize")
    with pytest.raises(InputError, match="no study file"):
        load_study(str(tmp_path / "none.yaml"))


class Inline(Executor):
    """Runs a task at once, in this process, with `task` in place of the one submitted."""

    def __init__(self, task=make_run):
        self.task = task
        self.made = []

    def submit(self, _, run, out):
        future = Future()
        try:
            self.made.append(run.config.run_id)
            future.set_result(self.task(run, out))
        except Exception as error:
            future.set_exception(error)
        return future


def train_without_notebook(run, out):
    save_run(train(run.config, data.load_dataset(run.config.dataset), progress=False), out)


@pytest.fixture
def two_runs(tmp_path):
    """Shrunken for speed: two runs of one epoch."""
    content = changed(
        fixed={"dataset": "mnist-5k", "epochs": 1, "device": "cpu"},
        runs=[BLOCK | {"grid": {"batch_size": [150, 300]}}],
    )
    return load_study(write(tmp_path, content))


@pytest.fixture
def small(few_digits, monkeypatch):
    """Shrunken for speed: few images, and no summary."""
    monkeypatch.setattr(data, "load_dataset", lambda name: replace(few_digits, name=name))
    monkeypatch.setattr(study, "_sum_up", lambda *_: {})


def test_a_study_is_run_once_and_then_only_summed_up(two_runs, tmp_path, small):
    out = tmp_path / "out"
    assert set(run_status_or_empty(out)) == set()
    first = Inline(train_without_notebook)
    assert run_study(two_runs, out, executor=first) == {}
    assert first.made == [run.config.run_id for run in two_runs.runs]
    assert all(text.startswith("done: test accuracy") for text in run_status(out).values())
    again = Inline(train_without_notebook)
    assert run_study(two_runs, out, executor=again) == {}
    assert again.made == []
    assert load_runs(out)["run_id"].nunique() == 2


def run_status_or_empty(out):
    try:
        return run_status(out)
    except InputError:
        return {}


def test_when_a_run_fails_the_others_go_on_and_it_is_tried_again(two_runs, tmp_path, small):
    bad = two_runs.runs[0].config.run_id

    def task(run, out):
        if run.config.run_id == bad:
            raise MemoryError("no room")
        train_without_notebook(run, out)

    out = tmp_path / "out"
    assert run_study(two_runs, out, executor=Inline(task)) == {bad: "MemoryError: no room"}
    status = run_status(out)
    assert status[bad] == "failed: MemoryError: no room"
    assert status[two_runs.runs[1].config.run_id].startswith("done")
    again = Inline(train_without_notebook)
    assert run_study(two_runs, out, executor=again) == {}
    assert again.made == [bad]


def test_more_seeds_can_be_added_to_a_folder(tmp_path, small):
    overrides = {"epochs": [1], "batch_size": [300], "accumulation_steps": [1]}
    block = BLOCK | {"notebook": "03_train_accumulation"}
    path = write(tmp_path, changed(runs=[block]))
    for seeds in ([0], [0, 1]):
        mine = load_study(path, overrides | {"seed": seeds})
        run_study(mine, tmp_path / "out", executor=Inline(train_without_notebook))
    assert load_runs(tmp_path / "out")["seed"].tolist() == [0, 1]
    assert len(run_status(tmp_path / "out")) == 2


def test_a_folder_that_holds_something_else_is_refused_and_kept(two_runs, tmp_path, small):
    out = tmp_path / "out"
    run_study(two_runs, out, executor=Inline(train_without_notebook))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = write(tmp_path, changed(), name="other")
    longer = load_study(write(tmp_path, changed()), {"epochs": [3], "device": ["cpu"]})
    nothing = Inline()
    with pytest.raises(InputError, match="holds the study 'mine', not 'other'; choose another"):
        run_study(load_study(other), out, executor=nothing)
    with pytest.raises(InputError, match="with epochs = 1, not 3; choose another --out"):
        run_study(longer, out, executor=nothing)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and holds no study"):
        run_study(two_runs, tmp_path / "full", executor=nothing)
    with pytest.raises(InputError, match="is not a folder"):
        run_study(two_runs, tmp_path / "full" / "thesis.txt", executor=nothing)
    assert nothing.made == []
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_a_damaged_record_is_not_overwritten(two_runs, tmp_path, small):
    out = tmp_path / "out"
    run_study(two_runs, out, executor=Inline(train_without_notebook))
    run_id = two_runs.runs[1].config.run_id
    (out / run_id / "history.csv").write_text("epoch\n")
    assert run_status(out)[run_id].startswith("damaged: ")
    nothing = Inline()
    with pytest.raises(InputError, match=f"{run_id} is damaged: history.csv was changed"):
        run_study(two_runs, out, executor=nothing)
    assert nothing.made == []
    assert (out / run_id / "history.csv").read_text() == "epoch\n"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dataset": ["mnist-6k"]}, "no dataset 'mnist-6k'; did you mean 'mnist-5k'?"),
        ({"batch_size": [4000]}, "batch_size = 4000, but 'mnist-5k' has only 3600 images"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path, overrides, message):
    content = changed(runs=[BLOCK | {"grid": {"batch_size": [600, 1200]}}])
    mine = load_study(write(tmp_path, content), overrides)
    nothing = Inline()
    with pytest.raises(InputError, match=message):
        run_study(mine, tmp_path / "out", executor=nothing)
    assert nothing.made == []
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_here_is_refused_if_the_runs_are_made_here(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_sum_up", lambda *_: {})
    mine = load_study(write(tmp_path, changed()), {"device": ["cuda:77"]})
    with pytest.raises(InputError, match="device = 'cuda:77', but this machine has"):
        run_study(mine, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    elsewhere = Inline(lambda *_: None)
    failures = run_study(mine, tmp_path / "out", executor=elsewhere)
    assert len(elsewhere.made) == 9
    assert all("run.json is missing" in cause for cause in failures.values())  # it made nothing


def test_a_record_of_another_study_or_other_images_is_refused(
    two_runs, tmp_path, small, monkeypatch
):
    out, nothing = tmp_path / "out", Inline()
    run_study(two_runs, out, executor=Inline(train_without_notebook))
    run_id = min(run.config.run_id for run in two_runs.runs)
    with monkeypatch.context() as patch:
        patch.setattr(study, "_check_runnable", lambda _: {"mnist-5k": "f" * 64})
        with pytest.raises(InputError) as error:
            run_study(two_runs, out, executor=nothing)
    assert f"{run_id} was made on other images than 'mnist-5k' has now" in str(error.value)
    stranger = RunConfig(seed=5, device="cpu", epochs=1, batch_size=300)
    train_without_notebook(study.PlannedRun("02", stranger), out)
    with pytest.raises(InputError, match=f"{stranger.run_id} is not a run of this study; move it"):
        run_study(two_runs, out, executor=nothing)
    assert nothing.made == []


def test_a_record_that_is_damaged_before_it_is_moved_is_a_failure(two_runs, tmp_path, small):
    def damaging(run, out):
        train_without_notebook(run, out)
        (Path(out) / run.config.run_id / "history.csv").write_text("epoch\n")

    out = tmp_path / "out"
    failures = run_study(two_runs, out, executor=Inline(damaging))
    assert all("history.csv was changed" in cause for cause in failures.values())
    assert len(failures) == 2
    assert run_status(out) == {run_id: f"failed: {cause}" for run_id, cause in failures.items()}
    assert run_study(two_runs, out, executor=Inline(train_without_notebook)) == {}
    assert not (out / "failures.json").exists()


def test_a_record_that_a_worker_made_on_other_images_is_a_failure(
    two_runs, few_digits, tmp_path, small
):
    def elsewhere(run, out):
        config = replace(run.config, batch_size=100)
        other = replace(few_digits, name="mnist-5k", train=part(few_digits.train, 200))
        result = replace(train(config, other, progress=False), config=run.config)
        save_run(result, out)

    out = tmp_path / "out"
    failures = run_study(two_runs, out, executor=Inline(elsewhere))
    assert len(failures) == 2
    assert all("was made on other images than 'mnist-5k' has now" in f for f in failures.values())
    assert run_study(two_runs, out, executor=Inline(train_without_notebook)) == {}


def test_a_smaller_command_leaves_the_others_runs_where_they_are(tmp_path, small):
    overrides = {"epochs": [1], "batch_size": [300], "accumulation_steps": [1], "device": ["cpu"]}
    path = write(tmp_path, changed(runs=[BLOCK | {"notebook": "03_train_accumulation"}]))
    both, one = (load_study(path, overrides | {"seed": seeds}) for seeds in ([0, 1], [0]))

    def interrupted(run, out):
        folder = study._work_folder(Path(out), run)
        folder.mkdir(parents=True)
        (folder / "progress.csv").write_bytes(b"epoch\n\xff\n")  # not even text
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_study(both, out, executor=Inline(interrupted))
    started = both.runs[0].config.run_id
    assert run_status(out)[started] == "started: epoch 1/1"
    other = load_study(path, overrides | {"seed": [1]})
    assert run_study(other, out, executor=Inline(train_without_notebook)) == {}
    assert run_status(out)[started] == "started: epoch 1/1"
    assert run_study(one, out, executor=Inline(train_without_notebook)) == {}
    assert not list(out.glob(".work-*"))


def test_zero_jobs_are_refused(two_runs, tmp_path):
    with pytest.raises(InputError, match="jobs = 0"):
        run_study(two_runs, tmp_path / "out", jobs=0)


def test_status_of_a_folder_that_holds_no_study(tmp_path):
    with pytest.raises(InputError, match="holds no study"):
        run_status(tmp_path)
    (tmp_path / "study.json").write_text(json.dumps({"runs": 3}))
    with pytest.raises(InputError, match="is damaged"):
        run_status(tmp_path)


def test_a_notebook_gets_every_setting_of_its_run(two_runs, tmp_path, monkeypatch):
    passed = {}

    def execute(notebook, output, parameters):
        passed.update(parameters)
        train_without_notebook(two_runs.runs[0], parameters["out"])
        output.write_text("{}")

    monkeypatch.setattr(study, "execute_notebook", execute)
    make_run(two_runs.runs[0], str(tmp_path / "out"))
    config = two_runs.runs[0].config.to_dict()
    config.pop("accumulation_steps")  # 02 has no accumulation
    assert {name: passed[name] for name in config} == config
    record = tmp_path / "out" / two_runs.runs[0].config.run_id
    assert (record / "notebook.ipynb").exists()


def test_a_notebook_that_saves_no_record_is_a_failure(two_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "execute_notebook", lambda *_: None)
    with pytest.raises(InputError, match="saved no record"):
        make_run(two_runs.runs[0], str(tmp_path / "out"))


def test_unknown_parameters_are_refused_before_papermill_starts(tmp_path):
    with pytest.raises(InputError, match="no parameter 'batchsize'; did you mean 'batch_size'"):
        study.execute_notebook("02_train_batch_size", tmp_path / "o.ipynb", {"batchsize": 1})
    assert not (tmp_path / "o.ipynb").exists()


def test_run_ids_in_study_json_are_those_of_the_configs(two_runs, tmp_path, small):
    out = tmp_path / "out"
    run_study(two_runs, out, executor=Inline(train_without_notebook))
    content = json.loads((out / "study.json").read_text())
    configs = [RunConfig.from_dict(run["config"]) for run in content["runs"]]
    assert [config.run_id for config in configs] == [run.config.run_id for run in two_runs.runs]
