"""The real commands, as a user gives them; killed, interrupted, and given again."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import Run, assert_end, kernels
from outcomes import CLOCK, records_of, study_of

from nbutils import load_runs, save_run, train
from nbutils.__main__ import _overrides, main
from nbutils.machine import processors
from nbutils.studies.study import load_study

KILLS = 50


def test_a_study_from_command_to_figure_and_reference(finished, tmp_path):
    assert "2/2 runs done" in finished.printed
    assert "3 x 600" in finished.printed
    shown = list(finished.out.glob("*.svg"))
    assert shown
    for path in [*shown, finished.out / "summary.ipynb"]:
        assert path.stat().st_size > 10_000
        assert str(path) in finished.printed
    runs = load_runs(finished.out)
    assert runs["accumulation_steps"].tolist() == [1, 1, 3, 3]
    beside = ["out", "printed.txt", "two.yaml"]
    assert sorted(path.name for path in finished.file.parent.iterdir()) == beside
    assert main(["export", str(finished.out), str(tmp_path / "reference")]) == 0
    assert load_runs(tmp_path / "reference").equals(runs)


def test_with_nothing_to_do_a_command_ends_at_once_and_torch_is_not_imported(finished):
    paths = [path for path in finished.out.rglob("*") if path.name not in ("study.json", ".lock")]
    made = {path: path.stat().st_mtime_ns for path in paths if path.is_file()}
    script = (
        "import sys; from nbutils.__main__ import main; file, out = sys.argv[1:];"
        "assert main(['run', file, '--out', out]) == main(['status', out]) == 0;"
        "assert 'torch' not in sys.modules"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, finished.file, finished.out], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert "Summing up" not in told.stdout
    assert told.stdout.count("done: test accuracy") == 2
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_after_faults_it_ends_bitwise_as_uninterrupted_training(finished, digits, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, processors() // 2))  # as each of two kernels
    for run in load_study(str(finished.file)).runs:
        save_run(train(run.config, digits, progress=False), tmp_path)
    torch.set_num_threads(threads)
    assert finished.content == records_of(tmp_path, without=CLOCK)


@pytest.mark.parametrize("presses", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_ends_all_and_says_how_to_go_on(finished, tmp_path, presses):
    with Run(finished.file, tmp_path) as run:
        if presses == 1:
            run.until_training()
        else:
            run.until(lambda: "runs to make" in run.printed.read_text())  # kernels are starting
        running, start = kernels(run.process), time.monotonic()
        for _ in range(presses):
            os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
            time.sleep(0.2)
        code, printed = run.end()
        assert time.monotonic() - start < 10
        assert code == 130
        assert printed.endswith("interrupted; what is done is kept, the same command goes on\n")
        assert "Traceback" not in printed
        assert_end(running)
    assert not list(run.out.glob(".work/*.failed"))


def test_overrides_on_the_command_line():
    assert _overrides(["learning_rate=1e-3,0.01", "norm=none", "augment=true", "norm=ghost"]) == {
        "learning_rate": [0.001, 0.01],
        "norm": ["none", "ghost"],
        "augment": [True],
    }


@pytest.mark.slow
def test_killed_at_random_instants_studies_end_as_if_uninterrupted(finished, tmp_path, capsys):
    """The command or a kernel is killed; the command is given again; and so on."""
    draw, victims, number = random.Random(KILLS), [], 0
    while len(victims) < KILLS or not done(tmp_path / str(number)):
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        with Run(finished.file, folder) as run:
            victim = kill_one(run, draw) if len(victims) < KILLS else None
            code, printed = run.end()
        assert code in {None: [0], "command": [-signal.SIGKILL]}.get(victim, [0, 1]), printed
        assert "Traceback" not in printed
        victims += [victim] if victim else []
        with capsys.disabled():
            print(f"\n{len(victims)}: {victim} killed", end="", flush=True)
        if done(folder) and len(victims) < KILLS:
            assert study_of(folder / "out") == finished.content
            number += 1
    assert study_of(folder / "out") == finished.content


def kill_one(run, draw):
    """Kill the command or one of its kernels at some instant; which, if one still ran."""
    kind = draw.choice(["command", "kernel"])
    if kind == "kernel":
        run.until(lambda: kernels(run.process))
    end = time.monotonic() + draw.uniform(0, 15)
    run.until(lambda: time.monotonic() > end)
    running = kernels(run.process)
    if run.process.poll() is not None or not (running or kind == "command"):
        return None
    if kind == "kernel":
        draw.choice(running).kill()
        return kind
    run.process.kill()
    run.process.wait()
    if draw.random() < 0.5:  # else the next command starts while they may still run
        assert_end(running)
    return kind


def done(folder):
    """Whether the study there ended well."""
    return (folder / "out" / "summary.ipynb").exists() and not (folder / "out" / ".work").exists()
