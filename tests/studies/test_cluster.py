"""Studies on a real Dask cluster: a scheduler and its workers, processes on this machine."""

import operator
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nbutils import InputError, study
from nbutils.__main__ import main
from nbutils.studies.record import read_record
from nbutils.studies.study import load_study, make_run, run_status

distributed = pytest.importorskip(
    "distributed", reason="needs the extra cluster: pip install -e '.[cluster]'"
)

from nbutils import cluster  # noqa: E402

NO_SECOND_TRY = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}


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
    """What `condition` returns, once it is true."""
    end = time.monotonic() + 120
    while not (value := condition()):
        assert time.monotonic() < end, "nothing happened within two minutes"
        time.sleep(0.05)
    return value


class Cluster:
    """A scheduler, and workers that can be started and killed."""

    def __init__(self, folder, **environment):
        self.folder = folder
        self.processes = []
        self.address_file = folder / "scheduler.json"
        options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        self.scheduler = self.start("scheduler", *options, **environment)
        wait_for(self.address_file.exists)
        self.client = distributed.Client(
            scheduler_file=str(self.address_file), set_as_default=False
        )
        self.address = self.client.scheduler.address

    def start(self, kind, *options, **environment):
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", kind, "--scheduler-file", self.address_file, *options],
            cwd=self.folder,
            env=os.environ | environment,
            stderr=subprocess.DEVNULL,
        )
        self.processes.append(process)
        return process

    def start_worker(self, *options, **environment):
        known = self.addresses()
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", *options]
        process = self.start("worker", *options, **environment)
        wait_for(lambda: self.addresses() - known)
        return process

    def addresses(self):
        return set(self.client.nthreads())

    def run(self, study_file, out):
        return main(["run", study_file, "--out", str(out), "--scheduler", self.address])

    def close(self):
        self.client.close()
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def new_cluster(folder, **environment):
    started = Cluster(folder, **environment)
    try:
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two workers."""
    with new_cluster(tmp_path_factory.mktemp("pair")) as started:
        started.workers = [started.start_worker(), started.start_worker()]
        yield started


@pytest.fixture
def no_summary(monkeypatch):
    monkeypatch.setattr(study, "_sum_up", lambda *_: {})


def kernels(process):
    """The notebooks' kernels that a worker runs now."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
        return [child for child in below if "ipykernel_launcher" in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


def records(out):
    """The record of each run, all of them whole."""
    folders = [path for path in sorted(out.iterdir()) if path.is_dir() and path.name[0] != "."]
    return [read_record(path).run_id for path in folders]


def working(pair):
    """A worker that runs a notebook now."""
    return wait_for(lambda: next(filter(kernels, pair.workers), None))


def test_records_come_from_workers_that_do_not_see_the_folder_and_so_do_failures(
    pair, tmp_path, monkeypatch, no_summary
):
    if not Path("/proc/self/cwd").exists():
        pytest.skip("needs a path that means another folder in each process")
    monkeypatch.chdir(tmp_path)  # the workers are in another folder
    tiny, out = write_study(tmp_path, device=["cpu", "cuda:77"]), Path("/proc/self/cwd/out")
    good, bad = (run.config.run_id for run in load_study(tiny).runs)
    assert pair.run(tiny, out) == 1
    assert records(out) == [good]
    assert {path.name for path in (out / good).iterdir()} == set(cluster.RECORD_FILES)
    cause = run_status(out)[bad]
    assert cause.startswith("failed: InputError: device = 'cuda:77'")
    assert "(on tcp://127.0.0.1:" in cause
    assert not (pair.folder / "out").exists()


def test_the_cluster_forgets_what_is_done(pair, tmp_path, monkeypatch):
    """Else it would make a run again when the worker that made it leaves."""
    monkeypatch.setattr(cluster, "wait_until_seen", lambda _: None)  # there will be no record
    run = load_study(write_study(tmp_path, seed=[0])).runs[0]
    with cluster.ClusterExecutor(pair.address) as executor:
        future = executor.submit(operator.eq, run, str(tmp_path))  # a task that ends at once
        assert future.result() is None
        known = lambda dask_scheduler: len(dask_scheduler.tasks)  # noqa: E731 - sent by value
        wait_for(lambda: pair.client.run_on_scheduler(known) == 0)


def test_ctrl_c_ends_the_runs_on_the_workers(pair, tmp_path):
    # A job in the background ignores Ctrl-C, and so would what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = ["run", write_study(tmp_path, epochs=[500]), "--scheduler", pair.address]
    with subprocess.Popen(
        [sys.executable, "-m", "nbutils", *arguments], cwd=tmp_path, stderr=subprocess.PIPE
    ) as command:
        running = kernels(working(pair))
        command.send_signal(signal.SIGINT)
        error = command.stderr.read().decode()
    assert command.returncode == 130
    assert error.splitlines()[-1].startswith("interrupted; what is done is kept")
    _, left = psutil.wait_procs(running, timeout=60)
    assert left == []
    assert not any(map(kernels, pair.workers))
    assert not any(pair.client.processing().values())


def test_a_worker_killed_in_mid_run_loses_nothing(pair, tmp_path, no_summary):
    """Last of this pair's tests: one of the two workers is dead afterwards."""
    tiny, out = write_study(tmp_path, seed=[0, 1]), tmp_path / "out"
    with ThreadPoolExecutor(1) as background:
        command = background.submit(pair.run, tiny, out)
        working(pair).send_signal(signal.SIGKILL)
        assert command.result() == 0
    assert records(out) == sorted(run.config.run_id for run in load_study(tiny).runs)
    assert len(pair.addresses()) == 1


def test_runs_that_kill_workers_and_a_lost_scheduler_are_told(tmp_path, no_summary):
    tiny, out = write_study(tmp_path, epochs=[500], seed=[0, 1]), tmp_path / "out"
    with new_cluster(tmp_path, **NO_SECOND_TRY) as frail, ThreadPoolExecutor(1) as background:
        frail.workers = [frail.start_worker(), frail.start_worker()]
        command = background.submit(frail.run, tiny, out)
        wait_for(lambda: all(map(kernels, frail.workers)))
        running = [kernel for worker in frail.workers for kernel in kernels(worker)]
        frail.workers[0].send_signal(signal.SIGKILL)
        wait_for((out / "failures.json").exists)
        frail.scheduler.send_signal(signal.SIGKILL)
        assert command.result() == 1
        _, left = psutil.wait_procs(running, timeout=60)
        assert left == []
    killed, lost = sorted(run_status(out).values())
    assert killed.startswith("failed: 1 worker died making this run, the last at tcp://127.0.0.1:")
    assert lost == f"failed: the scheduler {frail.address} was lost"
    assert records(out) == []


def test_runs_that_a_dead_worker_had_not_begun_are_made_by_another(tmp_path, no_summary):
    tiny, out = write_study(tmp_path, device=["auto"], seed=[0, 1]), tmp_path / "out"
    with new_cluster(tmp_path, **NO_SECOND_TRY) as frail, ThreadPoolExecutor(1) as background:
        only = frail.start_worker("--resources", "GPU=1")
        command = background.submit(frail.run, tiny, out)
        wait_for(lambda: sum(map(len, frail.client.processing().values())) == 2 and kernels(only))
        only.send_signal(signal.SIGKILL)
        frail.start_worker("--resources", "GPU=1")
        assert command.result() == 1
    killed, done = sorted(run_status(out).values(), reverse=True)
    assert killed.startswith("failed: 1 worker died making this run")
    assert done.startswith("done: ")


def test_runs_go_to_the_gpu_where_workers_declare_one(tmp_path):
    runs = load_study(write_study(tmp_path, device=["auto", "cuda:0", "cpu"])).runs
    with new_cluster(tmp_path) as mixed:
        mixed.start_worker("--resources", "GPU=1", "--name", "gpu")
        mixed.start_worker("--name", "plain")
        names = mixed.client.run(lambda dask_worker: dask_worker.name)
        address = {name: address for address, name in names.items()}
        with cluster.ClusterExecutor(mixed.address) as executor:
            futures = [executor.submit(make_run, run, str(tmp_path)) for run in runs]
            wait_for(lambda: sum(map(len, mixed.client.processing().values())) == len(runs))
            processing = mixed.client.processing()
            at = {name: len(processing[address[name]]) for name in address}
            assert at == {"gpu": 2, "plain": 1}
            assert all(future.cancel() for future in futures)


def test_workers_with_other_code_are_refused_by_name(tmp_path, capsys):
    other = tmp_path / "other"
    ignored = shutil.ignore_patterns("__pycache__", "reference")
    shutil.copytree(study.NOTEBOOKS.parent / "nbutils", other / "nbutils", ignore=ignored)
    shutil.copytree(study.NOTEBOOKS, other / "notebooks", ignore=ignored)
    with open(other / "nbutils" / "model.py", "a") as module:
        module.write("# changed\n")
    with new_cluster(tmp_path) as mixed:
        mixed.start_worker(PYTHONPATH=str(other))
        assert mixed.run(write_study(tmp_path, seed=[0]), tmp_path / "out") == 2
        (address,) = mixed.addresses()
        message = capsys.readouterr().err
        assert f"this machine has the nbutils of digest {cluster.code_version()}" in message
        assert f"but {address} has " in message
        assert not (tmp_path / "out").exists()


def finish(executor, remote):
    """What the future of a run holds after its task has ended like `remote`."""
    run = load_study("batch-size").runs[0]
    future = Future()
    executor._finish(future, run, Path("out/.work/mark"), lambda: None, remote)
    return future


def test_a_scheduler_lost_while_a_death_is_looked_into_ends_the_run():
    def lost(_):
        raise OSError("Timed out trying to connect")

    dead = SimpleNamespace(address="tcp://127.0.0.1:9")
    error = distributed.KilledWorker("key", dead, 0)
    remote = SimpleNamespace(
        status="error", exception=lambda: error, release=lambda: None, cancelled=lambda: False
    )
    executor = object.__new__(cluster.ClusterExecutor)
    executor.client = SimpleNamespace(get_events=lost)
    with pytest.raises(OSError, match="Timed out"):
        finish(executor, remote).result(timeout=0)


def test_a_record_that_another_machine_wrote_is_waited_for(tmp_path):
    path = tmp_path / "run.json"
    with ThreadPoolExecutor(1) as background:
        waiting = background.submit(cluster.wait_until_seen, path, patience=60)
        time.sleep(0.2)
        assert not waiting.done()
        path.touch()
        assert waiting.result(timeout=30) is None
    cluster.wait_until_seen(tmp_path / "nowhere", patience=0)


def test_where_no_scheduler_answers_the_message_says_so():
    with pytest.raises(InputError, match="no Dask scheduler answers there within"):
        cluster.ClusterExecutor("tcp://127.0.0.1:9", timeout=0.2)
    with pytest.raises(InputError, match="scheduler nowhere://x: no Dask scheduler answers"):
        cluster.ClusterExecutor("nowhere://x", timeout=0.2)


def test_without_dask_the_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["run", "batch-size", "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "pip install -e '.[cluster]'" in capsys.readouterr().err
