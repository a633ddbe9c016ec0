"""amc-sensitivity: cut one decision at a time, and pick ratios for the budget by a common threshold."""

from __future__ import annotations

import logging
import sys

import hydra
from omegaconf import DictConfig

from amc_env.errors import reported_together
from amc_env.graph.preparing import prepared
from search.config import compose as wiring
from search.config.command import application, command_line, resumable, run_command, run_folder
from search.settings import SensitivitySettings
from search.study.pipeline import Context
from search.study.problem import check
from search.study.sensitivity import run

log = logging.getLogger(__name__)

_OWN = ("ratios", "threshold")


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="sensitivity")
@application
def main_job(cfg: DictConfig) -> float:
    """One scan.

    Returns:
        The accuracy, in [0, 1], of the strategy picked, or of the original, for Hydra's sweepers.
    """
    folder = run_folder()
    with reported_together() as attempt:
        scan = attempt(lambda: SensitivitySettings(**wiring.scalars(cfg, *_OWN)))
        settings = attempt(lambda: wiring.settings_of(cfg).in_folder(folder))
    source = wiring.model_source(cfg)
    source.check()
    check(settings)
    go_on = command_line("amc-sensitivity", folder)
    log.info("run folder: %s; to resume an interrupted run: %s", folder, go_on)
    with resumable(go_on):
        data = wiring.data_of(cfg, source)
        log.info("data: %s, %d training and %d search images", data.name, len(data.train), len(data.search))
        model = prepared(source.load(data))
        context = Context(folder, lambda metrics, step: None, source.name, configuration=wiring.text_of(cfg))
        scanned = run(model, data, settings, scan, context)
    outcome = scanned.picked or scanned.trials[0][0]
    return outcome.score


def main() -> None:
    """The console script."""
    sys.exit(run_command(main_job))


if __name__ == "__main__":
    main()
