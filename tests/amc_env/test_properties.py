"""Random small networks, strategies and budgets: what must hold for all of them.

`HYPOTHESIS_EXAMPLES=300 pytest tests/amc_env/test_properties.py` tries more of them.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from networks import images
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.costs.base import NetworkCost
from amc_env.costs.counts import Macs, Params
from amc_env.costs.latency.cost import Latency
from amc_env.costs.latency.table import Conditions, Correction, LatencyTable, Times
from amc_env.costs.latency.units import units_of
from amc_env.costs.memory import Activations, Memory
from amc_env.encoding import Encoder, describe
from amc_env.env import EnvHandle, PruningEnv
from amc_env.errors import UserError
from amc_env.graph.layers import LayerGraph
from amc_env.graph.preparing import prepared
from amc_env.graph.surgery import silence_inputs
from amc_env.graph.tracing import trace
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.granularity import Channel
from amc_env.rewards import Error
from amc_env.space import Budget, Grid, SearchSpace, Strategy, Trial
from search.output.export import Small, export_all

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "0"))
KINDS = ("residual", "concat", "depthwise", "grouped", "shared", "attention", "gate")
PLANS = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from((4, 8, 12))), min_size=1, max_size=3)
RATIOS = st.lists(st.floats(0, 1), min_size=24, max_size=24)
COSTS = ("macs", "params", "both", "memory", "latency")


def examples(count: int) -> settings:
    """So many random examples, the same ones in every run; failing ones are not made smaller, which takes minutes."""
    return settings(
        max_examples=EXAMPLES or count,
        deadline=None,
        database=None,
        derandomize=not EXAMPLES,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class Block(nn.Module):
    """Maps [N, width, H, W] to [N, out, H, W] in one of several ways."""

    def __init__(self, kind: str, width: int, out: int):
        super().__init__()
        self.kind = kind
        inner = 6 if kind == "shared" else out
        self.enter, self.norm = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        if kind == "attention":
            self.more: nn.Module = nn.MultiheadAttention(out, 4, batch_first=True)
        elif kind == "gate":
            self.more = nn.Sequential(nn.Conv2d(out, 5, 1), nn.PReLU(), nn.Conv2d(5, out, 1), nn.Sigmoid())
        else:
            groups = {"depthwise": inner, "grouped": 2}.get(kind, 1)
            self.more = nn.Conv2d(inner, inner, 3, padding=1, groups=groups)
        self.leave = nn.Conv2d({"concat": 2 * out}.get(kind, inner), out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.enter(x)))
        if self.kind == "attention":
            tokens = x.flatten(2).transpose(1, 2)
            y = (
                self.more(tokens, tokens, tokens, need_weights=False)[0]
                .transpose(1, 2)
                .unflatten(2, x.shape[2:])
            )
        elif self.kind == "shared":
            y = self.more(F.relu(self.more(x)))
        else:
            y = self.more(x.mean((2, 3), keepdim=True)) * x if self.kind == "gate" else self.more(x)
        if self.kind == "residual":
            return x + self.leave(F.relu(y))
        return F.relu(self.leave(torch.cat([x, y], 1) if self.kind == "concat" else y))


def build(plan: Sequence[tuple[str, int]]) -> nn.Module:
    """A network of these blocks, in eval mode, with weights from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = [6, *(width for _, width in plan)]
        blocks = [Block(kind, before, out) for before, (kind, out) in zip(widths, plan, strict=False)]
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        network = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), *blocks, *pool, nn.Linear(widths[-1], 4)
        )
    return prepared(network.eval())


def made(plan: Sequence[tuple[str, int]], multiple: int) -> tuple[nn.Module, LayerGraph, tuple[Grid, ...]]:
    network = build(plan)
    return network, *Channel(multiple, 0.9).decisions(trace(network, images(2)))


def table_of(network: nn.Module, graph: LayerGraph) -> LatencyTable:
    """A table by which a layer takes (inputs + 2 * outputs) microseconds."""
    units = {}
    for unit in units_of(network, graph).values():
        inputs, outputs = ([1] if unit.depthwise else [1, 256]), [1, 256]
        ms = 1e-3 * np.add.outer(np.array(inputs), 2 * np.array(outputs))
        units[unit] = Times.fitted(inputs, outputs, ms)
    return LatencyTable(Conditions("eager", 1, 1, "here", {}), units, Correction())


