"""A study's runs on a Dask cluster whose workers see the study's folder.

A scheduler tells its workers and clients what to execute, so connect only to one you trust.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from nbutils.errors import InputError


@contextmanager
def cluster(address: str, out: Path, timeout: float = 10) -> Iterator[Executor]:
    """The cluster of the scheduler at `address` as an executor for `run_study`.

    Where workers declare the resource `GPU`, each run takes one.

    Raises:
        InputError: Dask is not installed, no scheduler answers within `timeout` seconds, or
            workers, which are named, do not see the folder `out`.
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
        folder = next(path for path in (out, *out.parents) if path.is_dir())
        with NamedTemporaryFile(dir=folder, prefix=".seen-by-workers-") as mark:
            sees = client.run(os.access, mark.name, os.W_OK)
        if blind := ", ".join(worker for worker in sees if not sees[worker]):
            raise InputError(f"{blind} does not see the folder {folder}; all must share its disk")
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        gpu = {"GPU": 1} if any("GPU" in worker["resources"] for worker in workers) else None
        yield client.get_executor(pure=False, resources=gpu)
