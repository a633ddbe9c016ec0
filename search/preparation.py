"""A run made ready: the network traced, the problem posed, the evaluator made; nothing is scored here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from amc_env.budget import Budget, Problem
from amc_env.costs import Macs, Params
from amc_env.errors import UserError, first_line
from amc_env.evaluator import ORIGINAL, Evaluator, Scorer, Start
from amc_env.layers import LayerGraph
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.criteria import rank
from amc_env.pruning.repair import BatchNorm, Both, LeastSquares, NoRepair, Repair, Sequential
from amc_env.pruning.topology import Topology
from search.data import Data, Split
from search.export import check_formats
from search.journal import Journal
from search.settings import FinalistSettings, RepairSettings, Settings

log = logging.getLogger(__name__)

_NAMES_SHOWN = 4
_CALIBRATION_BYTES = (
    2**30
)  # of one layer's activations over all calibration images; a few layers live at once


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network and data made ready for a search; nothing has been scored yet."""

    model: nn.Module
    data: Data
    graph: LayerGraph
    problem: Problem
    settings: Settings

    def images(self, split: Split, count: int | None = None) -> Tensor:
        """Normalised images of a split on the device, the first ``count`` of them."""
        chosen = split.images if count is None else split.images[:count]
        return self.data.normalise(chosen.to(self.settings.device))


def check(settings: Settings) -> None:
    """Finds out whether this machine can do what is asked.

    Raises:
        UserError: The device or an export format is unknown, or not there.
    """
    check_formats(settings.export)
    _check_device(settings.device)


def prepare(model: nn.Module, data: Data, settings: Settings) -> Prepared:
    """Traces the network and poses the problem; mistakes that can be found without scoring are found here.

    Raises:
        UserError: The device is missing, weights are not finite, labels do not fit the outputs, nothing can
            be pruned, or a budget is out of reach.
    """
    check(settings)
    bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"weights are not finite (NaN or infinity) in {', '.join(bad[:8])}")
    model = model.to(settings.device).eval()
    example = data.normalise(data.search.images[:2].to(settings.device))
    graph = LayerGraph.trace(model, example)
    with torch.no_grad():
        outputs = model(example)
    if outputs.ndim != 2 or outputs.shape[1] < len(data.classes):
        raise UserError(
            f"the network's output has shape {tuple(outputs.shape)}; one logit for each of the "
            f"{len(data.classes)} classes of {data.name} is needed"
        )
    graph, grids = settings.granularity.decisions(graph)
    if not grids:
        raise UserError(
            f"nothing is left to decide: {'; '.join(f'{w.name}: {w.reason}' for w in graph.whole[:8])}"
        )
    costs = {"macs": Macs(graph), "params": Params(graph)}
    budgets = [
        Budget.of(costs[b.cost], len(grids), ratio=None if b.limit else b.ratio, limit=b.limit)
        for b in settings.budgets
    ]
    problem = Problem(grids, list(costs.values()), budgets)
    return Prepared(model, data, graph, problem, _with_possible_repairs(settings, Topology.of(model)))


def _with_possible_repairs(settings: Settings, topology: Topology) -> Settings:
    """The settings without the rescoring of finalists where the network cannot be mended sequentially.

    Raises:
        UserError: The search itself was to use that repair.
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
        log.info(
            "%s: %s, least reachable %.1f%%", cost.name, f"{whole:,.0f}", 100 * problem.least_ratio(cost)
        )


def _repairs(prepared: Prepared, candidates: Candidates) -> dict[str, Callable[[], Repair]]:
    """How to make each repair; made when first asked for, since calibration takes time."""
    settings: RepairSettings = prepared.settings.repair
    topology = Topology.of(candidates.original)
    train = prepared.data.train
    images = _calibration_images(prepared.graph, settings.images)

    def fitted(kind: type[LeastSquares] | type[Sequential]) -> Repair:
        return kind(
            candidates,
            topology,
            prepared.images(train, images),
            per_image=settings.per_image,
            seed=prepared.settings.seed,
            ridge=settings.ridge,
        )

    def norms() -> Repair:
        return BatchNorm(prepared.images(train, settings.norm_images))

    return {
        "none": NoRepair,
        "least_squares": partial(fitted, LeastSquares),
        "batch_norm": norms,
        "both": lambda: Both("both", (fitted(LeastSquares), norms())),
        "sequential": partial(fitted, Sequential),
    }


def _calibration_images(graph: LayerGraph, wanted: int) -> int:
    """As many images as are wanted, or as the largest layer's activations leave room for."""
    largest = max(
        max(layer.in_channels * layer.in_size[0] * layer.in_size[1], layer.out_channels * layer.positions)
        for layer in graph.layers
    )
    room = max(1, _CALIBRATION_BYTES // (4 * largest))
    if room < wanted:
        log.info("repair is calibrated on %d images instead of %d: more would fill the memory", room, wanted)
    return min(room, wanted)


def make_evaluator(prepared: Prepared, memo: Journal | None = None) -> Evaluator:
    """The evaluator that judges every policy of this run."""
    settings = prepared.settings
    orders = rank(settings.criterion.scores(prepared.model, prepared.graph))
    candidates = Candidates(prepared.model, prepared.graph, orders)
    scorer = Scorer(
        prepared.model,
        prepared.images(prepared.data.search),
        prepared.data.search.labels.to(settings.device),
        batch_size=settings.scoring.batch_size,
        channels_last=settings.scoring.channels_last,
    )
    original = scorer(prepared.model)
    log.info(
        "the original's accuracy on the %d search images: %.2f%%", len(prepared.data.search), 100 * original
    )
    if original < 2 / len(prepared.data.classes):
        log.warning("that is near chance: are the images scaled and normalised as in the network's training?")
    start = Start(ORIGINAL, candidates, _repairs(prepared, candidates))
    return Evaluator(start, prepared.problem, scorer, settings.repair.name, memo)
