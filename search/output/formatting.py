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


COSTS = {
    "macs": "MACs",
    "params": "parameters",
    "latency_ms": "latency",
    "flops": "MACs",
    "storage": "stored size",
    "cycles": "cycles",
    "memory": "peak memory",
}


FORMATS = {"eie": "EIE", "csr": "CSR"}
"""Of stored weights; n:m goes by its numbers."""


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


@dataclass(frozen=True)
class Stored:
    """How large a masked network is in one format.

    Attributes:
        format: such as 'CSR' or '2:4', each layer in it or dense, whichever is smaller.
        weights: bits of a weight.
        size: with its unit.
        share: of dense at as many bits; '' for dense itself.
    """

    format: str
    weights: str
    size: str
    share: str


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


def size(count: float) -> str:
    """Bytes with their SI prefix: 590000 -> '590.00 kB'; 512 -> '512 B'."""
    text = quantity(count)
    return text if text == DASH else f"{text}B" if " " in text else f"{text} B"


def amount(cost: str, value: float) -> str:
    """A cost with its unit, by its name: latencies in ms, their spread in percent, bytes of storage and memory, counts."""
    if cost in ("storage", "memory"):
        return size(value)
    if cost == "latency_spread":
        return percent(value, 1)
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


def cost_name(cost: str, masked: bool = False) -> str:
    """'macs' -> 'MACs', where weights are masked 'non-zero MACs'; an unknown name is taken as it is."""
    name = COSTS.get(cost, cost)
    return f"non-zero {name}" if masked and cost in ("macs", "params") else name


def masked(result: Mapping[str, Any]) -> bool:
    """Whether a run set weights to zero instead of cutting channels out."""
    return bool((result.get("granularity") or {}).get("masked"))


def comparison(result: Mapping[str, Any]) -> Comparison:
    """The table of a run's result.json. Ratios are to the original; differences of accuracy are in points.

    Every accuracy names its split: in the row's title where all stages share it, else in each cell. Of masked weights
    MACs and parameters are given twice: those that are not zero, and all as dense hardware computes them.
    """
    present = {key: result[key] for key in STAGES if result.get(key)}
    rows = {_accuracy_title(present): tuple(_accuracy_cell(present, key) for key in present)}
    for cost, title in _cost_titles(result).items():
        if any(stage.get(cost) is not None for stage in present.values()):
            rows[title] = tuple(_cost_cell(present, key, cost) for key in present)
    return Comparison(tuple(STAGES[key] for key in present), rows)


def _cost_titles(result: Mapping[str, Any]) -> dict[str, str]:
    what = ", non-zero" if masked(result) else ""
    formats = [b["format"] for b in result.get("budgets") or [] if b.get("format")]
    return {
        "macs": f"MACs{what}",
        "dense_macs": "MACs, dense",
        "params": f"parameters{what}",
        "dense_params": "parameters, dense",
        "storage": ", ".join(["stored size", *(_format_name(result, name) for name in formats)]),
        "cycles": "cycles",
        "memory": "peak memory, one image",
        "latency_ms": _latency_title(result),
        "latency_spread": "latency, spread",
    }


def _latency_title(result: Mapping[str, Any]) -> str:
    batch, runtime = result.get("latency_batch"), result.get("latency_runtime")
    parts = [f"batch {batch}"] if batch else []
    return ", ".join(["latency", *parts, *([runtime] if runtime else [])])


def _format_name(result: Mapping[str, Any], name: str) -> str:
    granularity = result.get("granularity") or {}
    return (
        f"{granularity['n']}:{granularity['m']}"
        if name == "nm" and "n" in granularity
        else FORMATS.get(name, name)
    )


def budget_lines(result: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """One sentence per budget, tightest first, with whether it is met."""
    budgets = result.get("budgets") or ([result["budget"]] if result.get("budget") else [])
    base, zeros = result.get("base") or {}, masked(result)
    return [(_budget_line(budget, base, zeros), bool(budget["met"])) for budget in budgets]


def _budget_line(budget: Mapping[str, Any], base: Mapping[str, Any], zeros: bool) -> str:
    cost = budget["cost"]
    line = f"{cost_name(cost, zeros)} at most {amount(cost, budget['limit'])}"
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
    # What is dense never changes, and a spread says how sure a figure is.
    compared = whole and key != "base" and not cost.startswith("dense_") and cost != "latency_spread"
    return Cell(amount(cost, value), percent(value / whole, 1) if compared else "")


def storage_rows(result: Mapping[str, Any]) -> list[Stored]:
    """The sizes of a masked network that its run stated."""
    sizes = result.get("storage") or {}
    known = {
        "dense_fp32": ("dense", "32 bits", ""),
        "csr": (_format_name(result, "csr"), "32 bits", "dense_fp32"),
        "nm": (_format_name(result, "nm"), "32 bits", "dense_fp32"),
        "dense_4bit": ("dense", "4 bits", ""),
        "eie": (_format_name(result, "eie"), "4 bits", "dense_4bit"),
    }
    return [
        Stored(format, weights, size(sizes[key]), percent(sizes[key] / sizes[whole], 1) if whole else "")
        for key, (format, weights, whole) in known.items()
        if key in sizes
    ]


def pattern_line(result: Mapping[str, Any]) -> tuple[str, bool] | None:
    """What the check of an n:m pattern on the delivered weights came to, and whether it holds."""
    pattern = result.get("pattern")
    if not pattern:
        return None
    what, count = f"{pattern['n']}:{pattern['m']}", len(pattern["layers"])
    where = f"{count} of the {len(result.get('strategy') or {})} layers that it fits"
    if not pattern["holds"]:
        return f"{what} does NOT hold in all of {where}", False
    return f"{what} holds in {where}, checked on the delivered weights; the others are dense", True


def history_line(result: Mapping[str, Any]) -> str:
    """Through which weights the network came, and over how many rounds; '' where it was cut once from the original."""
    search = result.get("search") or {}
    parts = []
    if search.get("start"):
        adopted = [start for start in search["start"] if start.startswith("round ")]
        before = [start for start in search["start"] if start not in adopted]
        rounds = [f"{len(adopted)} rounds" if len(adopted) > 1 else adopted[0]] if adopted else []
        parts.append(" → ".join([*before, *rounds, "this network"]))
    if search.get("rounds") and result.get("finetuned"):
        parts.append(
            f"fine-tuned over {search['rounds']} rounds of pruning ({search['schedule']}), where 'pruned' is the same "
            "strategy at once"
        )
    return "; ".join(parts)
