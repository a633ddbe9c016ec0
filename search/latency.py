"""amc-latency's three tasks: times shown layer by layer, the table built, the table checked."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from amc_env.errors import UserError, first_line
from amc_env.latency import (
    Call,
    Runtime,
    Timing,
    interleaved,
    machine,
    sampling,
    using_threads,
    warn_where_busy,
)
from amc_env.latency.cost import Latency
from amc_env.latency.sampling import Checked, build_table, check_table, random_strategies
from amc_env.latency.table import Conditions, LatencyTable
from amc_env.latency.units import Unit, units_of
from amc_env.layers import Layer, LayerGraph
from amc_env.memory import Activations
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.granularity import Granularity
from amc_env.strategy import Grid
from search import files
from search.output.formatting import duration, percent
from search.output.plots import plot_latency_check
from search.output.progress import Progress, print_table

log = logging.getLogger(__name__)

CSV, CHECK_CSV, CHECK_PLOT = "latency.csv", "check.csv", "plots/latency_check.png"
_TIMES = ("ms", "low_ms", "high_ms", "spread", "runs")


@dataclass(frozen=True)
class How:
    """How latency is measured.

    Attributes:
        runtime: What runs the networks.
        threads: Of the processor.
        repeats: Timed passes of each.
        seed: Of the order of passes, and of the networks that correct a table.
    """

    runtime: Runtime
    threads: int
    repeats: int
    seed: int


@dataclass(frozen=True, eq=False)
class Subject:
    """A network whose latency is asked for.

    Attributes:
        name: The network's.
        candidates: Builds its pruned networks. Which channels go makes no difference to time: the last of each group.
        grids: The decisions' feasible counts.
        example: The batch, [N, C, H, W], on the network's device.
        how: How it is measured.
    """

    name: str
    candidates: Candidates
    grids: tuple[Grid, ...]
    example: Tensor
    how: How

    @classmethod
    def of(cls, name: str, model: nn.Module, example: Tensor, granularity: Granularity, how: How) -> Subject:
        """A network made ready to be cut.

        Raises:
            UserError: No channel of it can be cut.
        """
        graph, grids = granularity.decisions(LayerGraph.trace(model, example))
        if not grids:
            reasons = "; ".join(f"{w.name}: {w.reason}" for w in graph.whole[:8])
            raise UserError(f"nothing is left to cut: {reasons}")
        orders = [torch.arange(group.total) for group in graph.groups]
        return cls(name, Candidates(model, graph, orders), grids, example, how)

    @property
    def most(self) -> tuple[int, ...]:
        """The counts that remove all that may be removed."""
        return tuple(grid.count(grid.size - 1) for grid in self.grids)

    def activations(self) -> Activations:
        """Its operations, counted; see there."""
        return Activations(self.candidates.original, self.candidates.graph, self.grids, self.example)

    @property
    def conditions(self) -> Conditions:
        """Under which its times hold."""
        device = str(self.example.device)
        return Conditions.here(self.how.runtime.name, self.how.threads, len(self.example), device)

    def __str__(self) -> str:
        size = " x ".join(str(count) for count in self.example.shape[1:])
        threads = "1 thread" if self.how.threads == 1 else f"{self.how.threads} threads"
        return (
            f"{self.name}, batch {len(self.example)} of {size}, runtime {self.how.runtime.name}, {threads}, "
            f"on {machine(str(self.example.device))}"
        )


# ------------------------------------------------------------------------------------------------------- show


@dataclass(frozen=True)
class LayerTime:
    """A layer with the batch norm and activation behind it, timed alone; ``timing`` is of one call."""

    layer: Layer
    unit: Unit
    timing: Timing

    @property
    def ms(self) -> float:
        """Milliseconds of all its calls in one pass."""
        return self.layer.calls * self.timing.median_ms


@dataclass(frozen=True)
class Shown:
    """What ``show`` measured, all in the same rounds.

    Attributes:
        layers: In forward order.
        original: The whole network.
        most_pruned: The network with all removed that may be.
    """

    layers: tuple[LayerTime, ...]
    original: Timing
    most_pruned: Timing

    @property
    def sum_ms(self) -> float:
        """Of all layers timed alone."""
        return sum(layer.ms for layer in self.layers)

    def share(self, ms: float) -> float:
        """Of the whole network's latency."""
        return ms / self.original.median_ms

    @property
    def least_ratio(self) -> float:
        """The share of the original's latency that pruning can reach."""
        return self.share(self.most_pruned.median_ms)


