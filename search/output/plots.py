"""The pictures of a run, as PNG files.

Figures are built as objects, never through pyplot: no global state, no display, safe in threads. The palette is Okabe and
Ito's, which colour-blind readers can distinguish; light grey is always the original network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from agents.sensitivity import Curve
from amc_env.costs.latency import Timing
from search import files
from search.output.formatting import cost_name
from search.output.run_result import RunResult

BLUE, ORANGE, VERMILION, GREY, INK = "#0072B2", "#E69F00", "#D55E00", "#D0D3D6", "#30343A"
_LINES = (BLUE, VERMILION, "#009E73", ORANGE, "#CC79A7", "#56B4E9", INK)
DPI = 150
_ALL_NAMED = 10  # lines that can still be distinguished by colour
_NARROWEST = 0.02  # axis of costs, as a share of the original's
_MARKERS = ("o", "s", "^", "D")  # of the lines with names where there are more
_DEPTH = LinearSegmentedColormap.from_list("depth", colormaps["viridis_r"](np.linspace(0.1, 1.0, 256)))
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.6g}%")
_COUNT = FuncFormatter(lambda count, _: f"{count:.6g}" if count < 10_000 else f"{count / 1000:,.6g}k")


@dataclass(frozen=True)
class Width:
    """Channels of one decision, or weights of one layer: how many of how many stay."""

    name: str
    kept: int
    total: int


@dataclass(frozen=True)
class Candidate:
    """One evaluation: score in [0, 1], cost as a share of the original's, whether every budget was met."""

    accuracy: float
    cost: float
    met: bool


@dataclass(frozen=True)
class FrontPoint:
    """The network of one budget: its cost as a share of the original's, and its scores in [0, 1] by stage."""

    cost: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Line:
    """One line of a comparison: the best score in [0, 1] after each evaluation, for each seed."""

    label: str
    curves: Sequence[Sequence[float]]


