"""The files that a run left in its folder, parsed."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.sensitivity import Curve
from amc_env.space import Decision, SearchSpace
from search import files
from search.output.run_result import FILE as RESULT
from search.output.run_result import RunResult
from search.output.weights import CHANNELS_FILE

METRICS = "metrics.csv"
LAYER_ERRORS = "layer_errors.json"
log = logging.getLogger(__name__)

CONFIGURATION = "config.yaml"
"""The file of the resolved configuration. Hydra's own copy is that of the last command in the folder, even if it failed."""


@dataclass(frozen=True)
class Evaluation:
    """A line of evaluations.jsonl.

    Attributes:
        start: the weights that the strategy was cut from.
        repair: the repair that it was scored with.
        removed: the strategy's counts.
        score: on the search split, in [0, 1].
        costs: by name.
        met: whether every budget was met.
    """

    start: str
    repair: str
    removed: tuple[int, ...]
    score: float
    costs: Mapping[str, float]
    met: bool


@dataclass(frozen=True)
class RunFiles:
    """What a run left in its folder; an absent file is an empty value.

    Attributes:
        result: result.json.
        decisions: in forward order (strategy.json).
        header: the first line of evaluations.jsonl.
        evaluations: its other lines.
        metrics: the rows of metrics.csv, as text.
        configuration: the resolved configuration as YAML or JSON text.
        energy_kept: where the agent asked for `agents.base.SearchTask.layer_errors`, for each decision what they leave of
            the output energy, in [0, 1].
    """

    folder: Path
    result: RunResult
    decisions: Mapping[str, Decision]
    header: Mapping[str, Any]
    evaluations: tuple[Evaluation, ...]
    metrics: tuple[dict[str, str], ...]
    configuration: str
    energy_kept: tuple[Curve, ...]

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Read a run folder.

        Raises:
            UserError: if there is no readable result.json, or another file is damaged.
        """
        result = RunResult.read(folder)
        journal = folder / "evaluations.jsonl"
        lines = list(_journal(journal))
        header: dict[str, Any] = next((line["header"] for line in lines if "header" in line), {})
        return cls(
            folder=folder,
            result=result,
            decisions=_decisions(folder / "strategy.json"),
            header=header,
            evaluations=tuple(_evaluation(journal, line) for line in lines if "score" in line),
            metrics=tuple(_rows(folder / METRICS)),
            configuration=_text(folder / CONFIGURATION),
            energy_kept=tuple(_energy_kept(folder / LAYER_ERRORS)),
        )

    def series(self, name: str) -> dict[int, float]:
        """Step -> value of one metric, in the order of steps; rows without it are left out."""
        with files.reading(self.folder / METRICS):
            found = {int(row["step"]): float(row[name]) for row in self.metrics if row.get(name)}
        return dict(sorted(found.items()))

    def first_of_rounds(self) -> list[Evaluation]:
        """The first evaluation of every round of an agent that adopts weights; none for other agents."""
        starts = self.result.search.start
        if not any(start.startswith("round ") for start in starts):
            return []
        firsts: dict[str, Evaluation] = {}
        for evaluation in self.evaluations:
            firsts.setdefault(evaluation.start, evaluation)
        return [firsts[start] for start in starts if start in firsts]


def write_layer_errors(folder: Path, space: SearchSpace, errors: Sequence[NDArray[np.float64]]) -> None:
    """Writes layer_errors.json: the errors of every decision at each of its feasible counts."""
    content = {
        name: {"ratios": [grid.count(place) / total for place in range(grid.size)], "errors": curve.tolist()}
        for name, total, grid, curve in zip(space.names, space.totals, space.grids, errors, strict=True)
    }
    files.write(folder / LAYER_ERRORS, json.dumps(content) + "\n")


def copy_outcome(folder: Path, result: RunResult, target: Path) -> Path:
    """Copy what is needed to use a run's network into another folder, without the journal and the logs.

    Args:
        folder: the run folder.
        result: the run's figures.
        target: made where it is missing; files of the same names are replaced.

    Returns:
        ``target``.
    """
    for path in (*network_files(folder, result), *pictures(folder), folder / "report.html"):
        if path.exists():
            files.write(target / path.relative_to(folder), partial(copyfile, path))
    return target


def network_files(folder: Path, result: RunResult) -> list[Path]:
    """The files that make the network and say what it is, those that are there."""
    exported = [folder / export.path.name for export in result.exports if not export.error]
    names = (CHANNELS_FILE, "strategy.json", RESULT, CONFIGURATION)
    return [path for path in (*exported, *(folder / name for name in names)) if path.exists()]


def pictures(folder: Path) -> list[Path]:
    """The pictures of the report."""
    return sorted((folder / "plots").glob("*.png"))


def _evaluation(path: Path, line: Mapping[str, Any]) -> Evaluation:
    with files.reading(path):
        return Evaluation(
            start=str(line["start"]),
            repair=str(line["repair"]),
            removed=tuple(map(int, line["removed"])),
            score=float(line["score"]),
            costs={name: float(cost) for name, cost in line["costs"].items()},
            met=bool(line["met"]),
        )


def _decisions(path: Path) -> dict[str, Decision]:
    # JSON objects keep their order: the decisions are in forward order.
    if not path.exists():
        return {}
    with files.reading(path):
        entries = files.read_json(path)["decisions"]
        return {name: Decision(int(entry["removed"]), int(entry["total"])) for name, entry in entries.items()}


def _energy_kept(path: Path) -> Iterator[Curve]:
    if not path.exists():
        return
    with files.reading(path):
        for name, entry in files.read_json(path).items():
            points = zip(entry["ratios"], entry["errors"], strict=True)
            ratios, kept = zip(
                *((float(ratio), max(0.0, 1 - float(error))) for ratio, error in points), strict=True
            )
            yield Curve(name, ratios, kept)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with files.reading(path):
        for row in csv.DictReader(_text(path).splitlines(), restkey=""):
            yield {name: cell for name, cell in row.items() if name}


def _journal(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a journal; damaged lines and the incomplete last line of a killed run are left out."""
    with files.reading(path):
        lines = path.read_bytes().splitlines() if path.exists() else []
    entries = [files.unsealed(line) for line in lines]
    damaged = sum(entry is None for entry in entries[:-1])
    if damaged:
        log.warning("%d damaged lines of %s are left out", damaged, path)
    yield from (entry for entry in entries if entry is not None)


def _text(path: Path) -> str:
    with files.reading(path):
        return path.read_text(encoding="utf-8") if path.exists() else ""