def show(subject: Subject, folder: Path) -> Shown:
    """Measures every layer, the whole network and the most pruned one; prints them and writes latency.csv.

    Args:
        subject: The network.
        folder: The run folder.

    Raises:
        UserError: The runtime cannot run it.
    """
    shown = _shown(subject)
    _write_layers(shown, folder / CSV)
    _print(shown)
    warn_where_busy((shown.original, shown.most_pruned))
    log.info(
        "layers are timed alone, each with the norm and activation behind it; the least that pruning can reach here is %s "
        "of the whole network's latency",
        percent(shown.least_ratio, 1),
    )
    log.info("%s is in %s", CSV, folder)
    return shown


def _print(shown: Shown) -> None:
    def figures(ms: float, timing: Timing | None) -> tuple[str, ...]:
        spread = "" if timing is None else percent(timing.spread, 0)
        return f"{ms:.3f}", spread, percent(shown.share(ms), 1)

    rows = [
        (
            time.layer.name,
            described(time.unit),
            f"{time.layer.in_channels} → {time.layer.out_channels}",
            "x".join(map(str, time.unit.in_size)),
            *figures(time.ms, time.timing),
        )
        for time in shown.layers
    ]
    blank = ("", "", "")
    below = [
        ("sum of the layers", *blank, *figures(shown.sum_ms, None)),
        ("whole network", *blank, *figures(shown.original.median_ms, shown.original)),
        ("most pruned", *blank, *figures(shown.most_pruned.median_ms, shown.most_pruned)),
    ]
    print_table(("layer", "", "channels", "input", "ms", "spread", "share"), rows, below, words=2)


def _shown(subject: Subject) -> Shown:
    """Equal layers are timed once."""
    candidates, how, example = subject.candidates, subject.how, subject.example
    layers = candidates.graph.layers
    units = units_of(candidates.original, candidates.graph)
    keys = {layer.name: (units[layer.name], layer.in_channels, layer.out_channels) for layer in layers}
    with using_threads(how.threads):
        calls: dict[object, Call] = {
            (unit, inputs, outputs): how.runtime.prepare(
                unit.build(inputs, outputs).to(example.device),
                unit.example(len(example), inputs).to(example.device),
            )
            for unit, inputs, outputs in dict.fromkeys(keys.values())
        }
        calls["original"] = how.runtime.prepare(candidates.original, example)
        calls["most pruned"] = how.runtime.prepare(candidates.build(subject.most), example)
        times = interleaved(calls, repeats=how.repeats, settle=1, seed=how.seed)
    timed = tuple(LayerTime(layer, units[layer.name], times[keys[layer.name]]) for layer in layers)
    return Shown(timed, times["original"], times["most pruned"])


def described(unit: Unit) -> str:
    """A unit's layer in words: 'conv 3x3 /2', 'dw 3x3' for a depthwise one, 'linear'."""
    if unit.kind == "linear":
        return "linear"
    stride = f" /{max(unit.stride)}" if max(unit.stride) > 1 else ""
    groups = "" if unit.depthwise or unit.groups == 1 else f", {unit.groups} groups"
    return f"{'dw' if unit.depthwise else 'conv'} {unit.kernel[0]}x{unit.kernel[1]}{stride}{groups}"


def _write_layers(shown: Shown, path: Path) -> None:
    """A row for each layer, then the whole networks; milliseconds, and shares of the whole."""
    rows: list[Sequence[object]] = [
        (
            "layer",
            time.layer.name,
            described(time.unit),
            time.layer.in_channels,
            time.layer.out_channels,
            *_figures(time.timing, time.layer.calls),
            f"{shown.share(time.ms):.6g}",
        )
        for time in shown.layers
    ]
    for name, timing in (("original", shown.original), ("most pruned", shown.most_pruned)):
        rows.append(("network", name, "", "", "", *_figures(timing), f"{shown.share(timing.median_ms):.6g}"))
    titles = ("kind", "name", "unit", "in_channels", "out_channels", *_TIMES, "share")
    files.write_csv(path, titles, rows)


def _figures(timing: Timing, calls: int = 1) -> tuple[object, ...]:
    values = (timing.median_ms * calls, timing.low_ms * calls, timing.high_ms * calls, timing.spread)
    return (*(f"{value:.6g}" for value in values), timing.runs)


# ------------------------------------------------------------------------------------------- build and check


