"""A check that an agent keeps an agent's contract."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch

from agents.base import Agent
from agents.toy import ToySearch, one_fragile_layer

NEARLY_BEST = -0.1
"""A reward that counts as the toy's optimum, which is 0; the uniform strategy's is -0.34."""


def check_agent(
    factory: Callable[[], Agent],
    *,
    episodes: int = 80,
    seed: int = 1,
    learns: bool = True,
    seeded: bool = True,
) -> None:
    """Checks an agent's contract; takes the time of about three searches on the toy.

    It meets the budget (every strategy of an agent that steps, the best one of an agent that proposes whole
    strategies); a seed repeats its proposals, whatever the global random state, which it leaves alone; an interrupted
    search proposes the same again, also with more episodes; and it finds the optimum, which the uniform strategy misses.

    Args:
        factory: Makes the agent.
        episodes: Of the search.
        seed: Of the search.
        learns: Whether it is expected to find the optimum: on average over the last tenth of the episodes of an
            agent that steps, with its best strategy else.
        seeded: Whether what it proposes depends on the seed.

    Raises:
        AssertionError: It breaks the contract; the message says where.
    """
    agent, before = factory(), _global_states()
    agent.check(ToySearch().space, episodes)
    first = ToySearch().run(agent, episodes, seed)
    assert _global_states() == before, f"{agent.name} changes the global random state"
    _check_budget(agent, first)
    if learns:
        reached = _reached(agent, first)
        assert reached > NEARLY_BEST, f"{agent.name} reaches a reward of {reached:.3f}; the optimum is 0"
    _check_repeats(agent, first, episodes, seed)
    other = ToySearch(stop_after=min(4, len(first.scored)))
    with suppress(KeyboardInterrupt):
        other.run(factory(), episodes, seed + 1)
    differs = other.scored != first.scored[: len(other.scored)]
    assert differs == seeded, (
        f"{agent.name}: seeds {seed} and {seed + 1} differ: {differs}, expected {seeded}"
    )


def _check_budget(agent: Agent, search: ToySearch) -> None:
    met = [search.space.met(removed) for removed in search.scored]
    assert met, f"{agent.name} scores nothing"
    assert all(met) if agent.steps else any(met), f"{agent.name} misses the budget: {search.scored}"


def _reached(agent: Agent, search: ToySearch) -> float:
    if agent.steps:
        return float(np.mean(search.rewards[-max(1, len(search.rewards) // 10) :]))
    pairs = zip(search.scored, search.rewards, strict=True)
    return max(reward for removed, reward in pairs if search.space.met(removed))


def _check_repeats(agent: Agent, first: ToySearch, episodes: int, seed: int) -> None:
    stopped = ToySearch(stop_after=len(first.scored) // 2)
    try:
        stopped.run(agent, episodes, seed)
    except KeyboardInterrupt:
        expected = first.scored[: stopped.stop_after]
        assert stopped.scored == expected, f"{agent.name} does not repeat its proposals"
    else:
        raise AssertionError(f"{agent.name} swallows a KeyboardInterrupt")
    grown = ToySearch(_careless).run(agent, episodes + episodes // 4, seed)
    again = grown.scored[: len(first.scored)]
    assert again == first.scored, f"{agent.name} does not continue its proposals when episodes grow"


def _careless(ratios: npt.NDArray[np.float64]) -> float:
    """The same accuracy, scored by something that uses the global random state."""
    torch.rand(3), np.random.random(3), random.random()
    return one_fragile_layer(ratios)


def _global_states() -> tuple[str, ...]:
    states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state().tolist()
    return tuple(map(repr, states))
