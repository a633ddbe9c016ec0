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

from amc_env.costs.base import COSTS, BudgetSettings
from amc_env.costs.latency import LatencyBudget, runtime
from amc_env.costs.latency.table import LatencyTable
from amc_env.costs.memory import Activations
from amc_env.errors import UserError, first_line
from amc_env.evaluation.on_ray import check_ray
from amc_env.evaluation.precision import check_precision
from amc_env.evaluation.scorer import score
from amc_env.graph.layers import LayerGraph
from amc_env.inputs import Inputs, call, take, to_device
from amc_env.pruning.candidate import Candidates, MaskedCandidates
from amc_env.pruning.criteria import ElementCriterion, Sample, rank
from amc_env.pruning.criteria.base import rank_after
from amc_env.pruning.granularity import Masked, left_alone, traced
from amc_env.space import Budget, Cost, Grid, SearchSpace
from amc_env.tasks import Segmentation, Task
from search.data.base import Data, Split
from search.data.reading import Reader, Signature
from search.output.export import check_formats
from search.output.formatting import amount, cost_name, percent
from search.settings import Settings
from search.study.latency_table import How, Subject, build, counted, read_table
from search.training.short_term import check_loader

log = logging.getLogger(__name__)

_GONE = -1e-300
"""Saliency of a weight that is zero: below that of an unused one, and nothing in a sum with any other."""
_NAMES_SHOWN = 4


@dataclass(frozen=True, eq=False)
class PruningProblem:
    """A network, its data and the settings, made ready for a search. Nothing has been scored yet.

    Attributes:
        model: The network, in eval mode on the device.
        data: Its data.
        settings: The run's settings.
        graph: Its layers and coupled channels.
        grids: The decisions' feasible counts.
        candidates: What builds pruned networks, where it is known already; else the units are ranked on first use.
    """

    model: nn.Module
    data: Data
    settings: Settings
    graph: LayerGraph
    grids: tuple[Grid, ...]
    candidates: Candidates | MaskedCandidates | None = None

    @classmethod
    def build(cls, model: nn.Module, data: Data, settings: Settings) -> PruningProblem:
        """Trace the network and find every mistake that can be found without scoring.

        Raises:
            UserError: The device is missing, weights are not finite, labels do not fit the outputs, nothing can be
                pruned, a budget is out of reach, or the data's loader does not fit short-term fine-tuning.
        """
        check(settings)
        if settings.short_term_steps:
            check_loader(data)
        bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
        if bad:
            raise UserError(
                f"weights are not finite (NaN or infinity) in {', '.join(bad[:8])}", code="not_finite"
            )
        model = model.to(settings.device).eval()
        data = _of_task(data, settings.task, model)
        example = data.normalise(to_device(take(data.search.inputs, slice(2)), settings.device))
        granularity = settings.granularity
        graph = traced(model, example, granularity)
        _check_outputs(model, example, data, settings.task)
        graph, grids = granularity.decisions(graph)
        if settings.keep:
            types = {layer.name: type(model.get_submodule(layer.name)).__name__ for layer in graph.layers}
            graph, grids = left_alone(graph, grids, settings.keep, types)
        if not grids:
            reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in graph.skipped[:8])
            raise UserError(f"nothing is left to decide: {reasons}", code="nothing_to_prune")
        problem = cls(model, data, settings, graph, grids)
        problem.space  # noqa: B018 -- an unreachable budget is refused now
        return problem

    @cached_property
    def space(self) -> SearchSpace:
        """Decisions, costs and budgets of the settings.

        Raises:
            UserError: A budget does not fit the granularity, or is out of reach.
        """
        costs = costs_of(self)
        budgets = [
            Budget.of(costs[b.cost], len(self.grids), ratio=None if b.limit else b.ratio, limit=b.limit)
            for b in self.settings.budgets
        ]
        try:
            return SearchSpace(self.grids, list(costs.values()), budgets)
        except UserError as error:
            if not self.graph.skipped:
                raise
            names = ", ".join(f"{layer.name} ({layer.reason})" for layer in self.graph.skipped[:_NAMES_SHOWN])
            more = len(self.graph.skipped) - _NAMES_SHOWN
            rest = f" and {more} more" if more > 0 else ""
            raise UserError(
                f"{error}. Not pruned: {names}{rest}", code=error.code, field=error.field
            ) from error

    @cached_property
    def builder(self) -> Candidates | MaskedCandidates:
        """Builds the networks of strategies. Ranking their units may take passes over training images."""
        return self.candidates or builder_of(self, self.model)

    @cached_property
    def activations(self) -> Activations:
        """Sizes of the activations of pruned networks; takes a pass over one image for every decision.

        Raises:
            UserError: The network cannot be traced symbolically, or they do not follow from the counts removed.
        """
        return Activations(self.model, self.graph, self.grids, self.inputs(self.data.search, 1))

    def latency_table(self, budget: LatencyBudget) -> tuple[LatencyTable, Activations | None]:
        """See `amc_env.costs.base.CostInputs`."""
        return _latency_table(self, budget)

    @property
    def masked(self) -> tuple[Grid, ...]:
        """The decisions where they mask weights, nothing where they cut channels."""
        return self.grids if self.settings.granularity.masked else ()

    def inputs(self, split: Split, count: int | None = None) -> Inputs:
        """Network inputs of a split on the device, the first ``count`` of them."""
        return self.data.normalise(to_device(take(split.inputs, slice(count)), self.settings.device))

    def score(self, network: nn.Module, split: Split) -> float:
        """Score of a network on a split that may be larger than the memory: inputs are normalised batch by batch."""
        device = self.settings.device

        def prepare(batch: Inputs) -> Inputs:
            return self.data.normalise(to_device(batch, device))

        return score(
            network, split.inputs, to_device(split.targets, device), self.settings.task, prepare=prepare
        )

    def batch(self, size: int) -> Inputs:
        """``size`` network inputs of the search split on the device, repeated where it has fewer."""
        split = self.data.search
        chosen = take(split.inputs, torch.arange(size) % len(split))
        return self.data.normalise(to_device(chosen, self.settings.device))


