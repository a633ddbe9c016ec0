"""Whole runs on random images and small networks, in tenths of a second."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from networks import network

from agents.baselines import Random
from amc_env.pruning.granularity import NM, Channel, FineGrained, Granularity, Kernel, Vector
from search.data.base import Data
from search.output.tracking import CsvTracker
from search.settings import (
    BudgetSettings,
    FinalistSettings,
    FinetuneSettings,
    LatencySettings,
    RepairSettings,
    Settings,
)
from search.study.pipeline import Context, Finished, run

GRANULARITIES: dict[str, Granularity] = {
    "channel": Channel(multiple=1),
    "fine_grained": FineGrained(),
    "vector": Vector(),
    "kernel": Kernel(),
    "nm": NM(2, 4),
}

TUNING = FinetuneSettings(epochs=2, batch_size=16)
SETTINGS = Settings(
    agent=Random(),
    episodes=4,
    baselines=(),
    budgets=(BudgetSettings("params", 0.6),),
    repair=RepairSettings("batch_norm", images=16, norm_images=16),
    finalists=FinalistSettings(count=0),
    finetune=TUNING,
    latency=LatencySettings(repeats=0),
    export=(),
    original_lr=0.1,
)


def small(granularity: str = "fine_grained", **more: Any) -> Settings:
    """Settings of a quick run."""
    return replace(SETTINGS, granularity=GRANULARITIES[granularity], **more)


class Tracked:
    """What a run tracked; with ``stop_at``, an error at that episode (or epoch), as if the run had been stopped there."""

    def __init__(self, stop_at: int | None = None, stop_at_epoch: int | None = None):
        self.stop_at, self.stop_at_epoch = stop_at, stop_at_epoch
        self.episodes: list[int] = []
        self.epochs: list[int] = []

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        if "finetune/loss" in metrics:
            if step == self.stop_at_epoch:
                raise Stopped
            self.epochs.append(step)
            return
        if step == self.stop_at:
            raise Stopped
        self.episodes.append(step)


class Stopped(Exception):  # noqa: N818 -- nothing is wrong with the run
    """The run was stopped."""


def go(
    folder: Path, data: Data, settings: Settings, name: str = "concat", track: Tracked | None = None
) -> Finished:
    """Runs the pipeline on a network of `networks`, with metrics.csv as the command has it."""
    table, notes = cache(lambda: CsvTracker(folder)), track or Tracked()

    def both(metrics: Mapping[str, float], step: int) -> None:
        notes(metrics, step)
        table().log(metrics, step)

    return run(network(name), data, settings, Context(folder, both, model=name, begin=table))
