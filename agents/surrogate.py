"""A surrogate: the next strategy is the one that a model of the scores so far predicts to be best.

Sequential model-based optimisation: the model is cheap to fit and is refitted after every score, on a bootstrap sample of
the scores so that its proposals vary where it is unsure.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from agents.base import Agent, SearchTask
from agents.evolution import mutants
from agents.moves import order, starts
from amc_env.space import Removed, SearchSpace, Trial
from amc_env.validation import Count, Positive, settings

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]

_STRENGTHS = np.logspace(-3, 3, 13)  # of the ridge, chosen by cross-validation
_FLOOR = 1e-3  # of an error whose logarithm is taken
_BEST = 8  # strategies that the pool lies around


@settings
class Surrogate(Agent):
    """Proposes the strategy with the best prediction in a pool around the best strategies so far.

    The logarithm of the error is modelled as a sum over decisions of a cubic polynomial of the pruning ratio, by ridge
    regression whose strength is chosen by leave-one-out cross-validation; better strategies weigh more.

    Attributes:
        initial: Random strategies on the budget that are scored first, after the uniform and the least-error one.
        pool: Candidates whose scores are predicted for every proposal.
        focus: How much more the best strategy weighs than the worst in the fit: exp(focus) times. Strategies of looser
            budgets weigh as little as the worst, and are left out once this search has more scores than the model has
            coefficients.
        batch: Strategies that are proposed together, each by a bootstrap sample of its own; above 1 they can be scored
            side by side.
    """

    name: ClassVar[str] = "surrogate"
    steps: ClassVar[bool] = False

    initial: Count = 10
    pool: Count = 200
    focus: Positive = 3.0
    batch: Count = 1

    def search(self, task: SearchTask) -> None:
        """Scores ``task.episodes`` different strategies, or all that could be found."""
        rng, seen = np.random.default_rng(task.seed), dict[Removed, None]()
        trials: list[Trial] = []
        for proposals in self._batches(task, rng, trials, seen):
            trials += task.score(proposals[: task.episodes - len(trials)])
            if len(trials) == task.episodes:
                return
        log.warning("only %d different strategies found of %d asked for", len(trials), task.episodes)

    def _batches(
        self, task: SearchTask, rng: np.random.Generator, trials: list[Trial], seen: dict[Removed, None]
    ) -> Iterator[list[Removed]]:
        """New strategies, without end unless none is left; a batch is scored before the next is asked for."""
        space = task.space
        seen |= dict.fromkeys(first := starts(task))
        yield first
        origin, asked = max(trials, key=order).removed, len(seen)
        for number in range(self.initial):
            wide = space.land(rng.uniform(0.0, space.maxima))
            near = mutants(space, origin, rng, seen, 1, strength=4)
            seen |= dict.fromkeys(near if number % 2 else [wide])
        yield list(seen)[asked:]
        while candidates := self._pool(space, rng, trials, seen):
            features = _features(space, candidates)
            fits = (self._predicted(rng, trials, task, features) for _ in range(self.batch))
            best = dict.fromkeys(candidates[int(predicted.argmin())] for predicted in fits)
            seen |= best
            yield list(best)

    def _pool(
        self, space: SearchSpace, rng: np.random.Generator, trials: list[Trial], seen: dict[Removed, None]
    ) -> list[Removed]:
        best = sorted(trials, key=order, reverse=True)[:_BEST]
        origins = [best[0], *best]  # the best gets twice as many
        each = -(-self.pool // len(origins))
        found = (mutants(space, trial.removed, rng, seen, each) for trial in origins)
        return list(dict.fromkeys(removed for part in found for removed in part))

    def _predicted(
        self, rng: np.random.Generator, trials: Sequence[Trial], task: SearchTask, candidates: Floats
    ) -> Floats:
        """The predicted logarithm of each candidate's error, by a model of a bootstrap sample of the trials.

        Args:
            rng: Draws the sample.
            trials: Those of this search.
            task: Has the trials of earlier searches.
            candidates: Their features, one row each.
        """
        from sklearn.linear_model import RidgeCV

        errors = np.array([-trial.reward for trial in trials])
        usable = np.flatnonzero(np.isfinite(errors))
        sample = rng.choice(usable, len(usable))
        ranks = np.argsort(np.argsort(errors[sample])) / max(1, len(sample) - 1)
        known = task.known if len(trials) < candidates.shape[1] else ()
        before = [trial for trial in known if np.isfinite(trial.reward)]
        chosen = [*(trials[place] for place in sample), *before]
        features = _features(task.space, [trial.removed for trial in chosen])
        mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-9
        weights = np.exp(-self.focus * np.concatenate([ranks, np.ones(len(before))]))
        model = RidgeCV(_STRENGTHS)
        model.fit(
            (features - mean) / scale, _logarithm(np.array([-trial.reward for trial in chosen])), weights
        )
        predicted: Floats = model.predict((candidates - mean) / scale)
        return predicted


def _features(space: SearchSpace, strategies: Sequence[Removed]) -> Floats:
    """Ratio, square and cube of every decision, [strategies, 3 * decisions]."""
    ratios = np.array(strategies, dtype=np.float64) / np.array(space.totals)
    return np.concatenate([ratios, ratios**2, ratios**3], axis=1)


def _logarithm(errors: Floats) -> Floats:
    """Of errors, which are positive for every reward but a user's own: that is taken as it is."""
    positive: Floats = np.log(np.maximum(errors, _FLOOR)) if errors.min() >= 0 else errors
    return positive
