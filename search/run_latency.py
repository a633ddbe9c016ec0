"""amc-latency: what a network's layers cost in time, and the table that predicts its pruned networks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from amc_env.costs.latency import PROCESSOR_ONLY, runtime
from amc_env.errors import UserError, reported_together
from amc_env.graph.preparing import prepared
from search.config import compose as wiring
from search.config.command import application, run_command, run_folder
from search.data.loaders import seeded
from search.settings import CheckSettings, LatencySettings, LatencyStudySettings
from search.study.latency import check_of, show
from search.study.latency_table import How, Subject, build, counted, read_table
from search.study.problem import check_device

log = logging.getLogger(__name__)

TASKS = ("show", "build", "check")

_OWN = ("do", "table", "tolerance", "points", "seed", "device")


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="latency")
@application
def main_job(cfg: DictConfig) -> float | None:
    """One task.

    Returns:
        For Hydra's sweepers: of ``show`` the milliseconds of the unpruned network, of ``check`` the median absolute error as
        a share.
    """
    settings = _settings(cfg)
    folder = run_folder()
    file = folder / "latency.json" if settings.table is None else Path(settings.table)
    subject = _subject(cfg, settings)
    log.info("run folder: %s", folder)
    log.info("%s", subject)
    if settings.do == "show":
        return show(subject, folder).original.median_ms
    given = settings.do == "check" and settings.table is not None
    activations = counted(subject.activations)
    table = (
        read_table(file, subject)
        if given
        else build(subject, activations, file, tolerance=settings.tolerance, points=settings.points)
    )
    if settings.do == "build":
        return None
    networks, seed = settings.check.networks, settings.check.seed
    return check_of(subject, activations, table, folder, networks, seed).median_error


def _settings(cfg: DictConfig) -> LatencyStudySettings:
    with reported_together() as attempt:
        parts = {
            "granularity": attempt(partial(wiring.built, cfg, "granularity")),
            "latency": attempt(partial(wiring.made, LatencySettings, cfg, "latency")),
            "check": attempt(partial(wiring.made, CheckSettings, cfg, "check")),
        }
        fine = {name: part for name, part in parts.items() if part is not None}
        settings = attempt(lambda: LatencyStudySettings(**fine, **wiring.scalars(cfg, *_OWN)))
    assert isinstance(settings, LatencyStudySettings)
    return settings


def _subject(cfg: DictConfig, settings: LatencyStudySettings) -> Subject:
    """The network with random weights, on a random input: times depend on shapes alone."""
    source, latency = wiring.model_source(cfg), settings.latency
    check_device(settings.device)
    threads = latency.threads or torch.get_num_threads()
    how = How(runtime(latency.runtime, threads), threads, latency.repeats, settings.seed)
    how.runtime.check()
    shape, classes = wiring.input_of(cfg, source)
    device = _device_of(latency.runtime, settings.device)
    with seeded(settings.seed):
        model = prepared(source.build(shape, classes)).to(device)
        example = torch.randn(latency.batch, *shape).to(device)
    return Subject.of(source.name, model, example, settings.granularity, how)


def _device_of(runtime: str, device: str) -> str:
    """Where a runtime runs: on the device chosen, but for those that know one place only."""
    if runtime in PROCESSOR_ONLY:
        return "cpu"
    return "cuda" if runtime.startswith("cuda") and not device.startswith("cuda") else device


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """The command's arguments as Hydra knows them: the word that says what to do as ``do=``.

    Raises:
        UserError: The first argument is a word, and none of TASKS is among them.
    """
    overrides = list(arguments)
    place = next((i for i, argument in enumerate(overrides) if argument in TASKS), None)
    if place is not None:
        overrides[place] = f"do={overrides[place]}"
    elif overrides and "=" not in overrides[0] and not overrides[0].startswith("-"):
        raise UserError(
            f"amc-latency {overrides[0]}: there are {', '.join(TASKS)}, and settings like seed=1",
            code="unknown_name",
        )
    return overrides


def _command() -> None:
    sys.argv[1:] = overrides_of(sys.argv[1:])
    main_job()


def main() -> None:
    """The console script."""
    sys.exit(run_command(_command))


if __name__ == "__main__":
    main()
