"""Numbers in words, and the comparison original / pruned / fine-tuned, for the terminal and the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from amc_env.costs.base import COSTS, quantity, size
from amc_env.costs.latency.timing import BUSY
from search.output.run_result import BudgetFigures, GranularityFigures, NetworkFigures, RunResult

STAGES = {"base": "original", "pruned": "pruned", "finetuned": "fine-tuned"}
SPLITS = {
    "test": "test split",
    "search": "search split",
    "train": "training split",
    "val": "validation split",
}
FORMATS = {"eie": "EIE", "csr": "CSR"}
"""Of stored weights; n:m goes by its numbers."""
DASH = "–"
Number = TypeVar("Number", int, float)


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


def amount(figure: str, value: float) -> str:
    """A figure of result.json with its unit: a cost's value, measured milliseconds, or their spread in percent."""
    if figure == "latency_spread":
        return percent(value, 1)
    name = "latency" if figure == "latency_ms" else figure.removeprefix("dense_")
    return COSTS[name].format(value) if name in COSTS else quantity(value)


def front_table(result: RunResult) -> list[tuple[str, ...]]:
    """A title row, then one for the network of each of several budgets; empty without them."""
    if not result.front:
        return []
    cost, split = result.front[0].cost, split_name(result.front[0].split)
    tuned = any(row.finetuned is not None for row in result.front)
    timed = any(row.latency_ms is not None for row in result.front)
    title = cost_name(cost, result.granularity.masked)
    titles = ["budget", title, "of the original", f"{result.metric} of the search", f"pruned, {split}"]
    titles += ["fine-tuned"] * tuned + ["latency"] * timed + ["folder"]
    rows = []
    for row in result.front:
        cells = [percent(row.ratio, 0 if round(100 * row.ratio, 6) % 1 == 0 else 1), amount(cost, row.value)]
        cells += [
            percent(row.value * row.ratio / row.limit, 1),
            percent(row.search_accuracy),
            percent(row.pruned),
        ]
        cells += [DASH if row.finetuned is None else percent(row.finetuned)] * tuned
        cells += [DASH if row.latency_ms is None else amount("latency_ms", row.latency_ms)] * timed
        rows.append((*cells, row.folder))
    return [tuple(titles), *rows]


