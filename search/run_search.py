"""amc-search: search, apply, fine-tune, export, report."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from functools import cache

import hydra
from omegaconf import DictConfig

from search import wiring
from search.commands import application, command_line, run_command, run_folder
from search.pipeline import Context, run
from search.preparation import check
from search.progress import final_table
from search.report import write_report
from search.typecheck import check_types

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="search")
@application
def main_job(cfg: DictConfig) -> float:
    """One run of the main job.

    Returns:
        The final accuracy in [0, 1], for Hydra's sweepers.
    """
    check_types(cfg)
    folder = run_folder()
    source = wiring.model_source(cfg)
    source.check()
    settings = wiring.settings_of(cfg, source.original_lr)
    check(settings)
    go_on = command_line("amc-search", folder)
    log.info("run folder: %s; if it is stopped, go on with: %s", folder, go_on)
    data = wiring.data_of(cfg)
    log.info("data: %s, %d training and %d search images", data.name, len(data.train), len(data.search))
    trained = "trained here once, in seconds, and kept in the cache" if source.recipe else "no weights"
    log.info("network: %s, weights: %s", source.name, source.weights or source.url or trained)
    model = source.load(data)
    try:
        with ExitStack() as stack:
            # opened once the journal has said that the folder is ours: another run may be writing to it
            trackers = cache(lambda: stack.enter_context(wiring.trackers(cfg, folder)))
            context = Context(
                folder=folder,
                track=lambda metrics, step: trackers().log(metrics, step),
                model=source.name,
                config=wiring.header_config(cfg),
                command=command_line("amc-search"),
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


def _summary(result: dict[str, object]) -> dict[str, float]:
    figures = {}
    for stage in ("base", "pruned", "finetuned"):
        entry = result[stage]
        if isinstance(entry, dict):
            figures.update({f"{stage}/{k}": float(v) for k, v in entry.items() if isinstance(v, int | float)})
    return figures


def main() -> None:
    """The console script."""
    sys.exit(run_command(main_job))


if __name__ == "__main__":
    main()
