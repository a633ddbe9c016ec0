"""A surrogate: the next strategy is the one that a model of the scores so far predicts to be best.

Sequential model-based optimisation: the model is cheap to fit and is refitted after every score, on a bootstrap sample of
the scores so that its proposals vary where it is unsure.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
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
        focus: How much more the best strategy weighs than the worst in the fit: exp(focus) times.
    """

    name: ClassVar[str] = "surrogate"
    steps: ClassVar[bool] = False

    initial: Count = 10
    pool: Count = 200
    focus: Positive = 3.0

    def search(self, task: SearchTask) -> None:
        """Scores ``task.episodes`` different strategies, or all that could be found."""
        rng, seen = np.random.default_rng(task.seed), dict[Removed, None]()
        trials: list[Trial] = []
        for removed in islice(self._proposals(task, rng, trials, seen), task.episodes):
            seen[removed] = None
            trials += task.score([removed])
        if len(seen) < task.episodes:
            log.warning("only %d different strategies found of %d asked for", len(seen), task.episodes)

    def _proposals(
        self, task: SearchTask, rng: np.random.Generator, trials: list[Trial], seen: dict[Removed, None]
    ) -> Iterator[Removed]:
        """New strategies, without end unless none is left; each is scored before the next is asked for."""
        space = task.space
        yield from starts(task)
        origin = max(trials, key=order).removed
        for number in range(self.initial):
            wide = space.land(rng.uniform(0.0, space.maxima))
            near = mutants(space, origin, rng, seen, 1, strength=4)
            first = near if number % 2 else [wide]
            yield from [removed for removed in first if removed not in seen]
        while candidates := self._pool(space, rng, trials, seen):
            predicted = self._predicted(rng, trials, space, candidates)
            yield candidates[int(predicted.argmin())]

    def _pool(
        self, space: SearchSpace, rng: np.random.Generator, trials: list[Trial], seen: dict[Removed, None]
    ) -> list[Removed]:
        best = sorted(trials, key=order, reverse=True)[:_BEST]
        origins = [best[0], *best]  # the best gets twice as many
        each = -(-self.pool // len(origins))
        found = (mutants(space, trial.removed, rng, seen, each) for trial in origins)
        return list(dict.fromkeys(removed for part in found for removed in part))

    def _predicted(
        self, rng: np.random.Generator, trials: Sequence[Trial], space: SearchSpace, candidates: list[Removed]
    ) -> Floats:
        """The predicted logarithm of each candidate's error, by a model of a bootstrap sample of the trials."""
        from sklearn.linear_model import RidgeCV

        errors = np.array([-trial.reward for trial in trials])
        usable = np.flatnonzero(np.isfinite(errors))
        sample = rng.choice(usable, len(usable))
        ranks = np.argsort(np.argsort(errors[sample])) / max(1, len(sample) - 1)
        features = _features(space, [trials[place].removed for place in sample])
        mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-9
        model = RidgeCV(_STRENGTHS)
        model.fit((features - mean) / scale, _logarithm(errors[sample]), np.exp(-self.focus * ranks))
        predicted: Floats = model.predict((_features(space, candidates) - mean) / scale)
        return predicted


def _features(space: SearchSpace, strategies: Sequence[Removed]) -> Floats:
    """Ratio, square and cube of every decision, [strategies, 3 * decisions]."""
    ratios = np.array(strategies, dtype=np.float64) / np.array(space.totals)
    return np.concatenate([ratios, ratios**2, ratios**3], axis=1)


def _logarithm(errors: Floats) -> Floats:
    """Of errors, which are positive for every reward but a user's own: that is taken as it is."""
    positive: Floats = np.log(np.maximum(errors, _FLOOR)) if errors.min() >= 0 else errors
    return positive
