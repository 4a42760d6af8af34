import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from nbutils.studies.workers import Failure, Workers

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def double(number):
    return 2 * number


def fail():
    raise ValueError("two\nlines")


def die(sign, told):
    Path(told).write_text(tempfile.mkdtemp())
    os.kill(os.getpid(), sign)


def sleep_with_a_child(told):
    """Tells a temporary file, its own process id and that of a child.

    The child has a session of its own, as a kernel does.
    """
    child = subprocess.Popen(SLEEP, start_new_session=True)
    path = tempfile.mkstemp()[1]
    with open(told, "w") as file:
        file.write(f"{path} {os.getpid()} {child.pid}\n")
    time.sleep(600)


def read(told):
    while not (told.exists() and told.read_text().endswith("\n")):
        time.sleep(0.05)
    path, *pids = told.read_text().split()
    assert Path(path).parent != Path(tempfile.gettempdir())
    return Path(path), [int(pid) for pid in pids]


def assert_gone(path, pids):
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    assert not path.parent.exists()


def test_results_and_errors_arrive(tmp_path):
    with Workers(2, 1, tmp_path / "log.txt") as workers:
        good, bad = workers.submit(double, 21), workers.submit(fail)
        assert good.result() == 42
        with pytest.raises(Failure, match=r"^ValueError: two lines$"):
            bad.result()


def test_a_task_that_is_killed_takes_nothing_with_it(tmp_path):
    with Workers(1, 1, tmp_path / "log.txt") as workers:
        told = tmp_path / "killed", tmp_path / "aborted"
        killed = workers.submit(die, signal.SIGKILL, told[0])
        aborted = workers.submit(die, signal.SIGABRT, told[1])
        good = workers.submit(double, 1)
        with pytest.raises(Failure, match="killed by SIGKILL, which the system sends when memory"):
            killed.result()
        with pytest.raises(Failure, match=r"killed by SIGABRT$"):
            aborted.result()
        assert good.result() == 2
    assert not any(Path(path.read_text()).exists() for path in told)


def test_a_task_is_stopped_at_the_time_limit_with_what_it_started(tmp_path):
    with Workers(1, 1, tmp_path / "log.txt", time_limit=5) as workers:
        future = workers.submit(sleep_with_a_child, tmp_path / "told")
        with pytest.raises(Failure, match="stopped at the time limit of 5 s"):
            future.result()
    if (tmp_path / "told").exists():  # on a slow machine it may not have come so far
        assert_gone(*read(tmp_path / "told"))


def test_a_time_limit_may_be_of_months(tmp_path):
    with Workers(1, 1, tmp_path / "log.txt", time_limit=1e7) as workers:
        assert workers.submit(double, 1).result() == 2


def test_an_interrupted_block_ends_what_runs_and_drops_what_waits(tmp_path):
    workers = Workers(1, 1, tmp_path / "log.txt")
    workers.submit(sleep_with_a_child, tmp_path / "told")
    dropped = workers.submit(double, 1)
    path, pids = read(tmp_path / "told")
    workers.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert dropped.cancelled() or isinstance(dropped.exception(), Failure)
    assert_gone(path, pids)


def test_what_a_second_interrupt_left_running_ends_too(tmp_path):
    workers = Workers(1, 1, tmp_path / "log.txt")
    future = workers.submit(sleep_with_a_child, tmp_path / "told")
    path, pids = read(tmp_path / "told")
    workers._ended = True  # all that `__exit__` may have come to do
    with pytest.raises(Failure, match="interrupted"):
        future.result()
    workers.shutdown()
    assert_gone(path, pids)


def test_tasks_end_when_the_one_that_waits_is_killed(tmp_path):
    script = (
        "import sys, pathlib\n"
        "from nbutils.studies.workers import Workers\n"
        "from test_workers import sleep_with_a_child\n"
        "if __name__ == '__main__':\n"
        "    with Workers(1, 1, pathlib.Path('log.txt')) as workers:\n"
        "        workers.submit(sleep_with_a_child, 'told').result()\n"
    )
    (tmp_path / "main.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, env=environment)
    path, pids = read(tmp_path / "told")
    command.kill()
    command.wait()
    assert_gone(path, pids)


def test_what_tasks_print_goes_to_the_log(tmp_path, capfd):
    with Workers(1, 3, tmp_path / "log.txt") as workers:
        workers.submit(print, "hello").result()
        assert workers.submit(os.getenv, "OMP_NUM_THREADS").result() == "3"
    assert "hello" in (tmp_path / "log.txt").read_text()
    assert capfd.readouterr() == ("", "")
