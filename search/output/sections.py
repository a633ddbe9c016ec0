"""The sections of the report page, in their order: a new one is a function here and its name in SECTIONS."""

from __future__ import annotations

import base64
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from amc_env.costs.base import size
from search.output import charts
from search.output.export import FORMATS
from search.output.formatting import (
    baseline_rows,
    cost_name,
    front_table,
    layer_table,
    percent,
    split_name,
    spread_line,
    storage_rows,
)
from search.output.plots import (
    Candidate,
    FrontPoint,
    Width,
    plot_channels,
    plot_finetune,
    plot_front,
    plot_reward,
    plot_sensitivity,
    plot_tradeoff,
)
from search.output.run_files import Evaluation, RunFiles


@dataclass(frozen=True)
class Text:
    """A paragraph; `style` is '', 'soft' or 'bad'."""

    kind: ClassVar[str] = "text"

    text: str
    style: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        caption: below it.
        source: PNG as a data URI.
        shape: 'plain', or 'long' and 'longer' where it scrolls sideways on a small screen rather than shrink.
        chart: what is shown in its place where scripts run, as JSON; see `search.output.charts`. '' for nothing.
    """

    kind: ClassVar[str] = "picture"

    caption: str
    source: str
    shape: str = "plain"
    chart: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text; with `bars`, shares in [0, 1], the first column is code and a last one shows bars."""

    kind: ClassVar[str] = "table"

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    bars: Sequence[float] = ()


@dataclass(frozen=True)
class Code:
    """Text in a fixed width; `wrap` breaks its lines."""

    kind: ClassVar[str] = "code"

    code: str
    wrap: bool = False


@dataclass(frozen=True)
class Names:
    """Names of layers in a row."""

    kind: ClassVar[str] = "names"

    names: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"

    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Folded:
    """A block behind a line that opens it."""

    kind: ClassVar[str] = "folded"

    summary: str
    block: Block
    open: bool = False


SHOWN_STRATEGIES = 5

Block = Text | Picture | Table | Code | Names | Facts | Folded


@dataclass(frozen=True)
class Section:
    """A part of the page: its title and what is below it."""

    title: str
    blocks: Sequence[Block]


def beside(run: RunFiles) -> Section | None:
    """The agent beside its baselines, before fine-tuning."""
    compared = baseline_rows(run.result)
    if compared is None:
        return None
    note = "The same evaluator scored all of them. " + spread_line(run.result).capitalize()
    return Section("Beside the baselines", (Table(*compared), Text(f"{note.strip().rstrip('.')}.", "soft")))


def layers(run: RunFiles) -> Section | None:
    """Every layer, original and pruned."""
    titles, rows = layer_table(run.result)
    if not rows:
        return None
    kept = [layer.macs[1] / layer.macs[0] if layer.macs[0] else 1.0 for layer in run.result.shapes]
    blocks: list[Block] = [Folded(f"{len(rows)} layers", Table(titles, rows, kept), open=len(rows) <= 30)]
    if any(layer.ms for layer in run.result.shapes):
        note = "Times are the latency table's, of each layer alone; the network's takes other operations into account."
        blocks.append(Text(note, "soft"))
    return Section("Layers, original → pruned", blocks)


def stored_size(run: RunFiles) -> Section | None:
    """Bytes of masked weights in every format."""
    rows = [(row.format, row.weights, row.size, row.share) for row in storage_rows(run.result)]
    note = (
        "Each layer in the format or dense, whichever is smaller; biases, batch norms and other parameters with 32 bits "
        "each. The 4-bit codes are counted: no weight was quantised. Exported files keep the zeros."
    )
    table = Table(("format", "a weight", "size", "of dense"), rows)
    return Section("Stored size", (table, Text(note, "soft"))) if rows else None


