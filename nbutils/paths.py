"""Where the project keeps its files, and how a file is written so that it is always whole."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
"""The repository. nbutils reads notebooks from it, so it is installed with `pip install -e`."""

NOTEBOOKS = ROOT / "notebooks"
STUDIES = NOTEBOOKS / "studies"
REFERENCE = NOTEBOOKS / "reference"
FIGURES = ROOT / "figures"

PROGRESS, CHECKPOINT = "progress.csv", "checkpoint.pt"  # in the folder of an unfinished run


def data_folder() -> Path:
    """Folder of the downloaded datasets: `$NBUTILS_DATA`, else `data/` in the repository."""
    return Path(os.environ.get("NBUTILS_DATA") or ROOT / "data").expanduser().absolute()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that at every instant it is the old one or the new one.

    A process that is killed meanwhile leaves a hidden file beside it, `.NAME.*`.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write plain values by `write_atomically`."""
    write_atomically(path, f"{json.dumps(content, indent=1)}\n".encode())
