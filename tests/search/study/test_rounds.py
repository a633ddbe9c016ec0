"""Iterative pruning: what each round removes and how long it is tuned, and that one round is plain fine-tuning."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from masking import weight
from networks import network, same_state, with_state
from small_runs import small
from torch import Tensor, nn

from amc_env.costs.counts import Params
from amc_env.evaluation.pruner import Pruned
from amc_env.graph.layers import LayerGraph
from amc_env.pruning.criteria import Norm, Sample, Taylor
from amc_env.pruning.granularity import Channel
from amc_env.pruning.schedule import Schedule
from amc_env.space import Strategy, Trial
from search.data.base import Data
from search.settings import FinetuneSettings
from search.study.evaluation import make_evaluator
from search.study.problem import PruningProblem
from search.study.tuning import Tuner, finetuned, part_of
from search.training.batches import training_batches
from search.training.finetune import finetune

CUBIC = Schedule("cubic", 3)
SEVEN = FinetuneSettings(epochs=7, batch_size=16)


class Recorded(Tuner):
    """Remembers what it tuned, and what came out."""

    def __init__(self, problem: PruningProblem):
        self.epochs: list[int] = []
        self.masks: list[Mapping[str, Tensor]] = []
        self.states: list[dict[str, Tensor]] = []
        super().__init__(problem, lambda epoch, *_: self.epochs.append(epoch))

    def __call__(self, network: nn.Module, epochs: int, masks: Any = None, *, regularized: bool) -> nn.Module:
        super().__call__(network, epochs, masks, regularized=regularized)
        self.masks.append(masks)
        self.states.append(with_state(network))
        return network


def tuned(
    data: Data, granularity: str, name: str = "concat", **more: Any
) -> tuple[PruningProblem, Trial, Recorded, Pruned]:
    """A strategy at 40% of the parameters, tuned."""
    problem = PruningProblem.build(network(name), data, small(granularity, finetune=SEVEN, **more))
    evaluator, space = make_evaluator(problem), problem.space
    outcome = evaluator.evaluate([space.strategy(space.project([0.4] * len(space.grids)))])[0]
    record = Recorded(problem)
    return problem, outcome, record, finetuned(problem, evaluator, outcome, record)


def numbers(problem: PruningProblem, strategy: Strategy) -> list[tuple[int, ...]]:
    """Counts after each round of the cubic schedule: 19/27, 26/27 and all of the ratios, never more than those."""
    snapped = [[s * r for r in strategy.ratios] for s in (19 / 27, 26 / 27, 1.0)]
    counts = [problem.space.snap(ratios) for ratios in snapped]
    return [tuple(map(min, count, strategy.removed)) for count in counts]


def test_masks_grow_by_the_schedule_and_end_at_the_strategy(small_data: Data) -> None:
    problem, outcome, record, pruned = tuned(small_data, "fine_grained", schedule=CUBIC)
    assert record.epochs == [1, 2, 3, 4, 5, 6, 7]
    found = [[int((~masks[name]).sum()) for name in outcome.strategy.names] for masks in record.masks]
    assert [tuple(counts) for counts in found] == numbers(problem, outcome.strategy)
    assert found[0] < found[1] < found[2] == [*outcome.strategy.removed]
    for (before, after), state in zip(pairwise(record.masks), record.states[1:], strict=True):
        for name in after:  # what is gone stays gone, through every training
            assert not (after[name] & ~before[name]).any()
            assert (state[f"{name}.weight"][~before[name]] == 0).all()
    for name, mask in pruned.masks.items():
        assert torch.equal(weight(pruned.network, name) != 0, mask)
    left = sum(int(parameter.count_nonzero()) for parameter in pruned.network.parameters())
    assert left == Params(problem.graph, problem.grids)(outcome.strategy.removed)


def test_channels_go_by_the_schedule_and_what_is_left_is_nested(small_data: Data) -> None:
    problem, outcome, record, pruned = tuned(small_data, "channel", schedule=CUBIC)
    counts = numbers(problem, outcome.strategy)
    assert counts[0] < counts[1] <= counts[2] == outcome.strategy.removed
    for state, removed in zip(record.states, counts, strict=True):
        parameters = sum(v.numel() for k, v in state.items() if k.endswith(("weight", "bias")))
        assert parameters == Params(problem.graph)(removed)
    shapes = {
        key: value.shape for key, value in problem.builder.cut(outcome.strategy.removed).state_dict().items()
    }
    assert {key: value.shape for key, value in pruned.network.state_dict().items()} == shapes
    assert pruned.keeps.keys() == problem.builder.keeps(outcome.strategy.removed).keys()


@dataclass(frozen=True)
class Contrary:
    """Units of small weights are worth most: those that are gone, before all."""

    name: ClassVar[str] = "contrary"
    granularities: ClassVar[tuple[str, ...]] = ("channel",)
    images: ClassVar[int] = 0

    def channel_scores(self, model: nn.Module, graph: LayerGraph, sample: Sample) -> tuple[Tensor, ...]:
        return tuple(-score for score in Norm().channel_scores(model, graph, sample))


def test_channels_that_are_gone_stay_gone_whatever_the_criterion_says(small_data: Data) -> None:
    pruned = tuned(small_data, "channel", schedule=CUBIC, criterion=Contrary())[3]
    for layer in ("left", "right", "join"):
        assert weight(pruned.network, layer).flatten(1).any(1).all()


def test_later_rounds_rank_the_tuned_weights(small_data: Data) -> None:
    """With one round everything is ranked on the first weights; with three, what two trainings left is."""
    one, three = tuned(small_data, "fine_grained")[3], tuned(small_data, "fine_grained", schedule=CUBIC)[3]
    assert one.masks.keys() == three.masks.keys()
    assert any(not torch.equal(one.masks[name], three.masks[name]) for name in one.masks)


def test_dead_weights_do_not_take_the_place_of_those_that_are_gone(small_data: Data) -> None:
    """Taylor's criterion gives 0 to weights of inputs that are always 0, as removed ones have."""
    _, outcome, record, pruned = tuned(small_data, "fine_grained", schedule=CUBIC, criterion=Taylor(images=4))
    for before, after in pairwise(record.masks):
        assert all(not (after[name] & ~before[name]).any() for name in after)
    assert [int((~pruned.masks[n]).sum()) for n in outcome.strategy.names] == [*outcome.strategy.removed]


