"""What a search costs, taken apart: every case in a process of its own, rounds that interleave the cases, medians.

    python scripts/benchmark.py OUT --rounds 3 --weights mobilenet=FILE resnet20=FILE resnet56=FILE \
        --common data=cifar10 data.path=DIR

Cases (`--cases`), all at half the MACs with repair=least_squares and the defaults of amc-search:

    episode:NETWORK[:VARIANT]   episodes of DDPG after warm-up: deciding, building, repairing, scoring, learning, other
    baseline:NETWORK            the AMC release's way, as a plain baseline: channels masked, least squares anew each time by
                                scikit-learn on recorded inputs and outputs, validation at full size in batches of 50
    scoring:NETWORK             the scorer alone, in every precision, batch size and memory layout
    profile:NETWORK             torch.profiler's dearest operators in scoring, without and with what the scorer does
    growth:layers               episodes of ResNet-20, 56 and 110
    growth:images               of ResNet-56 on 1,000, 2,000 and all search images
    growth:workers              of ResNet-56: random strategies and DDPG, with and without workers
    search:NETWORK:EPISODES[:VARIANT]   a whole search by amc-search, and its memory

Speed is stated in GFLOP/s (two operations a MAC) and as a share of the matrix peak, which is measured in the case's own
process right before and after it. OUT/benchmark.json holds every round: a killed benchmark goes on, and what is there is
not run again. Networks without `--weights` have random ones (fit for timing) unless they are trained in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmark_cases import KINDS, VARIANTS, Job

from search import files

GROWTH = {
    "growth:layers": ("episode:resnet20", "episode:resnet56", "episode:resnet110"),
    "growth:images": ("episode:resnet56:images1000", "episode:resnet56:images2000", "episode:resnet56"),
    "growth:workers": (
        *("episode:resnet56:random", "episode:resnet56:workers1", "episode:resnet56:workers2"),
        *("episode:resnet56", "episode:resnet56:envs4_workers2"),
    ),
}
DEFAULT = (
    *("episode:mobilenet", "baseline:mobilenet", "episode:resnet20", "episode:resnet56", "scoring:resnet56"),
    *GROWTH,
)
SAMPLE_S = 0.25  # between two looks at the memory of a case's processes
PACKAGES = ("torch", "numpy", "scikit-learn", "gymnasium", "stable-baselines3")


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing, then prints the tables; 1 where a case failed."""
    options = _options(arguments)
    cases = list(dict.fromkeys(part for case in options.cases for part in GROWTH.get(case, (case,))))
    _check(cases)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "benchmark.json"
    asked = {"common": options.common, "weights": sorted(options.weights), "episodes": options.episodes}
    about = {"machine": machine(options.threads), **asked}
    found = json.loads(path.read_text()) if path.exists() else {**about, "runs": []}
    differ = [key for key, value in about.items() if found[key] != json.loads(json.dumps(value))]
    if differ:
        sys.exit(f"{path} was measured with another {', '.join(differ)}: give another folder")
    failed = False
    for number in range(1, options.rounds + 1):
        for case in cases:
            if any((run["case"], run["round"]) == (case, number) for run in found["runs"]):
                continue
            print(f"round {number} of {options.rounds}: {case}", file=sys.stderr, flush=True)
            run = _run(options, case, number)
            failed |= run is None
            if run is not None:
                found["runs"].append(run)
                files.write(path, json.dumps(found, indent=1) + "\n")
    show(found, cases)
    return int(failed)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=7, help="measured in an episode: case")
    parser.add_argument("--threads", type=int, help="of every process (default: as torch chooses)")
    parser.add_argument("--weights", nargs="*", default=[], metavar="NETWORK=FILE")
    parser.add_argument("--common", nargs="*", default=[], help="overrides of all cases, as for amc-search")
    options = parser.parse_args(arguments)
    if any("=" not in entry for entry in options.weights):
        parser.error(f"--weights {' '.join(options.weights)}: NETWORK=FILE is needed, like resnet20=FILE")
    return options


def _check(cases: list[str]) -> None:
    """Refuses cases that there are not, before the first is run."""
    variant = rf"(:({'|'.join(VARIANTS)}))?"
    known = re.compile(rf"episode:\w+{variant}|baseline:\w+|(scoring|profile):\w+|search:\w+:\d+{variant}")
    unknown = [case for case in cases if not known.fullmatch(case)]
    if unknown:
        there = f"episode:NETWORK[:VARIANT], baseline:NETWORK, scoring:NETWORK, profile:NETWORK, {', '.join(GROWTH)}, "
        there += f"search:NETWORK:EPISODES[:VARIANT], with the variants {', '.join(VARIANTS)}"
        sys.exit(f"unknown case {', '.join(unknown)}; there are {there}")


