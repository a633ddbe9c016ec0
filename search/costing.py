"""The costs of a run: MACs, parameters, and what its budgets limit besides."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from amc_env.costs import Cost, Macs, Params
from amc_env.cycles import Cycles
from amc_env.errors import UserError
from amc_env.latency import runtime
from amc_env.latency.cost import Latency
from amc_env.memory import Memory
from amc_env.pruning.candidate import Candidates, MaskedCandidates
from amc_env.storage import Storage, params_beside_weights
from search.latency import How, Subject, build, counted, read_table
from search.ranking import Ranked
from search.settings import (
    CyclesBudget,
    LatencyBudget,
    MemoryBudget,
    StorageBudget,
)


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
