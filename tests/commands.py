"""The real commands, as processes that tests watch, kill and interrupt."""

import signal
import subprocess
import sys
import time

import psutil


class Run:
    """`python -m nbutils run` of the study in `file`, going on; a context manager."""

    def __init__(self, file, folder, **options):
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
                **options,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in [*kernels(self.process), self.process]:
            process.kill()
        self.process.wait()

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


def kernels(process):
    """The notebooks' kernels that a command or a worker runs now."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def assert_end(processes, seconds=30):
    """They end by themselves, soon."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
