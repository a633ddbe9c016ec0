"""Latency, measured: networks made ready by a runtime, timed in turns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from amc_env.costs.latency.cost import Latency, LatencyBudget
from amc_env.costs.latency.runtimes import PROCESSOR_ONLY, RUNTIMES, Runtime, RuntimeName, runtime
from amc_env.costs.latency.timing import BUSY, Call, Timing, interleaved, warn_where_busy
from amc_env.inputs import Inputs
from amc_env.system import machine, processor, using_threads

__all__ = [
    "BUSY",
    "PROCESSOR_ONLY",
    "RUNTIMES",
    "Call",
    "Latency",
    "LatencyBudget",
    "Runtime",
    "RuntimeName",
    "Timing",
    "interleaved",
    "machine",
    "measure",
    "processor",
    "runtime",
    "using_threads",
    "warn_where_busy",
]


def measure(
    models: Mapping[str, nn.Module],
    example: Inputs,
    *,
    runtime: Runtime | str = "eager",
    threads: int | None = None,
    repeats: int = 30,
    warmup: int = 5,
) -> dict[str, Timing]:
    """Latency of each network on one batch, in rounds of all networks: each runs twice, the second time is taken.

    Args:
        models: Networks in eval mode, on the device of ``example``.
        example: The batch.
        runtime: What runs them.
        threads: Of the processor; None: torch's own setting.
        repeats: Timed passes of each network.
        warmup: Rounds before the timing.

    Raises:
        UserError: The runtime cannot run here, or not such a network.
    """
    with using_threads(threads):
        runs = _runtime(runtime, torch.get_num_threads()) if isinstance(runtime, str) else runtime
        calls = {name: runs.prepare(model, example) for name, model in models.items()}
        return interleaved(calls, repeats=repeats, warmup=warmup, settle=1)


_runtime = runtime  # the argument of `measure` hides it