@pytest.mark.parametrize("rounds", [2, 5, 7])
def test_epochs_are_shared_out_and_none_is_lost(small_data: Data, rounds: int) -> None:
    _, _, record, _ = tuned(small_data, "channel", schedule=Schedule("linear", rounds))
    assert record.epochs == [1, 2, 3, 4, 5, 6, 7]
    assert len(record.states) == rounds


@pytest.mark.parametrize("granularity", ["channel", "fine_grained", "kernel"])
def test_one_round_is_pruning_and_plain_fine_tuning_to_the_bit(small_data: Data, granularity: str) -> None:
    problem, outcome, record, pruned = tuned(small_data, granularity)
    plain = make_evaluator(problem).network(outcome)
    finetune(
        plain.network,
        training_batches(problem.data, 16, 0, "cpu"),
        epochs=7,
        lr=0.3 * 0.1,
        momentum=0.9,
        weight_decay=5e-4,
        warmup_epochs=0.05 * 7,
        seed=0,
        teacher=problem.model,
        distillation=0.5,
        masks=plain.masks,
    )
    assert same_state(plain.network, pruned.network)
    assert len(record.states) == 1


def test_a_part_of_a_strategy_by_hand(small_data: Data) -> None:
    """Ratios times the share, at the nearest feasible count, never above the strategy's own."""
    problem = PruningProblem.build(network("mlp"), small_data, small("nm"))
    whole = problem.space.strategy((2, 0, 2))
    assert part_of(problem, whole, 1.0) is whole
    assert part_of(problem, whole, 0.5).removed == (0, 0, 0)  # a tie goes to the smaller
    assert part_of(problem, whole, 0.51).removed == (2, 0, 2)
    problem = PruningProblem.build(
        network("mlp"), small_data, small("fine_grained")
    )  # 3840, 320 and 64 weights
    part = part_of(problem, problem.space.strategy((3000, 1, 10)), 0.26)
    assert part.removed == (780, 0, 3)
    problem = PruningProblem.build(
        network("mlp"), small_data, replace(small(), granularity=Channel(multiple=8))
    )
    assert [grid.count(1) for grid in problem.grids] == [4, 8]  # of 20 and 16
    # 12 of 20 at 0.6 is 7.2 of 20, nearer to 4 than to 12; a count that is off the grid is never exceeded.
    assert part_of(problem, problem.space.strategy((12, 8)), 0.6).removed == (4, 8)
    assert part_of(problem, problem.space.strategy((12, 6)), 0.99).removed == (12, 6)
