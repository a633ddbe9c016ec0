"""Does the score predict? Strategies of earlier runs, scored after each repair, against test accuracies.

    python scripts/compare_scores.py OUT --from RUN ... --strategies 20 --repairs least_squares sequential \
        --common model=resnet20 data=cifar10 model.weights=FILE data.path=DIR search.images=1000 finetune.epochs=3

The strategies stand at even steps among those of the runs' journals, ordered by their scores; duplicates count once. A row
is a repair: Spearman's rank correlation of its search scores with the test accuracies of the same networks, of the networks
after the last repair named, and of those after fine-tuning; then what an evaluation takes. The last columns compare the
better half of the strategies alone, which is what a search chooses from at its end.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import studies
from scipy.stats import spearmanr

COLUMNS = [
    "repair",
    "strategies",
    "test accuracy",
    "own",
    "last",
    "fine-tuned",
    "own, better half",
    "last, better half",
]
QUIET = ("budget=none", "latency.repeats=0", "export=[]", "finalists.count=0")


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then print a row per repair."""
    parser = studies.parser(__doc__)
    parser.add_argument("--from", dest="runs", type=Path, nargs="+", required=True, metavar="RUN")
    parser.add_argument("--strategies", type=int, default=20)
    parser.add_argument("--repairs", nargs="+", default=["least_squares", "sequential"])
    options = parser.parse_args(arguments)
    files = written(chosen(options.runs, options.strategies), options.out)
    points = {repair: [point(file, repair) for file in files] for repair in options.repairs}
    found = studies.run([p for repair in options.repairs for p in points[repair]], options)
    results = {
        repair: [found[p.name][0] for p in points[repair] if found[p.name]] for repair in options.repairs
    }
    if any(len(of_repair) < len(files) for of_repair in results.values()):
        return 1
    studies.show(COLUMNS, [row(repair, results) for repair in options.repairs])
    return 0


def point(file: Path, repair: str) -> studies.Point:
    """The run that applies a strategy after a repair."""
    overrides = (f"strategy='{file}'", f"repair={repair}", *QUIET)
    return studies.Point(f"{file.stem} {repair}", overrides, command="search.run_apply")


def chosen(runs: Sequence[Path], count: int) -> list[dict[str, int]]:
    """Strategies at even steps among those of the runs, from the worst to the best; decision to units removed."""
    scored: dict[tuple[tuple[str, int], ...], float] = {}
    for run in runs:
        names = json.loads((run / "strategy.json").read_text())["decisions"]
        for line in map(json.loads, (run / "evaluations.jsonl").read_text().splitlines()):
            if "score" in line:
                scored.setdefault(tuple(zip(names, line["removed"], strict=True)), line["score"])
    ordered = sorted(scored, key=scored.__getitem__)
    count = min(count, len(ordered))
    return [dict(ordered[round(k * (len(ordered) - 1) / max(1, count - 1))]) for k in range(count)]


def written(strategies: Sequence[dict[str, int]], out: Path) -> list[Path]:
    """Files that amc-apply reads, in OUT/strategies."""
    folder = out / "strategies"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:03d}.json" for number in range(len(strategies))]
    for file, strategy in zip(files, strategies, strict=True):
        decisions = {name: {"removed": removed} for name, removed in strategy.items()}
        file.write_text(json.dumps({"decisions": decisions}))
    return files


def row(repair: str, results: dict[str, list[studies.Result]]) -> list[str]:
    """The table's row of a repair."""
    scores = [studies.search_accuracy(result) for result in results[repair]]
    own, last = (
        [result["pruned"]["accuracy"] for result in of_repair]
        for of_repair in (results[repair], list(results.values())[-1])
    )
    tuned = [result["finetuned"] and result["finetuned"]["accuracy"] for result in results[repair]]
    half = sorted(range(len(last)), key=last.__getitem__)[len(last) // 2 :]
    correlations = [
        correlation(scores, own),
        correlation(scores, last),
        correlation(scores, tuned) if all(tuned) else "–",
        *(correlation([scores[i] for i in half], [of[i] for i in half]) for of in (own, last)),
    ]
    return [repair, str(len(own)), f"{100 * statistics.mean(own):.2f}", *correlations]


def correlation(scores: Sequence[float], accuracies: Sequence[float]) -> str:
    """Spearman's rank correlation."""
    return f"{spearmanr(scores, accuracies).statistic:.2f}"


if __name__ == "__main__":
    sys.exit(main())
