"""2:4 sparse linear layers of BERT-base against dense ones, on an NVIDIA GPU; on other machines the format's size alone.

    python scripts/benchmark_sparsity.py                      # fp16, 4,096 tokens
    python scripts/benchmark_sparsity.py --json FILE          # the figures with machine and versions as well

On CUDA: weights pruned 2:4 by magnitude become `torch.sparse.to_sparse_semi_structured` (cuSPARSELt, then CUTLASS,
where this PyTorch and GPU have them), are checked against the masked dense layer, and timed against the dense one by CUDA
events, the networks in turn. "gpu" is time on the GPU alone: the launches queue up behind a waiting kernel first. "call"
includes launching from Python, which small layers wait for. Without CUDA: the format is checked on the CPU and its sizes
are printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from amc_env.sparse import check, pack, unpack

SHAPES = {
    "attention, 4 a block": (768, 768),
    "feed-forward, in": (3072, 768),
    "feed-forward, out": (768, 3072),
}
"""[outputs, inputs] of the linear layers of a BERT-base block."""
LAYERS_A_BLOCK = {"attention, 4 a block": 4, "feed-forward, in": 1, "feed-forward, out": 1}
TOLERANCE = 2e-3
"""Largest difference from the masked dense layer, relative to its largest output: about two roundings to fp16 (2^-11
each) and the order of the sums."""
CALLS = 20  # between two events
WARMUP = 3  # rounds
WAIT_CYCLES = 30_000_000  # of the GPU, some 20 ms: longer than launching CALLS calls takes


def main() -> int:
    """Measures or, without a fitting GPU, checks the format; 0 unless a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=30, help="timings of each layer")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype stage.*")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    found: dict[str, Any] = {"machine": machine(), "format": [of_format(name) for name in SHAPES]}
    failed = not all(row["exact"] for row in found["format"])
    reason = unfit()
    if reason:
        print(f"speed not measured: {reason}")
    else:
        found["speed"] = [row for name in SHAPES for row in of_speed(name, options.tokens, options.repeats)]
        failed |= not all(row["error"] <= TOLERANCE for row in found["speed"])
        of_block(found["speed"])
    if options.json:
        options.json.write_text(json.dumps({**found, "not_measured": reason}, indent=2) + "\n")
    if failed:
        print("FAILED: the sparse result is not the masked dense one")
    return int(failed)


def machine() -> dict[str, Any]:
    """What the figures hang on."""
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        facts["cusparselt"] = torch.backends.cusparselt.version()
    else:
        facts["cpu"] = f"{platform.machine()} {platform.processor()}".strip()
    return facts


def unfit() -> str:
    """Why 2:4 cannot run fast here, or nothing."""
    need = "2:4 runs faster on NVIDIA GPUs with compute capability 8.0 or newer only"
    if not torch.cuda.is_available():
        return f"{need}, and this machine has no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{need}; this one has {machine()['capability']}"
    return ""