def _of_task(data: Data, task: Task, model: nn.Module) -> Data:
    """The data with targets as the task takes them, and batches of its loader read for the task and the network."""

    def ready(split: Split) -> Split:
        return replace(split, targets=task.targets(data.name, split.targets))

    reader = data.reader
    if reader is None or reader.task != task:
        reader = Reader(task, Signature.of(model))
    train, search, test = ready(data.train), ready(data.search), data.test and ready(data.test)
    augment = data.augment and not isinstance(
        task, Segmentation
    )  # labels of pixels would stay where they were
    return replace(data, train=train, search=search, test=test, augment=augment, reader=reader)


def _check_outputs(model: nn.Module, example: Inputs, data: Data, task: Task) -> None:
    with torch.no_grad():
        outputs = task.read(call(model, example))
    task.check(data.name, outputs, to_device(data.search.targets, "cpu"))
    if task.classes(outputs) < len(data.classes):
        raise UserError(
            f"the network's output has shape {tuple(outputs.shape)}; one logit for each of the "
            f"{len(data.classes)} classes of {data.name} is needed",
            code="wrong_output",
        )


def builder_of(
    problem: PruningProblem, network: nn.Module, kept_units: Sequence[Tensor] = ()
) -> Candidates | MaskedCandidates:
    """Ranks the units of ``network`` and gives the builder of its candidates.

    Args:
        problem: The decisions, criterion and data.
        network: The uncut network, or later weights of it in its shapes.
        kept_units: Units that earlier cuts left of every channel group, in any order; the others go first. Empty: no
            channel was cut. What earlier masks removed is zero, and goes first as well.
    """
    criterion = problem.settings.criterion
    train = problem.data.train
    settings = problem.settings
    targets = to_device(take(train.targets, slice(criterion.images)), settings.device)
    sample = Sample(problem.inputs(train, criterion.images), targets, settings.seed, settings.task)
    if not problem.masked:
        scores = criterion.channel_scores(network, problem.graph, sample)
        return Candidates(
            network, problem.graph, rank_after(scores, kept_units) if kept_units else rank(scores)
        )
    granularity = cast(Masked, problem.settings.granularity)
    layers = {grid.name: problem.graph.layer(grid.name) for grid in problem.grids}
    saliency = cast(ElementCriterion, criterion).saliency(network, list(layers.values()), sample)
    removal_rank = {}
    for name, layer in layers.items():
        weight = network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        worth = torch.where(weight == 0, _GONE, saliency[name].to(weight.device))
        removal_rank[name] = granularity.removal_rank(worth, layer)
    return MaskedCandidates(network, problem.grids, removal_rank)


