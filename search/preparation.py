"""A run made ready: the network traced, the problem posed, mistakes found; nothing is scored here."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import nn

from amc_env.budget import Budget, Problem, figure
from amc_env.errors import UserError, first_line
from amc_env.latency import runtime
from amc_env.layers import LayerGraph
from amc_env.precision import check_precision
from amc_env.pruning.topology import Topology
from search.costing import costs_of
from search.data import Data
from search.output.export import check_formats
from search.ranking import Prepared, Ranked
from search.settings import FinalistSettings, LatencyBudget, Settings
from search.short_term import check_loader

log = logging.getLogger(__name__)

_NAMES_SHOWN = 4


def check(settings: Settings) -> None:
    """Finds out whether this machine can do what is asked.

    Raises:
        UserError: The device, an export format or the latency's runtime is unknown, or not there.
    """
    check_formats(settings.export)
    _check_device(settings.device)
    check_precision(settings.scoring.precision, settings.device)
    here = (isinstance(b, LatencyBudget) and not (b.table and b.elsewhere) for b in settings.budgets)
    if settings.latency.repeats or any(here):
        runtime(settings.latency.runtime, settings.latency.threads or 1).check()


def prepare(model: nn.Module, data: Data, settings: Settings) -> Prepared:
    """Traces the network and poses the problem; mistakes that can be found without scoring are found here.

    Raises:
        UserError: The device is missing, weights are not finite, labels do not fit the outputs, nothing can
            be pruned, a budget is out of reach, or the data's loader does not fit short-term fine-tuning.
    """
    check(settings)
    if settings.short_term_steps:
        check_loader(data)
    bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"weights are not finite (NaN or infinity) in {', '.join(bad[:8])}")
    model = model.to(settings.device).eval()
    example = data.normalise(data.search.images[:2].to(settings.device))
    granularity = settings.granularity
    graph = (LayerGraph.layers_of if granularity.masked else LayerGraph.trace)(model, example)
    with torch.no_grad():
        outputs = model(example)
    if outputs.ndim != 2 or outputs.shape[1] < len(data.classes):
        raise UserError(
            f"the network's output has shape {tuple(outputs.shape)}; one logit for each of the "
            f"{len(data.classes)} classes of {data.name} is needed"
        )
    graph, grids = granularity.decisions(graph)
    if not grids:
        raise UserError(
            f"nothing is left to decide: {'; '.join(f'{w.name}: {w.reason}' for w in graph.whole[:8])}"
        )
    settings = _with_possible_repairs(settings, Topology.of(model))
    return posed(Ranked(model, data, settings, graph, grids))


def posed(ranked: Ranked) -> Prepared:
    """The search problem: all costs, and the budgets of the settings.

    Raises:
        UserError: A budget does not fit the granularity, or is out of reach.
    """
    costs = costs_of(ranked)
    budgets = [
        Budget.of(costs[b.cost], len(ranked.grids), ratio=None if b.limit else b.ratio, limit=b.limit)
        for b in ranked.settings.budgets
    ]
    problem = Problem(ranked.grids, list(costs.values()), budgets)
    prepared = Prepared(ranked.model, ranked.data, ranked.settings, ranked.graph, ranked.grids, problem)
    if "builder" in vars(ranked):  # the storage needed it: ranked once
        vars(prepared)["builder"] = ranked.builder
    return prepared


def announce(prepared: Prepared) -> None:
    """Says what will be decided, what stays whole and why, and what can be reached."""
    problem = prepared.problem
    log.info(
        "%d decisions over %d layers; left whole: %d",
        len(problem.grids),
        len(prepared.graph.layers),
        len(prepared.graph.whole),
    )
    for reason in dict.fromkeys(w.reason for w in prepared.graph.whole):
        names = [w.name for w in prepared.graph.whole if w.reason == reason]
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        log.info("  %s%s: %s", ", ".join(names[:_NAMES_SHOWN]), more, reason)  # report.html lists them all
    for cost in problem.costs:
        whole = cost([0] * len(problem.grids))
        log.info("%s: %s, least reachable %.1f%%", cost.name, figure(whole), 100 * problem.least_ratio(cost))


def _with_possible_repairs(settings: Settings, topology: Topology) -> Settings:
    """The settings with repairs that can mend this network.

    Raises:
        UserError: The search itself was to use a repair that cannot.
    """
    if not topology.reason:
        return settings
    if settings.repair.name == "sequential":
        raise UserError(
            f"repair=sequential does not work for this network: {topology.reason}; use repair=least_squares"
        )
    if settings.finalists.count and settings.finalists.repair == "sequential":
        log.warning(
            "the best is delivered as the search scored it, not repaired sequentially: %s", topology.reason
        )
        return replace(settings, finalists=FinalistSettings(count=0, repair=settings.repair.name))
    return settings


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={device} cannot be used here ({first_line(error)}); use device=cpu"
        ) from error
