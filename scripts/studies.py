"""Shared by the compare_* scripts: a run per point and seed, resumable, and a Markdown table.

A run's folder is OUT/NAME-SEED. A folder with a result is not run again, and an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]  # the content of a run's result.json
_SEARCH = "search.run_search"


@dataclass(frozen=True)
class Point:
    """One row of a table.

    Attributes:
        name: The row's title; its runs' folders are named after it.
        overrides: What the point adds to the overrides of all points.
        command: Module of the command that is run.
    """

    name: str
    overrides: tuple[str, ...] = ()
    command: str = _SEARCH

    def folder(self, out: Path, seed: int) -> Path:
        """The run folder for a seed."""
        return out / f"{self.name.replace(' ', '_')}-{seed}"


def parser(description: str | None, *, seeds: Sequence[int] = (1,)) -> argparse.ArgumentParser:
    """The options that all studies have."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("out", type=Path)
    found.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    found.add_argument("--jobs", type=int, default=1, help="runs at a time")
    found.add_argument("--threads", type=int, help="threads of a run (default: 1 where jobs > 1)")
    found.add_argument("--common", nargs="*", default=[], help="overrides of all runs, as for amc-search")
    return found


def run(points: Iterable[Point], options: argparse.Namespace) -> dict[str, list[Result]]:
    """Run what is missing.

    Returns:
        By point: the results of the seeds that succeeded. Failures are reported on stderr.
    """
    threads = options.threads or (1 if options.jobs > 1 else None)
    points = list(points)
    with ThreadPoolExecutor(options.jobs) as pool:
        for seed in options.seeds:
            for point in points:
                # baselines are points of their own
                alone = ["baselines=[]"] if point.command == _SEARCH else []
                overrides = [*alone, *options.common, *point.overrides, f"seed={seed}"]
                pool.submit(_run, point.command, point.folder(options.out, seed), overrides, threads)
    found = {point.name: [point.folder(options.out, seed) for seed in options.seeds] for point in points}
    return {
        name: [json.loads((folder / "result.json").read_text()) for folder in folders if _done(folder)]
        for name, folders in found.items()
    }


def _done(folder: Path) -> bool:
    return (folder / "result.json").exists()


def _run(module: str, folder: Path, overrides: Sequence[str], threads: int | None) -> None:
    """Run a command unless the folder has a result; the output is written to a file in the folder."""
    if _done(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [sys.executable, "-m", module, *overrides, f"hydra.run.dir='{folder}'"]
    with (folder / "output.txt").open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
    print(f"{folder}: {'done' if code == 0 else f'exit code {code}, see output.txt there'}", file=sys.stderr)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and, of several values, sample standard deviation."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(
    found: Mapping[str, Sequence[Result]], columns: Mapping[str, Callable[[Result], float | None]]
) -> int:
    """Print a row per point: the seeds that succeeded, and mean and spread of every column over them.

    Returns:
        The exit code: 1 where a point has no result.
    """
    rows = []
    for name, results in found.items():
        values = [[value for r in results if (value := column(r)) is not None] for column in columns.values()]
        rows.append([name, str(len(results)), *map(spread, values)])
    show(["run", "seeds", *columns], rows)
    return int(not all(found.values()))


def show(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table."""
    for row in (titles, ["---"] * len(titles), *rows):
        print(f"| {' | '.join(row)} |")


def search_accuracy(result: Result) -> float:
    """Of the delivered network on the search split, percent."""
    return 100 * float(result["search"]["search_accuracy"])


def accuracy(stage: str) -> Callable[[Result], float | None]:
    """Of ``pruned`` or ``finetuned`` on the test split, percent; None where there was no such stage."""
    return lambda result: 100 * result[stage]["accuracy"] if result[stage] else None


def share(cost: str) -> Callable[[Result], float | None]:
    """The pruned network's cost, percent of the original's; None where it was not computed."""
    return lambda result: (
        100 * result["pruned"][cost] / result["base"][cost] if result["base"].get(cost) else None
    )