def check(settings: Settings) -> None:
    """Finds out whether this machine can do what is asked.

    Raises:
        UserError: The device, an export format or the latency's runtime is unknown, or not there.
    """
    check_formats(settings.export)
    check_device(settings.device)
    check_precision(settings.scoring.precision, settings.device)
    if settings.scoring.actors:
        check_ray()
    here = (isinstance(b, LatencyBudget) and not (b.table and b.elsewhere) for b in settings.budgets)
    if settings.latency.repeats or any(here):
        runtime(settings.latency.runtime, settings.latency.threads or 1).check()


def announce(problem: PruningProblem) -> None:
    """Log what will be decided, what is skipped and why, and what can be reached."""
    space = problem.space
    log.info(
        "%d decisions over %d layers; skipped: %d",
        len(space.grids),
        len(problem.graph.layers),
        len(problem.graph.skipped),
    )
    for reason in dict.fromkeys(w.reason for w in problem.graph.skipped):
        names = [w.name for w in problem.graph.skipped if w.reason == reason]
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        log.info("  %s%s: %s", ", ".join(names[:_NAMES_SHOWN]), more, reason)  # report.html lists them all
    for cost in space.costs:
        log.info("%s", _reach(space, cost, bool(problem.masked)))


def _reach(space: SearchSpace, cost: Cost, masked: bool) -> str:
    """A cost of the original, the least that can be reached, and the budget of it."""

    def share(value: float) -> str:
        return f"{amount(cost.name, value)} ({percent(value / unpruned, 1)})"

    unpruned = cost([0] * len(space.grids))
    limits = [share(budget.limit) for budget in space.budgets if budget.cost.name == cost.name]
    asked = f", budget {limits[0]}" if limits else ""
    name = cost_name(cost.name, masked)
    return f"{name}: {amount(cost.name, unpruned)}, least reachable {share(cost(space.most))}{asked}"


def check_device(device: str) -> None:
    """Refuses a device that torch does not have here.

    Raises:
        UserError: Such a device.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={device} cannot be used here ({first_line(error)}); use device=cpu",
            code="no_device",
            field="device",
        ) from error


def costs_of(problem: PruningProblem) -> dict[str, Cost]:
    """The costs that every outcome states: MACs, parameters, and what a budget limits besides.

    Raises:
        UserError: A cost does not fit the granularity, or cannot be built for the network.
    """
    always = {name: BudgetSettings(name) for name in ("macs", "params")}
    wanted = always | {budget.cost: budget for budget in problem.settings.budgets}
    for name in wanted:
        COSTS[name].check_fits(problem.settings.granularity)
    return {name: COSTS[name].build(problem, settings) for name, settings in wanted.items()}


def _latency_table(problem: PruningProblem, budget: LatencyBudget) -> tuple[LatencyTable, Activations | None]:
    """The table that a budget names, that of the run folder, or a new one; and the network's activations."""
    settings = problem.settings
    wanted = settings.latency
    threads = wanted.threads or torch.get_num_threads()
    subject = Subject(
        problem.data.name,
        Candidates(problem.model, problem.graph, [torch.arange(g.total) for g in problem.graph.groups]),
        problem.grids,
        problem.batch(wanted.batch),
        How(runtime(wanted.runtime, threads), threads, budget.repeats, settings.seed),
    )
    activations = counted(lambda: problem.activations)
    if budget.table is not None:
        table = read_table(Path(budget.table), subject, elsewhere=budget.elsewhere)
    elif budget.kept is not None and budget.kept.exists():
        table = read_table(budget.kept, subject)
    else:
        table = build(subject, activations, budget.kept, tolerance=budget.tolerance, points=budget.points)
    return table, activations
