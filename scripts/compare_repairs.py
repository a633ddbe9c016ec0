"""Accuracy of uniformly pruned networks under every repair and several budgets, before fine-tuning.

    python scripts/compare_repairs.py model=resnet20 data=cifar10 model.weights=FILE data.path=DIR
    python scripts/compare_repairs.py ... +ratios=[0.75,0.5,0.35] criterion=l2 +test=true

Takes the options of amc-search. Accuracies are on the search split; `+test=true` adds the test split, for a table that
is published and not for choosing a default by.
"""

from __future__ import annotations

import sys
import time

import hydra
from omegaconf import DictConfig

from amc_env.evaluation.scorer import accuracy
from amc_env.space import Budget, Problem
from search.config.command import application, run_command
from search.job import prepared_of
from search.settings import REPAIRS
from search.study.evaluation import make_evaluator


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="search")
@application
def compare(cfg: DictConfig) -> None:
    """Prints one row a repair: accuracy in percent and seconds a candidate, for each ratio."""
    prepared = prepared_of(cfg)
    data = prepared.data
    evaluator = make_evaluator(prepared)
    macs, grids = prepared.problem.costs[0], prepared.problem.grids
    with_test = cfg.get("test", False)
    for ratio in cfg.get("ratios", [0.75, 0.5, 0.35]):
        problem = Problem(grids, prepared.problem.costs, [Budget.of(macs, len(grids), ratio=ratio)])
        strategy = problem.strategy(problem.project([0.0] * len(grids)))
        for repair in REPAIRS:
            evaluator.evaluate([problem.strategy(problem.most)], repair=repair)  # calibrates
            started = time.perf_counter()
            outcome = evaluator.evaluate([strategy], repair=repair)[0]
            seconds = time.perf_counter() - started
            line = f"ratio {ratio:.2f}  {repair:<14} search {100 * outcome.accuracy:6.2f}%  {seconds:6.2f} s"
            if with_test and data.test is not None:
                network = evaluator.network(outcome).network
                on_test = accuracy(
                    network, prepared.images(data.test), data.test.labels.to(prepared.settings.device)
                )
                line += f"  test {100 * on_test:6.2f}%"
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(compare))
