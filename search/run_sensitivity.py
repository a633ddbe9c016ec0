"""amc-sensitivity: cut one decision at a time, and pick ratios for the budget by a common threshold."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from amc_env.errors import UserError
from search import wiring
from search.commands import application, command_line, run_command, run_folder
from search.pipeline import Context
from search.preparation import check
from search.sensitivity import run
from search.settings import Settings
from search.typecheck import check_types

log = logging.getLogger(__name__)

_OWN = ("ratios", "threshold")
_OF_THE_PICK = (*_OWN, "budget")
"""Sections that change no evaluation: a scan may be gone on with under others."""


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="sensitivity")
@application
def main_job(cfg: DictConfig) -> float:
    """One scan.

    Returns:
        The accuracy, in [0, 1], of the strategy picked, or of the original, for Hydra's sweepers.
    """
    folder = run_folder()
    whole = _checked(cfg)
    source = wiring.model_source(whole)
    source.check()
    settings = _settings(whole, source.original_lr)
    check(settings)
    go_on = command_line("amc-sensitivity", folder)
    log.info("run folder: %s; if it is stopped, go on with: %s", folder, go_on)
    data = wiring.data_of(cfg)
    log.info("data: %s, %d training and %d search images", data.name, len(data.train), len(data.search))
    model = source.load(data)
    context = Context(folder, track=lambda metrics, step: None, model=source.name, config=_header_config(cfg))
    try:
        scanned = run(model, data, settings, context)
    except KeyboardInterrupt:
        log.warning("stopped; nothing that was scored is lost, go on with: %s", go_on)
        raise
    outcome = scanned.picked or scanned.outcomes[0][0]
    return outcome.accuracy


def _checked(cfg: DictConfig) -> DictConfig:
    """The configuration as that of a search, whose other sections have their defaults.

    Raises:
        UserError: There are settings that do not exist, or values of a wrong type.
    """
    there = hydra.compose("sensitivity")
    unknown = [str(name) for name in cfg if name not in there]
    if unknown:
        raise UserError(f"a scan has no {', '.join(unknown)}; there are {', '.join(map(str, there))}")
    whole = hydra.compose("search")
    with open_dict(whole):
        for name in cfg:
            if name not in (*_OWN, "search"):
                whole[name] = cfg._get_node(name)
        whole.search.images = cfg.search.get("images")
        agent = {"_target_": "agents.sensitivity.Sensitivity", **{name: cfg[name] for name in _OWN}}
        whole.agent = OmegaConf.create(agent)
    try:
        check_types(whole)
    except UserError as error:
        raise _without_agent(error) from error
    return whole


def _settings(whole: DictConfig, original_lr: float) -> Settings:
    try:
        return wiring.settings_of(whole, original_lr)
    except UserError as error:
        raise _without_agent(error) from error


def _without_agent(error: UserError) -> UserError:
    """The same in this command's words: what is the agent's in a search is at the top here."""
    text = str(error)
    for name in _OWN:
        text = text.replace(f"agent.{name}", name)
    return UserError(text)


def _header_config(cfg: DictConfig) -> Mapping[str, Any]:
    config = wiring.header_config(cfg)
    return {name: value for name, value in config.items() if name not in _OF_THE_PICK}


def main() -> None:
    """The console script."""
    sys.exit(run_command(main_job))


if __name__ == "__main__":
    main()
