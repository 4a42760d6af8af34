"""Notebooks as functions of their parameters: run one with papermill, check what it is given."""

import ast
import itertools
import json
import logging
import math
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nbutils.errors import InputError, suggest
from nbutils.paths import NOTEBOOKS
from nbutils.training.config import RunConfig


def notebook_path(name: str) -> Path:
    """The file of the notebook called `name` in `notebooks/`; InputError if there is none."""
    known = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    if name not in known:
        raise InputError(f"no notebook {name!r}; {suggest(name, known)}")
    return NOTEBOOKS / f"{name}.ipynb"


def declared_parameters(notebook: str) -> list[str]:
    """Names of the parameters that a notebook of the project declares."""
    for cell in json.loads(notebook_path(notebook).read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            return _assigned_names("".join(cell["source"]))
    return []


def check_parameters(notebook: str, names: Iterable[str]) -> None:
    """Raise InputError for parameters that a notebook lacks; papermill would only log them."""
    _check_declared(f"the notebook {notebook}", names, declared_parameters(notebook))


def check_injected_parameters() -> None:
    """In a notebook: InputError for parameters that papermill added but it does not declare."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    executed = shell.user_ns["In"] if shell else []
    for declared, injected in itertools.pairwise(executed):
        if injected.startswith("# Parameters\n"):  # the cell that papermill adds
            _check_declared("this notebook", _assigned_names(injected), _assigned_names(declared))


def _check_declared(where: str, names: Iterable[str], declared: list[str]) -> None:
    for name in names:
        if name not in declared:
            raise InputError(f"{where} has no parameter {name!r}; {suggest(name, declared)}")


def _assigned_names(source: str) -> list[str]:
    names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    return [node.id for node in names if isinstance(node.ctx, ast.Store)]


def config_from_parameters(variables: Mapping[str, Any]) -> RunConfig:
    """In a notebook: the settings of a run, from `globals()`; what is not there has its default."""
    check_injected_parameters()
    names = RunConfig.field_names()
    return RunConfig(**{name: variables[name] for name in names if name in variables})


def execute_notebook(
    notebook: str,
    output: Path,
    parameters: Mapping[str, Any],
    *,
    threads: int | None = None,
    time_limit: float | None = None,
) -> None:
    """Run a notebook of the project with papermill, in a kernel that ends with this process.

    The kernel has this number of `threads`; a cell may take `time_limit` seconds, rounded up. May
    be called from several threads at a time. Raises what papermill does.
    """
    import papermill
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)
    environment = {"TQDM_DISABLE": "1", "PYTHONUTF8": "1"}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    # Pipes, not TCP ports: kernels that start together may claim the same port. The system limits
    # the names of pipes.
    with tempfile.TemporaryDirectory(prefix="nbutils-", dir="/tmp") as folder:
        pipes = {"connection_file": f"{folder}/kernel.json", "ip": f"{folder}/kernel"}
        papermill.execute_notebook(
            str(notebook_path(notebook)),
            str(output.absolute()),
            parameters=dict(parameters),
            progress_bar=False,
            execution_timeout=None if time_limit is None else math.ceil(time_limit),
            config=Config({"KernelManager": {"transport": "ipc", **pipes}}),
            kernel_manager_class=_kernel_class(environment),
            shutdown_kernel="immediate",  # else one that computes has 5 s to end by itself
        )


def _kernel_class(environment: dict[str, str]) -> type:
    """A class of kernels that run this interpreter, whatever "python3" names on this machine."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict() | {"env": environment})

        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
            # What a kernel says of its own end would spoil the progress bar.
            await super().start_kernel(**options, stderr=subprocess.DEVNULL)

    return Kernel
