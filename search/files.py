"""Where decoded data and trained networks are cached, and files that are replaced in one step."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from platformdirs import user_cache_dir

from amc_env.errors import UserError
from amc_env.files import make_folder, read_json, reading, replacing, sweep, write, writing

__all__ = [
    "cache_folder",
    "cached",
    "make_folder",
    "read_json",
    "reading",
    "replacing",
    "sealed",
    "sweep",
    "unsealed",
    "write",
    "write_csv",
    "writing",
]

log = logging.getLogger(__name__)

CACHE_VARIABLE = "PRUNING_CACHE"
_CHECK = "check"
_AN_HOUR = 3600.0  # another process may be writing a younger temporary file
Content = TypeVar("Content")


def cache_folder() -> Path:
    """The folder named by the environment variable PRUNING_CACHE, else the platform's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("amc-pruning", appauthor=False))


def cached(path: Path, make: Callable[[Path], object], read: Callable[[Path], Content]) -> Content:
    """What ``read`` gives of a file in the cache; where it is missing or damaged, ``make`` writes it first.

    Raises:
        UserError: The file cannot be written.
    """
    sweep(path.parent, _AN_HOUR)
    if path.exists():
        try:
            with reading(path):
                return read(path)
        except UserError as error:
            log.warning("%s is damaged and is made again: %s", path, error)
    write(path, make)
    return read(path)


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested objects with their dotted names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def sealed(entry: Mapping[str, Any]) -> str:
    """An object as a line of JSON that ends with a checksum of the rest."""
    return json.dumps({**entry, _CHECK: _checksum(entry)}) + "\n"


def unsealed(line: bytes) -> dict[str, Any] | None:
    """The object of a line that `sealed` wrote, or None where the line is damaged."""
    try:
        entry = json.loads(line)
        return entry if entry.pop(_CHECK) == _checksum(entry) else None
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None


def _checksum(entry: Mapping[str, Any]) -> str:
    return f"{crc32(json.dumps(entry).encode()):08x}"


def write_csv(path: Path, titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file in one step: a line of titles, then the rows."""
    table = io.StringIO(newline="")
    csv.writer(table).writerows([titles, *rows])
    write(path, table.getvalue())
