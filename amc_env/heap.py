"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


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
