"""Running amc-search in tests: quick settings, and how a command ended."""

from collections.abc import Callable
from dataclasses import dataclass

SMALL = ("device=cpu", "model=digits_mlp", "model.epochs=3", "search.images=100", "repair.images=100")

QUICK = (
    *SMALL,
    "agent=ddpg",
    "search.episodes=8",
    "agent.warmup_episodes=3",
    "finalists.count=2",
    "baselines=[]",
    "finetune.epochs=1",
    "latency.repeats=2",
    "export=[]",
)
"""Overrides that make amc-search with agent=ddpg a matter of a second or two."""


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]
