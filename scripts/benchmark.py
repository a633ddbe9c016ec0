"""What whole searches cost: amc-search in interleaved rounds, every run in a process and temporary folder of its own.

    python scripts/benchmark.py OUT --cases search:resnet20 search:resnet56 --episodes 40 --rounds 3 --threads 2 \
        --weights resnet20=FILE resnet56=FILE --common data=cifar10 data.path=DIR \
        --variant int8=evaluator.precision=int8 --tree before=../before

    python scripts/benchmark.py OUT --cases search:resnet20 --actors 1 2 --threads 1 --common agent=evolution ...

Each case runs as it is, and again for each `--variant` (NAME=OVERRIDES, separated by spaces); all of these run from this
checkout and again from each `--tree` (NAME=PATH, another checkout of the project). `--actors N` is the variant
evaluator=ray with so many actors; "strategies/s" then shows the throughput, starting Ray included. "ratio" is a
row's time for an episode over that of the case's first row in the same round, so that a machine whose speed drifts
favours none.

OUT/benchmark.json is written after every run. The same command resumes an interrupted benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from studies import show

HERE = Path(__file__).resolve().parents[1]
SEARCH_ONLY = ("finetune.epochs=0", "export=[]", "latency.repeats=0")
PACKAGES = ("torch", "numpy", "gymnasium", "stable-baselines3")


@dataclass(frozen=True)
class Row:
    """A line of the table: a case with a variant of its settings, from one checkout."""

    case: str
    variant: str
    tree: str

    @property
    def network(self) -> str:
        """The name of its model."""
        return self.case.partition(":")[2]


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then print the table; 1 where a run failed."""
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "benchmark.json"
    settings = {
        name: getattr(options, name)
        for name in ("common", "episodes", "threads", "variant", "tree", "weights")
    }
    found = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": []}
    differ = [name for name, value in settings.items() if found["settings"][name] != value]
    if differ:
        sys.exit(f"{path} was measured with another --{', --'.join(differ)}: give another folder")
    known = {(Row(**run["row"]), run["round"]) for run in found["runs"]}
    failed = False
    for number in range(1, options.rounds + 1):
        for row in rows(options):
            if (row, number) in known:
                continue
            print(f"round {number} of {options.rounds}: {', '.join(asdict(row).values())}", file=sys.stderr)
            run = measured(row, options)
            failed |= run is None
            if run:
                found["runs"].append({"row": asdict(row), "round": number, **run})
                write(path, found)
    report(found["runs"], list(rows(options)))
    return int(failed)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--cases", nargs="+", default=["search:resnet20", "search:resnet56", "search:mobilenet"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=40, help="of a search")
    parser.add_argument("--threads", type=int, help="of every process (default: as torch chooses)")
    parser.add_argument("--weights", nargs="*", default=[], metavar="NETWORK=FILE")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=OVERRIDES")
    parser.add_argument("--actors", nargs="*", type=int, default=[], metavar="N", help="of evaluator=ray")
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--common", nargs="*", default=[], help="overrides of all runs, as for amc-search")
    options = parser.parse_args(arguments)
    options.variant += [f"{n} actors=evaluator=ray evaluator.actors={n}" for n in options.actors]
    wrong = [case for case in options.cases if not case.startswith("search:") or case.endswith(":")]
    if wrong:
        parser.error(f"unknown case {', '.join(wrong)}: give search:NETWORK, for example search:resnet20")
    for name in ("weights", "variant", "tree"):
        unnamed = [entry for entry in getattr(options, name) if "=" not in entry]
        if unnamed:
            parser.error(f"--{name} {' '.join(unnamed)}: give NAME=VALUE")
    for name, folder in named(options.tree).items():
        if not (Path(folder) / "search" / "run_search.py").exists():
            parser.error(f"--tree {name}={folder}: no checkout of this project")
    return options


def named(entries: Iterable[str]) -> dict[str, str]:
    """What ``NAME=VALUE`` entries say."""
    return dict(entry.split("=", 1) for entry in entries)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """All lines of the table, in the order in which a round runs them."""
    for case in options.cases:
        for variant in ("-", *named(options.variant)):
            for tree in ("-", *named(options.tree)):
                yield Row(case, variant, tree)


