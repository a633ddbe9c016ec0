"""2:4 sparse linear layers of BERT-base against dense ones, on an NVIDIA GPU of compute capability 8.0 or newer.

    python scripts/benchmark_sparsity.py                      # fp16, 4,096 tokens

Weights pruned 2:4 by magnitude become `torch.sparse.to_sparse_semi_structured`, are checked against the masked dense
layer, and timed against the unpruned one by CUDA events, the two in turn. The times include launching from Python.
Prints median milliseconds and quartiles; exit code 1 where the sparse result is wrong, 2 without such a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
from studies import show
from torch import Tensor
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

SHAPES = {"attention": (768, 768), "feed-forward, in": (3072, 768), "feed-forward, out": (768, 3072)}
"""[outputs, inputs] of the linear layers of a BERT-base block."""
TOLERANCE = 2e-3
"""Largest difference from the masked dense layer, relative to its largest output: about two roundings to fp16 (2^-11
each) and the order of the sums."""
CALLS = 20  # between two events
WARMUP = 3  # rounds


def main(arguments: list[str] | None = None) -> int:
    """Measure every layer, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=30, help="timings of each layer")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        print("error: 2:4 needs an NVIDIA GPU of compute capability 8.0 or newer", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype stage.*")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    rows, worst = [], 0.0
    for name, shape in SHAPES.items():
        weight, masked = pruned(shape, "cuda")
        inputs = torch.randn(options.tokens, shape[1], device="cuda", dtype=torch.float16)
        calls = {
            "dense": partial(F.linear, inputs, weight),
            "2:4": partial(F.linear, inputs, to_sparse_semi_structured(masked)),
        }
        expected = F.linear(inputs, masked).float()
        error = float((calls["2:4"]().float() - expected).abs().max() / expected.abs().max())
        worst = max(worst, error)
        times = timed(calls, options.repeats)
        faster = statistics.median(times["dense"]) / statistics.median(times["2:4"])
        rows.append([name, *map(described, times.values()), f"{faster:.2f}", f"{error:.1e}"])
    show(["layer", "dense ms", "2:4 ms", "times faster", "relative error"], rows)
    return int(worst > TOLERANCE)


def pruned(shape: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    """A dense fp16 weight, and the same with all but the 2 largest of every 4 inputs set to zero."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) / shape[1] ** 0.5).half()
    keep = torch.zeros(shape, dtype=torch.bool).view(-1, 4)
    keep.scatter_(1, weight.abs().view(-1, 4).topk(2).indices, True)
    return weight.to(device), torch.where(keep.view(shape), weight, 0.0).to(device)


def timed(calls: Mapping[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of a call; every round times each of the calls once."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARMUP + repeats):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                call()
            end.record()
            torch.cuda.synchronize()
            if turn >= WARMUP:
                found[name].append(start.elapsed_time(end) / CALLS)
    return found


def described(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.4f} ({low:.4f}–{high:.4f})"


if __name__ == "__main__":
    sys.exit(main())
