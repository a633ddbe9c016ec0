"""Timing by a clock of our own: turns, orders, quartiles, short calls."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from amc_env.costs.latency import Timing, interleaved, machine, timing


class Clock:
    """Stands still but for what calls cost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 0.0, []
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def call(self, name: str, *costs_ms: float, own: float | None = None):
        """A call that takes the next of these milliseconds each time, the last one from then on."""
        left = list(costs_ms)

        def run() -> float | None:
            self.log.append(name)
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1e3
            return own

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_every_round_runs_each_call_once_in_a_new_order(clock: Clock) -> None:
    names = ("a", "b", "c", "d")

    def rounds(seed: int) -> list[tuple[str, ...]]:
        clock.log.clear()
        interleaved({name: clock.call(name, 1.0) for name in names}, repeats=8, warmup=2, seed=seed)
        return list(zip(*[iter(clock.log)] * 4, strict=True))

    found = rounds(seed=0)
    assert len(found) == 10
    assert all(sorted(each) == list(names) for each in found)
    assert len(set(found[2:])) > 4
    assert rounds(seed=0) == found != rounds(seed=1)


def test_the_median_and_the_quartiles_leave_the_warmup_out(clock: Clock) -> None:
    found = interleaved({"a": clock.call("a", 50.0, 4.0, 1.0, 100.0, 2.0, 3.0)}, repeats=5, warmup=1)["a"]
    assert (found.low_ms, found.median_ms, found.high_ms) == pytest.approx((2.0, 3.0, 4.0))
    assert found.runs == 5
    assert found.spread == pytest.approx(2 / 3)
    assert Timing(0.0, 0.0, 0.0, 3).spread == 0


@pytest.mark.parametrize("warmup", [0, 1])
def test_short_calls_are_made_several_times_in_a_turn(clock: Clock, warmup: int) -> None:
    calls = {"short": clock.call("short", 0.25), "long": clock.call("long", 3.0)}
    found = interleaved(calls, repeats=6, warmup=warmup, least_ms=1.0)
    assert found["short"].median_ms == pytest.approx(0.25)
    assert found["long"].median_ms == pytest.approx(3.0)
    assert (clock.log.count("short"), clock.log.count("long")) == (1 + 6 * 4, 1 + 6)


def test_a_call_that_measures_itself_is_believed(clock: Clock) -> None:
    found = interleaved({"gpu": clock.call("gpu", 1.0, own=0.5)}, repeats=3, warmup=1, least_ms=2.0)
    assert found["gpu"].median_ms == 0.5
    assert clock.log.count("gpu") == 1 + 3 * 4


def test_the_machine_goes_by_its_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("amc_env.system._CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert machine() == "riscv64, 8 cores"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast 9000\nmodel name\t: Fast 9000\n")
    assert machine() == "Fast 9000, 8 cores"
