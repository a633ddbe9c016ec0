"""Calls shared out to threads, each of which computes with its part of torch's threads.

Batches side by side keep the cores busier than the parts of one batch do, which wait for each other after every
operation; and lanes of one thread round alike however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

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
