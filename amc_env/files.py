"""Files that are replaced in one step, and whose faults end in one UserError."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from amc_env.errors import UserError, first_line

_TEMPORARY = ".tmp-"


@contextmanager
def reading(subject: str | Path, advice: str = "") -> Iterator[None]:
    """Report whatever goes wrong while a file is read and parsed as one UserError.

    Readers raise errors of many types on a file that is not what its name says.

    Args:
        subject: What messages call the file.
        advice: What to do about it.

    Raises:
        UserError: The file is missing, of another kind or damaged; its code is ``unreadable``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        then = f"; {advice}" if advice else ""
        raise UserError(f"{subject} cannot be read ({_reason(error)}){then}", code="unreadable") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename:
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return first_line(error.__cause__ or error)


def read_json(path: Path, subject: str = "", advice: str = "") -> Any:
    """The content of a JSON file.

    Raises:
        UserError: As `reading`.
    """
    with reading(subject or path, advice):
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report that the file system refuses to write ``path`` as a UserError.

    Raises:
        UserError: There is no room, no permission, or something else in the way; its code is ``unwritable``.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or first_line(error)}); make room for it, or give another folder",
            code="unwritable",
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        UserError: As `writing`.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path`, which replaces `path` if the block ends without an error.

    Readers see the old file or all of the new one. Of two processes that write the same file, the last one stays. A
    symbolic link is replaced, not followed.

    Raises:
        UserError: As `writing`.
    """
    make_folder(path.parent)
    unfinished = path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    with writing(path):
        with unfinished.open("x"):
            mode = unfinished.stat().st_mode
        try:
            yield unfinished
            unfinished.chmod(mode)  # safetensors makes files that only their owner can read
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def sweep(folder: Path, seconds: float = 0.0) -> None:
    """Remove temporary files that killed processes left in a folder and two levels below, if they are older than this."""
    latest = time.time() - seconds
    for path in (found for inner in ("", "*/", "*/*/") for found in folder.glob(f"{inner}{_TEMPORARY}*")):
        with suppress(OSError):
            if path.stat().st_mtime <= latest:
                path.unlink()


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
