"""The latency table of a run: read, or built for this network on this machine."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from amc_env.costs.latency import Runtime, machine, sampling
from amc_env.costs.latency.sampling import build_table
from amc_env.costs.latency.table import Conditions, LatencyTable
from amc_env.costs.memory import Activations
from amc_env.errors import UserError, first_line
from amc_env.inputs import Inputs, count, device_of, tensors_of
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.granularity import Granularity, traced
from amc_env.space import Grid
from search.output.formatting import duration
from search.output.progress import Progress

log = logging.getLogger(__name__)


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
        example: The batch, on the network's device.
        how: How it is measured.
    """

    name: str
    candidates: Candidates
    grids: tuple[Grid, ...]
    example: Inputs
    how: How

    @classmethod
    def of(cls, name: str, model: nn.Module, example: Inputs, granularity: Granularity, how: How) -> Subject:
        """A network made ready to be cut.

        Raises:
            UserError: No channel of it can be cut.
        """
        graph, grids = granularity.decisions(traced(model, example, granularity))
        if not grids:
            reasons = "; ".join(f"{w.name}: {w.reason}" for w in graph.skipped[:8])
            raise UserError(f"nothing is left to cut: {reasons}", code="nothing_to_prune")
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
        device = str(device_of(self.example))
        return Conditions.here(self.how.runtime.name, self.how.threads, count(self.example), device)

    def __str__(self) -> str:
        sizes = (" x ".join(map(str, tensor.shape[1:])) for tensor in tensors_of(self.example))
        threads = "1 thread" if self.how.threads == 1 else f"{self.how.threads} threads"
        return (
            f"{self.name}, batch {count(self.example)} of {', '.join(sizes)}, runtime {self.how.runtime.name}, {threads}, "
            f"on {machine(str(device_of(self.example)))}"
        )


# ------------------------------------------------------------------------------------------- build and check


def shown_on(progress: Progress) -> Callable[[sampling.Progress], None]:
    """Shows timings; refining a table adds to their number."""
    return lambda now: progress.stage(now.stage, now.total).advance(done=now.done)


def build(
    subject: Subject, activations: Activations | None, path: Path | None, *, tolerance: float, points: int
) -> LatencyTable:
    """Builds the network's table, and writes it.

    Args:
        subject: The network.
        activations: Its own, for the correction; see `counted`.
        path: The JSON file; None: it is not kept.
        tolerance: See `amc_env.costs.latency.sampling.build_table`.
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
            on_progress=shown_on(progress),
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


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"table={path} is a folder; a file is needed", code="unwritable", field="table")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"table={path} cannot be written ({first_line(error)}): name another file",
            code="unwritable",
            field="table",
        ) from error


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


def counted(activations: Callable[[], Activations]) -> Activations | None:
    """None, with a warning, where the network's operations cannot be counted."""
    try:
        return activations()
    except UserError as error:
        log.warning("what lies between the layers is predicted as a constant: %s", error)
        return None
