"""What tests of studies share: a real finished study, and studies without notebooks."""

import io
import json
import os
from concurrent.futures import Executor, Future
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import Run, assert_end, kernels
from outcomes import study_of

from nbutils import RunConfig, save_run, train
from nbutils.__main__ import main
from nbutils.data import sources
from nbutils.studies import notebook as notebooks
from nbutils.studies import runner
from nbutils.studies.status import run_status
from nbutils.studies.study import PlannedRun, Study

# Shrunken for speed: two runs of two epochs, with six updates or two in each.
STUDY = """
runs: [{notebook: 03_train_accumulation, grid: {accumulation_steps: [1, 3]}}]
fixed: {epochs: 2, batch_size: 600, device: cpu}
summary: 04_summary
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A study that real commands have made after faults; to be left as it is.

    A second command is refused, a kernel is killed, then the command is killed while the other
    kernel goes on. The last command runs in a locale without UTF-8.
    """
    folder = tmp_path_factory.mktemp("finished")
    file = folder / "two.yaml"
    file.write_text(STUDY)
    with Run(file, folder) as first:
        first.until_training()
        running = kernels(first.process)
        for kernel in running:
            kernel.suspend()  # so that its run does not end meanwhile
        with redirect_stderr(io.StringIO()) as told:
            assert main(["run", str(file), "--out", str(first.out)]) == 2
        assert f"another command is at work in {first.out}" in told.getvalue()
        running[0].kill()
        first.until(lambda: list(first.out.glob(".work/*.failed")))
        running[1].resume()
        first.process.kill()
        first.process.wait()
        cause = "failed: DeadKernelError: Kernel died; the system kills it when memory runs out"
        assert cause in run_status(first.out).values()
        locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        with Run(file, folder, env=os.environ | locale) as again:  # the other kernel may still run
            assert_end(running)
            code, printed = again.end()
            assert code == 0, printed
    return SimpleNamespace(file=file, out=first.out, printed=printed, content=study_of(first.out))


class Inline(Executor):
    """Does a task at once, in this thread."""

    def submit(self, task, *arguments):
        future = Future()
        try:
            future.set_result(task(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def quick(few_digits, monkeypatch, capsys):
    """Studies whose notebooks are functions in this process, on 60 images.

    Attributes: `run(study, out)`; `study(*seeds)`; `before`, a list of functions that are called
    with a run's parameters before it is made; `executed`, the notebooks that were executed.
    """
    tiny = few_digits.subset(60)
    held = SimpleNamespace(before=[], executed=[])

    def execute(notebook, output, parameters, **_):
        held.executed.append(notebook)
        if "runs" in parameters:
            output.write_text(json.dumps({"metadata": {"papermill": {"parameters": parameters}}}))
            return
        for function in held.before:
            function(parameters)
        settings = {k: v for k, v in parameters.items() if k not in ("out", "on_oom")}
        data = replace(tiny, name=settings["dataset"])
        folder = Path(parameters["out"])
        result = train(RunConfig(**settings), data, log_folder=folder, progress=False)
        output.write_text("{}")
        save_run(result, folder)

    def study(*seeds, **settings):
        config = RunConfig(batch_size=30, epochs=2, device="cpu", norm="none")
        configs = [replace(config, seed=seed, **settings) for seed in seeds]
        runs = tuple(PlannedRun("02_train_batch_size", config) for config in configs)
        return Study("tiny", "Tiny", runs, "04_summary")

    monkeypatch.setattr(notebooks, "execute_notebook", execute)
    monkeypatch.setattr(sources, "load_dataset", lambda name: replace(tiny, name=name))
    held.study = study
    held.run = lambda study, out, **options: runner.run_study(
        study, out, executor=Inline(), **options
    )
    return held