def build(
    subject: Subject, activations: Activations | None, path: Path | None, *, tolerance: float, points: int
) -> LatencyTable:
    """Builds the network's table, and writes it.

    Args:
        subject: The network.
        activations: Its own, for the correction; see `counted`.
        path: The JSON file; None: it is not kept.
        tolerance: See `amc_env.latency.sampling.build_table`.
        points: See there.

    Raises:
        UserError: The file cannot be written, which is tried before anything is timed; or the runtime cannot run the
            network.
    """
    if path is not None:
        _check_place(path)
    how = subject.how
    with Progress() as progress:
        table = build_table(
            subject.candidates,
            subject.grids,
            subject.example,
            runtime=how.runtime,
            threads=how.threads,
            activations=activations,
            tolerance=tolerance,
            points=points,
            repeats=how.repeats,
            on_progress=_shown_on(progress),
            seed=how.seed,
        )
    if path is not None:
        table.save(path)
    log.info(
        "latency table: %d distinct layers, %d points, %d passes, %s",
        len(table.units),
        table.points,
        table.forwards,
        duration(table.seconds),
    )
    if path is not None:
        log.info("the table is in %s", path)
    return table


def _shown_on(progress: Progress) -> Callable[[sampling.Progress], None]:
    """Shows timings; refining a table adds to their number."""
    return lambda now: progress.stage(now.stage, now.total).advance(done=now.done)


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"table={path} is a folder; a file is needed")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"table={path} cannot be written ({first_line(error)}): name another file") from error


def read_table(path: Path, subject: Subject, *, elsewhere: bool = False) -> LatencyTable:
    """A table from a file, which must have been measured as the networks will be.

    Args:
        path: The file.
        subject: The network.
        elsewhere: Whether one that was measured under other conditions is wanted as it is.

    Raises:
        UserError: There is no such file, it is no table, or one measured under other conditions.
    """
    table = LatencyTable.load(path)
    if not elsewhere:
        table.refuses(subject.conditions, f"table={path}")
    return table


def check_of(
    subject: Subject,
    activations: Activations | None,
    table: LatencyTable,
    folder: Path,
    networks: int,
    seed: int,
) -> Checked:
    """Predicts networks cut at random, measures them, prints how far off the table is; check.csv and the plot.

    Args:
        subject: The network.
        activations: Its own; see `counted`.
        table: Its table.
        folder: The run folder.
        networks: How many; equal ones are measured once.
        seed: Of the cuts.

    Raises:
        UserError: The table does not fit the network, or the runtime cannot run it.
    """
    candidates, how = subject.candidates, subject.how
    latency = Latency(candidates.original, candidates.graph, table, activations)
    with Progress() as progress:
        checked = check_table(
            latency,
            candidates,
            subject.example,
            runtime=how.runtime,
            threads=how.threads,
            strategies=random_strategies(subject.grids, networks, seed),
            repeats=how.repeats,
            on_progress=_shown_on(progress),
            seed=seed,
        )
    _write_check(checked, subject, folder / CHECK_CSV)
    said = (
        f"median error {percent(checked.median_error, 1)} (of shares of the original's latency "
        f"{percent(checked.median_share_error, 1)}), largest {percent(checked.largest_error, 1)}, "
        f"rank correlation {checked.rank_correlation:.3f}"
    )
    plot_latency_check(
        checked.predicted_ms, checked.measured, folder / CHECK_PLOT, said.replace("), ", "),\n")
    )
    log.info("%d networks cut at random, predicted and measured: %s", len(checked.strategies), said)
    log.info("%s and %s are in %s", CHECK_CSV, CHECK_PLOT, folder)
    return checked


def counted(activations: Callable[[], Activations]) -> Activations | None:
    """None, with a warning, where the network's operations cannot be counted."""
    try:
        return activations()
    except UserError as error:
        log.warning("what lies between the layers is predicted as a constant: %s", error)
        return None


def _write_check(checked: Checked, subject: Subject, path: Path) -> None:
    """A row for each network: milliseconds, the error as a share, and the counts removed of every decision."""
    rows = [
        (f"{predicted:.6g}", *_figures(timing), f"{error:.6g}", *removed)
        for removed, predicted, timing, error in zip(
            checked.strategies, checked.predicted_ms, checked.measured, checked.errors, strict=True
        )
    ]
    titles = ("predicted_ms", *_TIMES, "error", *(grid.name for grid in subject.grids))
    files.write_csv(path, titles, rows)
