"""Bad input, wherever it comes in: what is said, and that nothing on disk has changed."""

import json
from importlib import import_module
from types import SimpleNamespace

import pytest

from nbutils import InputError, RunConfig, load_dataset, load_runs, train, train_many
from nbutils.__main__ import main
from nbutils.data.kaggle import read_test
from nbutils.report.bench import run_bench
from nbutils.studies.record import export_runs, load_tables
from nbutils.studies.study import check_injected_parameters, execute_notebook, load_study, run_study

RUN = ["run", "batch-size"]

COMMANDS = [
    (["run", "batch-sise"], "no study 'batch-sise'; did you mean 'batch-size'?"),
    (["run", "nowhere.yaml"], "no study file nowhere.yaml"),
    (["run", "../batch-size"], "no study '../batch-size'"),
    ([*RUN, "--dataset", "mnist5k"], "no dataset 'mnist5k'; did you mean"),
    ([*RUN, "--dataset", ""], "dataset = '', but it must be the name of a dataset"),
    ([*RUN, "--dataset", "kaggle:nowhere"], "no folder nowhere; it must hold"),
    ([*RUN, "--set", "epoch=3"], "no setting 'epoch'; did you mean 'epochs'?"),
    ([*RUN, "--set", "epochs"], "it must read FIELD=VALUE"),
    ([*RUN, "--set", "epochs="], "it must read FIELD=VALUE"),
    ([*RUN, "--set", "=3"], "no setting ''"),
    ([*RUN, "--set", "epochs=many"], "epochs = 'many', but it must be a whole number"),
    ([*RUN, "--set", "epochs=2.5"], "epochs = 2.5, but it must be a whole number"),
    ([*RUN, "--set", "epochs=true"], "epochs = True, but it must be a whole number"),
    ([*RUN, "--set", "epochs=1,"], "epochs = None, but it must be a whole number"),
    ([*RUN, "--set", "batch_size=0"], "batch_size = 0, but it must be a whole number >= 1"),
    ([*RUN, "--set", "batch_size=-8"], "batch_size = -8, but it must be"),
    ([*RUN, "--set", "batch_size=9999"], "has only 3600 images to train on"),
    ([*RUN, "--set", "learning_rate=-1e-3"], "learning_rate = -0.001, but it must be a number > 0"),
    ([*RUN, "--set", "learning_rate=.nan"], "learning_rate = nan, but it must be finite"),
    ([*RUN, "--set", "dataset=2020-13-45"], "no dataset '2020-13-45'"),
    ([*RUN, "--set", "dataset=mnist-5k,kmnist"], "dataset = 'mnist-5k', 'kmnist', but the runs in"),
    (["run", "cost", "--set", "dataset=5"], "dataset = 5, but it must be text"),
    (["run", "cost", "--set", "repeats=many"], "repeats = 'many', but it must be a whole number"),
    (["run", "cost", "--set", "batch_sizes=16,1.5"], "batch_sizes = 1.5, but it must be a whole"),
    (["run", "noise-scale", "--set", "epochs=true"], "epochs = True, but it must be a whole num"),
    ([*RUN, "--set", "momentum=0.9"], "momentum = 0.9, but it must be a setting of"),
    ([*RUN, "--set", "seed=0,0"], "are planned twice"),
    ([*RUN, "--set", "seed=-1"], "seed = -1, but it must be a whole number in [0, 2**63)"),
    ([*RUN, "--set", "norm=[none"], "norm = '[none', but it must be one of: batch, ghost, group"),
    ([*RUN, "--set", "augment=1"], "augment = 1, but it must be true or false"),
    ([*RUN, "--set", "device=cuda:99"], "device = 'cuda:99', but this machine"),
    ([*RUN, "--set", "device=gpu"], 'device = \'gpu\', but it must be "auto", "cpu"'),
    ([*RUN, "--jobs", "0"], "jobs = 0, but it must be a whole number >= 1"),
    ([*RUN, "--time-limit", "0"], "time_limit = 0.0, but it must be a number of seconds > 0"),
    ([*RUN, "--time-limit", "inf"], "time_limit = inf, but it must be a number of seconds > 0"),
    ([*RUN, "--time-limit", "nan"], "time_limit = nan, but it must be a number of seconds > 0"),
    ([*RUN, "--on-oom", "splt"], "no on_oom 'splt'; did you mean 'split'? allowed: stop, split"),
    ([*RUN, "--on-oom", "split", "--set", "norm=batch"], "on_oom = 'split', but with norm = 'bat"),
    ([*RUN, "--out", "here.toml"], "here.toml is not a folder; choose another --out"),
    ([*RUN, "--out", "full"], "full is not empty and holds no study; choose another --out"),
    ([*RUN, "--out", "other"], "other holds the study 'mine', not 'batch-size'"),
    ([*RUN, "--out", "torn"], "study.json is damaged: "),
    (["status", "nowhere"], "nowhere holds no study: it has no study.json"),
    (["status", "torn"], "study.json is damaged: "),
    (["status", "listed"], "failures.json is damaged, remove it"),
    (["export", "nowhere", "reference"], "no folder nowhere"),
    (["export", "full", "reference"], "no runs in full"),
    (["bench", "--out", "bench.txt"], "--out bench.txt: it must end in .json"),
    (["bench", "--dataset", "mnist-5k", "--repeats", "0"], "1 repeat or more"),
]

