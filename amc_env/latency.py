"""Latency, measured: warm-up, medians, networks interleaved so that a drifting machine favours none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.inference_mode()
def measure(
    models: Mapping[str, nn.Module], example: Tensor, *, repeats: int = 30, warmup: int = 5
) -> dict[str, float]:
    """Median latency of each network on one batch, in milliseconds, in PyTorch's eager mode.

    Args:
        models: Networks in eval mode, on the device of ``example``.
        example: The batch, [N, ...].
        repeats: Timed passes of each network; every round runs each network once.
        warmup: Rounds before the timing.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(warmup + repeats):
        for name, model in models.items():
            _settle(example)
            started = time.perf_counter()
            model(example)
            _settle(example)
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def _settle(example: Tensor) -> None:
    if example.is_cuda:
        torch.cuda.synchronize(example.device)