def measured(row: Row, options: argparse.Namespace) -> dict[str, Any] | None:
    """Figures, machine and commit of one search, or None where it failed; its output is then printed."""
    checkout = Path(named(options.tree).get(row.tree, HERE)).resolve()
    weights = named(options.weights).get(row.network)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *(f"model={row.network}", *SEARCH_ONLY, f"search.episodes={options.episodes}"),
            *([f"model.weights='{weights}'"] if weights else []),
            *(*options.common, *shlex.split(named(options.variant).get(row.variant, ""))),
            f"hydra.run.dir={folder}/run",
        ]
        threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
        path = os.pathsep.join([str(checkout), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        environment = {**os.environ, "PYTHONPATH": path, **threads}
        # -P: the code is that of the checkout in PYTHONPATH, not of the working directory.
        command = [sys.executable, "-P", "-m", "search.run_search", *overrides]
        output = Path(folder) / "output.txt"
        started = time.perf_counter()
        with output.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            print(output.read_text()[-2000:], file=sys.stderr)
            return None
        values = {
            "command s": seconds,
            "peak MiB": usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
        }
        values |= figures(Path(folder) / "run", options.episodes)
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
    versions = {name: version(name) for name in PACKAGES}
    return {"figures": values, "machine": {**result["machine"], **versions}, "commit": commit(checkout)}


def figures(folder: Path, episodes: int) -> dict[str, float]:
    """What a run folder says: seconds of the search and, where its trials have them, of their phases (medians)."""
    search = json.loads((folder / "result.json").read_text())["search"]
    found = {"episode s": search["seconds"] / episodes, "search s": search["seconds"]}
    trials = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    phases: dict[str, list[float]] = {}
    for trial in trials:
        for phase, seconds in trial.get("seconds", {}).items():
            phases.setdefault(f"{phase} s", []).append(seconds)
    found |= {phase: statistics.median(values) for phase, values in phases.items()}
    found |= {"evaluations": search["evaluations"], "repeats": search["cache_hits"]}
    found["strategies/s"] = search["evaluations"] / max(search["seconds"], 1e-9)
    return found | {"search accuracy": 100 * search["search_accuracy"]}


def commit(checkout: Path) -> str:
    """The checkout's commit; "-dirty" where files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(path: Path, content: Any) -> None:
    """Write a JSON file in one move."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def report(runs: list[dict[str, Any]], asked: list[Row]) -> None:
    """Print machine and commits, then every row's medians and ranges over the rounds."""
    runs = [run for run in runs if Row(**run["row"]) in asked]
    for text in dict.fromkeys(", ".join(f"{k} {v}" for k, v in run["machine"].items()) for run in runs):
        print(text)
    for tree, name in dict.fromkeys((run["row"]["tree"], run["commit"]) for run in runs):
        print(f"tree {tree}: commit {name}")
    print("\nMedian (range) over the rounds.\n")
    titles = list(dict.fromkeys(title for run in runs for title in run["figures"]))
    seconds = {(Row(**run["row"]), run["round"]): run["figures"]["episode s"] for run in runs}
    lines = []
    for row in asked:
        mine = [run for run in runs if Row(**run["row"]) == row]
        first = next(other for other in asked if other.case == row.case)
        ratios = [
            seconds[row, run["round"]] / seconds[first, run["round"]]
            for run in mine
            if seconds.get((first, run["round"]))
        ]
        values = [[run["figures"][title] for run in mine if title in run["figures"]] for title in titles]
        lines.append([*asdict(row).values(), cell(ratios), *map(cell, values)])
    show(["case", "variant", "tree", "ratio", *titles], lines)


def cell(values: list[float]) -> str:
    """Median and range."""
    if not values:
        return "–"
    middle, low, high = (f"{pick(values):.4g}" for pick in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low}–{high})"


if __name__ == "__main__":
    sys.exit(main())