def duration(seconds: float) -> str:
    """95.2 -> '1:35'; 3725 -> '1:02:05'."""
    rounded = max(0, round(seconds))
    minutes, rest = divmod(rounded, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def split_name(split: str) -> str:
    """'test' -> 'test split'; an unknown name is taken as it is."""
    return SPLITS.get(split, split)


def cost_name(cost: str, masked: bool = False) -> str:
    """'macs' -> 'MACs', where weights are masked 'non-zero MACs'; an unknown name is taken as it is."""
    name = COSTS[cost].title if cost in COSTS else cost
    return f"non-zero {name}" if masked and cost in ("macs", "params") else name


def comparison(result: RunResult) -> Comparison:
    """The table of a run. Ratios are to the original; differences of accuracy are in points.

    Every accuracy names its split: in the row's title where all stages share it, else in each cell. Of masked weights
    MACs and parameters are given twice: those that are not zero, and all as dense hardware computes them.
    """
    present = result.networks
    rows = {_score_title(result.metric, present): tuple(_score_cell(present, key) for key in present)}
    for cost, title in _cost_titles(result).items():
        if any(network.figure(cost) is not None for network in present.values()):
            rows[title] = tuple(_cost_cell(network, result.base, cost) for network in present.values())
    titles = STAGES | ({"pruned": "pruned, delivered"} if result.delivered is not result.finetuned else {})
    return Comparison(tuple((titles if result.finetuned else STAGES)[key] for key in present), rows)


def _cost_titles(result: RunResult) -> dict[str, str]:
    what = ", non-zero" if result.granularity.masked else ""
    counts = {
        "macs": f"MACs{what}",
        "dense_macs": "MACs, dense",
        "params": f"parameters{what}",
        "dense_params": "parameters, dense",
    }
    # The predicted latency is left to the budget's line: the table has the measured one.
    others = {cost: cost_name(cost) for cost in result.base.costs if cost not in counts and cost != "latency"}
    if "storage" in others:
        formats = [format_name(result.granularity, b.format) for b in result.budgets if b.format]
        others["storage"] = ", ".join([others["storage"], *formats])
    measured = {
        "latency_ms": f"latency, batch {result.latency_batch}, {result.latency_runtime}",
        "latency_spread": "latency, spread",
    }
    return counts | others | measured


def baseline_rows(result: RunResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Titles and rows of the agent beside its baselines, before fine-tuning; None where there are none."""
    if not result.baselines:
        return None
    search, pruned, budget = result.search, result.pruned, result.budget
    cost = budget.cost if budget else "macs"
    own = (search.agent, search.evaluations, search.search_accuracy, pruned.accuracy)
    found = [(*own, pruned.costs[cost])]
    found += [
        (b.agent, b.evaluations, b.search_accuracy, b.accuracy, b.costs[cost]) for b in result.baselines
    ]
    splits = dict.fromkeys(("search", pruned.split))
    titles = [split_name(split) for split in splits]
    rows = [
        (
            name,
            f"{count:,}",
            *map(percent, scores[: len(splits)]),
            percent(value / result.base.costs[cost], 1),
        )
        for name, count, *scores, value in found
    ]
    name = cost_name(cost, result.granularity.masked)
    return (f"{result.metric} before fine-tuning", "evaluations", *titles, name), rows


def spread_line(result: RunResult) -> str:
    """What one image and chance amount to in the accuracies of `baseline_rows`; '' of other scores."""
    scores = {"search": result.search.search_accuracy, result.pruned.split: result.pruned.accuracy}
    known = {split: score for split, score in scores.items() if split in result.images}
    if result.metric != "accuracy" or not known:
        return ""
    parts = [
        f"{100 / (n := result.images[split]):.2g} points of the {split_name(split)} (standard error "
        f"{100 * math.sqrt(max(score * (1 - score), 1 / n) / n):.1f})"
        for split, score in known.items()
    ]
    return f"one image is {' and '.join(parts)}; smaller differences between policies may be chance"


def layer_table(result: RunResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Titles, and a row for each layer: 'old → new' where they differ; under a latency budget with predicted times."""
    timed = any(layer.ms for layer in result.shapes)
    titles = "layer", "inputs", "outputs", "weights", "MACs left", *(["predicted ms"] if timed else [])
    rows = []
    for layer in result.shapes:
        channels = (_change(pair, lambda count: f"{count:,}") for pair in (layer.inputs, layer.outputs))
        before, after = layer.macs
        left = percent(after / before, 0) if before else DASH
        times = [_change(layer.ms, "{:.3f}".format) if layer.ms else DASH] if timed else []
        rows.append((layer.name, *channels, _change(layer.weights, quantity), left, *times))
    return titles, rows


def _change(pair: tuple[Number, Number], text: Callable[[Number], str]) -> str:
    return " → ".join(dict.fromkeys(map(text, pair)))


def format_name(granularity: GranularityFigures, name: str) -> str:
    """A format of stored weights, or a granularity, as people write it; n:m by its numbers."""
    return f"{granularity.n}:{granularity.m}" if name == "nm" else FORMATS.get(name, name)


def budget_lines(
    budgets: Sequence[BudgetFigures], original: Mapping[str, float], masked: bool = False
) -> list[tuple[str, bool]]:
    """One sentence per budget, with whether it is met.

    Args:
        budgets: with the values reached.
        original: the original network's costs by name.
        masked: whether weights are set to zero instead of cut out.
    """
    return [
        (
            f"{cost_name(b.cost, masked)} at most {amount(b.cost, b.limit)} ({percent(b.ratio, 1)}), reached "
            f"{amount(b.cost, b.value)} ({percent(b.value / original[b.cost], 1)})"
            f"{': met' if b.met else ': NOT met'}",
            b.met,
        )
        for b in budgets
    ]


def _score_title(metric: str, present: Mapping[str, NetworkFigures]) -> str:
    splits = {network.split for network in present.values()}
    return f"{metric}, {split_name(splits.pop())}" if len(splits) == 1 else metric


def _score_cell(present: Mapping[str, NetworkFigures], key: str) -> Cell:
    network, base = present[key], present["base"]
    text = percent(network.accuracy)
    if len({other.split for other in present.values()}) > 1:
        text += f", {split_name(network.split)}"
    # Accuracies on different images cannot be subtracted.
    comparable = key != "base" and base.split == network.split
    return Cell(text, f"{100 * (network.accuracy - base.accuracy):+.2f}" if comparable else "")


def _cost_cell(network: NetworkFigures, base: NetworkFigures, cost: str) -> Cell:
    value, original = network.figure(cost), base.figure(cost)
    if value is None:
        return Cell(DASH, "")
    # What is dense never changes, and a spread says how sure a figure is.
    compared = original and network is not base and not cost.startswith("dense_") and cost != "latency_spread"
    if cost == "latency_ms" and _unreliable(network, base):
        compared = False
    return Cell(amount(cost, value), percent(value / original, 1) if original and compared else "")


def _unreliable(*networks: NetworkFigures) -> bool:
    """Whether measured times spread so far that their ratio means nothing."""
    return any((network.latency_spread or 0) > BUSY for network in networks)


def latency_note(result: RunResult) -> str:
    """A warning where measured latency is not reliable; '' where it is."""
    return spread_note([network.latency_spread or 0 for network in result.networks.values()])


def spread_note(spreads: Sequence[float]) -> str:
    """A warning where measured times spread too far, as shares of their median; '' where none does."""
    if all(spread <= BUSY for spread in spreads):
        return ""
    return (
        f"measured latency is not reliable: times spread over more than {percent(BUSY, 0)} of their median, so something "
        "else was running; measure again on an idle machine"
    )


def storage_rows(result: RunResult) -> list[Stored]:
    """The sizes of a masked network."""
    if result.masked is None:
        return []
    sizes = result.masked.storage
    known = {"dense_fp32": ("32 bits", ""), "csr": ("32 bits", "dense_fp32"), "nm": ("32 bits", "dense_fp32")}
    known |= {"dense_4bit": ("4 bits", ""), "eie": ("4 bits", "dense_4bit")}
    return [
        Stored(
            "dense" if not dense else format_name(result.granularity, key),
            bits,
            size(sizes[key]),
            percent(sizes[key] / sizes[dense], 1) if dense else "",
        )
        for key, (bits, dense) in known.items()
        if key in sizes
    ]


def pattern_line(result: RunResult) -> tuple[str, bool] | None:
    """Whether the n:m pattern holds in the delivered weights, in words and as a fact; None without one."""
    pattern = result.masked and result.masked.pattern
    if not pattern:
        return None
    what = f"{pattern.n}:{pattern.m}"
    where = f"{len(pattern.layers)} of the {len(result.strategy)} layers that it fits"
    if not pattern.holds:
        return f"{what} does NOT hold in all of {where}", False
    return f"{what} holds in {where}, checked on the delivered weights; the others are dense", True


def history_line(result: RunResult) -> str:
    """The weights that led to the network, and the rounds of pruning; '' where the original was pruned at once."""
    search, parts = result.search, []
    if search.start:
        adopted = [start for start in search.start if start.startswith("round ")]
        before = [start for start in search.start if start not in adopted]
        rounds = [f"{len(adopted)} rounds" if len(adopted) > 1 else adopted[0]] if adopted else []
        parts.append(" → ".join([*before, *rounds, "this network"]))
    if search.rounds and result.finetuned:
        parts.append(
            f"fine-tuned over {search.rounds} rounds of pruning ({search.schedule}), where 'pruned' is the same "
            "strategy at once"
        )
    return "; ".join(parts)
