"""amc-apply: apply a strategy that is given, then fine-tune, export and report as amc-search does."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from agents.base import Agent
from agents.baselines import Uniform
from amc_env.errors import UserError
from amc_env.validation import check_arguments
from search.config import compose as wiring
from search.config.command import application, run_command
from search.job import run_job
from search.study.apply import Given

log = logging.getLogger(__name__)

_AGENTS: dict[str, Callable[..., Agent]] = {"strategy": Given.read, "ratio": Uniform}
"""By the setting that is given: the function that makes the agent."""


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="apply")
@application
def main_job(cfg: DictConfig) -> float:
    """One strategy, applied.

    Returns:
        The search score of the delivered strategy in [0, 1], for Hydra's sweepers (to be maximised).
    """
    given = [name for name in _AGENTS if cfg.get(name) is not None]
    if len(given) != 1:
        raise UserError(
            f"{' and '.join(given) + ' are both' if given else 'nothing is'} given: set strategy=FILE, the strategy.json "
            "of a run, or ratio=0.5, the share removed of every decision; one of the two",
            code="missing",
            field="strategy",
        )
    (name,) = given
    return run_job(cfg, "amc-apply", {"agent": partial(_agent, cfg, name)})


def _agent(cfg: DictConfig, name: str) -> Agent:
    make, given = _AGENTS[name], wiring.scalars(cfg, name)
    check_arguments(make, given)
    agent = make(**given)
    if isinstance(agent, Given):
        _warn_of_another_criterion(agent)
    return agent


def _warn_of_another_criterion(given: Given) -> None:
    """Counts are the same under every criterion; which units go is not."""
    made, now = given.content.get("criterion"), HydraConfig.get().runtime.choices.get("criterion")
    if made is not None and made != now:
        log.warning(
            "the strategy was found with criterion=%s and is applied with criterion=%s: other units go",
            made,
            now,
        )


def main() -> None:
    """The console script."""
    sys.exit(run_command(main_job))


if __name__ == "__main__":
    main()
