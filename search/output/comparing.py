"""Several runs side by side: the best score after so many evaluations, mean and spread over the seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amc_env.errors import UserError
from search import files
from search.output.formatting import DASH, duration, percent
from search.output.plots import Line, plot_comparison
from search.output.run_files import RunFiles
from search.output.run_result import FILE

AT = (60, 100, 200)
"""Numbers of evaluations that the table has a column for."""

_SHOWN = ("model", "agent.", "budgets.", "granularity.", "criterion.", "repair.", "episodes")
_HIDDEN = (".class", ".cost")
_MOST_SHOWN = 3


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        label: The agent, and what else sets the group apart.
        runs: One for each seed.
    """

    label: str
    runs: tuple[RunFiles, ...]


def find_runs(paths: Iterable[Path]) -> list[RunFiles]:
    """The finished runs in these folders: run folders, or folders of runs such as a sweep's.

    Raises:
        UserError: A folder has none.
    """
    found: dict[Path, RunFiles] = {}
    for path in paths:
        folders = sorted(file.parent for file in path.rglob(FILE)) if path.is_dir() else []
        if not folders:
            raise UserError(
                f"{path} has no finished run: give run folders, or folders of runs; a run writes {FILE} when it ends",
                code="no_run",
            )
        found |= {folder.resolve(): RunFiles.read(folder) for folder in folders}
    return list(found.values())


def grouped(runs: Sequence[RunFiles]) -> list[Group]:
    """The runs by everything but their seed, in the order given; labelled by the agent and by what differs."""
    found: dict[str, list[RunFiles]] = {}
    for run in runs:
        found.setdefault(json.dumps(_identity(run), sort_keys=True), []).append(run)
    identities = [json.loads(key) for key in found]
    return [
        Group(_label(one, identities), tuple(members))
        for one, members in zip(identities, found.values(), strict=True)
    ]


def _label(identity: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The agent, and the settings by which it differs from the same agent's other groups."""
    same = [other for other in others if other["agent"] == identity["agent"]]
    shown = [
        f"{name.removeprefix('agent.').removeprefix('budgets.')}={value}"
        for name, value in sorted(identity.items(), key=lambda entry: not entry[0].startswith("model"))
        if name.startswith(_SHOWN) and not name.endswith(_HIDDEN) and any(o.get(name) != value for o in same)
    ]
    more = [f"and {len(shown) - _MOST_SHOWN} more"] if len(shown) > _MOST_SHOWN else []
    return " ".join([identity["agent"], *shown[:_MOST_SHOWN], *more])


def best_so_far(run: RunFiles) -> list[float]:
    """The best score within the budget after each evaluation of the search, NaN before the first.

    Strategies that were scored again at the end with a better repair are left out. Of a run with several budgets the
    tightest one counts.
    """
    budget = run.result.budget if run.result.front else None
    scored = [e for e in run.evaluations if e.repair == run.evaluations[0].repair]
    met = [e.met if budget is None else e.costs[budget.cost] <= budget.limit for e in scored]
    scores = np.array([e.score if within else np.nan for e, within in zip(scored, met, strict=True)])
    best: list[float] = np.fmax.accumulate(scores).tolist()
    return best


def rows(groups: Sequence[Group], at: Sequence[int] = AT) -> Iterator[tuple[str, ...]]:
    """A title row, then one for each group: best score at each number of evaluations, test accuracy, seconds."""
    yield ("run", "seeds", *(f"best at {n}" for n in at), "best", "pruned", "fine-tuned", "search time")
    for group in groups:
        curves = [best_so_far(run) for run in group.runs]
        reached = [[_at(run, curve, n) for run, curve in zip(group.runs, curves, strict=True)] for n in at]
        results = [run.result for run in group.runs]
        tuned = [result.finetuned.accuracy for result in results if result.finetuned]
        yield (
            group.label,
            str(len(group.runs)),
            *(map(_spread, reached)),
            _spread([curve[-1] for curve in curves if curve]),
            _spread([result.pruned.accuracy for result in results]),
            _spread(tuned),
            duration(statistics.mean(result.search.seconds for result in results)),
        )


def _at(run: RunFiles, curve: Sequence[float], evaluations: int) -> float:
    """The best score after so many evaluations; the last one of an agent that repeated itself and had as many episodes."""
    if evaluations > max(len(curve), run.result.search.episodes) or not curve:
        return math.nan
    return curve[min(evaluations, len(curve)) - 1]


def write_comparison(groups: Sequence[Group], folder: Path, at: Sequence[int] = AT) -> tuple[Path, Path]:
    """Write comparison.csv and comparison.png into a folder, and return both paths."""
    titles, *others = rows(groups, at)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "comparison.csv"
    files.write_csv(table, titles, others)
    lines = [Line(group.label, [best_so_far(run) for run in group.runs]) for group in groups]
    return table, plot_comparison(lines, folder / "comparison.png")


def _spread(shares: Sequence[float]) -> str:
    """Mean and, of several values, sample standard deviation, in percent."""
    if not shares or not all(map(math.isfinite, shares)):
        return DASH
    mean = percent(statistics.mean(shares))
    return f"{mean} ± {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else mean


def _identity(run: RunFiles) -> dict[str, Any]:
    found = dict(files.flat(run.header))
    found.pop("seed", None)
    return found | {"agent": run.result.search.agent, "model": run.result.model}