def spaced(
    network: nn.Module, graph: LayerGraph, grids: tuple[Grid, ...], costs: str, ratio: float
) -> SearchSpace:
    """Budgets of this share; examples whose budget is out of reach are skipped."""
    known: list[NetworkCost] = [Macs(graph), Params(graph)]
    try:
        if costs == "memory":  # attention is not followed symbolically
            known.append(Memory(Activations(network, graph, grids, images(1))))
        if costs == "latency":
            known.append(Latency(network, graph, table_of(network, graph)))
        limited = [cost for cost in known if costs in (cost.name, "both")]
        return SearchSpace(grids, known, [Budget.of(cost, len(grids), ratio=ratio) for cost in limited])
    except UserError:
        assume(False)
        raise


def silenced(network: nn.Module, candidates: Candidates, removed: Sequence[int]) -> nn.Module:
    """The uncut network, where what a strategy removes is not read."""
    masked = prepared(candidates.build([0] * len(removed)))
    for group, order, count in zip(candidates.graph.groups, candidates.orders, removed, strict=True):
        for member in group.members:
            if member.side == "in" and member.module in group.consumers:
                gone = member.positions[order[len(order) - count :]].flatten()
                silence_inputs(masked.get_submodule(member.module), gone)
    return masked


def candidates_of(network: nn.Module, graph: LayerGraph) -> Candidates:
    generator = torch.Generator().manual_seed(0)
    return Candidates(network, graph, [torch.randperm(g.total, generator=generator) for g in graph.groups])


@given(PLANS, st.sampled_from((1, 2)), st.sampled_from(COSTS), st.floats(0.2, 0.9), RATIOS)
@examples(10)
def test_budgets_are_met_and_slim_networks_are_masked_ones(
    plan: list[tuple[str, int]], multiple: int, costs: str, ratio: float, ratios: list[float]
) -> None:
    network, graph, grids = made(plan, multiple)
    space, candidates = spaced(network, graph, grids, costs, ratio), candidates_of(network, graph)
    removed = space.project(ratios[: len(grids)])
    assert space.met(removed)
    slim = candidates.build(removed)
    assert Params(graph)(removed) == sum(p.numel() for p in slim.parameters())
    with torch.no_grad():
        found, wanted = slim(images(2)), silenced(network, candidates, removed)(images(2))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@given(PLANS, st.sampled_from((1, 2)), st.sampled_from(COSTS), st.floats(0.2, 0.9), RATIOS)
@examples(10)
def test_every_episode_can_be_ended_within_the_budget(
    plan: list[tuple[str, int]], multiple: int, costs: str, ratio: float, ratios: list[float]
) -> None:
    network, graph, grids = made(plan, multiple)
    space = spaced(network, graph, grids, costs, ratio)
    found: list[Strategy] = []

    def score(strategy: Strategy) -> Trial:
        found.append(strategy)
        removed = strategy.removed
        return Trial(1, strategy, "original", "none", 0.5, space.cost(removed), space.met(removed), -0.5)

    env = PruningEnv(EnvHandle(space, Encoder(describe(graph, grids), space), score, Error()))
    observation, _ = env.reset()
    for number in range(len(grids)):
        assert ((observation >= 0) & (observation <= 1)).all()
        observation, *_ = env.step(np.array([ratios[number]], np.float32))
    assert len(found) == 1
    assert space.met(found[0].removed)


@given(PLANS, RATIOS)
@examples(3)
def test_exports_compute_what_slim_networks_do(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[str, int]], ratios: list[float]
) -> None:
    network, graph, grids = made(plan, 2)
    removed = [grid.snap(ratio) for grid, ratio in zip(grids, ratios, strict=False)]
    candidates = candidates_of(network, graph)
    small = Small(candidates.build(removed), images(2), candidates.keeps(removed), "random", network)
    folder: Path = tmp_path_factory.mktemp("export")
    for done in export_all(small, folder, ["safetensors", "pt2"]):
        assert done.error is None
