"""Lanes: results in order, a thread's part of torch's threads in each, and nothing left running or changed."""

import threading
import time
from contextlib import closing

import pytest
import torch

from amc_env.system import in_lanes, in_turn, using_threads


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_results_come_in_order(threads: int, count: int) -> None:
    with using_threads(threads):
        assert list(in_lanes(lambda i: i * i, count)) == [i * i for i in range(count)]
        assert torch.get_num_threads() == threads
    assert list(in_turn(lambda i: i * i, count)) == [i * i for i in range(count)]


@pytest.mark.parametrize(
    ("threads", "count", "each"), [(2, 5, 1), (5, 2, 2), (4, 1, 4), (12, 40, 2), (32, 40, 4)]
)
def test_lanes_share_out_torch_s_threads(threads: int, count: int, each: int) -> None:
    with using_threads(threads):
        assert set(in_lanes(lambda _: torch.get_num_threads(), count)) == {each}


def test_as_many_calls_run_at_once_as_there_are_threads() -> None:
    together = threading.Barrier(3, timeout=30)
    with using_threads(3):
        assert sorted(in_lanes(lambda _: together.wait(), 3)) == [0, 1, 2]


def test_an_error_reaches_the_caller_and_the_rest_is_not_begun() -> None:
    ran = []

    def call(index: int) -> None:
        ran.append(index)
        if index == 0:
            raise ZeroDivisionError
        time.sleep(0.01)

    before = threading.active_count()
    with using_threads(2):
        with pytest.raises(ZeroDivisionError):
            list(in_lanes(call, 1000))
        assert torch.get_num_threads() == 2
    assert threading.active_count() == before
    assert len(ran) < 500


def test_closing_ends_what_is_not_read() -> None:
    before = threading.active_count()
    with using_threads(2), closing(in_lanes(lambda i: i, 1000)) as results:
        assert next(results) == 0
    assert threading.active_count() == before
