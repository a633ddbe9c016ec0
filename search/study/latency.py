"""amc-latency's three tasks: times shown layer by layer, the table built, the table checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amc_env.costs.latency import Call, Timing, interleaved, using_threads
from amc_env.costs.latency.cost import Latency
from amc_env.costs.latency.sampling import Checked, check_table, random_strategies
from amc_env.costs.latency.table import LatencyTable
from amc_env.costs.latency.units import Unit, units_of
from amc_env.costs.memory import Activations
from amc_env.graph.layers import Layer
from amc_env.inputs import count, device_of
from search import files
from search.output.formatting import percent, spread_note
from search.output.progress import Progress, print_table
from search.study.latency_table import Subject, shown_on

log = logging.getLogger(__name__)


CSV, CHECK_CSV, CHECK_PLOT = "latency.csv", "check.csv", "plots/latency_check.png"
REPORT = "report.html"


_TIMES = ("ms", "low_ms", "high_ms", "spread", "runs")


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
        original: The unpruned network.
        most_pruned: The network with all removed that may be.
    """

    layers: tuple[LayerTime, ...]
    original: Timing
    most_pruned: Timing

    @property
    def sum_ms(self) -> float:
        """Of all layers timed alone."""
        return sum(layer.ms for layer in self.layers)

    @property
    def note(self) -> str:
        """A warning where the times of the networks spread too far; '' where they do not."""
        return spread_note([self.original.spread, self.most_pruned.spread])

    def share(self, ms: float) -> float:
        """Of the unpruned network's latency."""
        return ms / self.original.median_ms

    def share_text(self, ms: float) -> str:
        """The share in percent; nothing where the times spread too far for ratios."""
        return "" if self.note else percent(self.share(ms), 1)


def show(subject: Subject, folder: Path) -> Shown:
    """Measures every layer, the unpruned network and the most pruned one; prints them and writes latency.csv.

    Args:
        subject: The network.
        folder: The run folder.

    Raises:
        UserError: The runtime cannot run it.
    """
    shown = _shown(subject)
    _write_layers(shown, folder / CSV)
    _write_report(shown, subject, folder / REPORT)
    _print(shown)
    log.info("layers are timed alone, each with the norm and activation behind it")
    if shown.note:
        log.warning("%s; shares are left out", shown.note)
    else:
        least = shown.share_text(shown.most_pruned.median_ms)
        log.info("the least that pruning can reach here is %s of the unpruned network's latency", least)
    log.info("%s and %s are in %s", CSV, REPORT, folder)
    return shown


def _write_report(shown: Shown, subject: Subject, path: Path) -> None:
    """report.html: what each layer takes, with bars."""
    from search.output.report import write_page
    from search.output.sections import Section, Table, Text

    rows = [
        (
            time.layer.name,
            described(time.unit),
            f"{time.layer.in_channels} → {time.layer.out_channels}",
            f"{time.ms:.3f}",
            percent(time.timing.spread, 0),
            shown.share_text(time.ms),
        )
        for time in shown.layers
    ]
    longest = max(time.ms for time in shown.layers)
    table = Table(
        ("layer", "operation", "channels", "ms", "spread", "share"),
        rows,
        [time.ms / longest for time in shown.layers],
    )
    note = (
        f"Each layer alone, with the norm and activation behind it; {shown.sum_ms:.3f} ms together. The spread is the "
        "distance of the quartiles, as a share of the median."
    )
    ms = shown.most_pruned.median_ms
    facts = [
        ("unpruned", f"{shown.original.median_ms:.3f} ms"),
        (
            "pruned as far as possible",
            " ".join(f"{ms:.3f} ms {f'({share})' if (share := shown.share_text(ms)) else ''}".split()),
        ),
        ("batch", count(subject.example)),
        ("threads", subject.how.threads),
    ]
    headline = f"{subject.name} takes {shown.original.median_ms:.3f} ms."
    warning = [Text(f"Warning: {shown.note}.", "bad")] if shown.note else []
    write_page(
        path, headline, facts, (Section("Layers, front to back", (*warning, table, Text(note, "soft"))),)
    )


def _print(shown: Shown) -> None:
    def figures(ms: float, timing: Timing | None) -> tuple[str, ...]:
        spread = "" if timing is None else percent(timing.spread, 0)
        return f"{ms:.3f}", spread, shown.share_text(ms)

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
        ("unpruned network", *blank, *figures(shown.original.median_ms, shown.original)),
        ("most pruned", *blank, *figures(shown.most_pruned.median_ms, shown.most_pruned)),
    ]
    print_table(("layer", "", "channels", "input", "ms", "spread", "share"), rows, below, words=2)


def _shown(subject: Subject) -> Shown:
    """Equal layers are timed once."""
    candidates, how, example = subject.candidates, subject.how, subject.example
    layers, batch, device = candidates.graph.layers, count(example), device_of(example)
    units = units_of(candidates.original, candidates.graph)
    keys = {layer.name: (units[layer.name], layer.in_channels, layer.out_channels) for layer in layers}
    with using_threads(how.threads):
        calls: dict[object, Call] = {
            (unit, inputs, outputs): how.runtime.prepare(
                unit.build(inputs, outputs).to(device),
                unit.example(batch, inputs).to(device),
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
    """A row for each layer, then the networks; milliseconds, and shares of the unpruned network's."""
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
    latency.check()
    with Progress() as progress:
        checked = check_table(
            latency,
            candidates,
            subject.example,
            runtime=how.runtime,
            threads=how.threads,
            strategies=random_strategies(subject.grids, networks, seed),
            repeats=how.repeats,
            on_progress=shown_on(progress),
            seed=seed,
        )
    _write_check(checked, subject, folder / CHECK_CSV)
    said = (
        f"median error {percent(checked.median_error, 1)} (of shares of the original's latency "
        f"{percent(checked.median_share_error, 1)}), largest {percent(checked.largest_error, 1)}, "
        f"rank correlation {checked.rank_correlation:.3f}"
    )
    from search.output.plots import plot_latency_check

    plot_latency_check(
        checked.predicted_ms, checked.measured, folder / CHECK_PLOT, said.replace("), ", "),\n")
    )
    log.info("%d networks cut at random, predicted and measured: %s", len(checked.strategies), said)
    _write_check_report(checked, subject, said, folder)
    log.info("%s, %s and %s are in %s", CHECK_CSV, CHECK_PLOT, REPORT, folder)
    return checked


def _write_check_report(checked: Checked, subject: Subject, said: str, folder: Path) -> None:
    """report.html: predicted against measured latency."""
    from search.output.report import write_page
    from search.output.sections import Picture, Section, Text, data_uri

    caption = "Networks cut at random: what the table predicts, and what was measured."
    picture = Picture(caption, data_uri(folder / CHECK_PLOT))
    note = spread_note([timing.spread for timing in checked.measured])
    warning = [Text(f"Warning: {note}.", "bad")] if note else []
    facts = [("networks", len(checked.strategies)), ("threads", subject.how.threads)]
    headline = f"The latency table of {subject.name}: {said}."
    write_page(folder / REPORT, headline, facts, (Section("Predicted and measured", (*warning, picture)),))


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
