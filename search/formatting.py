"""Numbers as people read them, and the comparison original / pruned / fine-tuned, for the terminal and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STAGES = {"base": "original", "pruned": "pruned", "finetuned": "fine-tuned"}
SPLITS = {
    "test": "test split",
    "search": "search split",
    "train": "training split",
    "val": "validation split",
}
COSTS = {"macs": "MACs", "params": "parameters", "latency_ms": "latency", "flops": "MACs"}
DASH = "–"


@dataclass(frozen=True)
class Cell:
    """One figure of the comparison: its text, and how it stands to the original ('' for the original itself)."""

    text: str
    relative: str


@dataclass(frozen=True)
class Comparison:
    """The table original / pruned / fine-tuned: stages that were left out are absent.

    Attributes:
        stages: column titles.
        rows: row title -> one cell per stage.
    """

    stages: tuple[str, ...]
    rows: dict[str, tuple[Cell, ...]]


def percent(share: float, digits: int = 2) -> str:
    """0.9173 -> '91.73%'."""
    return DASH if not math.isfinite(share) else f"{100 * share:.{digits}f}%"


def quantity(value: float) -> str:
    """A count with its SI prefix, two decimals: 20412000 -> '20.41 M'; below 1000 as it is."""
    if not math.isfinite(value):
        return DASH
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f} {prefix}"
    return f"{value:.0f}"


def amount(cost: str, value: float) -> str:
    """A cost with its unit, by the cost's name: latencies in ms, everything else counted."""
    return f"{value:.2f} ms" if cost.endswith("_ms") or cost == "latency" else quantity(value)


def duration(seconds: float) -> str:
    """95.2 -> '1:35'; 3725 -> '1:02:05'."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def split_name(split: str) -> str:
    """'test' -> 'test split'; an unknown name is taken as it is."""
    return SPLITS.get(split, split)


def cost_name(cost: str) -> str:
    """'macs' -> 'MACs'; an unknown name is taken as it is."""
    return COSTS.get(cost, cost)


def comparison(result: Mapping[str, Any]) -> Comparison:
    """The table of a run's result.json. Ratios are to the original; differences of accuracy are in points.

    Every accuracy names its split: in the row's title where all stages share it, else in each cell.
    """
    present = {key: result[key] for key in STAGES if result.get(key)}
    rows = {_accuracy_title(present): tuple(_accuracy_cell(present, key) for key in present)}
    batch = result.get("latency_batch")
    titles = {
        "macs": "MACs",
        "params": "parameters",
        "latency_ms": f"latency, batch {batch}" if batch else "latency",
    }
    for cost, title in titles.items():
        if any(stage.get(cost) is not None for stage in present.values()):
            rows[title] = tuple(_cost_cell(present, key, cost) for key in present)
    return Comparison(tuple(STAGES[key] for key in present), rows)


def budget_lines(result: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """One sentence per budget, tightest first, with whether it is met."""
    budgets = result.get("budgets") or ([result["budget"]] if result.get("budget") else [])
    return [(_budget_line(budget, result.get("base") or {}), bool(budget["met"])) for budget in budgets]


def _budget_line(budget: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    cost = budget["cost"]
    line = f"{cost_name(cost)} at most {amount(cost, budget['limit'])}"
    if budget.get("ratio") is not None:
        line += f" ({percent(budget['ratio'], 1)})"
    line += f", reached {amount(cost, budget['value'])}"
    whole = base.get(cost)
    if whole:
        line += f" ({percent(budget['value'] / whole, 1)})"
    return line + (": met" if budget["met"] else ": NOT met")


def _accuracy_title(present: Mapping[str, Mapping[str, Any]]) -> str:
    splits = {stage["split"] for stage in present.values()}
    return f"accuracy, {split_name(splits.pop())}" if len(splits) == 1 else "accuracy"


def _accuracy_cell(present: Mapping[str, Mapping[str, Any]], key: str) -> Cell:
    stage, base = present[key], present.get("base")
    text = percent(stage["accuracy"])
    if len({other["split"] for other in present.values()}) > 1:
        text += f", {split_name(stage['split'])}"
    # Accuracies on different images cannot be subtracted.
    comparable = base is not None and key != "base" and base["split"] == stage["split"]
    return Cell(text, f"{100 * (stage['accuracy'] - base['accuracy']):+.2f}" if comparable and base else "")


def _cost_cell(present: Mapping[str, Mapping[str, Any]], key: str, cost: str) -> Cell:
    value, whole = present[key].get(cost), present.get("base", {}).get(cost)
    if value is None:
        return Cell(DASH, "")
    return Cell(amount(cost, value), percent(value / whole, 1) if whole and key != "base" else "")
