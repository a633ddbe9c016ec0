"""Criteria, granularities and schedules side by side at equal pruning ratios; prints Markdown tables, draws the curve.

    python scripts/compare_pruning.py OUT criteria --common model=resnet20 data=cifar10 model.weights=FILE data.path=DIR
    python scripts/compare_pruning.py OUT criteria-tuned --common ...   (the best four of each column)
    python scripts/compare_pruning.py OUT granularities --common ...
    python scripts/compare_pruning.py OUT curve         --common ...    (also OUT/curve.png)

Every decision loses the same ratio, so that only what is compared differs. Each cell is one line of OUT/TABLE.jsonl, written
as it is measured: a stopped script goes on where it was. The best four are chosen on the search split; the test split is for
the printed figures. `--epochs` is the fine-tuning of a cell, all rounds together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from matplotlib.figure import Figure
from torch import nn

from amc_env.evaluation.scorer import Scorer
from search.config import compose as wiring
from search.data.base import Data
from search.study.evaluation import make_evaluator
from search.study.problem import Prepared, prepare
from search.study.tuning import Tuner, finetuned

CRITERIA = ("l1", "l2", "bn_scale", "taylor", "obd", "apoz", "lasso", "fpgm", "random")
CHANNEL_ONLY = ("bn_scale", "apoz", "lasso", "fpgm")
DRAWN = ("random", "lasso", "obd")  # criteria that chance enters even without repair
COLUMNS = (("channel", 0.3), ("channel", 0.5), ("fine_grained", 0.8), ("fine_grained", 0.9))
REPAIR = "sequential"
GRANULARITIES = (
    ("channel", 0.5),
    ("kernel", 0.5),
    ("vector", 0.5),
    ("nm n=2 m=4", 0.5),
    ("fine_grained", 0.5),
    ("channel", 0.75),
    ("kernel", 0.75),
    ("vector", 0.75),
    ("nm n=1 m=4", 0.75),
    ("fine_grained", 0.75),
)
CURVE = (0.8, 0.9, 0.95)
FINALISTS = 4


@dataclass(frozen=True)
class Cell:
    """One figure: what is pruned how, and fine-tuned for how long."""

    granularity: str
    ratio: float
    criterion: str = "l1"
    repair: str = "none"
    seed: int = 1
    epochs: int = 0
    schedule: str = "one_shot"
    rounds: int = 1

    def overrides(self) -> list[str]:
        """As amc-search would be told."""
        name, *settings = self.granularity.split()
        more = [f"granularity.{setting}" for setting in settings]
        if name in ("vector", "kernel", "fine_grained"):
            more.append("granularity.max_ratio=0.98")
        rounds = [] if self.schedule == "one_shot" else [f"schedule.rounds={self.rounds}"]
        return [
            *(
                f"granularity={name}",
                *more,
                f"criterion={self.criterion}",
                f"repair={self.repair}",
                "budget=none",
            ),
            *(f"seed={self.seed}", f"finetune.epochs={self.epochs}", f"schedule={self.schedule}", *rounds),
            *("agent=uniform", f"agent.ratio={self.ratio}", "device=cpu", "finalists.count=0"),
        ]


def criteria(options: argparse.Namespace) -> Iterator[Cell]:
    """Every criterion at every column, without and with repair; seeds where something is drawn."""
    for seed in options.seeds:
        for granularity, ratio in COLUMNS:
            for criterion in CRITERIA:
                if granularity != "channel" and criterion in CHANNEL_ONLY:
                    continue
                for repair in ("none", REPAIR):
                    drawn = criterion in DRAWN or repair == REPAIR
                    if seed == options.seeds[0] or drawn:
                        yield Cell(granularity, ratio, criterion, repair, seed)


def criteria_tuned(options: argparse.Namespace) -> Iterator[Cell]:
    """The best four of each column, by their mean accuracy on the search split with repair."""
    measured = read(options.out / "criteria.jsonl")
    for seed in options.seeds:
        for granularity, ratio in COLUMNS:
            scores: dict[str, list[float]] = defaultdict(list)
            for cell, line in measured.items():
                if (cell.granularity, cell.ratio, cell.repair) == (granularity, ratio, REPAIR):
                    scores[cell.criterion].append(line["search"])
            best = sorted(scores, key=lambda name: -statistics.mean(scores[name]))[:FINALISTS]
            for criterion in best:
                yield Cell(granularity, ratio, criterion, REPAIR, seed, options.epochs)


def granularities(options: argparse.Namespace) -> Iterator[Cell]:
    """Granularities at equal sparsity: as cut, repaired, fine-tuned."""
    for seed in options.seeds:
        for granularity, ratio in GRANULARITIES:
            if seed == options.seeds[0]:
                yield Cell(granularity, ratio, repair="none", seed=seed)
            yield Cell(granularity, ratio, repair=REPAIR, seed=seed, epochs=options.epochs)


def curve(options: argparse.Namespace) -> Iterator[Cell]:
    """Accuracy against ratio: pruned only, pruned and fine-tuned, iterative; equal epochs."""
    for seed in options.seeds:
        for ratio in CURVE:
            yield Cell("fine_grained", ratio, seed=seed, epochs=options.epochs)
            yield Cell(
                "fine_grained",
                ratio,
                seed=seed,
                epochs=options.epochs,
                schedule="cubic",
                rounds=options.epochs,
            )


TABLES: dict[str, Callable[[argparse.Namespace], Iterator[Cell]]] = {
    "criteria": criteria,
    "criteria-tuned": criteria_tuned,
    "granularities": granularities,
    "curve": curve,
}


class Measuring:
    """Measures cells of one network and dataset."""

    def __init__(self, common: Sequence[str], train_images: int | None):
        self._common = list(common)
        with initialize_config_module("conf", version_base="1.3"):
            cfg = compose("search", self._common)
        source = wiring.model_source(cfg)
        self._lr = source.original_lr
        self.data: Data = wiring.data_of(cfg)
        self._model: nn.Module = source.load(self.data)
        if train_images is not None:
            self.data = replace(self.data, train=self.data.train.take(torch.arange(train_images)))

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Accuracies in [0, 1] of the cut network, and of the fine-tuned one where there is one."""
        with initialize_config_module("conf", version_base="1.3"):
            cfg = compose("search", [*self._common, *cell.overrides()])
        started = time.perf_counter()
        prepared = prepare(self._model, self.data, wiring.settings_of(cfg, self._lr))
        evaluator = make_evaluator(prepared)
        strategy = prepared.problem.strategy(prepared.problem.snap([cell.ratio] * len(prepared.grids)))
        outcome = evaluator.evaluate([strategy])[0]
        judge = self._judge(prepared)
        whole = prepared.problem.cost([0] * len(prepared.grids))
        line = {
            "search": outcome.accuracy,
            "test": judge(evaluator.network(outcome).network),
            "params": outcome.costs["params"] / whole["params"],
            "macs": outcome.costs["macs"] / whole["macs"],
        }
        if cell.epochs:
            tuned = finetuned(prepared, evaluator, outcome, Tuner(prepared, lambda epoch, loss, lr: None))
            line["tuned"] = judge(tuned.network)
        return {**line, "seconds": round(time.perf_counter() - started, 1)}

    def _judge(self, prepared: Prepared) -> Scorer:
        split = self.data.test or self.data.search
        return Scorer(prepared.model, prepared.graph.topology, prepared.images(split), split.labels)


