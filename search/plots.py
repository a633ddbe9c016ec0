"""The pictures of a run, as PNG files.

Figures are built as objects, never through pyplot: no global state, no display, safe in threads. The palette is Okabe and
Ito's, which keeps apart for the colour-blind; light grey is always the original network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from search.formatting import cost_name

BLUE, ORANGE, VERMILION, GREY, INK = "#0072B2", "#E69F00", "#D55E00", "#D0D3D6", "#30343A"
DPI = 150
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.6g}%")


@dataclass(frozen=True)
class Width:
    """Channels of one decision: how many of how many stay."""

    name: str
    kept: int
    total: int


@dataclass(frozen=True)
class Candidate:
    """One evaluation: accuracy in [0, 1], cost as a share of the original's, whether every budget was met."""

    accuracy: float
    cost: float
    met: bool


def plot_channels(widths: Sequence[Width], path: Path) -> Path:
    """AMC's picture: per decision, in forward order, the channels kept before the original's, and their share below.

    Args:
        widths: one per decision, front to back.
        path: PNG to write.
    """
    count = len(widths)
    figure = _figure(width=min(11.0, max(5.8, 1.2 + 0.175 * count)), height=4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    places = np.arange(count)
    totals = np.array([width.total for width in widths])
    kept = np.array([width.kept for width in widths])
    above.bar(places, totals, width=0.84, color=GREY, label="original")
    above.bar(places, kept, width=0.84, color=BLUE, label="kept")
    above.set_ylabel("channels")
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
    return _save(figure, path)


def plot_reward(rewards: Sequence[float], path: Path, warmup: int = 0, note: str = "") -> Path:
    """Reward of every episode, the running best, and the warm-up shaded.

    Args:
        rewards: one per episode, in order; infinities and nan leave a gap.
        path: PNG to write.
        warmup: episodes at the start that were played at random.
        note: a few words beside the axis title, such as the budget.
    """
    figure = _figure()
    axes = figure.subplots()
    values = np.array([reward if math.isfinite(reward) else np.nan for reward in rewards], dtype=float)
    episodes = np.arange(1, len(values) + 1)
    if warmup:
        axes.axvspan(
            0.5, min(warmup, len(values)) + 0.5, color=GREY, alpha=0.45, lw=0, label="warm-up (random)"
        )
    axes.plot(episodes, values, ".", ms=4, color=ORANGE, label="episode")
    if np.isfinite(values).any():
        best = np.fmax.accumulate(values)
        axes.plot(episodes, best, color=BLUE, lw=1.8, drawstyle="steps-post", label="best so far")
    axes.set_xlim(0.5, max(1, len(values)) + 0.5)
    axes.set_xlabel(f"episode ({note})" if note else "episode")
    axes.set_ylabel("reward")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return _save(figure, path)


def plot_tradeoff(
    candidates: Sequence[Candidate],
    path: Path,
    cost: str = "macs",
    split: str = "search split",
    limit: float | None = None,
    best: Candidate | None = None,
    base: float | None = None,
) -> Path:
    """Accuracy against cost of all evaluations, the delivered one marked.

    Args:
        cost: its name, for the axis; `split` likewise: what the accuracies were measured on.
        limit: the budget, as a share of the original's cost.
        best: the evaluation that was delivered.
        base: accuracy of the original network on the same split.
    """
    figure = _figure()
    axes = figure.subplots()
    _scatter(axes, candidates)
    if limit is not None:
        axes.axvline(limit, color=INK, lw=1, ls="--", label="budget")
    if base is not None:
        axes.axhline(base, color=INK, lw=1, ls=":", label="original")
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
    axes.set_xlabel(f"{cost_name(cost)}, share of the original")
    axes.set_ylabel(f"accuracy, {split}")
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    _legend(axes)
    return _save(figure, path)


def _scatter(axes: Axes, candidates: Sequence[Candidate]) -> None:
    for met, colour, label in ((True, BLUE, "within budget"), (False, ORANGE, "over budget")):
        chosen = [candidate for candidate in candidates if candidate.met is met]
        if chosen:
            costs, accuracies = [c.cost for c in chosen], [c.accuracy for c in chosen]
            axes.scatter(costs, accuracies, s=14, color=colour, alpha=0.55, lw=0, label=label)


def plot_finetune(losses: Sequence[float], path: Path, accuracies: Mapping[int, float] | None = None) -> Path:
    """Training loss per fine-tuning epoch; accuracies (epoch from 0 -> [0, 1]) on an axis below where measured."""
    figure = _figure(height=3.0 if not accuracies else 4.2)
    panels: Any = figure.subplots(2 if accuracies else 1, 1, sharex=True, squeeze=False)[:, 0]
    epochs = np.arange(1, len(losses) + 1)
    panels[0].plot(epochs, losses, "o-", ms=4, lw=1.8, color=BLUE)
    panels[0].set_ylabel("training loss")
    if accuracies:
        panels[1].plot(
            [epoch + 1 for epoch in accuracies],
            list(accuracies.values()),
            "o-",
            ms=4,
            lw=1.8,
            color=VERMILION,
        )
        panels[1].set_ylabel("accuracy")
        panels[1].yaxis.set_major_formatter(_PERCENT)
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return _save(figure, path)


def _figure(width: float = 5.8, height: float = 3.5) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _legend(axes: Axes) -> None:
    """A row above the axes, where it covers no point."""
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0)}
    axes.legend(**place, ncols=5, frameon=False, handletextpad=0.4, columnspacing=1.2)


def _shorten(name: str) -> str:
    """Keep the end of a long layer name, which tells layers apart."""
    return name if len(name) <= 26 else "…" + name[-25:]


def _save(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9AA0A6")
        axes.tick_params(colors=INK, labelsize=None)
        axes.grid(axis="y", color="#E6E8EA", lw=0.7)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
