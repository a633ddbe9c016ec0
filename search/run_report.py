"""amc-report: write a run's report again, or compare several runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from amc_env.errors import UserError
from search.config.command import run_command


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="amc-report",
        description="Write the report of a run folder again, or compare runs: the best score after so many evaluations, "
        "mean and spread over the runs that differ in their seed alone.",
        epilog="examples: amc-report outputs/first      amc-report multirun/2026-11-30/10-00-00 --at 50 100",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run, or a folder of runs")
    parser.add_argument(
        "--at", nargs="+", type=int, metavar="N", help="evaluations to compare after (60 100 200)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), help="where comparison.csv and .png go (comparison)"
    )
    return parser.parse_args()


def _command() -> None:
    """The command's work."""
    options = _arguments()
    from search.output.comparing import AT, find_runs, grouped, rows, write_comparison
    from search.output.progress import print_table
    from search.output.report import write_report

    at = tuple(options.at or AT)
    if min(at) < 1:
        raise UserError(
            f"--at {' '.join(map(str, at))}: numbers of evaluations are at least 1", code="out_of_range"
        )
    runs = find_runs(options.folders)
    if len(runs) == 1:
        print(f"report: {write_report(runs[0].folder)}")  # noqa: T201 -- what the command is for
        return
    groups = grouped(runs)
    titles, *others = rows(groups, at)
    print_table(titles, others)
    for path in write_comparison(groups, options.out, at):
        print(path)  # noqa: T201 -- what the command is for


def main() -> None:
    """The console script."""
    sys.exit(run_command(_command))


if __name__ == "__main__":
    main()
