"""Candidates of a start are trained on the same images, in whatever order and process they come."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from networks import network, random_removed, same_state
from refusals import refused
from small_runs import small
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from amc_env.evaluation.pruner import ORIGINAL
from search.data.base import Data
from search.settings import SHORT_TERM, ShortTermSettings
from search.study.evaluation import start_of
from search.study.problem import PruningProblem
from search.training.batches import FirstBatches

STEPS = 6  # an epoch of the loader has four


def loader(data: Data, **more: object) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Shuffled by a generator of its own."""
    images = TensorDataset(data.normalise(data.train.inputs), data.train.targets)
    return DataLoader(images, 16, shuffle=True, generator=torch.Generator().manual_seed(5), **more)


def ready(data: Data, **more: object) -> PruningProblem:
    settings = small("channel", short_term=ShortTermSettings(STEPS, lr_fraction=1.0, batch_size=16))
    return PruningProblem.build(network("concat"), replace(data, loader=loader(data, **more)), settings)


def tuned(problem: PruningProblem, removed: tuple[int, ...], name: str = ORIGINAL) -> nn.Module:
    """A candidate, repaired and trained."""
    start = start_of(problem, name, problem.builder)
    model = start.candidates.build(removed)
    start.repairs[SHORT_TERM]()(model, removed, start.candidates.keeps(removed))
    return model


def test_a_candidate_does_not_depend_on_those_before_it(small_data: Data) -> None:
    problem = ready(small_data)
    removed, other = (random_removed(problem.grids, seed) for seed in range(2))
    generator = problem.data.loader.generator
    before = generator.get_state()
    first = tuned(problem, removed)
    tuned(problem, other)
    assert torch.equal(generator.get_state(), before)
    torch.rand((), generator=generator)  # as in another process, where it has another state
    assert same_state(tuned(problem, removed), first)
    assert not same_state(tuned(problem, removed, "round 1"), first)


def test_a_loader_whose_workers_keep_their_random_numbers_is_refused(small_data: Data) -> None:
    lasting = {"num_workers": 1, "persistent_workers": True}
    with refused("conflict", "short_term.steps"):
        ready(small_data, **lasting)
    untuned = replace(small("channel"), short_term=ShortTermSettings(0))
    PruningProblem.build(
        network("concat"), replace(small_data, loader=loader(small_data, **lasting)), untuned
    )


class Once:
    """Batches that can be read one time only."""

    example = torch.zeros(2)

    def __init__(self) -> None:
        self.batches = iter([(torch.zeros(2), torch.zeros(2))] * 3)

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self.batches


def test_as_many_steps_as_are_asked_for_or_none() -> None:
    assert len(list(FirstBatches(Once(), 3))) == 3
    assert len(list(FirstBatches(Once(), 2))) == 2
    with refused("one_pass", ""):
        list(FirstBatches(Once(), 4))
