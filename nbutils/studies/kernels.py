"""Kernels that start at once: forked from a process that has imported what notebooks need.

A kernel spends seconds on importing torch, its compiler, matplotlib and seaborn, before it runs
its first cell. On Linux one process, multiprocessing's fork server, does that once for a study:
the processes that make its runs are forks of it, and their kernels are forks of these. A fork has
all that has been imported and nothing that was computed.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

PRELOAD = (
    "torch._dynamo",  # every optimizer imports it when it is made
    "seaborn",
    "ipykernel.kernelapp",
    "papermill",
    "nbutils.plots.plots",
    "nbutils.training.train",
)
"""What the forks find imported."""


_forking = False


def processes() -> Any:
    """How to start processes: forks of the one that has imported `PRELOAD`, else fresh ones."""
    if sys.platform != "linux":  # elsewhere system libraries do not stand a fork
        return multiprocessing.get_context("spawn")
    multiprocessing.forkserver.set_forkserver_preload(list(PRELOAD))
    return multiprocessing.get_context("forkserver")


def fork_kernels() -> None:
    """Let kernels be forks of this process, one that `processes` started and did no more yet."""
    global _forking
    _forking = sys.platform == "linux"


def kernel_manager() -> str:
    """The class that starts a notebook's kernel, for nbclient's `kernel_manager_class`."""
    manager = ForkedKernelManager if _forking else AsyncKernelManager
    return f"{manager.__module__}.{manager.__name__}"


class ForkedKernelManager(AsyncKernelManager):
    """Starts its kernel by a `ForkedProvisioner`."""

    async def _async_pre_start_kernel(self, **options: Any) -> Any:
        if self.provisioner is None:
            self.provisioner = ForkedProvisioner(
                kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self
            )
        return await super()._async_pre_start_kernel(**options)

    pre_start_kernel = _async_pre_start_kernel


class ForkedProvisioner(LocalProvisioner):
    """Makes a kernel of a fork."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> Any:
        """Start a process that becomes the kernel which `cmd` would have started."""
        arguments = cmd[cmd.index("ipykernel_launcher") + 1 :]
        self.process: Any = _Fork(arguments, dict(options["env"]), options.get("cwd"))
        self.pid = self.pgid = self.process.pid
        self.cwd = options.get("cwd") or os.getcwd()
        return self.connection_info


class _Fork:
    """A process of multiprocessing with the methods of `subprocess.Popen` that are called."""

    stdin = stdout = stderr = None

    def __init__(self, arguments: list[str], env: dict[str, str], cwd: str | None) -> None:
        self._process = multiprocessing.get_context("fork").Process(
            target=_become_kernel, args=(arguments, env, cwd)
        )
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()


def _become_kernel(arguments: list[str], env: dict[str, str], cwd: str | None) -> None:
    import matplotlib as mpl
    import torch
    from ipykernel import kernelapp

    os.setsid()
    # What papermill set for its own process is not for the kernel.
    asyncio.set_event_loop(asyncio.new_event_loop())
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    os.environ.clear()
    os.environ.update(env)
    if "MPLBACKEND" not in env:
        mpl.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    if "OMP_NUM_THREADS" in env:  # which is only read when torch is imported
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    if cwd:
        os.chdir(cwd)
    # It need not look for its parent, as it ends with it anyway.
    arguments = [*arguments, "--IPKernelApp.parent_handle=1"]
    sys.argv = ["ipykernel_launcher", *arguments]
    kernelapp.launch_new_instance(argv=arguments)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
