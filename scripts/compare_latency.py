"""Measures the networks of finished runs of one model in the same rounds, and prints their table.

    python scripts/compare_latency.py OUT/netadapt-1 OUT/ddpg-1 OUT/uniform-1 --runtimes eager onnx --threads 1 --repeats 200

What a run's own result.json says was measured at that run's end; here all networks and the original take turns, so that a
machine that drifts favours none. Exported weights (export=[safetensors]) must be in the folders.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn

from amc_env.latency import Timing, measure
from search import wiring
from search.export import load_pruned


def networks_of(folders: list[Path], batch: int) -> tuple[dict[str, nn.Module], Tensor]:
    """The original and the small network of every folder, and a batch of images for them."""
    cfg: Any = OmegaConf.load(folders[0] / ".hydra" / "config.yaml")
    data, source = wiring.data_of(cfg), wiring.model_source(cfg)
    classes = len(data.classes)
    networks = {"original": source.load(data)}
    for folder in folders:
        networks[str(folder)] = load_pruned(source.build(data.image_shape, classes), folder)
    return networks, data.normalise(data.search.images[:batch])


def row(folder: Path, timings: dict[str, dict[str, Timing]]) -> list[str]:
    """A run's figures: accuracies in percent, costs as shares of the original's."""
    result = json.loads((folder / "result.json").read_text())
    base, pruned, tuned = result["base"], result["pruned"], result["finetuned"]
    shares = [
        f"{pruned[cost] / base[cost]:.3f}" if base.get(cost) else "-"
        for cost in ("macs", "params", "latency")
    ]
    measured = []
    for times in timings.values():
        time, whole = times[str(folder)], times["original"].median_ms
        measured.append(f"{time.median_ms / whole:.3f} ({time.median_ms:.2f} ms ± {100 * time.spread:.0f}%)")
    return [
        folder.name,
        f"{100 * pruned['accuracy']:.2f}",
        f"{100 * tuned['accuracy']:.2f}" if tuned else "-",
        *shares,
        *measured,
        str(result["search"]["evaluations"]),
        f"{result['search']['seconds']:.0f}",
    ]


def main() -> None:
    """Measures on every runtime, then prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--runtimes", nargs="+", default=["eager"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    folders = [folder for folder in options.folders if (folder / "result.json").exists()]
    if not folders:
        sys.exit("none of these folders has a result.json")
    networks, example = networks_of(folders, options.batch)
    timings = {
        name: measure(networks, example, runtime=name, threads=options.threads, repeats=options.repeats)
        for name in options.runtimes
    }
    titles = [
        "run",
        "pruned",
        "fine-tuned",
        "MACs",
        "params",
        "predicted",
        *options.runtimes,
        "evaluations",
        "search s",
    ]
    print(" | ".join(titles))
    print(" | ".join("---" for _ in titles))
    for folder in folders:
        print(" | ".join(row(folder, timings)))
    for name, times in timings.items():
        whole = times["original"]
        print(
            f"original, {name}: {whole.median_ms:.2f} ms ± {100 * whole.spread:.0f}% (middle half)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
