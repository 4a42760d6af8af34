"""A study's runs on a Dask cluster whose workers see the study's folder.

A scheduler tells its workers and clients what to execute, so connect only to one you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from nbutils.errors import InputError
from nbutils.machine import processors
from nbutils.paths import NOTEBOOKS


@contextmanager
def cluster(address: str, out: Path, timeout: float = 10) -> Iterator[Executor]:
    """The cluster of the scheduler at `address` as an executor for `run_study`.

    Where workers declare the resource `GPU`, each run takes one.

    Raises:
        InputError: Dask is not installed, no scheduler answers within `timeout` seconds, or
            workers, which are named, do not see the folder `out` or have other code.
    """
    try:
        from distributed import Client

        client = Client(address, timeout=timeout, set_as_default=False)
    except ModuleNotFoundError as error:
        raise InputError(
            f"a scheduler needs the extra cluster: pip install -e '.[cluster]' ({error})"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"scheduler {address}: no Dask scheduler answers there within {timeout:g} s; "
            "`dask scheduler` starts one and prints its address"
        ) from error
    with client:
        if not client.nthreads():
            print(f"Waiting for a worker; `dask worker {address}` starts one", flush=True)
            client.wait_for_workers(1)
        resources = {"GPU": 1} if _check_workers(client, out.absolute()) else None
        executor = client.get_executor(pure=False, resources=resources)
        executor.submit = partial(executor.submit, _on_worker, code_version())
        yield executor


def _check_workers(client: Any, out: Path) -> bool:
    """Refuse workers that cannot make the runs; whether any of them declares a GPU."""
    folder = next(path for path in (out, *out.parents) if path.is_dir())
    mark = folder / f".seen-by-workers-{uuid.uuid4().hex}"
    mark.touch()
    try:
        answers = client.run(_describe, str(mark), on_error="return")
    finally:
        mark.unlink(missing_ok=True)
    code, faults = code_version(), []
    for worker, found in sorted(answers.items()):
        if isinstance(found, BaseException):
            faults.append(f"{worker} has no nbutils that works ({found!r})")
        elif found["code"] != code:
            faults.append(f"{worker} has the nbutils {found['code']}, not {code} as here")
        elif not found["sees"]:
            faults.append(f"{worker} does not see the folder {folder}")
    if faults:
        raise InputError(f"{'; '.join(faults)}; all need the same code and a disk that they share")
    return any(found["gpu"] for found in answers.values())


def _describe(mark: str, dask_worker: Any) -> dict[str, Any]:
    gpu = "GPU" in dask_worker.state.total_resources
    return {"code": code_version(), "gpu": gpu, "sees": os.access(mark, os.W_OK)}


def code_version() -> str:
    """The start of a digest over the code of nbutils and of the notebooks."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        digest.update(json.dumps([cell["source"] for cell in cells]).encode())
    return digest.hexdigest()[:8]


def _on_worker(code: str, task: Callable[..., Any], *args: Any) -> Any:
    """Do a task on a worker, which may have joined later, with the code of the command."""
    from distributed import get_worker

    worker = get_worker()
    if code_version() != code:
        raise InputError(f"{worker.address} has the nbutils {code_version()}, not {code}")
    os.environ["OMP_NUM_THREADS"] = str(max(1, processors() // worker.state.nthreads))
    return task(*args)
