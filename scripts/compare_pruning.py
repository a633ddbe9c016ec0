"""Criteria, granularities and schedules side by side at equal pruning ratios.

    python scripts/compare_pruning.py OUT criteria --common model=resnet20 data=cifar10 model.weights=FILE data.path=DIR
    python scripts/compare_pruning.py OUT criteria-tuned --common ...   (the best four of each column, run criteria first)
    python scripts/compare_pruning.py OUT granularities --common ...
    python scripts/compare_pruning.py OUT curve --common ...

Every decision loses the same ratio, so that only what is compared differs. The best four are chosen on the search split;
the test split is for the printed figures. `--epochs` is the fine-tuning of a point, all rounds together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator

import studies
from studies import Point

CRITERIA = ("l1", "l2", "bn_scale", "taylor", "obd", "apoz", "lasso", "fpgm", "random")
CHANNEL_ONLY = ("bn_scale", "apoz", "lasso", "fpgm")
COLUMNS = (("channel", 0.3), ("channel", 0.5), ("fine_grained", 0.8), ("fine_grained", 0.9))
REPAIR = "sequential"
GRANULARITIES = tuple(
    (name, ratio)
    for ratio, pattern in ((0.5, "nm n=2 m=4"), (0.75, "nm n=1 m=4"))
    for name in ("channel", "kernel", "vector", pattern, "fine_grained")
)
CURVE = (0.8, 0.9, 0.95)
FINALISTS = 4


def uniform(granularity: str, ratio: float, repair: str, epochs: int, criterion: str = "l1") -> Point:
    """Every decision loses ``ratio``; ``granularity`` may have settings behind its name."""
    name, *settings = granularity.split()
    if name in ("vector", "kernel", "fine_grained"):
        settings.append("max_ratio=0.98")
    return Point(
        f"{granularity} {ratio:g} {criterion} {repair} epochs={epochs}",
        (
            *(f"granularity={name}", *(f"granularity.{setting}" for setting in settings)),
            *(f"criterion={criterion}", f"repair={repair}", f"finetune.epochs={epochs}"),
            *("agent=uniform", f"agent.ratio={ratio}", "budget=none", "finalists.count=0"),
            *("export=[]", "latency.repeats=0"),
        ),
    )


def criteria(options: argparse.Namespace) -> Iterator[Point]:
    """Every criterion at every column, without and with repair."""
    for granularity, ratio in COLUMNS:
        for criterion in CRITERIA:
            if granularity == "channel" or criterion not in CHANNEL_ONLY:
                for repair in ("none", REPAIR):
                    yield uniform(granularity, ratio, repair, 0, criterion)


def criteria_tuned(options: argparse.Namespace) -> Iterator[Point]:
    """The best four of each column, by their mean accuracy on the search split with repair, fine-tuned."""
    for granularity, ratio in COLUMNS:
        scores = {}
        for criterion in CRITERIA:
            point = uniform(granularity, ratio, REPAIR, 0, criterion)
            paths = [point.folder(options.out, seed) / "result.json" for seed in options.seeds]
            results = [json.loads(path.read_text()) for path in paths if path.exists()]
            if results:
                scores[criterion] = statistics.mean(map(studies.search_accuracy, results))
        for criterion in sorted(scores, key=lambda name: -scores[name])[:FINALISTS]:
            yield uniform(granularity, ratio, REPAIR, options.epochs, criterion)


def granularities(options: argparse.Namespace) -> Iterator[Point]:
    """Granularities at equal sparsity: unrepaired, repaired, and fine-tuned."""
    for granularity, ratio in GRANULARITIES:
        yield uniform(granularity, ratio, "none", 0)
        yield uniform(granularity, ratio, REPAIR, options.epochs)


def curve(options: argparse.Namespace) -> Iterator[Point]:
    """Accuracy against ratio: fine-tuned after one cut, and after one cut per epoch; equal epochs."""
    for ratio in CURVE:
        one_shot = uniform("fine_grained", ratio, "none", options.epochs)
        yield one_shot
        cubic = ("schedule=cubic", f"schedule.rounds={options.epochs}")
        yield Point(f"{one_shot.name} cubic", (*one_shot.overrides, *cubic))


TABLES: dict[str, Callable[[argparse.Namespace], Iterator[Point]]] = {
    "criteria": criteria,
    "criteria-tuned": criteria_tuned,
    "granularities": granularities,
    "curve": curve,
}


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then print the table."""
    parser = studies.parser(__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args(arguments)
    columns = {
        "params left": studies.share("params"),
        "search accuracy": studies.search_accuracy,
        "pruned": studies.accuracy("pruned"),
        "fine-tuned": studies.accuracy("finetuned"),
    }
    return studies.table(studies.run(TABLES[options.table](options), options), columns)


if __name__ == "__main__":
    sys.exit(main())