def front(run: RunFiles) -> Section | None:
    """The networks of several budgets."""
    rows = run.result.front
    if not rows:
        return None
    titles, *cells = front_table(run.result)
    points = []
    for row in rows:
        tuned = {} if row.finetuned is None else {"fine-tuned": row.finetuned}
        points.append(FrontPoint(row.value * row.ratio / row.limit, {"pruned": row.pruned} | tuned))
    masked, metric = run.result.granularity.masked, run.result.metric
    path = plot_front(
        points,
        rows[0].base,
        run.folder / "plots" / "front.png",
        rows[0].cost,
        masked,
        metric,
        split_name(rows[0].split),
    )
    caption = (
        "The network of each budget. The rest of this page is about the last one, which is the smallest."
    )
    return Section("Score against budget", (Table(titles, cells), Picture(caption, data_uri(path))))


def kept(run: RunFiles) -> Section | None:
    """Channels of every decision, or weights of every masked layer, that are left."""
    masked = run.result.masked
    if masked is None:
        widths = [Width(name, d.kept, d.total) for name, d in run.decisions.items()]
        title, unit = "What was kept", "channels"
        caption = "Channels kept per decision, front to back, before the original's. Coupled layers share one decision."
    else:
        layers = [(name, masked.layers[name]) for name in run.decisions]
        widths = [Width(name, layer.nonzero, layer.weights) for name, layer in layers]
        title, unit = "Weights kept", "weights"
        caption = (
            "Weights kept per layer, front to back, before all weights of the layer; the others are zero."
        )
        if pattern := masked.pattern:
            caption += f" A layer is dense or keeps {pattern.n} of every {pattern.m}."
    if not widths:
        return None
    path = plot_channels(widths, run.folder / "plots" / "channels.png", unit)
    shape = "plain" if len(widths) <= 12 else "long" if len(widths) <= 30 else "longer"
    chart = _interactive(charts.widths(widths, unit))
    return Section(title, (Picture(caption, data_uri(path), shape, chart),))


def the_search(run: RunFiles) -> Section | None:
    """The reward of every episode; not of rounds, whose rewards are of different weights."""
    rewards, search = run.series("episode/reward"), run.result.search
    if len(rewards) < 2 or run.first_of_rounds():
        return None
    stages = _boundaries(list(rewards), search.stage_episodes or math.inf)
    path = plot_reward(
        list(rewards.values()), run.folder / "plots" / "reward.png", search.warmup, _budget_note(run), stages
    )
    caption = "Reward of every episode and the best so far, from scores on the search split."
    if any(evaluation.repair != search.repair for evaluation in run.evaluations):
        caption += (
            f" The best of them were scored again with repair={search.repair}: the best reward that is stated, "
            f"{search.best_reward:.4f}, is from that score, so it may lie above or below the line."
        )
    if search.stages and stages:
        caption += (
            " Each stage searches under its own budget, from the network that the one before left: rewards of "
            "different stages do not compare."
        )
    elif stages:
        caption += " One search for each budget: rewards of different budgets do not compare."
    chart = _interactive(charts.reward(list(rewards.values()), stages))
    return Section("The search", (Picture(caption, data_uri(path), chart=chart),))


