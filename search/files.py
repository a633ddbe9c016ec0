"""Where decoded data and trained networks are cached, and files that are replaced in one step."""

from __future__ import annotations

import csv
import io
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_dir

CACHE_VARIABLE = "PRUNING_CACHE"


def cache_folder() -> Path:
    """The folder named by the environment variable PRUNING_CACHE, else the platform's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("amc-pruning", appauthor=False))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path`, which replaces `path` if the block ends without an error.

    Readers see the old file or all of the new one. Of two processes that write the same file, the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    with unfinished.open("x"):
        mode = unfinished.stat().st_mode
    try:
        yield unfinished
        unfinished.chmod(mode)  # safetensors makes files that only their owner can read
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file in one step, see `replacing`.

    Args:
        path: the file; its folder is made where needed.
        content: text (written as UTF-8), bytes, or a function that writes the file whose path it is given.
    """
    with replacing(path) as unfinished:
        if callable(content):
            content(unfinished)
        else:
            unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def write_csv(path: Path, titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file in one step: a line of titles, then the rows."""
    table = io.StringIO(newline="")
    csv.writer(table).writerows([titles, *rows])
    write(path, table.getvalue())
