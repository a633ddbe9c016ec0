"""What a learner sets for the whole process while it computes, and puts back: threads, denormals, random states."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch

DENORMAL = 1e-40
"""A float32 that is not 0 and has less than full precision."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one thread, and puts the number of threads back.

    The networks are too small for more: two threads gain a quarter on an idle machine and cost a factor of
    ten on a busy one, waiting for each other. One also makes what is learnt independent of the machine's
    number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Takes numbers too small for full precision for 0 in this thread, and puts back how they were taken.

    Adam's moments of units that have fallen silent fade through them for hundreds of updates, and processors
    compute with them many times slower.
    """
    before = not (torch.tensor(DENORMAL) * 1).item()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Puts the global random states back: Stable-Baselines3 seeds all of them, and they are the caller's."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def learning() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Computes on one thread, with denormals flushed, and puts back these and the global random states.

    Yields:
        A context for what the learner calls, such as scoring: it computes there as before, and whatever it does to the
        global random states does not reach the learner.
    """
    threads, flushed = torch.get_num_threads(), not (torch.tensor(DENORMAL) * 1).item()

    @contextmanager
    def outside() -> Iterator[None]:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushed)
        try:
            with random_states_kept():
                yield
        finally:
            torch.set_num_threads(1)
            torch.set_flush_denormal(True)

    with random_states_kept(), one_thread(), denormals_flushed():
        yield outside
