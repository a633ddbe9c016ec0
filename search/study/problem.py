"""The pruning problem of a run: network, data and settings made into decisions, costs and budgets.

Mistakes that can be found without scoring are found here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from amc_env.costs.counts import Macs, Params
from amc_env.costs.cycles import Cycles
from amc_env.costs.latency import runtime
from amc_env.costs.latency.cost import Latency
from amc_env.costs.memory import Activations, Memory
from amc_env.costs.storage import Storage, params_beside_weights
from amc_env.errors import UserError, first_line
from amc_env.evaluation.precision import check_precision
from amc_env.graph.layers import LayerGraph
from amc_env.graph.topology import Topology
from amc_env.graph.tracing import trace, trace_layers
from amc_env.pruning.candidate import Candidates, MaskedCandidates
from amc_env.pruning.criteria import ElementCriterion, Sample, rank
from amc_env.pruning.criteria.base import rank_after
from amc_env.pruning.granularity import Masked
from amc_env.space import Budget, Cost, Grid, Problem, figure
from search.data.base import Data, Split
from search.export import check_formats
from search.settings import (
    CyclesBudget,
    FinalistSettings,
    LatencyBudget,
    MemoryBudget,
    Settings,
    StorageBudget,
)
from search.study.latency_table import How, Subject, build, counted, read_table
from search.training.short_term import check_loader

_GONE = (
    -1e-300
)  # worth of a weight that is zero: below that of an idle one, and nothing in a sum with any other


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

    def batch(self, size: int) -> Tensor:
        """Normalised images of the search split on the device, ``size`` of them: over again where it has fewer."""
        images = self.data.search.images
        return self.data.normalise(images[torch.arange(size) % len(images)].to(self.settings.device))

    @cached_property
    def builder(self) -> Candidates | MaskedCandidates:
        """Builds the networks of strategies. Ranking their units may take passes over training images."""
        return builder_of(self, self.model)

    @cached_property
    def activations(self) -> Activations:
        """How large the activations of cut networks are. Finding out takes a pass over one image for every decision.

        Raises:
            UserError: The network cannot be traced symbolically, or they do not follow from the counts removed.
        """
        return Activations(self.model, self.graph, self.grids, self.images(self.data.search, 1))

    @property
    def masked(self) -> tuple[Grid, ...]:
        """The decisions where they mask weights, nothing where they cut channels."""
        return self.grids if self.settings.granularity.masked else ()


@dataclass(frozen=True, eq=False)
class Prepared(Ranked):
    """A network and data made ready for a search; nothing has been scored yet."""

    problem: Problem


def builder_of(
    ranked: Ranked, network: nn.Module, kept_units: Sequence[Tensor] = ()
) -> Candidates | MaskedCandidates:
    """Ranks the units of ``network`` and gives the builder of its candidates.

    Args:
        ranked: The decisions, criterion and data.
        network: The uncut network, or later weights of it in its shapes.
        kept_units: Units that earlier cuts left of every channel group, in any order; the others go first. Empty: no
            channel was cut. What earlier masks removed is zero, and goes first as well.
    """
    criterion = ranked.settings.criterion
    train = ranked.data.train
    labels = train.labels[: criterion.images].to(ranked.settings.device)
    sample = Sample(ranked.images(train, criterion.images), labels, ranked.settings.seed)
    if not ranked.masked:
        scores = criterion.channel_scores(network, ranked.graph, sample)
        return Candidates(
            network, ranked.graph, rank_after(scores, kept_units) if kept_units else rank(scores)
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


log = logging.getLogger(__name__)


_NAMES_SHOWN = 4


def check(settings: Settings) -> None:
    """Finds out whether this machine can do what is asked.

    Raises:
        UserError: The device, an export format or the latency's runtime is unknown, or not there.
    """
    check_formats(settings.export)
    check_device(settings.device)
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
    graph = (trace_layers if granularity.masked else trace)(model, example)
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


def check_device(device: str) -> None:
    """Refuses a device that torch does not have here.

    Raises:
        UserError: Such a device.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={device} cannot be used here ({first_line(error)}); use device=cpu"
        ) from error


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
        elif isinstance(budget, MemoryBudget):
            costs["memory"] = _memory(ranked)
        elif isinstance(budget, LatencyBudget):
            costs["latency"] = _latency(ranked, budget)
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


def _memory(ranked: Ranked) -> Memory:
    if ranked.masked:
        raise UserError(
            f"budget=memory counts activations, which granularity={ranked.settings.granularity.name} does not make "
            "smaller: use granularity=channel"
        )
    return Memory(ranked.activations)


def _latency(ranked: Ranked, budget: LatencyBudget) -> Latency:
    settings = ranked.settings
    if ranked.masked:
        raise UserError(
            f"budget=latency measures dense networks, which granularity={settings.granularity.name} does not make "
            "faster: use granularity=channel"
        )
    wanted = settings.latency
    threads = wanted.threads or torch.get_num_threads()
    subject = Subject(
        ranked.data.name,
        Candidates(ranked.model, ranked.graph, [torch.arange(g.total) for g in ranked.graph.groups]),
        ranked.grids,
        ranked.batch(wanted.batch),
        How(runtime(wanted.runtime, threads), threads, budget.repeats, settings.seed),
    )
    activations = counted(lambda: ranked.activations)
    if budget.table is not None:
        table = read_table(Path(budget.table), subject, elsewhere=budget.elsewhere)
    elif budget.kept is not None and budget.kept.exists():
        table = read_table(budget.kept, subject)
    else:
        table = build(subject, activations, budget.kept, tolerance=budget.tolerance, points=budget.points)
    return Latency(ranked.model, ranked.graph, table, activations)
