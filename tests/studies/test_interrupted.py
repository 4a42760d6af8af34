"""The real command, killed, starved and stopped: `python -m nbutils run`."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from nbutils import load_runs
from nbutils.studies.record import load_predictions

# Shrunken for speed: two runs of two epochs, at least a second of training each.
STUDY = """
runs: [{notebook: 03_train_accumulation, grid: {accumulation_steps: [1, 3]}}]
fixed: {epochs: 2, batch_size: 1200, device: cpu}
summary: 04_summary
"""


class Command:
    """`python -m nbutils run` and the processes that it starts; a context manager."""

    def __init__(self, folder):
        self.out = folder / "out"
        (folder / "two.yaml").write_text(STUDY)
        self.output = folder / "output.txt"
        # A job in the background ignores Ctrl-C, and so would what it starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "nbutils", "run", folder / "two.yaml"),
                    *("--out", self.out, "--jobs", "2"),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.family():
            process.kill()
        self.process.kill()
        self.process.wait()

    def family(self):
        """The processes that it started, and those that these did."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kernels(self):
        return [kernel for worker in self.workers() for kernel in sessions(children(worker))]

    def workers(self):
        """Processes of tasks that have started a kernel, which like them has its own session."""
        return [p for p in sessions(self.family()) if sessions(children(p))]

    def until(self, condition):
        """Wait until `condition()` holds, or the command has ended; what it returned."""
        while not (found := condition()) and self.process.poll() is None:
            time.sleep(0.02)
        return found

    def end(self):
        """Exit status, and what it printed."""
        return self.process.wait(), self.output.read_text()


def children(process):
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def sessions(processes):
    """Those that lead a session."""
    return [process for process in processes if leads_session(process.pid)]


def leads_session(pid):
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def content(out):
    """What the records say, but for the clock and the peak of memory."""
    runs = load_runs(out)
    clock = ["seconds", "images_per_second", "peak_memory"]
    _, predictions = load_predictions(out)
    for run_id in predictions:
        files = sorted(path.name for path in (out / run_id).iterdir())
        assert files == ["history.csv", "notebook.ipynb", "predictions.npz", "run.json"]
        assert json.loads((out / run_id / "notebook.ipynb").read_text())["cells"]
    hidden = [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert hidden == [".lock"]
    return runs.drop(columns=clock).to_csv(), {k: v.tolist() for k, v in predictions.items()}


def status(out):
    command = [sys.executable, "-m", "nbutils", "status", out]
    told = subprocess.run(command, capture_output=True, text=True)
    return told.returncode, told.stdout


def assert_ends(processes):
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    with Command(tmp_path_factory.mktemp("whole")) as command:
        start = time.monotonic()
        code, output = command.end()
        assert code == 0, output
        return content(command.out), time.monotonic() - start


def test_a_command_killed_in_mid_run_goes_on(tmp_path, expected):
    with Command(tmp_path) as command:
        command.until(lambda: list(tmp_path.glob("out/.work-1/.work/*/checkpoint.pt")))
        started = command.family()
        command.process.send_signal(signal.SIGKILL)
        command.process.wait()
        with Command(tmp_path) as again:
            code, output = again.end()
            assert code == 0, output
        assert_ends(started)
    assert content(tmp_path / "out") == expected[0]


def test_a_killed_kernel_fails_its_run_and_a_second_command_is_refused(tmp_path, expected):
    with Command(tmp_path) as command:
        command.until(lambda: list(tmp_path.glob("out/.work-1/.work/*/checkpoint.pt")))
        kernel = command.kernels()[0]
        kernel.suspend()  # so that its run does not end meanwhile
        with Command(tmp_path) as second:
            code, output = second.end()
            assert code == 2
            assert f"another command is at work in {tmp_path / 'out'}" in output
        kernel.kill()
        code, output = command.end()
        assert code == 1
        assert "DeadKernelError" in output
        assert "1/2 runs done" in output
        assert "the same command tries the rest again" in output
        assert "Traceback" not in output
    code, told = status(tmp_path / "out")
    assert code == 1
    assert told.count("done: test accuracy") == 1
    assert told.count("failed: DeadKernelError: Kernel died; the system kills it when memory") == 1
    with Command(tmp_path) as again:
        code, output = again.end()
        assert code == 0, output
    assert status(tmp_path / "out")[0] == 0
    assert content(tmp_path / "out") == expected[0]


@pytest.mark.parametrize("when", ["at the start", "in mid-run"])
def test_ctrl_c_ends_all_and_says_how_to_go_on(tmp_path, when):
    with Command(tmp_path) as command:
        if when == "at the start":  # what the runs need is being imported
            command.until(lambda: "runs to make" in command.output.read_text())
        else:
            command.until(command.kernels)
        started = command.family()
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
        code, output = command.end()
        assert code == 130
        assert output.endswith("interrupted; what is done is kept, the same command goes on\n")
        assert "Traceback" not in output
        assert_ends(started)
    code, told = status(tmp_path / "out")
    assert code == 0
    assert "failed" not in told


def test_random_kills(tmp_path_factory, expected, request, capsys):
    """The command, a worker or a kernel is killed; the command is given again; and so on."""
    kills = request.config.getoption("--kills")
    if not kills:
        pytest.skip("takes many minutes; give --kills N, or make test-faults")
    expectation, seconds = expected
    draw, victims, studies = random.Random(kills), [], 0
    folder = tmp_path_factory.mktemp("killed")
    while len(victims) < kills or not done(folder):
        if done(folder):
            assert content(folder / "out") == expectation
            studies, folder = studies + 1, tmp_path_factory.mktemp("killed")
        with Command(folder) as command:
            victim = kill_one(command, draw, seconds) if len(victims) < kills else None
            code, output = command.end()
        assert code in {None: [0], "command": [-signal.SIGKILL]}.get(victim, [0, 1]), output
        assert "Traceback" not in output
        if victim:
            victims.append(victim)
            with capsys.disabled():
                print(f"\n{len(victims)}: {victim} killed", end="", flush=True)
    assert content(folder / "out") == expectation
    counts = {kind: victims.count(kind) for kind in sorted(set(victims))}
    with capsys.disabled():
        print(f"\n{len(victims)} kills {counts}; {studies + 1} studies ended as if uninterrupted")


def kill_one(command, draw, seconds):
    """Kill a process of a command at some instant; which kind is told, if one still ran.

    The command at any time of the seconds that it takes, a worker or a kernel at any time from
    the first kernel's start. Where the command is killed, all that it started ends by itself.
    """
    kind = draw.choice(["command", "worker", "kernel"])
    find = {"worker": command.workers, "kernel": command.kernels}.get(kind)
    if find:
        command.until(command.kernels)
    end = time.monotonic() + draw.uniform(0, seconds / 4 if find else seconds)
    command.until(lambda: time.monotonic() > end)
    if find:
        for process in draw.sample(find(), 1) if find() else []:
            process.kill()
            return kind
        return None
    if command.process.poll() is not None:
        return None
    started = command.family()
    command.process.kill()
    command.process.wait()
    assert_ends(started)
    return kind


def done(folder):
    """Whether the study there ended well."""
    return (folder / "out" / "summary.ipynb").exists() and not list(folder.glob("out/.work-*"))
