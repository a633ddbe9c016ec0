"""The user's cache folder: what is decoded or trained once and read by every later run."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_dir

CACHE_VARIABLE = "PRUNING_CACHE"


def cache_folder() -> Path:
    """The folder that the environment variable PRUNING_CACHE names, else the platform's own for us."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("amc-pruning", appauthor=False))


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see all of it or nothing.

    Two processes that write the same file at once both succeed; the last rename stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    unfinished = Path(name)
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