def plot_comparison(lines: Sequence[Line], path: Path) -> Path:
    """Best score against evaluations: the mean over the seeds, and the band from the lowest to the highest.

    Args:
        lines: one per group of runs; curves of one line may differ in length, and are shown where all of them go.
        path: PNG to write.
    """
    figure = _figure(7.2, 4.2)
    axes = figure.subplots()
    for place, line in enumerate(lines):
        length = min(map(len, line.curves))
        scores = np.array([curve[:length] for curve in line.curves])
        colour, style = _LINES[place % len(_LINES)], ("-", "--", ":")[place // len(_LINES) % 3]
        evaluations = np.arange(1, length + 1)
        axes.plot(
            evaluations, scores.mean(axis=0), color=colour, ls=style, lw=1.8, label=_shorten(line.label)
        )
        if len(scores) > 1:
            axes.fill_between(
                evaluations, scores.min(axis=0), scores.max(axis=0), color=colour, alpha=0.15, lw=0
            )
    axes.set_xlabel("evaluations")
    axes.set_ylabel("best score on the search split")
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return _save(figure, path)


def plot_front(
    points: Sequence[FrontPoint],
    original: float,
    path: Path,
    cost: str,
    masked: bool,
    metric: str,
    split: str,
) -> Path:
    """Score against cost of the networks of several budgets, a line for each stage.

    Args:
        points: one per budget.
        original: the original network's score.
        path: PNG to write.
        cost: its name, for the axis; likewise `metric` and `split`, the images that the scores are on.
        masked: weights are masked: MACs and parameters count those that are not zero.
    """
    figure = _figure()
    axes = figure.subplots()
    axes.axhline(original, color=INK, lw=1, ls="--", label="original")
    for colour, stage in zip(
        (BLUE, VERMILION), dict.fromkeys(s for p in points for s in p.scores), strict=False
    ):
        shown = [(point.cost, point.scores[stage]) for point in points if stage in point.scores]
        axes.plot(*zip(*shown, strict=True), "o-", color=colour, ms=5, lw=1.8, label=stage)
    _name_axes(axes, f"{cost_name(cost, masked)}, share of the original", f"{metric}, {split}")
    return _save(figure, path)


def plot_channels(widths: Sequence[Width], path: Path, unit: str = "channels") -> Path:
    """Save `channels_figure` as a PNG."""
    return _save(channels_figure(widths, unit), path)


def layers_figure(result: RunResult) -> Figure:
    """`channels_figure` of the output channels of all layers, or of their weights where those are masked."""
    masked = result.granularity.masked
    pairs = [(layer.name, layer.weights if masked else layer.outputs) for layer in result.shapes]
    widths = [Width(name, after, before) for name, (before, after) in pairs]
    return channels_figure(widths, "weights" if masked else "channels")


def channels_figure(widths: Sequence[Width], unit: str = "channels") -> Figure:
    """AMC's picture: per decision, in forward order, the channels kept before the original's, and their share below.

    Args:
        widths: one per decision, front to back.
        unit: what is counted: channels, or weights where those are masked.
    """
    count = len(widths)
    figure = _figure(width=min(11.0, max(5.8, 1.2 + 0.175 * count)), height=4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    places = np.arange(count)
    totals = np.array([width.total for width in widths])
    kept = np.array([width.kept for width in widths])
    above.bar(places, totals, width=0.84, color=GREY, label="original")
    above.bar(places, kept, width=0.84, color=BLUE, label="kept")
    above.set_ylabel(unit)
    above.yaxis.set_major_formatter(_COUNT)
    above.legend(loc="upper left", ncols=2, frameon=False, bbox_to_anchor=(0.0, 1.12), borderaxespad=0.0)
    below.bar(places, np.ones(count), width=0.84, color=GREY)
    below.bar(places, kept / totals, width=0.84, color=BLUE)
    below.set_ylim(0, 1)
    below.set_ylabel("share kept")
    below.yaxis.set_major_formatter(_PERCENT)
    below.set_yticks((0, 0.5, 1))
    # About 60 characters fit side by side; more would run into each other.
    upright = max((len(width.name) for width in widths), default=0) * count < 55
    each = math.ceil(count / 64)  # more names than this run into each other
    below.set_xticks(
        places[::each],
        [_shorten(width.name) for width in widths[::each]],
        rotation=0 if upright else 90,
        fontsize=8.5 if count <= 30 else 7.5,
    )
    for axes in (above, below):
        axes.tick_params(axis="x", length=0)
    figure.align_ylabels()
    below.set_xlim(-0.7, count - 0.3)
    return _styled(figure)


def plot_reward(
    rewards: Sequence[float], path: Path, warmup: int = 0, note: str = "", stages: Sequence[int] = ()
) -> Path:
    """Reward of every episode, the running best, and the warm-up shaded.

    Args:
        rewards: one per episode, in order; infinities and nan leave a gap.
        path: PNG to write.
        warmup: episodes at the start, of each stage, that were played at random.
        note: a few words beside the axis title, such as the budget.
        stages: how many episodes lie before each further stage, whose rewards are of another network and budget: the
            best starts again there.
    """
    figure = _figure()
    axes = figure.subplots()
    values = np.array([reward if math.isfinite(reward) else np.nan for reward in rewards], dtype=float)
    axes.plot(np.arange(1, len(values) + 1), values, ".", ms=4, color=ORANGE, label="episode")
    for first, end in pairwise((0, *stages, len(values))):
        _stage(axes, values[first:end], first, warmup)
    axes.set_xlim(0.5, max(1, len(values)) + 0.5)
    axes.set_xlabel(f"episode ({note})" if note else "episode")
    axes.set_ylabel("reward")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return _save(figure, path)


def _stage(axes: Axes, values: NDArray[np.float64], first: int, warmup: int) -> None:
    """The best so far and the warm-up of one search, after ``first`` episodes of earlier ones."""
    if warmup:
        end = first + min(warmup, len(values))
        axes.axvspan(first + 0.5, end + 0.5, color=GREY, alpha=0.45, lw=0, label="warm-up (random)")
    if np.isfinite(values).any():
        episodes, best = first + np.arange(1, len(values) + 1), np.fmax.accumulate(values)
        axes.plot(episodes, best, color=BLUE, lw=1.8, drawstyle="steps-post", label="best so far")
    if first:
        axes.axvline(first + 0.5, color=INK, lw=1, ls=":", label="next stage")


def plot_tradeoff(
    candidates: Sequence[Candidate],
    path: Path,
    cost: str = "macs",
    split: str = "search split",
    limit: float | None = None,
    best: Candidate | None = None,
    masked: bool = False,
    rounds: Sequence[Candidate] = (),
    metric: str = "accuracy",
) -> Path:
    """Score against cost of all evaluations, the delivered one marked.

    Args:
        cost: its name, for the axis; `split` likewise: what the accuracies were measured on.
        limit: the budget, as a share of the original's cost.
        best: the evaluation that was delivered.
        masked: weights are masked: MACs and parameters count those that are not zero.
        rounds: what an agent that adopts weights began each round with, in order.
        metric: the name of the score.
    """
    figure = _figure()
    axes = figure.subplots()
    _scatter(axes, candidates)
    if rounds:
        costs, accuracies = [c.cost for c in rounds], [c.accuracy for c in rounds]
        axes.plot(costs, accuracies, ".-", color=INK, lw=1.2, ms=5, label="rounds")
    if limit is not None:
        axes.axvline(limit, color=INK, lw=1, ls="--", label="budget")
    if best is not None:
        star: dict[str, Any] = {
            "s": 150,
            "marker": "*",
            "color": VERMILION,
            "ec": "white",
            "lw": 0.8,
            "zorder": 3,
        }
        axes.scatter([best.cost], [best.accuracy], label="chosen", **star)
    _widen(axes, _NARROWEST)
    _name_axes(axes, f"{cost_name(cost, masked)}, share of the original", f"{metric}, {split}")
    return _save(figure, path)


def _widen(axes: Axes, narrowest: float) -> None:
    """Widens a narrow axis of costs: candidates that all use up the budget must not look spread out."""
    left, right = axes.get_xlim()
    missing = max(0.0, narrowest - (right - left))
    axes.set_xlim(left - missing / 2, right + missing / 2)


def _scatter(axes: Axes, candidates: Sequence[Candidate]) -> None:
    for met, colour, label in ((True, BLUE, "within budget"), (False, ORANGE, "over budget")):
        chosen = [candidate for candidate in candidates if candidate.met is met]
        if chosen:
            costs, accuracies = [c.cost for c in chosen], [c.accuracy for c in chosen]
            axes.scatter(costs, accuracies, s=14, color=colour, alpha=0.55, lw=0, label=label)


def plot_finetune(
    losses: Sequence[float], path: Path, scores: Sequence[float] = (), metric: str = "accuracy"
) -> Path:
    """Training loss per fine-tuning epoch and, where it is known, the score on the search split above it."""
    figure = _figure(height=4.4 if scores else 3.0)
    *above, axes = figure.subplots(2 if scores else 1, 1, sharex=True, squeeze=False).flat
    axes.plot(np.arange(1, len(losses) + 1), losses, "o-", ms=4, lw=1.8, color=BLUE)
    axes.set_ylabel("training loss")
    for upper in above:
        upper.plot(np.arange(1, len(scores) + 1), scores, "o-", ms=4, lw=1.8, color=VERMILION, clip_on=False)
        room = max(0.01, float(np.ptp(scores)) / 4)
        upper.set_ylim(max(0.0, min(scores) - room), min(1.0, max(scores) + room))
        upper.set_ylabel(f"{metric}, search split")
        upper.yaxis.set_major_formatter(_PERCENT)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _save(figure, path)


def plot_sensitivity(
    curves: Sequence[Curve],
    path: Path,
    *,
    threshold: float | None = None,
    picked: Sequence[float] = (),
    split: str = "search split",
    metric: str = "accuracy",
) -> Path:
    """The lecture's picture: accuracy against the share removed of one decision at a time, a line each.

    Colour goes with depth. Few lines have their names beside them; of many, the most sensitive have.

    Args:
        curves: one per decision, front to back.
        path: PNG to write.
        threshold: accuracy, in [0, 1], that was picked for all of them.
        picked: share removed of each decision by that; none where nothing was picked.
        split: the images that accuracies are on.
        metric: the name of the score.
    """
    figure = _figure(width=7.4, height=4.4)
    axes = figure.subplots()
    colours = _DEPTH(np.linspace(0.0, 1.0, max(2, len(curves))))
    many = len(curves) > _ALL_NAMED
    falling_most = sorted(range(len(curves)), key=lambda place: -curves[place].drop)
    named = falling_most[: len(_MARKERS)] if many else range(len(curves))
    for place, curve in enumerate(curves):
        style: dict[str, Any] = {"lw": 0.9, "alpha": 0.8}
        if place in named:
            marker = _MARKERS[named.index(place)] if many else "o"
            style = {"lw": 1.6, "marker": marker, "ms": 4, "label": _shorten(curve.name)}
        axes.plot(curve.ratios, curve.accuracies, color=colours[place], **style)
    _picked(axes, curves, picked, threshold)
    if many:
        _depth_bar(figure, axes, len(curves))
    axes.set_xlim(0.0, None)
    axes.set_xlabel("share removed, one decision at a time")
    axes.set_ylabel(f"{metric}, {split}")
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    title = "most sensitive" if many else None
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, title=title, title_fontsize=8)
    return _save(figure, path)


def plot_latency_check(
    predicted: Sequence[float], measured: Sequence[Timing], path: Path, note: str = ""
) -> Path:
    """Predicted against measured latency of networks; on the diagonal the two are equal.

    Args:
        predicted: milliseconds by the table, one for each network.
        measured: of the same networks; bars span the quartiles.
        path: PNG to write.
        note: a few words above the axes, such as the error.
    """
    figure = _figure(width=5.0, height=4.8)
    axes = figure.subplots()
    centres = np.array([timing.median_ms for timing in measured])
    quartiles = np.array([(timing.low_ms, timing.high_ms) for timing in measured])
    ends = np.array((min(centres.min(), *predicted), max(centres.max(), *predicted)))
    ends += 0.04 * np.ptp(ends) * np.array((-1.0, 1.0))
    axes.fill_between(ends, 0.95 * ends, 1.05 * ends, color=GREY, alpha=0.45, lw=0, label="within 5%")
    axes.plot(ends, ends, color=INK, lw=1, ls="--", label="equal")
    axes.hlines(predicted, *quartiles.T, color=BLUE, lw=1, alpha=0.4)
    axes.scatter(centres, predicted, s=18, color=BLUE, alpha=0.8, lw=0, zorder=3, label="network")
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(_COUNT)
    axes.set_xlabel("measured, ms")
    axes.set_ylabel("predicted, ms")
    axes.legend(loc="upper left", frameon=False, fontsize=8.5)
    if note:
        axes.set_title(note, fontsize=8.5, color=INK, loc="left")
    return _save(figure, path)


def _picked(axes: Axes, curves: Sequence[Curve], picked: Sequence[float], threshold: float | None) -> None:
    """The common threshold, and where it left every curve."""
    if threshold is not None:
        axes.axhline(threshold, color=INK, lw=1, ls="--", label=f"threshold {100 * threshold:.2f}%")
    if picked:
        heights = [
            np.interp(x, curve.ratios, curve.accuracies) for curve, x in zip(curves, picked, strict=True)
        ]
        marks: dict[str, Any] = {
            "s": 18,
            "facecolor": "white",
            "edgecolor": VERMILION,
            "lw": 1.2,
            "zorder": 3,
        }
        axes.scatter(picked, heights, label="picked", **marks)


def _depth_bar(figure: Figure, axes: Axes, count: int) -> None:
    scale = ScalarMappable(Normalize(1, count), _DEPTH)
    bar = figure.colorbar(scale, ax=axes, pad=0.01, aspect=40, ticks=MaxNLocator(integer=True))
    bar.set_label("decision, front to back")
    bar.outline.set_visible(False)


def _figure(width: float = 5.8, height: float = 3.5) -> Figure:
    figure = Shown(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _name_axes(axes: Axes, cost: str, score: str) -> None:
    """Names of a cost and a score, both shares, and the legend."""
    axes.set_xlabel(cost)
    axes.set_ylabel(score)
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """A row above the axes, where it covers no point; a label that occurs several times is shown once."""
    named = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0)}
    size = 10 if len(named) < 4 else 8.5
    look: dict[str, Any] = {"fontsize": size, "frameon": False, "handletextpad": 0.4, "columnspacing": 1.2}
    axes.legend(named.values(), named.keys(), **place, **look, ncols=len(named) if len(named) < 5 else 3)


def _shorten(name: str) -> str:
    """Keep the end of a long layer name, which tells layers apart."""
    return name if len(name) <= 26 else "…" + name[-25:]


class Shown(Figure):
    """A figure that a notebook shows as it is, without pyplot."""

    def _repr_png_(self) -> bytes:
        picture = BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def _save(figure: Figure, path: Path) -> Path:
    _styled(figure)
    with files.replacing(path) as unfinished:
        figure.savefig(unfinished)
    return path


def _styled(figure: Figure) -> Figure:
    """The figure with the project's axes."""
    for axes in figure.axes:
        if axes.get_label() == "<colorbar>":
            continue
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9AA0A6")
        axes.tick_params(colors=INK, labelsize=None)
        axes.grid(axis="y", color="#E6E8EA", lw=0.7)
        axes.set_axisbelow(True)
    return figure
