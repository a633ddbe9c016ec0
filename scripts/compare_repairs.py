"""Accuracy of uniformly pruned networks under every repair and several budgets, before fine-tuning.

    python scripts/compare_repairs.py OUT --common model=resnet20 data=cifar10 model.weights=FILE data.path=DIR

Choose defaults by the search split; the test split is for tables that are published.
"""

from __future__ import annotations

import sys

import studies

REPAIRS = ("none", "batch_norm", "least_squares", "both", "sequential")
UNIFORM = ("agent=uniform", "finalists.count=0", "finetune.epochs=0", "export=[]", "latency.repeats=0")
COLUMNS = {
    "search accuracy": studies.search_accuracy,
    "test accuracy": studies.accuracy("pruned"),
    "MACs": studies.share("macs"),
    "search s": lambda result: result["search"]["seconds"],
}


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then print a row per repair and ratio."""
    parser = studies.parser(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.5, 0.35])
    options = parser.parse_args(arguments)
    points = [
        studies.Point(f"{ratio:g} {repair}", (*UNIFORM, f"budget.ratio={ratio}", f"repair={repair}"))
        for ratio in options.ratios
        for repair in REPAIRS
    ]
    return studies.table(studies.run(points, options), COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
