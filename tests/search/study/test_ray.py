"""Candidates on a local Ray: the trials of one process, to the bit, whatever becomes of the actors."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journals import content
from networks import network, same_state
from refusals import refused
from small_runs import go, small

from agents.evolution import Evolution
from agents.netadapt import NetAdapt
from amc_env.evaluation import on_ray
from amc_env.evaluation.evaluator import Evaluator
from search.data.base import Data
from search.settings import FinalistSettings, RepairSettings, ScoringSettings, Settings, ShortTermSettings
from search.study.evaluation import make_evaluator
from search.study.identity import identity
from search.study.problem import PruningProblem

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
TWO = ScoringSettings(actors=2)
FITTED = RepairSettings("least_squares", images=16, norm_images=16)
SETTINGS = small("channel", agent=Evolution(children=4), episodes=9, repair=FITTED, scoring=TWO)


@pytest.fixture(scope="module", autouse=True)
def _one_ray() -> Iterator[None]:
    """One Ray for all tests of this file; runs do not end what they have not started."""
    os.environ.update(on_ray.ENVIRONMENT)
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False
    )
    yield
    ray.shutdown()


def evaluators(data: Data, settings: Settings) -> tuple[PruningProblem, Evaluator, Evaluator]:
    """The problem, its evaluator in this process, and that with two actors."""
    problem = PruningProblem.build(network("concat"), data, settings)
    here = replace(problem, settings=replace(settings, scoring=ScoringSettings()))
    return problem, make_evaluator(here), make_evaluator(problem)


def test_a_run_leaves_the_same_journal_and_network_as_in_one_process(
    small_data: Data, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, finalists=FinalistSettings(2, "sequential"))
    there = go(tmp_path / "ray", small_data, settings)
    here = go(tmp_path / "local", small_data, replace(settings, scoring=ScoringSettings()))
    assert content(tmp_path / "ray" / "evaluations.jsonl") == content(
        tmp_path / "local" / "evaluations.jsonl"
    )
    assert same_state(there.model, here.model)
    assert ray.is_initialized()


def test_rounds_with_short_training_are_scored_alike(small_data: Data, tmp_path: Path) -> None:
    tuned: dict[str, Any] = {
        "agent": NetAdapt(reduction=0.3),
        "finetune": replace(SETTINGS.finetune, epochs=0),
    }
    settings = replace(SETTINGS, short_term=ShortTermSettings(steps=1, batch_size=16), **tuned)
    go(tmp_path / "ray", small_data, settings)
    go(tmp_path / "local", small_data, replace(settings, scoring=ScoringSettings()))
    assert content(tmp_path / "ray" / "evaluations.jsonl") == content(
        tmp_path / "local" / "evaluations.jsonl"
    )


def test_the_candidates_of_a_lost_actor_are_scored_again(small_data: Data) -> None:
    masks = small("fine_grained").granularity
    problem, local, remote = evaluators(small_data, replace(SETTINGS, granularity=masks))
    space, rng = problem.space, np.random.default_rng(0)
    strategies = [space.strategy(space.land(rng.uniform(0.0, space.maxima))) for _ in range(24)]
    trials = remote.trials(strategies)
    found = [next(trials)]
    pruner = remote._pruner
    assert isinstance(pruner, on_ray.RayPruner)
    before = list(pruner._actors)
    ray.kill(before[0])
    found += trials
    assert [(t.removed, t.score) for t in found] == [(t.removed, t.score) for t in local.evaluate(strategies)]
    assert sum(actor in before for actor in pruner._actors) == 1
    remote.close()


def test_more_actors_than_there_are_processors_are_refused(small_data: Data) -> None:
    problem, _, remote = evaluators(small_data, replace(SETTINGS, scoring=ScoringSettings(actors=64)))
    with refused("out_of_range", "evaluator.actors"):
        remote.evaluate([problem.space.strategy([0, 0, 0])])


def test_a_run_may_be_resumed_with_or_without_ray(small_data: Data) -> None:
    problem = PruningProblem.build(network("concat"), small_data, SETTINGS)
    here = replace(problem, settings=replace(SETTINGS, scoring=ScoringSettings()))
    assert identity(problem) == identity(here)
