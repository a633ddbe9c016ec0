"""Checks that a cost, a criterion or a granularity keeps its contract, for authors of new ones.

Each check raises an AssertionError that says what is broken, and returns nothing where all is well.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from amc_env.graph.layers import LayerGraph
from amc_env.pruning.criteria.base import Criterion, ElementCriterion, Sample
from amc_env.pruning.granularity import Granularity, Masked
from amc_env.space import Cost, Grid

_COUNTS = 20  # of a decision that are tried, evenly spread
_ROUNDING = 1 + 1e-12


def check_cost(
    cost: Cost, grids: Sequence[Grid], *, original: float | None = None, falls: bool = False, seeds: int = 5
) -> None:
    """Checks a cost on the decisions of a network: its name, and that it never rises when more is removed.

    Args:
        cost: The cost.
        grids: The decisions.
        original: The unpruned network's cost, where it is known otherwise.
        falls: Whether every unit removed must lower it.
        seeds: Random strategies in whose surroundings it is tried.

    Raises:
        AssertionError: It breaks the contract.
    """
    assert bool(cost.name and cost.unit), f"name {cost.name!r} and unit {cost.unit!r} must not be empty"
    nothing = cost([0] * len(grids))
    assert 0 < nothing < np.inf, f"cost {cost.name} of the unpruned network is {nothing}; it must be above 0"
    if original is not None:
        assert np.isclose(nothing, original, rtol=1e-9), f"cost {cost.name} is {nothing}, not {original}"
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        removed = [grid.count(int(rng.integers(grid.size))) for grid in grids]
        for i, grid in enumerate(grids):
            counts = [grid.count(j) for j in range(0, grid.size, max(1, grid.size // _COUNTS))]
            strategies = [[*removed[:i], count, *removed[i + 1 :]] for count in counts]
            values = [cost(tuple(strategy)) for strategy in strategies]
            assert values == [cost(strategy) for strategy in strategies], (
                f"cost {cost.name} is not the same twice"
            )
            assert min(values) >= 0, f"cost {cost.name} is negative: {values}"
            for (count, before), (more, after) in pairwise(zip(counts, values, strict=True)):
                fine = after < before if falls else after <= before * _ROUNDING
                assert fine, f"cost {cost.name}: {grid.name} at {count}: {before}, at {more}: {after}"


def check_criterion(criterion: Criterion, model: nn.Module, graph: LayerGraph, sample: Sample) -> None:
    """Checks a criterion on a network: shapes, finite scores, no side effects, and the same result twice.

    Raises:
        AssertionError: It breaks the contract.
    """
    who = f"criterion {criterion.name}"
    assert criterion.granularities, f"{who} fits no granularity"
    subject = copy.deepcopy(model).train()
    next(subject.parameters()).requires_grad_(False)
    before, tensors = _flags(subject), copy.deepcopy(subject.state_dict())
    random_state = torch.get_rng_state()
    with torch.no_grad():  # a caller may have switched gradients off
        first = _scores(criterion, subject, graph, sample)
    assert torch.equal(torch.get_rng_state(), random_state), f"{who} changes the global random state"
    assert _flags(subject) == before, f"{who} changes the mode, gradients or hooks"
    after = subject.state_dict()
    assert all(torch.equal(after[key], value) for key, value in tensors.items()), f"{who} changes the network"
    torch.rand(3)  # another random state, the same result
    again = _scores(criterion, subject.eval(), graph, sample)
    torch.set_rng_state(random_state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{who} is not the same twice"
    _check_scores(who, first, graph, subject)


def _scores(criterion: Criterion, model: nn.Module, graph: LayerGraph, sample: Sample) -> list[Tensor]:
    found = list(criterion.channel_scores(model, graph, sample))
    if isinstance(criterion, ElementCriterion):
        saliency = criterion.saliency(model, graph.layers, sample)
        assert list(saliency) == [layer.name for layer in graph.layers], "saliency is not of every layer"
        found += saliency.values()
    return found


def _check_scores(who: str, scores: Sequence[Tensor], graph: LayerGraph, model: nn.Module) -> None:
    shapes = [(group.total,) for group in graph.groups]
    weights = [tuple(cast(Tensor, model.get_submodule(layer.name).weight).shape) for layer in graph.layers]
    expected = shapes + weights if len(scores) > len(shapes) else shapes
    assert [tuple(score.shape) for score in scores] == expected, f"{who} gives other shapes than {expected}"
    for score in scores:
        assert score.dtype == torch.float64, f"{who} gives {score.dtype}, not float64"
        assert not score.requires_grad, f"{who} gives scores that hold a graph of gradients"
        assert bool(score.isfinite().all() and (score >= 0).all()), (
            f"{who} gives scores that are negative or NaN"
        )


def _flags(model: nn.Module) -> tuple[object, ...]:
    hooks = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return hooks, [(p.requires_grad, p.grad is None) for p in model.parameters()]


def check_granularity(granularity: Granularity, graph: LayerGraph) -> None:
    """Checks a granularity on a network: every decision leaves a choice and a rest, every omission has a reason.

    Raises:
        AssertionError: It breaks the contract.
    """
    who = f"granularity {granularity.name}"
    assert granularity.speed, f"{who} does not say which hardware it makes faster"
    decided, grids = granularity.decisions(graph)
    assert granularity.decisions(graph)[1] == grids, f"{who} is not the same twice"
    units = [layer.name for layer in graph.layers if not layer.costless]
    names, reasons = [grid.name for grid in grids], {entry.name: entry.reason for entry in decided.skipped}
    wanted = units if granularity.masked else [group.name for group in graph.groups]
    assert names == [name for name in wanted if name in set(names)], (
        f"{who}: {names} are not in forward order"
    )
    missing = set(wanted) - set(names) - reasons.keys()
    assert not missing, f"{who}: {missing} are neither decided nor reported"
    for grid in grids:
        counts = [grid.count(i) for i in range(grid.size)]
        ascending = counts[0] == 0 and all(a < b for a, b in pairwise(counts))
        assert ascending, f"{who}: counts of {grid.name} do not ascend from 0: {counts}"
        assert 0 < counts[-1] < grid.total, f"{who}: {grid.name} loses nothing or everything: {counts}"
        if granularity.masked:
            _check_places(cast(Masked, granularity), graph, grid)


def _check_places(granularity: Masked, graph: LayerGraph, grid: Grid) -> None:
    """Every place in the order of removal has equally many weights, so that a count removes exactly its share."""
    layer = graph.layer(grid.name)
    inputs = layer.in_channels // layer.groups
    shape = (layer.out_channels, inputs, *(layer.kernel if layer.kind == "conv" else ()))
    saliency = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranks = granularity.removal_rank(saliency, layer)
    assert ranks.dtype == torch.int32, f"{grid.name}: ranks are {ranks.dtype}, not int32"
    assert ranks.shape == saliency.shape, f"{grid.name}: ranks of shape {tuple(ranks.shape)}, not {shape}"
    counts = set(torch.bincount(ranks.flatten(), minlength=grid.total).tolist())
    assert counts == {layer.weights // grid.total}, f"{grid.name}: places have {counts} weights each"
