"""One run from its configuration to the table at its end: what amc-search and amc-apply have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from amc_env.graph.preparing import prepared
from search.api import say_rate
from search.config import compose as wiring
from search.config.command import IncompleteError, command_line, resumable, run_folder
from search.output.formatting import layer_table
from search.output.progress import final_table
from search.output.run_files import network_files, pictures
from search.output.run_result import RunResult
from search.output.tracking import Outcome
from search.settings import SAFE_LR
from search.study.pipeline import Context, run
from search.study.problem import check

log = logging.getLogger(__name__)


def run_job(
    cfg: DictConfig,
    program: str,
    parts: Mapping[str, Callable[[], Any]] | None = None,
) -> float:
    """Runs the main job in the run folder.

    Args:
        cfg: The configuration of the command.
        program: The command, as it is started.
        parts: Settings that are not made from a section, as in `settings_of`.

    Returns:
        The search score of the delivered strategy in [0, 1], for Hydra's sweepers (to be maximised): a sweep must not
        choose by the test split.
    """
    folder = run_folder()
    settings = wiring.settings_of(cfg, parts=parts)
    source = wiring.model_source(cfg)
    source.check()
    settings = replace(settings, original_lr=source.original_lr or SAFE_LR).in_folder(folder)
    check(settings)
    go_on = command_line(program, folder)
    log.info("run folder: %s; to resume an interrupted run: %s", folder, go_on)
    with resumable(go_on):
        data = wiring.data_of(cfg, source)
        kind = "calibration" if data.stream else "training"  # a stream's training images are never all here
        log.info("data: %s, %d %s and %d search images", data.name, len(data.train), kind, len(data.search))
        log.info("network: %s, weights: %s", source.name, source.origin)
        say_rate(settings, known=source.original_lr is not None)
        model = prepared(source.load(data))
        with ExitStack() as stack:
            # opened once the journal has said that the folder is ours: another run may be writing to it
            trackers = cache(lambda: stack.enter_context(wiring.trackers(cfg, folder)))
            context = Context(
                folder=folder,
                track=lambda metrics, step: trackers().log(metrics, step),
                model=source.name,
                command=command_line(program),
                configuration=wiring.text_of(cfg),
                begin=trackers,
            )
            finished = run(model, data, settings, context)
            from search.output.report import write_report  # matplotlib, which a search does without

            report = write_report(folder)
            trackers().outcome(_outcome(finished.result, folder))
    final_table(finished.result, folder, report)
    _check_exports(finished.result)
    return finished.result.search.search_accuracy


def _check_exports(result: RunResult) -> None:
    failed = [f"{export.path.name}: {export.error}" for export in result.exports if export.error]
    failed += [f"{name} in {row.folder}" for row in result.front[:-1] for name in row.failed]
    if failed:
        raise IncompleteError(f"the run is complete but for exports that failed: {'; '.join(failed)}")


def _outcome(result: RunResult, folder: Path) -> Outcome:
    figures = {
        f"{stage}/{name}": float(value)
        for stage, network in result.networks.items()
        for name, value in network.to_json().items()
        if isinstance(value, int | float)
    }
    return Outcome(figures, *layer_table(result), pictures(folder), network_files(folder, result))
