"""Threads, memory, random generators and the name of the machine."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from amc_env.errors import UserError, first_line

T = TypeVar("T")


_MOST = 8  # lanes: Python itself runs in one thread at a time


def in_turn(call: Callable[[int], T], count: int) -> Generator[T]:
    """What ``call`` gives for 0 to ``count - 1``, one after another."""
    for index in range(count):
        yield call(index)


def in_lanes(call: Callable[[int], T], count: int) -> Generator[T]:
    """The same, in order, as many at once as torch has threads, but no more than eight.

    Close it where it may not be read to its end. Gradients and inference are modes of a thread: ``call`` sets those
    that it needs.
    """
    threads = torch.get_num_threads()
    lanes = min(threads // -(-threads // _MOST), count)
    if lanes < 2:
        yield from in_turn(call, count)
        return
    pool = ThreadPoolExecutor(lanes, "lane", initializer=torch.set_num_threads, initargs=(threads // lanes,))
    try:
        yield from pool.map(call, range(count))
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:  # the lanes' number is that of libraries in all threads
            torch.set_num_threads(threads)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was used up: of a graphics processor, or of the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


@contextmanager
def memory_for(what: str, field: str) -> Iterator[None]:
    """Refuses what does not fit into memory.

    Args:
        what: What the memory is for, like "scoring".
        field: The setting to lower.

    Raises:
        UserError: The block used up the memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"out of memory: {what} does not fit ({first_line(error)}): lower {{field}}",
            code="out_of_memory",
            field=field,
        ) from error


def release_heap() -> None:
    """Gives back what the C library holds of freed memory: some hundred MiB after many activations of some MiB each.

    Does nothing where the library has no such call. It takes some milliseconds, and more when memory is needed again.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], object] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Lets torch use ``count`` threads within the block; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def named_generator(seed: int, *names: str) -> torch.Generator:
    """A random generator of its own for the thing that ``names`` name."""
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


_CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine(device: str = "cpu") -> str:
    """One line that names what times are taken on: the graphics processor where ``device`` is one, processor and cores."""
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.startswith("cuda") else ""
    return f"{gpu}{processor()}, {os.cpu_count()} cores"
