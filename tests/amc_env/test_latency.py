"""Latency: the order of measurement, and medians."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from amc_env import latency


class Called(nn.Module):
    """Writes down when it was run."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.log.append(self.name)
        return x


def test_networks_are_interleaved() -> None:
    log: list[str] = []
    found = latency.measure(
        {"a": Called("a", log), "b": Called("b", log)}, torch.zeros(1), repeats=4, warmup=2
    )
    assert log == ["a", "b"] * 6
    assert set(found) == {"a", "b"}
    assert all(value >= 0 for value in found.values())


def test_medians_in_milliseconds_after_the_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 3.001, 4.0, 4.5, 5.0, 5.002])  # seconds: a warm-up, then 1, 500 and 2 ms
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = latency.measure({"a": Called("a", [])}, torch.zeros(1), repeats=3, warmup=1)
    assert found["a"] == pytest.approx(2.0)
