"""The real commands, as a user gives them; killed, interrupted, and given again."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from nbutils import load_runs
from nbutils.__main__ import _overrides

KILLS = 50


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, **options
    )


class Run:
    """`python -m nbutils run` of the study in `file`, going on; a context manager."""

    def __init__(self, file, folder):
        self.out, self.printed = folder / "out", folder / "printed.txt"
        arguments = ["run", file, "--out", self.out, "--jobs", "2"]
        # A job in the background ignores Ctrl-C, and so would what it starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(self.printed, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nbutils", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in [*self.kernels(), self.process]:
            process.kill()
        self.process.wait()

    def kernels(self):
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def until(self, condition):
        """Wait until `condition()` holds or the command has ended; what it returned."""
        while not (found := condition()) and self.process.poll() is None:
            time.sleep(0.02)
        return found

    def until_training(self):
        """Wait until a run has made an epoch."""
        assert self.until(lambda: list(self.out.glob(".work/*/*/checkpoint.pt")))

    def end(self):
        """Exit status, and what it printed."""
        return self.process.wait(), self.printed.read_text()


def assert_end(processes):
    """They end by themselves, soon."""
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def test_a_study_from_command_to_figure_and_reference(finished, tmp_path):
    assert "2/2 runs done" in finished.progress
    assert "3 x 600" in finished.printed
    shown = list(finished.out.glob("*.svg"))
    assert shown
    for path in [*shown, finished.out / "summary.ipynb"]:
        assert path.stat().st_size > 10_000
        assert str(path) in finished.printed
    runs = load_runs(finished.out)
    assert runs["accumulation_steps"].tolist() == [1, 1, 3, 3]
    assert sorted(path.name for path in finished.file.parent.iterdir()) == ["out", "two.yaml"]
    export = command("nbutils", "export", finished.out, tmp_path / "reference")
    assert export.returncode == 0, export.stderr
    assert load_runs(tmp_path / "reference").equals(runs)


def test_with_nothing_to_do_a_command_ends_at_once_and_torch_is_not_imported(finished):
    paths = [path for path in finished.out.rglob("*") if path.name not in ("study.json", ".lock")]
    made = {path: path.stat().st_mtime_ns for path in paths if path.is_file()}
    script = (
        "import sys; from nbutils.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    for arguments in (["run", finished.file, "--out", finished.out], ["status", finished.out]):
        told = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True
        )
        assert told.returncode == 0, told.stderr
        assert "Summing up" not in told.stdout
    assert told.stdout.count("done: test accuracy") == 2
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_faults_and_the_same_command_again(finished, content_of, tmp_path):
    """A second command is refused, a kernel is killed, then the command is killed."""
    with Run(finished.file, tmp_path) as first:
        first.until_training()
        kernels = first.kernels()
        for kernel in kernels:
            kernel.suspend()  # so that its run does not end meanwhile
        with Run(finished.file, tmp_path) as second:
            code, printed = second.end()
            assert code == 2
            assert f"another command is at work in {first.out}" in printed
        kernels[0].kill()
        first.until((first.out / "failures.json").exists)
        kernels[1].resume()
        first.process.kill()
        first.process.wait()
        told = command("nbutils", "status", first.out)
        assert told.returncode == 1
        assert "failed: DeadKernelError: Kernel died; the system kills it when" in told.stdout
        with Run(finished.file, tmp_path) as again:  # the other kernel may still run
            assert_end(kernels)
            again.until(lambda: "Summing up" in again.printed.read_text())
            again.process.kill()
    shutil.rmtree(first.out / ".work")
    assert content_of(first.out) == finished.content


@pytest.mark.parametrize("presses", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_ends_all_and_says_how_to_go_on(finished, tmp_path, presses):
    with Run(finished.file, tmp_path) as run:
        if presses == 1:
            run.until_training()
        else:
            run.until(lambda: "runs to make" in run.printed.read_text())  # kernels are starting
        kernels, start = run.kernels(), time.monotonic()
        for _ in range(presses):
            os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
            time.sleep(0.2)
        code, printed = run.end()
        assert time.monotonic() - start < 10
        assert code == 130
        assert printed.endswith("interrupted; what is done is kept, the same command goes on\n")
        assert "Traceback" not in printed
        assert_end(kernels)
    assert not (run.out / "failures.json").exists()


def test_overrides_on_the_command_line():
    assert _overrides(["learning_rate=1e-3,0.01", "norm=none", "augment=true", "norm=ghost"]) == {
        "learning_rate": [0.001, 0.01],
        "norm": ["none", "ghost"],
        "augment": [True],
    }


@pytest.mark.slow
def test_killed_at_random_instants_studies_end_as_if_uninterrupted(
    finished, content_of, tmp_path, capsys
):
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
            assert content_of(folder / "out") == finished.content
            number += 1
    assert content_of(folder / "out") == finished.content


def kill_one(run, draw):
    """Kill the command or one of its kernels at some instant; which, if one still ran."""
    kind = draw.choice(["command", "kernel"])
    if kind == "kernel":
        run.until(run.kernels)
    end = time.monotonic() + draw.uniform(0, 15)
    run.until(lambda: time.monotonic() > end)
    kernels = run.kernels()
    if run.process.poll() is not None or not (kernels or kind == "command"):
        return None
    if kind == "kernel":
        draw.choice(kernels).kill()
        return kind
    run.process.kill()
    run.process.wait()
    if draw.random() < 0.5:  # else the next command starts while they may still run
        assert_end(kernels)
    return kind


def done(folder):
    """Whether the study there ended well."""
    return (folder / "out" / "summary.ipynb").exists() and not (folder / "out" / ".work").exists()
