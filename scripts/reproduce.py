"""Repeat a published result: scripts/reproduce.sh ROW [--seeds 1 2 3] [--common model.weights=FILE data.path=DIR].

A row is conf/experiment/ROW.yaml. For each seed three runs are fine-tuned alike: the network that the search found, the
uniform strategy at the same budget, and the unpruned network. A network without published weights is trained first, and
its weights are kept. Ends with a line for docs/results.md. The same command resumes, with its finished runs kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from studies import Point, Result, accuracy, run, share, show, spread
from studies import parser as studies_parser

PUBLISHED = {
    "resnet20_half": "Distiller, AMC: 91.78 → 91.26, best of many runs",
    "resnet56_half": "AMC: 92.8 → 91.9, as Distiller's readme quotes it",
    "resnet56_minus54": "AutoBot (56% removed): 93.26 → 93.76, epoch chosen on the test split",
    "resnet56_minus71": "TPP: 93.78 → 92.35",
    "plain20_half": "AMC: 90.5 → 90.2, as Distiller's readme quotes it",
    "mobilenet_half": "none",
    "mobilenet_half_latency": "none",
    "resnet20_netadapt": "none",
    "mobilenet_imagenet_half": "AMC: 70.9 → 70.5, the release's readme",
}
UNIFORM = ("agent=uniform", "search.episodes=1")
UNPRUNED = (*UNIFORM, "agent.ratio=0", "budget=none", "~budget.ratio")
TRAINED_FIRST = {"plain20_half": 30, "mobilenet_half": 30, "mobilenet_half_latency": 30}
"""Epochs of the first training of networks without published weights."""
FROM_SCRATCH = (
    *("model.weights=random", "repair=none", "finetune.from_scratch=true", "finetune.lr_fraction=1"),
    *("finetune.weight_decay=5e-4", "finetune.distillation=0", "finetune.keep=last"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing of a row, then print its line; 1 where a run failed."""
    options = _options(arguments)
    own_weights = any(given.startswith("model.weights=") for given in options.common)
    common = [f"+experiment={options.row}", "latency.repeats=0", *options.common]
    if options.row in TRAINED_FIRST and not own_weights:
        weights = trained(options, common)
        if weights is None:
            return 1
        common.append(f"model.weights='{weights}'")
    options.common = common
    points = [Point("found"), Point("uniform", UNIFORM), Point("unpruned", UNPRUNED)]
    found = run(points, options)
    report(options.row, found)
    return int(any(len(results) < len(options.seeds) for results in found.values()))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = studies_parser(__doc__)
    parser.add_argument("row", choices=PUBLISHED)
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    return options


def trained(options: argparse.Namespace, common: Sequence[str]) -> Path | None:
    """The weights of a network that is trained here from random ones; None where that failed."""
    epochs = f"finetune.epochs={TRAINED_FIRST[options.row]}"
    first = argparse.Namespace(**{**vars(options), "seeds": [0], "common": [*common, *FROM_SCRATCH]})
    run([Point("training", (*UNPRUNED, epochs, "export=[safetensors]"))], first)
    return next((options.out / "training-0").glob("*.safetensors"), None)


def report(row: str, found: dict[str, list[Result]]) -> None:
    """Print the row's line: what was published, ours, and what both are compared with."""
    searched, unpruned = found["found"], found["unpruned"]
    tuned = _accuracies(searched, "finetuned")
    bases = [100 * result["base"]["accuracy"] for result in searched]
    cells = {
        "row": row,
        "published": PUBLISHED[row],
        "seeds": str(len(searched)),
        "MACs left": spread(_values(searched, "macs"), 1) + "%",
        "unpruned": spread(bases[:1]),
        "pruned": spread(_accuracies(searched, "pruned")),
        "fine-tuned": spread(tuned),
        "drop": spread([before - after for before, after in zip(bases, tuned, strict=False)]),
        "uniform, fine-tuned": spread(_accuracies(found["uniform"], "finetuned")),
        "unpruned, trained alike": spread(_accuracies(unpruned, "finetuned")),
        "search, s": spread([result["search"]["seconds"] for result in searched], 0),
        "machine": searched[0]["machine"]["processor"] if searched else "–",
    }
    show(list(cells), [list(cells.values())])


def _accuracies(results: Sequence[Result], stage: str) -> list[float]:
    column = accuracy(stage)
    return [value for result in results if (value := column(result)) is not None]


def _values(results: Sequence[Result], cost: str) -> list[float]:
    column = share(cost)
    return [value for result in results if (value := column(result)) is not None]


if __name__ == "__main__":
    sys.exit(main())
