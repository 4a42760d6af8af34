"""Kernels forked from a process that has imported everything: the same work, and no orphans."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nbutils import load_runs
from nbutils.studies.kernels import kernel_manager
from nbutils.studies.study import execute_notebook
from nbutils.studies.workers import Workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")


def execute(out):
    parameters = {"batch_size": 1024, "epochs": 1, "out": str(out / "runs")}
    execute_notebook("02_train_batch_size", out / "notebook.ipynb", parameters)
    return kernel_manager()


def test_a_forked_kernel_computes_what_a_fresh_one_does(tmp_path, monkeypatch):
    forked, fresh = tmp_path / "forked", tmp_path / "fresh"
    forked.mkdir()
    fresh.mkdir()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Workers(1, 1, tmp_path / "log.txt") as workers:
        assert "Forked" in workers.submit(execute, forked).result()
    assert "Forked" not in execute(fresh)

    measured = ["seconds", "images_per_second", "peak_memory"]
    histories = [load_runs(out / "runs").drop(columns=measured) for out in (forked, fresh)]
    assert histories[0].equals(histories[1])
    figures = [
        [
            "image/png" in output["data"]
            for cell in json.loads((out / "notebook.ipynb").read_text())["cells"]
            for output in cell.get("outputs", [])
            if output["output_type"] in ("display_data", "execute_result")
        ]
        for out in (forked, fresh)
    ]
    assert any(figures[0])
    assert any(figures[1])


STARTS_A_KERNEL = """
import time
from nbutils.studies.kernels import ForkedKernelManager
from jupyter_core.utils import run_sync
if __name__ == "__main__":
    manager = ForkedKernelManager(kernel_name="python3", transport="ipc", ip={ip!r})
    run_sync(manager.start_kernel)()
    print(manager.provisioner.pid, flush=True)
    time.sleep(600)
"""


def test_a_forked_kernel_ends_with_the_process_that_started_it(tmp_path):
    script = tmp_path / "start.py"
    script.write_text(STARTS_A_KERNEL.format(ip=str(tmp_path / "k")))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        kernel = int(process.stdout.readline())
        os.kill(kernel, 0)
        process.send_signal(signal.SIGKILL)
    for _ in range(600):
        try:
            os.kill(kernel, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(kernel, signal.SIGKILL)
    pytest.fail("the kernel lives on")
