"""Notebooks as functions of their parameters."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import SimpleNamespace

import nbformat
import papermill
import pytest
from nbclient.exceptions import CellTimeoutError
from nbformat.v4 import new_code_cell, new_notebook

from nbutils import InputError, RunConfig
from nbutils.studies import notebook as notebooks
from nbutils.studies.notebook import (
    config_from_parameters,
    declared_parameters,
    execute_notebook,
)

PROBE = """
import json, os, sys, time
names = ["OMP_NUM_THREADS", "TQDM_DISABLE"]
told = {"executable": sys.executable, **{name: os.environ.get(name) for name in names}}
open(out, "w").write(json.dumps(told))
time.sleep(seconds)
"""


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A project with one notebook, which tells what its kernel has; runs in 2 seconds."""
    parameters = new_code_cell('out: str = ""  # file\nseconds: float = 0  # to sleep')
    parameters.metadata["tags"] = ["parameters"]
    content = new_notebook(cells=[parameters, new_code_cell(PROBE)])
    content.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "P"}
    (tmp_path / "project").mkdir()
    nbformat.write(content, tmp_path / "project" / "probe.ipynb")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "project")

    def run(name="told", **options):
        parameters = {"out": str(tmp_path / name), **options.pop("parameters", {})}
        execute_notebook("probe", tmp_path / f"{name}.ipynb", parameters, **options)
        return json.loads((tmp_path / name).read_text())

    return run


def test_a_kernel_is_this_interpreter_with_the_threads_it_is_given(probe, tmp_path, monkeypatch):
    """Also where "python3" is another kernel, and temporary files have long names."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    other = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(other))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with ThreadPoolExecutor(2) as pool:
        given = pool.submit(probe, "given", threads=3, time_limit=1e7)  # of months
        inherited = pool.submit(probe, "inherited")
        here = {"executable": sys.executable, "TQDM_DISABLE": "1"}
        assert given.result() == here | {"OMP_NUM_THREADS": "3"}
        assert inherited.result() == here | {"OMP_NUM_THREADS": "7"}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert not list(long.iterdir())


def test_a_cell_has_a_time_limit(probe):
    with pytest.raises(CellTimeoutError, match="timed out while it was being executed, after 1 s"):
        probe(time_limit=0.5, parameters={"seconds": 600})


def test_the_declared_parameters_are_those_that_papermill_finds():
    for path in sorted(notebooks.NOTEBOOKS.glob("*.ipynb")):
        assert declared_parameters(path.stem) == list(papermill.inspect_notebook(str(path)))


def test_a_config_has_the_notebooks_variables_and_defaults():
    variables = {"batch_size": 7, "norm": "none", "out": "", "figures": 3}
    assert config_from_parameters(variables) == RunConfig(batch_size=7, norm="none")


@pytest.mark.parametrize("injected", ["batchsize = 512", "batch_size = 1\nbatchsize = 1"])
def test_a_parameter_that_papermill_adds_must_be_declared(monkeypatch, injected):
    declared = 'batch_size: int = 128  # images\nout: str = ""  # folder'
    shell = SimpleNamespace(user_ns={"In": ["", declared, "# Parameters\nbatch_size = 512\n"]})
    monkeypatch.setattr(import_module("IPython.core.getipython"), "get_ipython", lambda: shell)
    config_from_parameters({})
    shell.user_ns["In"][2] = f"# Parameters\n{injected}\n"
    with pytest.raises(InputError, match="this notebook has no parameter 'batchsize'; did you"):
        config_from_parameters({})


def test_papermill_by_itself_adds_the_cell_that_is_looked_for(probe, tmp_path):
    path = tmp_path / "project" / "probe.ipynb"
    content = nbformat.read(path, as_version=4)
    content.cells[1].source = "from nbutils.studies import notebook\nnotebook." + (
        "check_injected_parameters()"
    )
    nbformat.write(content, path)
    with pytest.raises(papermill.PapermillExecutionError, match="no parameter 'batchsize'"):
        papermill.execute_notebook(path, None, {"batchsize": 512}, progress_bar=False)
