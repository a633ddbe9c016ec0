"""Iterative pruning: a strategy reached over rounds, each of them fine-tuned (Han et al., NeurIPS 2015, section 3).

The ratios rise as the schedule says. Every round ranks and mends anew, from the weights that the round before left.
With one round this is pruning followed by fine-tuning.
"""

from __future__ import annotations

from torch import nn

from amc_env.evaluator import Evaluator, Outcome, Pruned
from amc_env.pruning.candidate import Builder, Candidates, MaskedCandidates
from amc_env.pruning.widen import widen
from amc_env.strategy import Strategy
from search.preparation import Prepared, builder_of, start_of
from search.tuning import Tuner


def finetuned(prepared: Prepared, evaluator: Evaluator, outcome: Outcome, tune: Tuner) -> Pruned:
    """The strategy of an outcome, applied and fine-tuned over the schedule's rounds.

    Args:
        prepared: The run.
        evaluator: The one that scored the outcome.
        outcome: What is to be reached.
        tune: Fine-tunes.
    """
    settings = prepared.settings
    shares = settings.schedule.shares
    start = outcome.start
    builder = evaluator.builder(start)
    for number, share in enumerate(shares, start=1):
        strategy = part_of(prepared, outcome.strategy, share)
        pruned = evaluator.apply(strategy, start=start, repair=outcome.repair)
        epochs = settings.finetune.epochs * number // len(shares)
        epochs -= settings.finetune.epochs * (number - 1) // len(shares)
        tune(pruned.network, epochs, pruned.masks, regularized=settings.regularization.during)
        if number < len(shares):
            start = f"{outcome.start}, round {number}"
            wide = widen(pruned.network, pruned.keeps, prepared.model)
            builder = later_builder(prepared, builder, strategy, wide)
            evaluator.begin(start_of(prepared, start, builder))
    return pruned


def part_of(prepared: Prepared, strategy: Strategy, share: float) -> Strategy:
    """The strategy with this share of its pruning ratios, as feasible counts; all of it for 1."""
    if share == 1.0:
        return strategy
    counts = prepared.problem.snap([share * ratio for ratio in strategy.ratios])
    return prepared.problem.strategy([min(*pair) for pair in zip(counts, strategy.removed, strict=True)])


def later_builder(
    prepared: Prepared, builder: Builder, strategy: Strategy, network: nn.Module
) -> Candidates | MaskedCandidates:
    """Builds further candidates from weights that were trained after a cut.

    Counts stay those of units removed from the uncut network; what is gone already goes first.

    Args:
        prepared: The run.
        builder: The one that the cut was made by.
        strategy: What was removed.
        network: The trained network in the uncut network's shapes.
    """
    if not isinstance(builder, Candidates):
        return builder_of(prepared, network)
    kept = [order[: len(order) - gone] for order, gone in zip(builder.orders, strategy.removed, strict=True)]
    return builder_of(prepared, network, kept)
