"""Run amc-search for several choices and seeds, and print a table: mean and spread over the seeds.

    python scripts/compare_agents.py OUT --seeds 1 2 3 --jobs 2 \
        --run ddpg agent=ddpg --run random agent=random --run uniform agent=uniform \
        --common model=resnet20 data=cifar10 model.weights=FILE data.path=DIR search.episodes=200

Accuracies and shares of the original's costs are percentages; "predicted" latency is the table's, "measured" is that of the
run's last step.
"""

from __future__ import annotations

import sys

import studies

COLUMNS = {
    "search accuracy": studies.search_accuracy,
    "pruned": studies.accuracy("pruned"),
    "fine-tuned": studies.accuracy("finetuned"),
    "MACs": studies.share("macs"),
    "params": studies.share("params"),
    "predicted": studies.share("latency"),
    "measured": studies.share("latency_ms"),
    "evaluations": lambda result: result["search"]["evaluations"],
    "search s": lambda result: result["search"]["seconds"],
}


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then print the table."""
    parser = studies.parser(__doc__, seeds=(1, 2, 3))
    parser.add_argument("--run", nargs="+", action="append", required=True, metavar=("NAME", "OVERRIDE"))
    options = parser.parse_args(arguments)
    points = [studies.Point(name, tuple(overrides)) for name, *overrides in options.run]
    return studies.table(studies.run(points, options), COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
