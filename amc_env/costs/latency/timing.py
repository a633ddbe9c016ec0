"""Fair timing: calls interleaved in a new random order each round, so that a drifting machine favours none."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)


Call = Callable[[], float | None]
"""One pass, over when it returns; gives the milliseconds that it took where it measured them itself."""


_LOG = logging.getLogger(__name__)


BUSY = 0.3
"""Spread from which on a machine is taken to be busy with something else, and times as unreliable."""


@dataclass(frozen=True)
class Timing:
    """How long one call took, over many runs.

    Attributes:
        median_ms: Milliseconds.
        low_ms: The lower quartile.
        high_ms: The upper quartile.
        runs: How many were timed.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int

    @property
    def spread(self) -> float:
        """(upper quartile - lower quartile) / median; 0 where the median is."""
        return (self.high_ms - self.low_ms) / self.median_ms if self.median_ms else 0.0


def interleaved(
    calls: Mapping[Key, Call],
    *,
    repeats: int = 30,
    warmup: int = 5,
    least_ms: float = 0.0,
    settle: int = 0,
    seed: int = 0,
) -> dict[Key, Timing]:
    """Times every call, in rounds that run each of them once, in a new order.

    Args:
        calls: What to time.
        repeats: Timed rounds, at least 1.
        warmup: Rounds before them.
        least_ms: A call shorter than this is made several times in its turn, and their mean is one run, so that
            neither the clock's resolution nor its own cost matters.
        settle: Calls in each turn before those that are timed: what runs again and again in use finds its weights in the
            caches, and not what others left there.
        seed: Of the orders.
    """
    generator = random.Random(seed)
    order = list(calls)
    fastest = dict.fromkeys(calls, math.inf)
    for _ in range(max(warmup, int(least_ms > 0))):
        for key in order:
            fastest[key] = min(fastest[key], _turn(calls[key], 1))
    counts = {key: max(1, math.ceil(least_ms / max(fastest[key], 1e-4))) for key in order}
    runs: dict[Key, list[float]] = {key: [] for key in order}
    for _ in range(repeats):
        generator.shuffle(order)
        for key in order:
            for _ in range(settle):
                calls[key]()
            runs[key].append(_turn(calls[key], counts[key]))
    return {key: _timing(values) for key, values in runs.items()}


def _turn(call: Call, count: int) -> float:
    """Mean milliseconds of ``count`` calls in a row."""
    started = time.perf_counter()
    own = [call() for _ in range(count)]
    passed = 1e3 * (time.perf_counter() - started)
    measured = [each for each in own if each is not None]
    return (sum(measured) if measured else passed) / count


def _timing(values: list[float]) -> Timing:
    low, median, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return Timing(median, low, high, len(values))


def warn_where_busy(networks: Sequence[Timing]) -> None:
    """Warn if the times of complete networks spread too far to be reliable."""
    spread = float(np.median([timing.spread for timing in networks]))
    if spread > BUSY:
        _LOG.warning(
            "latency: the middle half of a network's times spreads over %.0f%% of their median: something else runs here, "
            "and neither these times, nor a table nor a check made now, can be relied on; more repeats measure for longer",
            100 * spread,
        )
