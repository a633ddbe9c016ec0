"""Freed memory goes back to the system; where the C library cannot, nothing happens."""

import sys
from pathlib import Path

import pytest

from amc_env import system as heap


def resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(sys.platform != "linux" or heap._trim() is None, reason="no malloc_trim here")
def test_freed_memory_goes_back() -> None:
    kept, pieces = [], [bytes(100_000) for _ in range(2000)]  # small enough for the heap
    for place, piece in enumerate(pieces):
        if place % 20 == 0:
            kept.append(piece)
    del pieces, piece
    before = resident_mib()
    heap.release_heap()
    assert resident_mib() < before - 50
    assert len(kept) == 100


def test_elsewhere_there_is_no_such_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert heap._trim.__wrapped__() is None
