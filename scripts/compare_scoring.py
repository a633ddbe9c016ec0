"""How coarser scoring ranks the strategies of a search: evaluator.precision=bfloat16 or int8, and evaluator.first_images.

    python scripts/compare_scoring.py model=resnet20 data=cifar10 model.weights=FILE data.path=DIR search.episodes=100
    python scripts/compare_scoring.py ... +precision=[int8] +first=[500,1000,2000]

Takes the options of amc-search. The agent searches once, every strategy scored in float32 on all search images; the same
strategies are then scored again, in the same order, in every coarser way. Differences are in points of accuracy; the last
column is what the strategy that looks best then lacks of the best, in float32.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import hydra
import numpy as np
from omegaconf import DictConfig
from scipy.stats import spearmanr

from agents.base import SearchTask
from amc_env.env import PruningVectorEnv
from amc_env.errors import UserError
from amc_env.evaluation.evaluator import Outcome
from amc_env.evaluation.precision import BFLOAT16, INT8
from search.config.command import application, run_command
from search.job import prepared_of
from search.settings import ScoringSettings
from search.study.evaluation import make_evaluator
from search.study.pipeline import env_handle
from search.study.problem import Prepared
from search.study.study import Episode, Loop


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="search")
@application
def compare(cfg: DictConfig) -> None:
    """Prints one row for each way of scoring."""
    prepared = prepared_of(cfg)
    images = len(prepared.data.search)
    exact = searched(prepared)
    coarse = cfg.get("precision", [BFLOAT16, INT8])
    ways = {precision: ScoringSettings(precision=precision) for precision in coarse}
    ways |= {
        f"first {count} images": ScoringSettings(first_images=count) for count in cfg.get("first", [1000])
    }
    print(f"{len(exact)} strategies, {images} search images")
    print(
        "| way | images scored | mean difference | its spread | largest | rank correlation | its best is worse by |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, scoring in ways.items():
        settings = replace(prepared.settings, scoring=scoring)
        try:
            line = row(name, exact, again(replace(prepared, settings=settings), exact), images)
        except UserError as error:  # not on this machine: the others are still of use
            line = f"{name}: {error}"
        print(line, flush=True)


def searched(prepared: Prepared) -> list[Outcome]:
    """Different strategies of the agent's search, in order."""
    found: dict[tuple[int, ...], Outcome] = {}

    def note(episode: Episode) -> None:
        outcome = episode.scored.outcome
        found.setdefault(outcome.strategy.removed, outcome)

    settings = prepared.settings
    loop = Loop(make_evaluator(prepared), settings.reward, note)
    envs = partial(PruningVectorEnv, env_handle(prepared, loop))
    settings.agent.search(SearchTask(prepared.problem, envs, loop.score, settings.episodes, settings.seed))
    return list(found.values())


def again(prepared: Prepared, exact: list[Outcome]) -> list[Outcome]:
    """The same strategies, one after the other, as a search would have them scored."""
    settings = prepared.settings
    loop = Loop(make_evaluator(prepared), settings.reward, matter=settings.told_apart)
    return [loop.outcome(outcome.strategy) for outcome in exact]


def row(name: str, exact: list[Outcome], coarse: list[Outcome], images: int) -> str:
    """A line of the table."""
    a, b = (np.array([outcome.accuracy for outcome in outcomes]) for outcomes in (exact, coarse))
    scored = np.mean([outcome.images or images for outcome in coarse]) / images
    off = 100 * (b - a)
    figures = f"{off.mean():+.2f} | {off.std():.2f} | {abs(off).max():.2f} | {spearmanr(a, b).statistic:.4f}"
    return f"| {name} | {scored:.0%} | {figures} | {100 * (a.max() - a[b.argmax()]):.2f} |"


if __name__ == "__main__":
    sys.exit(run_command(compare))
