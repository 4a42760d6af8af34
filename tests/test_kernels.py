"""Kernels forked from a process that has imported everything: the same work, and no orphans."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nbutils import load_runs, study
from nbutils.kernels import kernel_manager

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")

FRESH = "jupyter_client.manager.AsyncKernelManager"


def test_a_forked_kernel_computes_what_a_fresh_one_does(tmp_path, monkeypatch):
    histories = []
    for manager in (kernel_manager(), FRESH):
        out = tmp_path / manager
        out.mkdir()
        monkeypatch.setattr(study, "kernel_manager", lambda manager=manager: manager)
        parameters = {"batch_size": 1024, "epochs": 1, "out": str(out)}
        study.execute_notebook("02_train_batch_size", out / "notebook.ipynb", parameters)
        (out / "notebook.ipynb").rename(tmp_path / f"{manager}.ipynb")
        histories.append(
            load_runs(out).drop(columns=["seconds", "images_per_second", "peak_memory"])
        )
    assert histories[0].equals(histories[1])
    figures = [
        [
            "image/png" in output["data"]
            for cell in json.loads((tmp_path / f"{manager}.ipynb").read_text())["cells"]
            for output in cell.get("outputs", [])
            if output["output_type"] in ("display_data", "execute_result")
        ]
        for manager in (kernel_manager(), FRESH)
    ]
    assert figures[0] == figures[1]
    assert any(figures[0])


STARTS_A_KERNEL = """
import time
from nbutils.kernels import ForkedKernelManager
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