def read(path: Path) -> dict[Cell, dict[str, Any]]:
    """The cells of a file."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {Cell(**line.pop("cell")): line for line in lines}


def spread(values: Sequence[float]) -> str:
    """Mean and, over several values, standard deviation, in percent."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def show(cells: dict[Cell, dict[str, Any]]) -> None:
    """One row for what was compared; mean and spread over seeds, of the test split."""
    rows: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
    for cell, line in cells.items():
        rows[replace(cell, seed=0)].append(line)
    print(
        "| granularity | ratio | criterion | repair | schedule | epochs | params left | cut | fine-tuned | seeds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for cell, lines in sorted(rows.items(), key=lambda item: _order(item[0])):
        tuned = spread([line["tuned"] for line in lines]) if cell.epochs else "–"
        schedule = f"{cell.schedule}, {cell.rounds}" if cell.rounds > 1 else cell.schedule
        params = f"{100 * lines[0]['params']:.1f}%"
        cut = spread([line["test"] for line in lines])
        print(
            f"| {cell.granularity} | {cell.ratio:g} | {cell.criterion} | {cell.repair} | {schedule} | {cell.epochs} | "
            f"{params} | {cut} | {tuned} | {len(lines)} |"
        )


def _order(cell: Cell) -> tuple[Any, ...]:
    coarse_first = [name for name, _ in GRANULARITIES]
    return (cell.ratio, coarse_first.index(cell.granularity), cell.criterion, cell.repair, cell.rounds)


def draw(cells: dict[Cell, dict[str, Any]], path: Path) -> None:
    """The lecture's curve: accuracy against ratio."""
    figure = Figure(figsize=(5.8, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    lines = {
        "pruned": ("test", "one_shot", "#D55E00"),
        "pruned and fine-tuned": ("tuned", "one_shot", "#0072B2"),
        "iterative": ("tuned", "cubic", "#009E73"),
    }
    for label, (key, schedule, colour) in lines.items():
        points: dict[float, list[float]] = defaultdict(list)
        for cell, line in cells.items():
            if cell.schedule == schedule:
                points[cell.ratio].append(line[key])
        ratios = sorted(points)
        means = [100 * statistics.mean(points[ratio]) for ratio in ratios]
        axes.plot([100 * ratio for ratio in ratios], means, "o-", color=colour, label=label)
    axes.set_xlabel("pruning ratio of every layer, %")
    axes.set_ylabel("accuracy, test split, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E8EA")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Measures what is missing, then prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--train-images", type=int, help="of an epoch of fine-tuning; default: all")
    parser.add_argument("--common", nargs="*", default=[], help="overrides of all cells, as for amc-search")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.table}.jsonl"
    known = read(path)
    wanted = list(TABLES[options.table](options))
    measure: Measuring | None = None
    for number, cell in enumerate(wanted, start=1):
        if cell in known:
            continue
        measure = measure or Measuring(options.common, options.train_images)
        known[cell] = measure(cell)
        with path.open("a") as file:
            file.write(json.dumps({"cell": asdict(cell), **known[cell]}) + "\n")
        print(f"{number}/{len(wanted)} {cell} {known[cell]}", flush=True)
    show({cell: known[cell] for cell in wanted})
    if options.table == "curve":
        draw({cell: known[cell] for cell in wanted}, options.out / "curve.png")


if __name__ == "__main__":
    main()
