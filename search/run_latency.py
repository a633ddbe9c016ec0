"""amc-latency: what a network's layers cost in time, and the table that predicts its pruned networks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from amc_env.costs.latency import runtime
from amc_env.errors import UserError, require
from search.config import compose as wiring
from search.config.command import application, run_command, run_folder
from search.config.typecheck import fits, said
from search.data.loaders import seeded
from search.settings import Settings
from search.study.latency import check_of, show
from search.study.latency_table import How, Subject, build, counted, read_table
from search.study.problem import check

log = logging.getLogger(__name__)

TASKS = ("show", "build", "check")

_OWN: dict[str, Any] = {
    "do": Literal["show", "build", "check"],
    "table": str | None,
    "tolerance": float,
    "points": int,
    "check.networks": int,
    "check.seed": int,
}
"""Settings that amc-search does not have, and their types."""

_INPUTS = {
    "search.data.digits.digits": ((1, 8, 8), 10),
    "search.data.cifar10.cifar10": ((3, 32, 32), 10),
    "search.data.imagenet.imagenet": ((3, 224, 224), 1000),
}
"""Shapes of images and numbers of classes: times hang on no pixel, so none is downloaded or decoded for them."""

_NOBODY = {"_target_": "agents.baselines.Uniform", "ratio": 0.0}
"""Decides nothing: a configuration of amc-search needs an agent."""


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="latency")
@application
def main_job(cfg: DictConfig) -> float | None:
    """One task.

    Returns:
        For Hydra's sweepers: of ``show`` the milliseconds of the whole network, of ``check`` the median absolute error as
        a share.
    """
    _check(cfg)
    whole = wiring.as_search(cfg, "latency", _NOBODY)
    settings = wiring.settings_of(whole, original_lr=0.1)
    if settings.granularity.masked:
        raise UserError(
            f"granularity={settings.granularity.name} sets weights to zero, which makes no network faster in dense "
            "runtimes: use granularity=channel"
        )
    check(settings)
    folder = run_folder()
    file = folder / "latency.json" if cfg.table is None else Path(cfg.table)
    subject = _subject(whole, settings)
    log.info("run folder: %s", folder)
    log.info("%s", subject)
    if cfg.do == "show":
        return show(subject, folder).original.median_ms
    given = cfg.do == "check" and cfg.table is not None
    activations = counted(subject.activations)
    table = (
        read_table(file, subject)
        if given
        else build(subject, activations, file, tolerance=cfg.tolerance, points=cfg.points)
    )
    if cfg.do == "build":
        return None
    checked = check_of(subject, activations, table, folder, cfg.check.networks, cfg.check.seed)
    return checked.median_error


def _check(cfg: DictConfig) -> None:
    """The settings that are this command's own.

    Raises:
        UserError: Values of a wrong type, or out of range; all in one message.
    """
    if not isinstance(cfg.check, DictConfig):
        raise UserError(f"check={cfg.check} is no section of settings; see --help")
    values = {name: OmegaConf.select(cfg, name) for name in _OWN}
    wrong = [f"{n}={v} must be {said(_OWN[n])}" for n, v in values.items() if not fits(v, _OWN[n])]
    wrong += [
        f"unknown key check.{key}; there are networks, seed"
        for key in map(str, cfg.check)
        if f"check.{key}" not in _OWN
    ]
    if wrong:
        raise UserError("; ".join(wrong))
    tolerance, points = values["tolerance"], values["points"]
    networks, seed = values["check.networks"], values["check.seed"]
    require(
        {
            "tolerance": (0 < tolerance < 1, tolerance, "in (0, 1)"),
            "points": (points >= 0, points, "at least 0"),
            "check.networks": (networks >= 3, networks, "at least 3"),
            "check.seed": (
                0 <= seed != cfg.seed,
                seed,
                "at least 0, and not seed: what corrects the table proves nothing",
            ),
        }
    )
    if cfg.do == "show" and cfg.table is not None:
        raise UserError(
            f"table={cfg.table} is for amc-latency build and amc-latency check; show measures alone"
        )


def _subject(cfg: DictConfig, settings: Settings) -> Subject:
    """The network with random weights, on an input drawn at random: time hangs on shapes alone."""
    source, latency = wiring.model_source(cfg), settings.latency
    require({"latency.repeats": (latency.repeats >= 1, latency.repeats, "at least 1")})
    shape, classes = _shape_of(cfg)
    device = _device_of(latency.runtime, settings.device)
    with seeded(settings.seed):
        model = source.build(shape, classes).eval().to(device)
        example = torch.randn(latency.batch, *shape).to(device)
    threads = latency.threads or torch.get_num_threads()
    how = How(runtime(latency.runtime, threads), threads, latency.repeats, settings.seed)
    return Subject.of(source.name, model, example, settings.granularity, how)


def _shape_of(cfg: DictConfig) -> tuple[tuple[int, int, int], int]:
    """The shape of the data's images, and how many classes they have."""
    known = _INPUTS.get(cfg.data._target_)
    if known is not None:
        return known[0], cfg.data.get("classes", known[1])
    data = wiring.data_of(cfg)
    return data.image_shape, len(data.classes)


def _device_of(runtime: str, device: str) -> str:
    """Where a runtime runs: on the device chosen, but for those that know one place only."""
    if runtime == "onnx":
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
        raise UserError(f"amc-latency {overrides[0]}: there are {', '.join(TASKS)}, and settings like seed=1")
    return overrides


def _command() -> None:
    sys.argv[1:] = overrides_of(sys.argv[1:])
    main_job()


def main() -> None:
    """The console script."""
    sys.exit(run_command(_command))


if __name__ == "__main__":
    main()
