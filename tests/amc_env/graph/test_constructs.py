"""Every construct has the decisions that it should have, and its cut networks are what the costs say."""

import pytest
import torch
from constructs import CONSTRUCTS
from refusals import refused
from torch import nn

from amc_env.costs.counts import Macs, Params
from amc_env.graph.preparing import prepared
from amc_env.graph.rules import RULES
from amc_env.graph.surgery import silence_inputs
from amc_env.graph.tracing import trace, trace_layers
from amc_env.inputs import call, output_of
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.granularity import Channel

NOTHING = {name for name, construct in CONSTRUCTS.items() if not construct.units}


def network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return prepared(CONSTRUCTS[name].build())


@pytest.mark.parametrize("name", sorted(NOTHING))
def test_what_cannot_be_pruned_is_refused_with_reasons(name: str) -> None:
    with refused("nothing_to_prune", ""):
        trace(network(name), CONSTRUCTS[name].example())


@pytest.mark.parametrize("name", sorted(set(CONSTRUCTS) - NOTHING))
def test_decisions_and_cut_networks(name: str) -> None:
    model, example = network(name), CONSTRUCTS[name].example()
    graph = trace(model, example, residual=CONSTRUCTS[name].residual)
    assert {group.name: group.total for group in graph.groups} == CONSTRUCTS[name].units
    graph, grids = Channel(1, 0.9).decisions(graph)
    orders = [
        torch.randperm(g.total, generator=torch.Generator().manual_seed(i))
        for i, g in enumerate(graph.groups)
    ]
    candidates = Candidates(model, graph, orders)
    removed = [grid.count((grid.size // 2 + number) % grid.size) for number, grid in enumerate(grids)]
    cut = candidates.build(removed)
    masked = prepared(candidates.build([0] * len(grids)))
    for group, order, count in zip(graph.groups, orders, removed, strict=True):
        for member in group.members:
            if member.side == "in" and member.module in group.consumers:
                gone = member.positions[order[len(order) - count :]].flatten()
                silence_inputs(masked.get_submodule(member.module), gone)
    with torch.no_grad():
        got, want = output_of(call(cut, example)), output_of(call(masked, example))
    assert got.shape == want.shape
    if not CONSTRUCTS[name].residual:  # norms of fewer channels give something else
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    skeleton = candidates.cut(removed)
    assert all(map(torch.equal, skeleton.state_dict().values(), cut.state_dict().values()))
    for network_of in (cut, skeleton):
        assert Params(graph)(removed) == sum(p.numel() for p in network_of.parameters())
    assert Macs(graph)(removed) == Macs(trace_layers(cut, example))(())


def test_a_rule_that_does_not_know_a_case_fixes_the_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> list[object]:
        raise IndexError

    monkeypatch.setitem(RULES, "native_batch_norm", fails)
    graph = trace(network("signals"), CONSTRUCTS["signals"].example())
    assert [group.name for group in graph.groups] == ["two"]
    assert "native_batch_norm" in next(s.reason for s in graph.skipped if s.name == "one")
