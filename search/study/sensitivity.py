"""A sensitivity scan: every decision cut alone over a list of ratios, and what a common threshold makes of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from torch import nn

from agents.sensitivity import Curve, curves_of, pick, plan
from amc_env.evaluation.evaluator import Evaluator
from amc_env.evaluation.pruner import ORIGINAL
from amc_env.space import Removed, SearchSpace, Trial
from search import files
from search.data.base import Data
from search.output.formatting import amount, budget_lines, cost_name, percent
from search.output.progress import Progress
from search.settings import SensitivitySettings, Settings
from search.study.evaluation import make_evaluator, start_of
from search.study.identity import score_identity
from search.study.journal import Journal
from search.study.pipeline import Context
from search.study.problem import PruningProblem, announce
from search.study.results import budget_figures, strategy_json, write_json

log = logging.getLogger(__name__)


CSV, PLOT, STRATEGY, REPORT = "sensitivity.csv", "plots/sensitivity.png", "strategy.json", "report.html"


_SHOWN = 5  # decisions named at the end; sensitivity.csv has all


@dataclass(frozen=True, eq=False)
class Scanned:
    """What a scan ends with.

    Attributes:
        trials: A list per decision: the original, then what cuts the decision alone, less to more.
        curves: The same as accuracy against ratio.
        threshold: The accuracy, in [0, 1], that was picked for all decisions; None where there is neither a budget
            nor a drop of accuracy to pick it by.
        picked: The trial of the strategy that came of it.
    """

    trials: tuple[tuple[Trial, ...], ...]
    curves: tuple[Curve, ...]
    threshold: float | None = None
    picked: Trial | None = None


def run(
    model: nn.Module, data: Data, settings: Settings, scan: SensitivitySettings, context: Context
) -> Scanned:
    """Scans a network, picks ratios for its budget, and writes all of it into the run folder.

    A run in the same folder takes what was scored from there; the budget, the drop of accuracy and the list of ratios
    may have changed.

    Args:
        model: The trained network.
        data: Its data.
        settings: The run's settings; the agent does not matter.
        scan: The ratios and the drop of accuracy.
        context: The run folder and the header's configuration.

    Raises:
        UserError: What was asked cannot be done, as in `search.study.pipeline.run`.
    """
    problem = PruningProblem.build(model, data, settings)
    announce(problem)
    space = problem.space
    # What is scored depends on no budget: the journal serves them all.
    free = replace(problem, settings=replace(settings, budgets=()))
    start = start_of(problem, ORIGINAL, problem.builder)
    with Journal(context.folder, score_identity(free), free.space, ordered=False) as journal:
        context.start()
        if journal.replayed:
            log.info("resuming with %d evaluations of %s", journal.replayed, context.folder)
        with closing(make_evaluator(free, journal, start)) as evaluator:
            scanned = _scan(evaluator, space, scan.ratios)
            if space.budgets or scan.threshold is not None:
                common = pick(space, scanned.curves, scan.threshold)
                (picked,) = _evaluated(evaluator, space, [common.removed])
                scanned = replace(scanned, threshold=common.threshold, picked=picked)
        _write(scanned, problem, context.folder)
    _tell(scanned, problem, context.folder)
    return scanned


def _scan(evaluator: Evaluator, space: SearchSpace, ratios: Sequence[float]) -> Scanned:
    """Scores every decision alone, front to back, so that candidates share what is before the cut."""
    plans = plan(space, ratios)
    asked: list[tuple[str, Removed]] = [("the original", (0,) * len(plans))]
    for place, (grid, alone) in enumerate(zip(space.grids, plans, strict=True)):
        asked += [(f"{grid.name} without {percent(r[place] / grid.total, 0)}", r) for r in alone]
    scored = []
    with Progress() as progress:
        stage = progress.stage("scan", len(asked))
        found = _evaluated(evaluator, space, [removed for _, removed in asked])
        for (what, _), trial in zip(asked, found, strict=True):
            stage.advance(f"{what}: {percent(trial.score)}")
            scored.append(trial)
    original, rest = scored[0], iter(scored[1:])
    cut = [tuple(islice(rest, len(alone))) for alone in plans]
    accuracies = [[trial.score for trial in alone] for alone in cut]
    curves = curves_of(space, plans, original.score, accuracies)
    return Scanned(tuple((original, *alone) for alone in cut), tuple(curves))


def _evaluated(evaluator: Evaluator, space: SearchSpace, removed: Sequence[Removed]) -> Iterator[Trial]:
    """Outcomes with the costs of this run: those of the journal may have been scored for a budget on others."""
    for trial in evaluator.trials([space.strategy(counts) for counts in removed]):
        yield replace(trial, costs=space.cost(trial.removed))


def _write(scanned: Scanned, problem: PruningProblem, folder: Path) -> None:
    """sensitivity.csv, the plot and, where one was picked, strategy.json."""
    _write_csv(scanned, folder / CSV)
    picked = scanned.picked
    ratios = () if picked is None else picked.strategy.ratios
    from search.output.plots import plot_sensitivity

    metric = problem.settings.task.metric
    plot_sensitivity(scanned.curves, folder / PLOT, threshold=scanned.threshold, picked=ratios, metric=metric)
    if picked is not None:
        write_json(folder / STRATEGY, strategy_json(problem, picked))
    _write_report(scanned, problem, folder)


def _write_report(scanned: Scanned, problem: PruningProblem, folder: Path) -> None:
    """report.html: the curves, and every decision with what it loses and what was picked."""
    from search.output.report import write_page
    from search.output.sections import Picture, Section, Table, data_uri

    unpruned, picked, metric = scanned.trials[0][0], scanned.picked, problem.settings.task.metric
    rows = []
    for curve in scanned.curves:
        cut = None if picked is None else picked.strategy.decisions[curve.name]
        taken = "" if cut is None else f"{cut.removed:,} of {cut.total:,}"
        rows.append((curve.name, f"{100 * curve.drop:.2f} points", taken))
    largest = max(curve.drop for curve in scanned.curves) or 1.0
    bars = [max(0.0, curve.drop) / largest for curve in scanned.curves]
    caption = f"Score ({metric}) on the search split with one decision pruned alone, against its ratio."
    table = Table(("decision", "mean drop", "removed by the strategy picked"), rows, bars)
    most = max(scanned.curves, key=lambda curve: curve.drop)
    facts = [(f"{metric} of the original", percent(unpruned.score)), ("decisions", len(rows))]
    if picked is not None:
        facts += [(f"{metric} of the strategy picked", percent(picked.score))]
    sections = (
        Section("Sensitivity", (Picture(caption, data_uri(folder / PLOT)),)),
        Section("Decisions, front to back", (table,)),
    )
    write_page(
        folder / REPORT, f"{most.name} is the most sensitive of {len(rows)} decisions.", facts, sections
    )


def _write_csv(scanned: Scanned, path: Path) -> None:
    """A row for each evaluation, with its costs; the score is in [0, 1]."""
    costs = list(scanned.trials[0][0].costs)
    rows: list[Sequence[object]] = []
    for curve, alone in zip(scanned.curves, scanned.trials, strict=True):
        for trial in alone:
            cut = trial.strategy.decisions[curve.name]
            shown = (f"{cut.ratio:.6g}", cut.removed, cut.total, f"{trial.score:.6g}")
            rows.append((curve.name, *shown, *(f"{trial.costs[cost]:.12g}" for cost in costs)))
    files.write_csv(path, ("decision", "ratio", "removed", "total", "accuracy", *costs), rows)


def _tell(scanned: Scanned, problem: PruningProblem, folder: Path) -> None:
    """The most sensitive decisions, what was picked, and where to look further."""
    most = sorted(scanned.curves, key=lambda curve: -curve.drop)[:_SHOWN]
    width = max(len(curve.name) for curve in most)
    log.info("most sensitive, by the mean drop of %s over the ratios measured:", problem.settings.task.metric)
    for curve in most:
        lost = f"{100 * curve.drop:6.2f} points"
        if scanned.picked is not None:
            cut = scanned.picked.strategy.decisions[curve.name]
            lost += f", {cut.removed:4d} of {cut.total} removed ({percent(cut.ratio, 1)})"
        log.info("  %-*s %s", width, curve.name, lost)
    if scanned.picked is not None:
        _tell_picked(scanned.picked, scanned, problem)
    written = [CSV, PLOT, REPORT] if scanned.picked is None else [CSV, PLOT, STRATEGY, REPORT]
    log.info("%s are in %s", " and ".join((", ".join(written[:-1]), written[-1])), folder)


def _tell_picked(picked: Trial, scanned: Scanned, problem: PruningProblem) -> None:
    unpruned = scanned.trials[0][0]
    costs = [
        f"{amount(name, value)} {cost_name(name)} ({percent(value / unpruned.costs[name], 1)})"
        for name, value in picked.costs.items()
    ]
    log.info(
        "picked where each decision alone keeps %s: %s %s on the search split (original %s), %s",
        percent(scanned.threshold or 0.0),
        problem.settings.task.metric,
        percent(picked.score),
        percent(unpruned.score),
        ", ".join(costs),
    )
    for line, _ in budget_lines(budget_figures(problem, picked.strategy.removed), unpruned.costs):
        log.info("budget: %s", line)