STUDIES = [
    ("!!python/object/apply:os.mkdir [executed]", "cannot be read"),
    ("title: 2020-13-45\nruns: []\nsummary: 04_summary", "cannot be read"),
    ("runs: &a [*a]\nsummary: 04_summary", "a block of runs must be a mapping"),
    ("runs: [{notebook: ../../x, grid: {}}]\nsummary: 04_summary", "no notebook '../../x'"),
    ("runs: [{notebook: 02_train_batch_size}]\nsummary: /etc/x", "no notebook '/etc/x'"),
    (
        "runs: [{notebook: 02_train_batch_size, grid: {out: [/elsewhere]}}]\nsummary: 04_summary",
        "grid: no setting 'out'",
    ),
    (
        "runs: [{notebook: 02_train_batch_size, grid: {on_oom: [split]}}]\nsummary: 04_summary",
        "grid: no setting 'on_oom'",
    ),
    (
        "runs: [{notebook: 02_train_batch_size, grid: {dropout: [1.0]}}]\nsummary: 04_summary",
        "dropout = 1.0, but it must be a number in [0, 1)",
    ),
    (
        "runs: [{notebook: 02_train_batch_size, grid: {seed: [zero]}}]\nsummary: 04_summary",
        "seed = 'zero', but it must be a whole number",
    ),
]

PYTHON = [
    (lambda data: RunConfig(batch_size="128"), "batch_size = '128', but it must be a whole number"),
    (lambda data: RunConfig(precision="half"), "precision = 'half', but it must be one of"),
    (lambda data: RunConfig(dataset=" "), "dataset = ' ', but it must be the name of a dataset"),
    (lambda data: RunConfig.from_dict({"lr": 1}), "no setting 'lr'; allowed: dataset, batch_size"),
    (lambda data: load_dataset("MNIST"), "no dataset 'MNIST'"),
    (lambda data: train(RunConfig(batch_size=301), data), "batch_size = 301, but 'few-digits' has"),
    (lambda data: train(RunConfig(), data, engine="turbo"), "no engine 'turbo'; allowed: auto, "),
    (lambda data: train(RunConfig(), data, on_oom="half"), "no on_oom 'half'; allowed: stop, sp"),
    (
        lambda data: train(RunConfig(norm="ghost"), data, on_oom="split"),
        "on_oom = 'split', but with norm = 'ghost'",
    ),
    (
        lambda data: train_many([RunConfig(batch_size=300, accumulation_steps=2)], data),
        "effective_batch_size (batch_size * accumulation_steps) = 600",
    ),
    (lambda data: run_bench(data, images=10), "there must be 1024 images or more"),
    (lambda data: load_runs("nowhere"), "no folder nowhere"),
    (lambda data: load_runs("full"), "no runs in full"),
    (lambda data: load_tables("full"), "full holds no whole tables: environment.json is missing"),
    (lambda data: export_runs("here.toml", "reference"), "no folder here.toml"),
    (lambda data: read_test("here.toml"), "here.toml"),
    (
        lambda data: run_study(load_study("batch-size"), "new", executor=object(), time_limit=9),
        "time_limit is for processes of our own",
    ),
    (
        lambda data: execute_notebook("02_train", "out.ipynb", {}),
        "no notebook '02_train'; did you mean '02_train_batch_size'?",
    ),
    (
        lambda data: execute_notebook("02_train_batch_size", "out.ipynb", {"on_om": "split"}),
        "the notebook 02_train_batch_size has no parameter 'on_om'; did you mean 'on_oom'?",
    ),
]

INJECTED = [
    ("batchsize = 512", "this notebook has no parameter 'batchsize'; did you mean 'batch_size'?"),
    ("batch_size = 512\nBatch_Size = 1", "this notebook has no parameter 'Batch_Size'"),
    ("accumulation_steps = 8", "no parameter 'accumulation_steps'; allowed: batch_size, out"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a file and folders of other kinds; must be as it was afterwards."""
    (tmp_path / "here.toml").touch()
    for name in ("full", "other", "torn", "listed"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    plan = {"name": "mine", "title": "Mine", "runs": [], "summary": "04_summary"}
    for name in ("other", "listed"):
        (tmp_path / name / "study.json").write_text(json.dumps(plan))
    (tmp_path / "listed" / "failures.json").write_text("[1]")
    (tmp_path / "torn" / "study.json").write_text(json.dumps(plan)[:20])
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    yield tmp_path
    assert snapshot(tmp_path) == before


def snapshot(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_there_are_enough_cases():
    assert len(COMMANDS) + len(STUDIES) + len(PYTHON) + len(INJECTED) >= 40


@pytest.mark.parametrize(("arguments", "message"), COMMANDS, ids=lambda value: str(value)[:60])
def test_on_the_command_line_it_is_one_line_and_exit_status_2(here, capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("content", "message"), STUDIES)
def test_in_a_study(here, tmp_path_factory, content, message):
    path = tmp_path_factory.mktemp("study") / "mine.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        load_study(str(path))
    assert str(error.value).startswith("study ")
    assert message in str(error.value)


@pytest.mark.parametrize(("call", "message"), PYTHON, ids=[message for _, message in PYTHON])
def test_in_python(here, few_digits, call, message):
    with pytest.raises(InputError) as error:
        call(few_digits)
    assert message in str(error.value)


@pytest.mark.parametrize(("source", "message"), INJECTED)
def test_injected_by_papermill(here, monkeypatch, source, message):
    declared = 'batch_size: int = 128  # images\nout: str = ""  # folder'
    shell = SimpleNamespace(user_ns={"In": ["", declared, f"# Parameters\n{source}\n"]})
    module = import_module("IPython.core.getipython")
    monkeypatch.setattr(module, "get_ipython", lambda: shell)
    with pytest.raises(InputError) as error:
        check_injected_parameters()
    assert message in str(error.value)


def test_a_study_stays_in_its_folder():
    study = load_study("batch-size", {"dataset": ["kaggle:../../etc"]})
    assert study.default_folder.parts == ("runs", "batch-size-kaggle-etc")
    assert all("/" not in run.config.run_id for run in study.runs)