def _boundaries(steps: list[int], each: float) -> list[int]:
    """How many episodes come before each further stage, whose steps begin after a multiple of ``each``."""
    numbers = [(step - 1) // each for step in steps]
    return [place for place, (before, now) in enumerate(pairwise(numbers), start=1) if now != before]


def _budget_note(run: RunFiles) -> str:
    budget = run.result.budget
    if budget is None:
        return ""
    ratios = run.result.search.stages or [row.ratio for row in run.result.front] or (budget.ratio,)
    name = cost_name(budget.cost, run.result.granularity.masked)
    return f"budget {', '.join(f'{100 * ratio:.3g}%' for ratio in ratios)} of {name}"


def tradeoff(run: RunFiles) -> Section | None:
    """Accuracy against cost of every strategy that was scored on the delivered network's weights."""
    result, budget = run.result, run.result.budget
    cost = budget.cost if budget else "macs"
    original = result.base.costs[cost]

    def candidate(evaluation: Evaluation) -> Candidate:
        return Candidate(evaluation.score, evaluation.costs[cost] / original, evaluation.met)

    starts, rounds = result.search.start or ("original",), run.first_of_rounds()
    shown = starts if rounds else starts[-1:]
    scored = [e for e in run.evaluations if cost in e.costs and e.start in shown]
    if len({e.removed for e in scored}) < 2:
        return None
    delivered = tuple(decision.removed for decision in run.decisions.values())
    # The last of equals: a strategy may have been scored again, with a better repair, before it was delivered.
    best = next((candidate(e) for e in reversed(scored) if e.removed == delivered), None)
    path = plot_tradeoff(
        [candidate(e) for e in scored],
        run.folder / "plots" / "tradeoff.png",
        cost,
        limit=budget.limit / original if budget else None,
        best=best,
        masked=result.granularity.masked,
        rounds=[candidate(e) for e in rounds],
        metric=result.metric,
    )
    metric = result.metric
    chart = charts.tradeoff(
        [candidate(e) for e in scored],
        [e.removed for e in scored],
        f"{cost_name(cost, result.granularity.masked)}, share of the original",
        metric,
        budget.limit / original if budget else None,
        best,
    )
    of = "that the last stage " if result.search.stages else ""
    caption = (
        f"All strategies {of}scored. Scores are on the search split, before fine-tuning: it was split off the "
        "training data, which a pretrained network has seen, so they compare strategies and do not predict the score on "
        "test data."
    )
    picture = Picture(caption, data_uri(path), chart=_interactive(chart))
    return Section(f"{metric[0].upper()}{metric[1:]} against cost", (picture,))


def _interactive(chart: charts.Chart) -> str:
    """As a `Picture` has it; '' where there is nothing to draw it with."""
    return charts.embedded(chart) if charts.available() else ""


def best_strategies(run: RunFiles) -> Section | None:
    """The best that were scored like the delivered strategy, and how far they differ from it."""
    scored_like = (run.result.search.start or ("original",))[-1], run.result.search.repair
    within = {
        e.removed: e
        for e in run.evaluations
        if (e.start, e.repair) == scored_like
        and all(e.costs.get(b.cost, math.inf) <= b.limit for b in run.result.budgets)
    }
    best = sorted(within.values(), key=lambda evaluation: -evaluation.score)[:SHOWN_STRATEGIES]
    if len(best) < 2:
        return None
    original, delivered = run.result.base.costs, [decision.removed for decision in run.decisions.values()]
    costs = [name for name in original if name in best[0].costs]

    def row(evaluation: Evaluation) -> tuple[str, ...]:
        shares = (percent(evaluation.costs[name] / original[name], 1) for name in costs)
        apart = sum(map(operator.ne, evaluation.removed, delivered))
        others = f"{apart} of {len(delivered)} decisions" if apart else "delivered"
        return percent(evaluation.score), *shares, others, " ".join(map(str, evaluation.removed))

    titles = (
        run.result.metric,
        *(f"{cost_name(name)} left" for name in costs),
        "differs in",
        "removed, front to back",
    )
    note = (
        "Before fine-tuning, on the search split. The counts of a row can be given to compress(strategy=...)."
    )
    table = Table(titles, [row(evaluation) for evaluation in best])
    return Section(
        "Best strategies",
        (Text(note, "soft"), Folded(f"the best {len(best)}", table, open=len(delivered) <= 12)),
    )


def fine_tuning(run: RunFiles) -> Section | None:
    """The loss and the score of every epoch."""
    losses, search = run.series("finetune/loss"), run.result.search
    if not losses:
        return None
    scores = list(run.series("finetune/accuracy").values())
    path = plot_finetune(
        list(losses.values()), run.folder / "plots" / "finetune.png", scores, run.result.metric
    )
    caption = f"Training loss{f' and {run.result.metric}' * bool(scores)} per epoch; the last epoch is the one kept."
    if search.stages or search.rounds or search.start or run.result.front:
        caption += " All trainings of the run follow one another: the loss jumps where more is pruned."
    return Section("Fine-tuning", (Picture(caption, data_uri(path)),))


def layer_errors(run: RunFiles) -> Section | None:
    """What each decision alone takes from the layers that read it, where the agent asked for that."""
    curves = run.energy_kept
    if not curves or {curve.name for curve in curves} != set(run.decisions):
        return None
    path = plot_sensitivity(
        curves,
        run.folder / "plots" / "layer_errors.png",
        picked=[run.decisions[curve.name].ratio for curve in curves],
        split="after least squares",
        metric="output energy kept",
    )
    caption = (
        "One decision at a time: the share of the outputs of the layers that read it which least squares restores from "
        "what is left, on calibration examples. No network was scored for it. Circles mark what the delivered strategy "
        "removes."
    )
    return Section("What each decision loses alone", (Picture(caption, data_uri(path)),))


def decisions(run: RunFiles) -> Section | None:
    """What was removed of every decision."""
    masked, unit = run.result.masked, run.result.granularity.unit
    pattern = masked is not None and masked.pattern is not None
    rows = []
    for name, d in run.decisions.items():
        left = (f"{d.kept}:{d.total}" if d.removed else "dense") if pattern else f"{d.kept:,} / {d.total:,}"
        rows.append((name, left, percent(d.ratio, 1)))
    titles = (
        "layer" if masked else "decision (first layer)",
        f"{unit} kept" if pattern else f"{unit} kept / total",
        "removed",
    )
    table = Table(titles, rows, [1 - d.ratio for d in run.decisions.values()])
    summary = f"{len(rows)} decisions, front to back"
    return Section("Decisions", (Folded(summary, table, open=len(rows) <= 30),)) if rows else None


def skipped(run: RunFiles) -> Section | None:
    """Layers that are not pruned, by reason."""
    by_reason: dict[str, list[str]] = {}
    for layer in run.result.skipped:
        by_reason.setdefault(layer.reason, []).append(layer.name)
    blocks = [block for reason, names in by_reason.items() for block in (Text(reason), Names(names))]
    return Section("Not pruned", blocks) if blocks else None


def loading(run: RunFiles) -> Section | None:
    """How to load every exported file, and which exports failed."""
    exports = run.result.exports
    done = [export for export in exports if not export.error]
    files = ", ".join(f"{export.path.name} ({size(export.bytes)})" for export in done)
    blocks: list[Block] = []
    if done:
        note = f"{files} in {run.folder.name}, the folder of this page; put its path in place of RUN_FOLDER."
        blocks.append(Text(note, "soft"))
    for export in done:
        chosen = FORMATS[export.format]
        blocks += [Text(chosen.title), Code(chosen.load_snippet)]
    blocks += [Text(f"Export {e.format} failed: {e.error}", "bad") for e in exports if e.error]
    what = "network" if run.result.granularity.masked else "small network"
    return Section(f"Loading the {what}" if done else "Exports", blocks) if blocks else None


def command(run: RunFiles) -> Section | None:
    """The command that started the run."""
    line = run.result.command
    return Section("Repeating the run", (Code(line, wrap=True),)) if line else None


def configuration(run: RunFiles) -> Section | None:
    """All choices, the machine and the versions."""
    known = {"machine": run.result.machine, "versions": run.header.get("versions")}
    fingerprints = {name: run.header.get(name) for name in ("weights", "data", "threads")}
    facts = [(name, value) for name, value in _flat(known | fingerprints) if value]
    parts: tuple[tuple[str, Block, object], ...] = (
        ("Full configuration", Code(run.configuration), run.configuration),
        ("Machine, versions, fingerprints", Facts(facts), facts),
    )
    blocks = [Folded(summary, block) for summary, block, present in parts if present]
    return Section("Configuration and machine", blocks) if blocks else None


SECTIONS: tuple[Callable[[RunFiles], Section | None], ...] = (
    front,
    beside,
    stored_size,
    kept,
    layers,
    the_search,
    tradeoff,
    best_strategies,
    fine_tuning,
    decisions,
    layer_errors,
    skipped,
    loading,
    command,
    configuration,
)
"""Each gives its section, or None where the run has nothing to show in it."""


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def data_uri(path: Path) -> str:
    """A PNG file as a page holds it."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