def machine(threads: int | None) -> dict[str, Any]:
    """What the figures hang on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory GiB": round(pages / 2**30, 1),
        "threads": threads or os.environ.get("OMP_NUM_THREADS", "default"),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def commit() -> str:
    """Of this repository; "-dirty" where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _run(options: argparse.Namespace, case: str, number: int) -> dict[str, Any] | None:
    """A case's round in a process of its own, or None where that failed; its output goes to a file."""
    folder = (options.out / f"{case.replace(':', '-')}-{number}").absolute()
    folder.mkdir(exist_ok=True)
    for left in folder.glob("*.jsonl"):  # a killed round's journal would be read back
        left.unlink()
    weights = {name: str(Path(file).absolute()) for name, file in (w.split("=", 1) for w in options.weights)}
    job = Job(case, options.common, weights, str(folder), options.episodes)
    request, result = folder / "request.json", folder / "result.json"
    request.write_text(json.dumps(vars(job)))
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(options.threads)} if options.threads else {})
    command = [sys.executable, str(Path(__file__).with_name("benchmark_cases.py")), str(request), str(result)]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            memory = _most_memory(process)
        finally:
            process.kill()
    if process.returncode:
        print(f"{case} failed; see {folder / 'output.txt'}", file=sys.stderr)
        return None
    run = {"case": case, "round": number, "commit": commit(), **json.loads(result.read_text())}
    return run | {"children MiB": memory}


def _most_memory(process: subprocess.Popen[bytes]) -> float:
    """Waits for a process, and gives the most resident memory that its children were seen with."""
    most = 0.0
    while True:
        try:
            process.wait(SAMPLE_S)
        except subprocess.TimeoutExpired:
            most = max(most, children_mib(process.pid))
        else:
            return most


def children_mib(root: int) -> float:
    """Resident memory of a process's descendants, MiB, shared pages counted in each; 0 where the system does not say."""
    parents, sizes = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            values = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        pid = int(stat.parent.name)
        parents[pid], sizes[pid] = int(values[1]), int(values[21]) * os.sysconf("SC_PAGE_SIZE")
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(sizes[pid] for pid in tree - {root}) / 2**20


def show(found: dict[str, Any], cases: list[str]) -> None:
    """The machine, a table for each kind, and how much faster an episode is than the baseline's."""
    runs = [run for run in found["runs"] if run["case"] in cases]
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    for name in ("commit", "threads", "gpu"):
        values = dict.fromkeys(str(run[name]) for run in runs if name in run)
        print(f"{name} {', '.join(values)}" if values else f"no {name}")
    for precision in runs[0]["peak"]["before"] if runs else ():
        peaks = [reading[precision] for run in runs for reading in run["peak"].values()]
        print(f"matrix peak in {precision}, GFLOP/s: {cell(peaks)}")
    print("\nMedian (range) over the rounds.")
    for kind in KINDS:
        table(kind, figures([run for run in runs if run["case"].split(":")[0] == kind]))
    for case in cases:
        both = (seconds(runs, f"baseline:{case.split(':')[1]}"), seconds(runs, case))
        if case.startswith("episode") and "images" not in case and all(both):
            times = statistics.median(both[0]) / statistics.median(both[1])
            print(f"\n{case}: {times:.1f} times as fast as the baseline's episode")


def seconds(runs: list[dict[str, Any]], case: str) -> list[float]:
    """Of an episode in every round of a case."""
    return [run["rows"][""]["episode s"] for run in runs if run["case"] == case and "" in run["rows"]]


def table(kind: str, rows: dict[str, dict[str, list[float]]]) -> None:
    """In Markdown; nothing where there are no rows."""
    titles = list(dict.fromkeys(name for row in rows.values() for name in row))
    if titles:
        print(f"\n| {kind} | {' | '.join(titles)} |\n{'|---' * (1 + len(titles))}|")
    for label, row in rows.items():
        print(f"| {label} | {' | '.join(cell(row.get(title, [])) for title in titles)} |")


def figures(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """The values of all rounds, by row and figure; memory is a case's, and stands in its first row."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        memory = {key: run[key] for key in ("process MiB", "children MiB", "gpu MiB") if key in run}
        for label, row in run["rows"].items():
            name = ", ".join(filter(None, (run["case"].partition(":")[2], label)))
            for figure, value in {**row, **memory}.items():
                found.setdefault(name, {}).setdefault(figure, []).append(value)
            memory = {}
    return found


def cell(values: list[float]) -> str:
    """Median and range."""
    if not values:
        return "–"
    middle, low, high = (_number(f(values)) for f in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low}–{high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