def pruned(shape: tuple[int, int], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A dense fp16 weight, and the same with all but the 2 largest of every 4 inputs set to zero."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) / shape[1] ** 0.5).half()
    keep = torch.zeros(shape, dtype=torch.bool).view(-1, 4)
    keep.scatter_(1, weight.abs().view(-1, 4).topk(2).indices, True)
    return weight.to(device), torch.where(keep.view(shape), weight, 0.0).to(device)


def of_format(name: str) -> dict[str, Any]:
    """Packs and unpacks a weight on the CPU: sizes in bytes, and whether it comes back bit for bit."""
    _, masked = pruned(SHAPES[name])
    packed = pack(masked, 2, 4)
    back = unpack(packed)
    exact = check(masked, 2, 4) and torch.equal(back.view(torch.int16), masked.view(torch.int16))
    dense = masked.numel() * masked.element_size()
    print(
        f"{name:<22}{SHAPES[name]!s:<14}dense fp16 {dense:>9,} bytes, 2:4 {packed.size:>9,} bytes "
        f"({packed.size / dense:.2%}), unpacked {'bit for bit' if exact else 'DIFFERENT'}"
    )
    return {"layer": name, "shape": SHAPES[name], "dense_bytes": dense, "bytes": packed.size, "exact": exact}


def of_speed(name: str, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Checks and times the dense layer and its 2:4 twins, a row for each; a backend that fails says why."""
    weight, masked = pruned(SHAPES[name], "cuda")
    generator = torch.Generator(device="cuda").manual_seed(1)
    inputs = torch.randn(tokens, weight.shape[1], generator=generator, device="cuda", dtype=torch.float16)
    bias = torch.randn(len(weight), generator=generator, device="cuda", dtype=torch.float16)
    want = F.linear(inputs, masked, bias).float()
    calls = {
        "dense": partial(F.linear, inputs, weight, bias)
    }  # the unpruned weight: what one has without 2:4
    errors = {"dense": 0.0}
    for backend in ("cusparselt", "cutlass"):
        SparseSemiStructuredTensor._FORCE_CUTLASS = backend == "cutlass"
        try:
            call = partial(F.linear, inputs, to_sparse_semi_structured(masked), bias)
            errors[backend] = float((call().float() - want).abs().max() / want.abs().max())
        except RuntimeError as error:
            print(f"{name:<22}{backend}: not here ({str(error).splitlines()[0]})")
        else:
            calls[backend] = call
    times = {kind: timed(calls, repeats, queued=kind == "gpu") for kind in ("gpu", "call")}
    rows = []
    for backend in calls:
        row: dict[str, Any] = {"layer": name, "shape": SHAPES[name], "tokens": tokens, "backend": backend}
        row["error"] = errors[backend]
        for kind, by_backend in times.items():
            row[f"{kind}_ms"], row[f"{kind}_quartiles_ms"] = by_backend[backend]
            row[f"{kind}_speedup"] = by_backend["dense"][0] / by_backend[backend][0]
        rows.append(row)
        show(row)
    return rows


def timed(
    calls: dict[str, Callable[[], Tensor]], repeats: int, *, queued: bool
) -> dict[str, tuple[float, tuple[float, float]]]:
    """Median and quartiles of a call in milliseconds; every round times each of them once."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARMUP + repeats):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if queued:
                torch.cuda._sleep(WAIT_CYCLES)  # meanwhile the launches below are queued
            start.record()
            for _ in range(CALLS):
                call()
            end.record()
            torch.cuda.synchronize()
            if turn >= WARMUP:
                found[name].append(start.elapsed_time(end) / CALLS)
    return {name: (statistics.median(values), quartiles(values)) for name, values in found.items()}


def quartiles(values: list[float]) -> tuple[float, float]:
    """First and third quartile."""
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def show(row: dict[str, Any]) -> None:
    """A line of the table."""
    parts = [f"{row['layer']:<22}{row['backend']:<11}"]
    for kind in ("gpu", "call"):
        low, high = row[f"{kind}_quartiles_ms"]
        speedup = row[f"{kind}_speedup"]
        parts.append(f"{kind} {row[f'{kind}_ms']:.4f} ms ({low:.4f}-{high:.4f}) x{speedup:.2f}  ")
    if row["backend"] != "dense":
        parts.append(f"error {row['error']:.1e} (at most {TOLERANCE:.0e})")
    print("".join(parts))


def of_block(rows: list[dict[str, Any]]) -> None:
    """All six linear layers of a BERT-base block together, on the GPU."""
    for backend in dict.fromkeys(row["backend"] for row in rows):
        mine = {row["layer"]: row["gpu_ms"] for row in rows if row["backend"] == backend}
        if mine.keys() == SHAPES.keys():
            total = sum(LAYERS_A_BLOCK[layer] * value for layer, value in mine.items())
            print(f"a block's six linear layers, {backend}: gpu {total:.4f} ms")


if __name__ == "__main__":
    sys.exit(main())
