"""Draw docs/summary.png from the folder of a run: `python scripts/draw_summary.py RUN PNG`."""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, GREY = "#0072B2", "#D0D3D6"
STAGES = {"base": "original", "pruned": "pruned", "finetuned": "fine-tuned"}


def draw_channels(axes: Axes, decisions: dict[str, dict[str, float]]) -> None:
    """Bars of the channels that every decision keeps, before those of the original."""
    totals = np.array([entry["total"] for entry in decisions.values()])
    removed = np.array([entry["removed"] for entry in decisions.values()])
    axes.bar(np.arange(len(totals)), totals, color=GREY, label="original")
    axes.bar(np.arange(len(totals)), totals - removed, color=BLUE, label="kept")
    axes.set_xticks(np.arange(len(totals)), list(decisions), rotation=20, ha="right", fontsize=8)
    axes.set_ylabel("channels")
    axes.legend(frameon=False)


def draw_table(axes: Axes, result: dict[str, dict[str, float] | None]) -> None:
    """Accuracy and costs of the three networks."""
    found = {label: figures for stage, label in STAGES.items() if (figures := result[stage])}
    rows = [
        [f"{100 * figures['accuracy']:.2f}%" for figures in found.values()],
        *[[f"{figures[cost] / 1000:,.1f} k" for figures in found.values()] for cost in ("macs", "params")],
    ]
    axes.axis("off")
    table = axes.table(
        rows, rowLabels=["test accuracy", "MACs", "parameters"], colLabels=list(found), loc="center"
    )
    table.scale(1.0, 2.0)


def main(run: Path, path: Path) -> None:
    """Reads a run's strategy.json and result.json, and writes the picture."""
    figure = Figure(figsize=(10.0, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1.0))
    draw_channels(left, json.loads((run / "strategy.json").read_text())["decisions"])
    draw_table(right, json.loads((run / "result.json").read_text()))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
