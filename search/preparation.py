"""A run made ready: the network traced, the problem posed, the evaluator made; nothing is scored here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import cast

import torch
from torch import Tensor, nn

from amc_env.budget import Budget, Problem
from amc_env.costs import Cost, Macs, Params
from amc_env.cycles import Cycles
from amc_env.errors import UserError, first_line
from amc_env.evaluator import ORIGINAL, Evaluator, Start
from amc_env.layers import LayerGraph
from amc_env.prefix import PrefixScorer
from amc_env.pruning.candidate import Candidates, MaskedCandidates
from amc_env.pruning.criteria import ElementCriterion, Sample, rank
from amc_env.pruning.granularity import Masked
from amc_env.pruning.masked_repair import MaskedLeastSquares, MaskedSequential
from amc_env.pruning.repair import BatchNorm, Both, LeastSquares, NoRepair, Repair, Sequential
from amc_env.pruning.topology import Topology
from amc_env.pruning.widen import rank_after
from amc_env.storage import Storage, params_beside_weights
from amc_env.strategy import Grid
from search.data import Data, Split
from search.export import check_formats
from search.journal import Journal
from search.settings import (
    CyclesBudget,
    FinalistSettings,
    RepairSettings,
    Settings,
    StorageBudget,
)

log = logging.getLogger(__name__)

_NAMES_SHOWN = 4
_GONE = (
    -1e-300
)  # worth of a weight that is zero: below that of an idle one, and nothing in a sum with any other
_CALIBRATION_BYTES = (
    2**30
)  # of one layer's activations over all calibration images; a few layers live at once


@dataclass(frozen=True, eq=False)
class Ranked:
    """A network's decisions, and what each of them removes first.

    Attributes:
        model: The network, in eval mode on the device.
        data: Its data.
        settings: The run's settings.
        graph: Its layers and coupled channels.
        grids: The decisions' feasible counts.
    """

    model: nn.Module
    data: Data
    settings: Settings
    graph: LayerGraph
    grids: tuple[Grid, ...]

    def images(self, split: Split, count: int | None = None) -> Tensor:
        """Normalised images of a split on the device, the first ``count`` of them."""
        chosen = split.images if count is None else split.images[:count]
        return self.data.normalise(chosen.to(self.settings.device))

    @cached_property
    def builder(self) -> Candidates | MaskedCandidates:
        """Builds the networks of strategies. Ranking their units may take passes over training images."""
        return builder_of(self, self.model)

    @property
    def masked(self) -> tuple[Grid, ...]:
        """The decisions where they mask weights, nothing where they cut channels."""
        return self.grids if self.settings.granularity.masked else ()


@dataclass(frozen=True, eq=False)
class Prepared(Ranked):
    """A network and data made ready for a search; nothing has been scored yet."""

    problem: Problem


def builder_of(
    ranked: Ranked, network: nn.Module, kept_units: Sequence[Tensor] | None = None
) -> Candidates | MaskedCandidates:
    """Ranks the units of ``network`` and gives the builder of its candidates.

    Args:
        ranked: The decisions, criterion and data.
        network: The uncut network, or later weights of it in its shapes.
        kept_units: Units that earlier cuts left of every channel group, in any order; the others go first. What
            earlier masks removed is zero, and goes first as well.
    """
    criterion = ranked.settings.criterion
    train = ranked.data.train
    labels = train.labels[: criterion.images].to(ranked.settings.device)
    sample = Sample(ranked.images(train, criterion.images), labels, ranked.settings.seed)
    if not ranked.masked:
        scores = criterion.channel_scores(network, ranked.graph, sample)
        return Candidates(
            network, ranked.graph, rank(scores) if kept_units is None else rank_after(scores, kept_units)
        )
    granularity = cast(Masked, ranked.settings.granularity)
    layers = {grid.name: ranked.graph.layer(grid.name) for grid in ranked.grids}
    saliency = cast(ElementCriterion, criterion).saliency(network, list(layers.values()), sample)
    places = {}
    for name, layer in layers.items():
        weight = network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        worth = torch.where(weight == 0, _GONE, saliency[name].to(weight.device))
        places[name] = granularity.places(worth, layer)
    return MaskedCandidates(network, ranked.grids, places)


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


def costs_of(ranked: Ranked) -> dict[str, Cost]:
    """The costs that every outcome states: MACs, parameters, and what a budget limits besides."""
    costs: dict[str, Cost] = {
        "macs": Macs(ranked.graph, ranked.masked),
        "params": Params(ranked.graph, ranked.masked),
    }
    for budget in ranked.settings.budgets:
        if isinstance(budget, StorageBudget):
            costs["storage"] = storage_of(ranked, budget.format, budget.value_bits)
        elif isinstance(budget, CyclesBudget):
            costs["cycles"] = _cycles(ranked, budget)
    return costs


def storage_of(ranked: Ranked, format: str, value_bits: int = 32) -> Storage:
    """Stored size of the masked network.

    Raises:
        UserError: Nothing is masked, or the format does not fit.
    """
    if not ranked.masked:
        raise UserError(
            "budget=storage counts the bytes of masked weights, and granularity=channel masks none: use "
            "budget=params, or a granularity such as fine_grained"
        )
    builder = cast(MaskedCandidates, ranked.builder)
    others = params_beside_weights(ranked.graph)
    return Storage(ranked.graph.layers, ranked.grids, builder.places, others, format, value_bits=value_bits)


def _cycles(ranked: Ranked, budget: CyclesBudget) -> Cycles:
    if ranked.masked:
        raise UserError(
            f"budget=cycles counts a dense array processor, which granularity={ranked.settings.granularity.name} "
            "does not make faster: use granularity=channel"
        )
    return Cycles(
        ranked.graph,
        input_parallel=budget.input_parallel,
        output_parallel=budget.output_parallel,
        pixel_parallel=budget.pixel_parallel,
    )


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


def _repairs(
    prepared: Prepared, candidates: Candidates | MaskedCandidates
) -> dict[str, Callable[[], Repair]]:
    """How to make each repair; made when first asked for, since calibration takes time."""
    settings: RepairSettings = prepared.settings.repair
    topology = Topology.of(candidates.original)
    train = prepared.data.train
    images = _calibration_images(prepared.graph, settings.images)
    makers: dict[str, Callable[..., Repair]]
    if isinstance(candidates, MaskedCandidates):
        decided = [prepared.graph.layer(grid.name) for grid in prepared.grids]
        ridge = settings.mask_ridge
        makers = {
            "least_squares": partial(MaskedLeastSquares, candidates.original, decided),
            "sequential": partial(MaskedSequential, candidates.original, decided),
        }
    else:
        ridge = settings.ridge
        makers = {
            "least_squares": partial(LeastSquares, candidates),
            "sequential": partial(Sequential, candidates),
        }

    def fitted(name: str) -> Repair:
        options = {"per_image": settings.per_image, "seed": prepared.settings.seed, "ridge": ridge}
        return makers[name](topology, prepared.images(train, images), **options)

    def norms() -> Repair:
        return BatchNorm(prepared.images(train, settings.norm_images))

    return {
        "none": NoRepair,
        "least_squares": partial(fitted, "least_squares"),
        "batch_norm": norms,
        "both": lambda: Both("both", (fitted("least_squares"), norms())),
        "sequential": partial(fitted, "sequential"),
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


def start_of(prepared: Prepared, name: str, candidates: Candidates | MaskedCandidates) -> Start:
    """A state of the weights that strategies are cut from, with its repairs."""
    return Start(name, candidates, _repairs(prepared, candidates))


def make_evaluator(prepared: Prepared, memo: Journal | None = None, start: Start | None = None) -> Evaluator:
    """The evaluator that judges every policy of this run.

    Args:
        prepared: The run.
        memo: Keeps outcomes across runs.
        start: The weights to begin with; by default the network's own.
    """
    settings = prepared.settings
    start = start or start_of(prepared, ORIGINAL, prepared.builder)
    scorer = PrefixScorer(
        prepared.model,
        prepared.images(prepared.data.search),
        prepared.data.search.labels.to(settings.device),
        batch_size=settings.scoring.batch_size,
        channels_last=settings.scoring.channels_last,
    )
    original = scorer(start.candidates.original)
    log.info(
        "%s accuracy on the %d search images: %.2f%%",
        "the original's" if start.name == ORIGINAL else f"{start.name}: the starting",
        len(prepared.data.search),
        100 * original,
    )
    if original < 2 / len(prepared.data.classes):
        log.warning("that is near chance: are the images scaled and normalised as in the network's training?")
    return Evaluator(start, prepared.problem, scorer, settings.repair.name, memo)
