"""Measures the networks of finished runs of one model in the same rounds, and prints their table.

    python scripts/compare_latency.py OUT/netadapt-1 OUT/ddpg-1 OUT/uniform-1 --runtimes eager onnx --threads 1 --repeats 200

`--plot FILE` draws NetAdapt's picture: accuracy on the search split against the cost that was searched on, round by round,
and where the other runs ended.

What a run's own result.json says was measured at that run's end; here all networks and the original take turns, so that a
machine that drifts favours none. Exported weights (export=[safetensors]) must be in the folders.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import Tensor, nn

from amc_env.costs.latency import Timing, measure
from search.config import compose as wiring
from search.output.export import load_pruned
from search.output.report import read_run, rounds_begun

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


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


def draw(folders: list[Path], path: Path) -> None:
    """Accuracy on the search split against the share of the budget's cost: rounds of NetAdapt, and where others ended."""
    figure = Figure(figsize=(5.8, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    for folder, colour in zip(folders, itertools.cycle(COLOURS)):
        run = read_run(folder)
        result = run.result
        cost = (result["budget"] or {"cost": "macs"})["cost"]
        begun = rounds_begun(run)
        states = [(state["costs"][cost] / result["base"][cost], state["accuracy"]) for state in begun]
        end = (result["pruned"][cost] / result["base"][cost], result["search"]["search_accuracy"])
        points = [(100 * share, 100 * accuracy) for share, accuracy in states or [end]]
        axes.plot(*zip(*points, strict=True), "o-", ms=4 if states else 8, color=colour, label=folder.name)
    if result["budget"]:
        axes.axvline(100 * result["budget"]["ratio"], color="#30343A", lw=1, ls="--", label="budget")
    axes.set_xlabel(f"{cost}, % of the original")
    axes.set_ylabel("accuracy, search split, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E8EA")
    axes.legend(frameon=False)
    figure.savefig(path)


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
    parser.add_argument("--plot", type=Path, help="a PNG to draw")
    options = parser.parse_args()
    folders = [folder for folder in options.folders if (folder / "result.json").exists()]
    if not folders:
        sys.exit("none of these folders has a result.json")
    if options.plot:
        draw(folders, options.plot)
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
