"""How AMC explores: truncated-normal noise around the actor's mean, and a random warm-up before it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt
import torch
from torch.special import ndtr, ndtri

from amc_env.space import Removed, SearchSpace

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]


def warn_within_warmup(episodes: int, warmup: int, asked: int) -> None:
    """Log a warning where all episodes of a search are warm-up.

    Args:
        episodes: Of the search.
        warmup: Of the warm-up, in whole rounds of environments.
        asked: The setting.
    """
    if episodes <= warmup:
        log.warning(
            "search.episodes=%d ends within the warm-up of %d (agent.warmup_episodes=%d): nothing is learnt",
            episodes,
            warmup,
            asked,
        )


@dataclass(frozen=True)
class TruncatedNormalNoise:
    """Actions drawn from a normal distribution cut to the action range (not clipped onto its ends).

    Stable-Baselines3 adds noise in the scaled space [-1, 1] and clips it; AMC draws in action units, and its
    sigma shrinks with every episode after the warm-up.

    Attributes:
        sigma: Standard deviation before truncation, in action units, during and right after the warm-up.
        decay: Factor per episode after the warm-up.
        warmup: Episodes of warm-up.
    """

    sigma: float
    decay: float
    warmup: int

    def sigma_at(self, episode: int) -> float:
        """Returns sigma in the given episode, counted from 0."""
        return self.sigma * self.decay ** max(0, episode - self.warmup)

    def draw(self, mean: Floats, low: Floats, high: Floats, episode: int, rng: np.random.Generator) -> Floats:
        """Returns an action of the shape of ``mean``, inside [low, high], by inverting the distribution."""
        sigma = self.sigma_at(episode)
        uniform = rng.random(mean.shape)  # drawn in any case: a sigma of 0 must not shift later draws
        if sigma < 1e-9:
            return np.asarray(np.clip(mean, low, high))
        below, above = (ndtr(torch.from_numpy((end - mean) / sigma)) for end in (low, high))
        normal = ndtri(below + torch.from_numpy(uniform) * (above - below)).numpy()
        return np.asarray(np.clip(mean + sigma * normal, low, high))


Warmup = Callable[[], Floats]
"""Draws the actions [decisions] of one warm-up episode."""


def uniform_ratios(space: SearchSpace) -> Floats:
    """The ratios [decisions] of the uniform strategy: one for all, the least that meets every budget."""
    return _ratios(space, space.project([0.0] * len(space.names)))


def _ratios(space: SearchSpace, removed: Removed) -> Floats:
    return np.asarray(removed, dtype=np.float64) / np.asarray(space.totals, dtype=np.float64)


def uniform_warmup(space: SearchSpace, noise: TruncatedNormalNoise, rng: np.random.Generator) -> Warmup:
    """AMC's warm-up: every action uniform over the range that all decisions share.

    Under a bound that only raises actions most of these fall far below the budget: the median has 30% of
    the MACs left at a target of 50%.
    """
    high = float(np.max(space.maxima))
    return lambda: rng.uniform(0.0, high, len(space.names))


def landing_warmup(space: SearchSpace, noise: TruncatedNormalNoise, rng: np.random.Generator) -> Warmup:
    """Strategies that land on the budget: uniform ratios, shifted together, fed to the environment as
    actions.

    The bound leaves them as they are, since each prefix of a strategy that meets the budgets can meet them.
    """
    return lambda: _ratios(space, space.land(rng.uniform(0.0, space.maxima)))


def near_uniform_warmup(space: SearchSpace, noise: TruncatedNormalNoise, rng: np.random.Generator) -> Warmup:
    """The uniform strategy, then strategies around it: its ratios with the noise added, landed on the budget.

    Not in AMC. Where many decisions are cut deep, ratios drawn from their whole range are far worse than uniform
    ones, and so is the best of a few of them. Without a budget nothing removed takes the uniform strategy's place.
    """
    uniform = uniform_ratios(space)
    draws = (noise.draw(mean, np.zeros(1), space.maxima, 0, rng) for mean in repeat(uniform))
    return chain([uniform], (_ratios(space, space.land(ratios)) for ratios in draws)).__next__


WARMUPS: dict[str, Callable[[SearchSpace, TruncatedNormalNoise, np.random.Generator], Warmup]] = {
    "uniform": uniform_warmup,
    "landing": landing_warmup,
    "near_uniform": near_uniform_warmup,
}
