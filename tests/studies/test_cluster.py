"""Studies on a real Dask cluster: a scheduler and its workers, processes on this machine."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import assert_end, kernels

from nbutils import InputError
from nbutils.__main__ import main
from nbutils.studies import runner
from nbutils.studies.cluster import cluster
from nbutils.studies.status import run_status

distributed = pytest.importorskip(
    "distributed", reason="needs the extra cluster: pip install -e '.[cluster]'"
)


def write_study(folder, **grid):
    """Shrunken for speed: runs of one epoch with large batches."""
    path = folder / "tiny.yaml"
    path.write_text(
        f"runs: [{{notebook: 02_train_batch_size, grid: {grid}}}]\n"
        "fixed: {epochs: 1, device: cpu, batch_size: 1024}\n"
        "summary: 04_summary\n"
    )
    return str(path)


def wait_for(condition):
    """What `condition` returns, once it is true, within five minutes."""
    end = time.monotonic() + 300
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    assert value
    return value


class Cluster:
    """A scheduler, and workers that can be started and killed; a context manager."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        self.file = folder / "scheduler.json"
        self.start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        wait_for(self.file.exists)
        self.client = distributed.Client(scheduler_file=str(self.file), set_as_default=False)
        self.address = self.client.scheduler.address

    def start(self, kind, *options):
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", kind, "--scheduler-file", self.file, *options],
            cwd=self.folder,
            stderr=subprocess.DEVNULL,
        )
        self.processes.append(process)
        return process

    def start_worker(self, *options):
        known = set(self.client.nthreads())
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", *options]
        process = self.start("worker", *options)
        wait_for(lambda: set(self.client.nthreads()) - known)
        return process

    def run(self, study_file, out):
        return main(["run", study_file, "--out", str(out), "--scheduler", self.address])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.client.close()
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A cluster with one worker."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as started:
        started.worker = started.start_worker()
        yield started


@pytest.fixture
def no_summary(monkeypatch):
    monkeypatch.setattr(runner, "_sum_up", lambda *_: {})


@pytest.mark.slow
def test_a_run_that_fails_on_a_worker_is_told_and_the_others_are_made(one, tmp_path, no_summary):
    out = tmp_path / "out"
    assert one.run(write_study(tmp_path, device=["cpu", "cuda:77"]), out) == 1
    done, failed = sorted(run_status(out).values())
    assert done.startswith("done: test accuracy")
    assert failed.startswith("failed: InputError: device = 'cuda:77'")


def test_workers_that_do_not_see_the_folder_are_refused_by_name(one, tmp_path, capsys, monkeypatch):
    if not os.path.exists("/proc/self/cwd"):
        pytest.skip("needs a path that means another folder in each process")
    monkeypatch.chdir(tmp_path)  # the worker is in another folder
    assert one.run(write_study(tmp_path, seed=[0]), "/proc/self/cwd/out") == 2
    (address,) = one.client.nthreads()
    assert f"{address} does not see the folder /proc/self/cwd" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.slow
def test_ctrl_c_ends_the_runs_on_the_workers(one, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    study = write_study(tmp_path, epochs=[500])
    arguments = ["run", study, "--scheduler", one.address, "--out", tmp_path / "out"]
    with subprocess.Popen(
        [sys.executable, "-m", "nbutils", *arguments], stderr=subprocess.PIPE, text=True
    ) as command:
        wait_for(lambda: list(tmp_path.glob("out/.work/*/*/checkpoint.pt")))
        running = kernels(one.worker)
        command.send_signal(signal.SIGINT)
        error = command.stderr.read()
    assert command.returncode == 130
    assert error.splitlines()[-1].startswith("interrupted; what is done is kept")
    assert_end(running, seconds=60)
    wait_for(lambda: not any(one.client.processing().values()))


@pytest.mark.slow
def test_the_runs_of_a_killed_worker_are_made_by_another(tmp_path, no_summary):
    study, out = write_study(tmp_path, epochs=[3], seed=[0, 1]), tmp_path / "out"
    with Cluster(tmp_path) as pair, ThreadPoolExecutor(1) as background:
        workers = [pair.start_worker(), pair.start_worker()]
        command = background.submit(pair.run, study, out)
        wait_for(lambda: list(out.glob(".work/*/*/checkpoint.pt")))
        running = kernels(workers[0])
        workers[0].send_signal(signal.SIGKILL)
        assert command.result() == 0
        assert_end(running, seconds=60)
        assert len(pair.client.nthreads()) == 1
    assert all(text.startswith("done") for text in run_status(out).values())


@pytest.mark.slow
def test_a_lost_scheduler_is_told(tmp_path, no_summary):
    study, out = write_study(tmp_path, epochs=[500]), tmp_path / "out"
    with Cluster(tmp_path) as frail, ThreadPoolExecutor(1) as background:
        worker = frail.start_worker()
        command = background.submit(frail.run, study, out)
        wait_for(lambda: list(out.glob(".work/*/*/checkpoint.pt")))
        running = kernels(worker)
        frail.processes[0].send_signal(signal.SIGKILL)
        assert command.result(timeout=300) == 1
        assert_end(running, seconds=60)
    assert list(run_status(out).values()) == ["failed: cancelled: the scheduler was lost"]


@pytest.mark.slow
def test_runs_go_to_the_gpu_where_workers_declare_one(tmp_path):
    with Cluster(tmp_path) as mixed:
        mixed.start_worker("--resources", "GPU=1", "--name", "gpu")
        mixed.start_worker("--name", "plain")
        with cluster(mixed.address, tmp_path) as executor:
            name = lambda _: distributed.get_worker().name  # noqa: E731
            assert {executor.submit(name, number).result() for number in range(4)} == {"gpu"}


def test_where_no_scheduler_answers_or_dask_is_not_there(monkeypatch, capsys, tmp_path):
    for address in ("tcp://127.0.0.1:9", "nowhere://x"):
        with (
            pytest.raises(InputError, match=f"scheduler {address}: no Dask scheduler answers"),
            cluster(address, tmp_path, timeout=0.2),
        ):
            pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["run", "batch-size", "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "pip install -e '.[cluster]'" in capsys.readouterr().err
