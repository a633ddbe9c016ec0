"""Measure the networks of finished runs of one model in the same rounds, and print a table.

    python scripts/compare_latency.py OUT/netadapt-1 OUT/ddpg-1 OUT/uniform-1 --runtimes eager onnx --threads 1 --repeats 200

A run's own result.json has the latency that was measured at that run's end. Here all networks and the original take turns,
so that a machine whose speed drifts favours none. The folders must have exported weights (export=[safetensors]).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import studies
from omegaconf import OmegaConf
from torch import nn

from amc_env.costs.latency import Timing, measure
from amc_env.inputs import Inputs, take
from search import load_pruned
from search.config import compose as wiring


def networks_of(folders: list[Path], batch: int) -> tuple[dict[str, nn.Module], Inputs]:
    """The original and the pruned network of every folder, and a batch of images for them."""
    cfg: Any = OmegaConf.load(folders[0] / ".hydra" / "config.yaml")
    source = wiring.model_source(cfg)
    data = wiring.data_of(cfg, source)
    networks = {"original": source.load(data)}
    for folder in folders:
        networks[str(folder)] = load_pruned(source.build(data.image_shape, len(data.classes)), folder)
    return networks, data.normalise(take(data.search.inputs, slice(batch)))


def row(folder: Path, timings: dict[str, dict[str, Timing]]) -> list[str]:
    """Accuracies in percent, costs as shares of the original's in percent."""
    result = json.loads((folder / "result.json").read_text())
    columns = [studies.accuracy(stage) for stage in ("pruned", "finetuned")]
    columns += [studies.share(cost) for cost in ("macs", "params", "latency")]
    measured = []
    for times in timings.values():
        time, original = times[str(folder)], times["original"]
        percent = 100 * time.median_ms / original.median_ms
        measured.append(f"{percent:.1f} ({time.median_ms:.2f} of {original.median_ms:.2f} ms)")
    values = [column(result) for column in columns]
    return [folder.name, *("–" if value is None else f"{value:.2f}" for value in values), *measured]


def main(arguments: list[str] | None = None) -> int:
    """Measure with every runtime, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--runtimes", nargs="+", default=["eager"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args(arguments)
    missing = [str(folder) for folder in options.folders if not (folder / "result.json").exists()]
    if missing:
        parser.error(f"no result.json in {', '.join(missing)}")
    networks, example = networks_of(options.folders, options.batch)
    timings = {
        name: measure(networks, example, runtime=name, threads=options.threads, repeats=options.repeats)
        for name in options.runtimes
    }
    titles = ["run", "pruned", "fine-tuned", "MACs", "params", "predicted", *options.runtimes]
    studies.show(titles, [row(folder, timings) for folder in options.folders])
    return 0


if __name__ == "__main__":
    sys.exit(main())
