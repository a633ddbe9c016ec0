"""One run from its configuration to the table at its end: what amc-search and amc-apply have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

from omegaconf import DictConfig

from search.config import compose as wiring
from search.config.command import command_line, run_folder
from search.progress import final_table
from search.report import write_report
from search.study.pipeline import Context, run
from search.study.problem import Prepared, check, prepare

log = logging.getLogger(__name__)


def prepared_of(cfg: DictConfig) -> Prepared:
    """A run of amc-search made ready, outside any folder: for scripts that measure its parts."""
    source, data = wiring.model_source(cfg), wiring.data_of(cfg)
    return prepare(source.load(data), data, wiring.settings_of(cfg, source.original_lr))


def run_job(
    cfg: DictConfig,
    program: str,
    header: Callable[[], Mapping[str, Any]],
    **parts: Callable[[], Any],
) -> float:
    """Runs the main job in the run folder.

    Args:
        cfg: The configuration of the command.
        program: The command, as it is started.
        header: Gives what of it evaluations depend on, for the journal's header and the tracker; called when the
            settings have been checked.
        parts: Settings that are not made from a section, as in `settings_of`.

    Returns:
        The final accuracy in [0, 1], for Hydra's sweepers.
    """
    folder = run_folder()
    settings = wiring.settings_of(cfg, **parts)
    source = wiring.model_source(cfg)
    source.check()
    settings = replace(settings, original_lr=source.original_lr).in_folder(folder)
    config = header()
    check(settings)
    go_on = command_line(program, folder)
    log.info("run folder: %s; if it is stopped, go on with: %s", folder, go_on)
    data = wiring.data_of(cfg)
    kind = "calibration" if data.stream else "training"  # a stream's training images are never all here
    log.info("data: %s, %d %s and %d search images", data.name, len(data.train), kind, len(data.search))
    trained = "trained here once, in seconds, and kept in the cache" if source.recipe else "no weights"
    log.info("network: %s, weights: %s", source.name, source.weights or source.url or trained)
    model = source.load(data)
    try:
        with ExitStack() as stack:
            # opened once the journal has said that the folder is ours: another run may be writing to it
            trackers = cache(lambda: stack.enter_context(wiring.trackers(cfg, folder, config)))
            context = Context(
                folder=folder,
                track=lambda metrics, step: trackers().log(metrics, step),
                model=source.name,
                config=config,
                command=command_line(program),
                begin=trackers,
            )
            finished = run(model, data, settings, context)
            report = write_report(folder)
            trackers().summary(_summary(finished.result))
    except KeyboardInterrupt:
        log.warning("stopped; nothing that was scored is lost, go on with: %s", go_on)
        raise
    final_table(finished.result, folder, report)
    last = finished.result["finetuned"] or finished.result["pruned"]
    return float(last["accuracy"])


def _summary(result: Mapping[str, Any]) -> dict[str, float]:
    figures = {}
    for stage in ("base", "pruned", "finetuned"):
        entry = result[stage]
        if isinstance(entry, dict):
            figures.update({f"{stage}/{k}": float(v) for k, v in entry.items() if isinstance(v, int | float)})
    return figures
