"""Black-box samplers of other libraries as agents; a strategy is a vector of ratios, shifted to land on the budget."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from agents.base import Agent, SearchTask
from agents.moves import order, starts
from amc_env.errors import UserError
from amc_env.space import Trial
from amc_env.validation import Count, Fraction, settings

_WORST = -10.0
"""Reported for a reward of minus infinity."""


@settings
class CmaEs(Agent):
    """CMA-ES, by the package ``cmaes``.

    Hansen and Ostermeier, "Completely Derandomized Self-Adaptation in Evolution Strategies", 2001. It starts around the
    better of the uniform and the least-error strategy.

    Attributes:
        sigma: First standard deviation, in pruning ratio.
        population: Strategies of a generation, which are scored together; None: the package's rule, 4 + 3 log(decisions).
    """

    name: ClassVar[str] = "cmaes"
    steps: ClassVar[bool] = False

    sigma: Fraction = 0.15
    population: Count | None = None

    def check(self, space: object, episodes: int) -> None:
        """Refuses a search without the package."""
        _package("cmaes")

    def search(self, task: SearchTask) -> None:
        """Scores ``task.episodes`` strategies; a strategy may come again."""
        package, space = _package("cmaes"), task.space
        first = starts(task)[: task.episodes]
        best = max(task.score(first), key=order)
        bounds = np.stack([np.zeros(len(space.names)), np.maximum(space.maxima, 1e-6)], axis=1)
        cma = package.CMA(
            mean=np.array(best.strategy.ratios),
            sigma=self.sigma,
            bounds=bounds,
            seed=task.seed,
            population_size=self.population,
        )
        left = task.episodes - len(first)
        while left > 0:
            asked = [cma.ask() for _ in range(cma.population_size)]
            trials = task.score([space.land(ratios) for ratios in asked[:left]])
            left -= len(trials)
            if len(trials) == len(asked):
                cma.tell([(x, -_finite(trial)) for x, trial in zip(asked, trials, strict=True)])


@settings
class Tpe(Agent):
    """The tree-structured Parzen estimator, by Optuna's sampler.

    Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011.

    Attributes:
        initial: Strategies that are drawn at random first.
    """

    name: ClassVar[str] = "tpe"
    steps: ClassVar[bool] = False

    initial: Count = 20

    def check(self, space: object, episodes: int) -> None:
        """Refuses a search without the package."""
        _package("optuna")

    def search(self, task: SearchTask) -> None:
        """Scores ``task.episodes`` strategies; a strategy may come again."""
        optuna, space = _package("optuna"), task.space
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        ranges = {
            name: optuna.distributions.FloatDistribution(0.0, float(most))
            for name, most in zip(space.names, space.maxima, strict=True)
            if most > 0
        }
        sampler = optuna.samplers.TPESampler(seed=task.seed, n_startup_trials=self.initial)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        first = starts(task)[: task.episodes]
        for removed in first:
            ratios_of = dict(zip(space.names, space.strategy(removed).ratios, strict=True))
            study.enqueue_trial({name: ratios_of[name] for name in ranges})
        for number in range(task.episodes):
            asked = study.ask(ranges)
            ratios = [asked.params.get(name, 0.0) for name in space.names]
            (trial,) = task.score([first[number] if number < len(first) else space.land(ratios)])
            study.tell(asked, _finite(trial))


def _finite(trial: Trial) -> float:
    return trial.reward if math.isfinite(trial.reward) else _WORST


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"{{field}} needs the package {name}: pip install 'amc-netadapt[samplers]'",
            code="missing_package",
            field="agent",
        ) from error
