"""Iterative pruning: a strategy reached over rounds, each of them fine-tuned (Han et al., NeurIPS 2015, section 3).

The ratios rise as the schedule says. Every round ranks and mends anew, from the weights that the round before left.
With one round this is pruning followed by fine-tuning.
"""

from __future__ import annotations

from amc_env.evaluator import Evaluator, Outcome, Pruned
from amc_env.pruning.widen import widen
from amc_env.strategy import Strategy
from search.judging import start_of
from search.ranking import Prepared, builder_of
from search.training import forget_weights
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
    for number, share in enumerate(shares, start=1):
        strategy = part_of(prepared, outcome.strategy, share)
        pruned = evaluator.apply(strategy, start=start, repair=outcome.repair)
        if settings.finetune.from_scratch:
            forget_weights(pruned.network, settings.seed)
        epochs = settings.finetune.epochs * number // len(shares)
        epochs -= settings.finetune.epochs * (number - 1) // len(shares)
        tune(pruned.network, epochs, pruned.masks, regularized=settings.regularization.during)
        if number < len(shares):
            start = f"{outcome.start}, round {number}"
            wide = widen(pruned.network, pruned.keeps, prepared.model)
            evaluator.begin(start_of(prepared, start, builder_of(prepared, wide, pruned.units)))
    return pruned


def part_of(prepared: Prepared, strategy: Strategy, share: float) -> Strategy:
    """The strategy with this share of its pruning ratios, as feasible counts; all of it for 1."""
    if share == 1.0:
        return strategy
    counts = prepared.problem.snap([share * ratio for ratio in strategy.ratios])
    return prepared.problem.strategy([min(*pair) for pair in zip(counts, strategy.removed, strict=True)])
