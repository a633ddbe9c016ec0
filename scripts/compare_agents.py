"""Runs amc-search for several choices and seeds, and prints a table: mean and spread over the seeds.

    python scripts/compare_agents.py OUT --seeds 1 2 3 --jobs 2 \
        --run ddpg agent=ddpg --run random agent=random --run uniform agent=uniform \
        --common model=resnet20 data=cifar10 model.weights=FILE data.path=DIR search.episodes=200

Every run has a folder OUT/NAME-SEED; a folder with a result is not run again and a stopped run goes on, so the script can be
stopped and started at will. Runs side by side get one thread each (`--jobs` of them at a time).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--threads", type=int, default=None, help="threads of a run (default: 1 where jobs > 1)"
    )
    parser.add_argument("--run", nargs="+", action="append", required=True, metavar=("NAME", "OVERRIDE"))
    parser.add_argument("--common", nargs="*", default=[], help="overrides of all runs")
    options = parser.parse_args()
    threads = options.threads or (1 if options.jobs > 1 else None)
    tasks = [(name, seed, more) for seed in options.seeds for name, *more in options.run]
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(
                _run, options.out / f"{name}-{seed}", [*options.common, *more, f"seed={seed}"], threads
            )
            for name, seed, more in tasks
        ]
        failed = sum(job.result() != 0 for job in jobs)
    _table(options.out, [name for name, *_ in options.run], options.seeds)
    sys.exit(1 if failed else 0)


def _run(folder: Path, overrides: list[str], threads: int | None) -> int:
    """One run, unless it has its result already; its output goes to a file in its folder."""
    if (folder / "result.json").exists():
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "search.run_search", *overrides, f"hydra.run.dir={folder}"]
    with (folder / "output.txt").open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
    if code:
        print(f"{folder} ended with exit code {code}; see {folder / 'output.txt'}", file=sys.stderr)
    return code


def _table(out: Path, names: list[str], seeds: list[int]) -> None:
    columns = (
        *("run", "seeds", "search acc.", "pruned", "fine-tuned", "MACs", "params", "predicted", "measured"),
        *("evaluations", "search s"),
    )
    print(" | ".join(columns))
    print(" | ".join("---" for _ in columns))
    for name in names:
        results = [_read(out / f"{name}-{seed}" / "result.json") for seed in seeds]
        done = [result for result in results if result is not None]
        if not done:
            continue
        cells = [
            name,
            str(len(done)),
            _spread([100 * r["search"]["search_accuracy"] for r in done]),
            _spread([100 * r["pruned"]["accuracy"] for r in done]),
            _spread([100 * r["finetuned"]["accuracy"] for r in done if r["finetuned"]]),
            *(_spread(_shares(done, cost)) for cost in ("macs", "params", "latency", "latency_ms")),
            _spread([r["search"]["evaluations"] for r in done], digits=0),
            _spread([r["search"]["seconds"] for r in done], digits=0),
        ]
        print(" | ".join(cells))


def _shares(results: list[dict[str, Any]], cost: str) -> list[float]:
    """Percent of the original's cost; of ``latency_ms`` as it was measured, interleaved with the original's."""
    return [100 * r["pruned"][cost] / r["base"][cost] for r in results if r["base"].get(cost)]


def _spread(values: list[float], digits: int = 2) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} +- {spread:.{digits}f}"


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    main()
