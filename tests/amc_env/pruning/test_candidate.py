"""Candidates: torch-pruning's own result bit for bit, masks that zero what they should, one skeleton for all."""

import pytest
import torch
import torch_pruning as tp
from masking import SUITABLE, masked, weight
from networks import NETWORKS, SMALL, images, network, problem, random_removed, same_state, with_state
from torch import nn

from amc_env.pruning.candidate import Candidates, MaskedCandidates
from search.models.resnet import ResNet


def pruned_by_the_library(model: nn.Module, candidates: Candidates, removed: tuple[int, ...]) -> nn.Module:
    """The same channels cut by torch-pruning, group after group."""
    graph = tp.DependencyGraph().build_dependency(
        model, example_inputs=images(1), unwrapped_parameters=None, customized_pruners={}, verbose=False
    )
    for group, order, count in zip(candidates.graph.groups, candidates.orders, removed, strict=True):
        root = model.get_submodule(group.name)
        member = next(m for m in group.members if (m.module, m.side) == (group.name, "out"))
        gone = member.positions[order[len(order) - count :]].flatten().sort().values.tolist()
        cut = tp.prune_linear_out_channels if isinstance(root, nn.Linear) else tp.prune_conv_out_channels
        if gone:
            graph.get_pruning_group(root, cut, gone).prune()
    return model


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"selection"}))
def test_the_same_state_dict_as_torch_pruning(name: str) -> None:
    candidates, grids = problem(name)
    removed = random_removed(grids, 0)
    theirs = pruned_by_the_library(network(name), candidates, removed)
    assert any(removed)
    assert same_state(candidates.cut(removed), theirs)
    assert same_state(candidates.build(removed), theirs)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_skeleton_serves_all(name: str) -> None:
    candidates, grids = problem(name)
    first, second = random_removed(grids, 0), random_removed(grids, 1)
    before = with_state(candidates.cut(first))
    sizes = str(candidates.skeleton)
    candidates.cut(second)
    again = candidates.cut(first)
    assert again is candidates.skeleton
    assert str(again) == sizes == str(candidates.build(first))
    assert all(torch.equal(before[key], value) for key, value in again.state_dict().items())
    assert same_state(candidates.cut([0] * len(grids)), network(name))


@pytest.mark.parametrize("name", SMALL)
def test_a_candidate_shares_no_memory_with_the_original(name: str) -> None:
    candidates, grids = problem(name)
    for removed in ((0,) * len(grids), random_removed(grids, 2)):
        with torch.no_grad():
            for tensor in candidates.cut(removed).state_dict().values():
                tensor.fill_(7)
    assert same_state(candidates.original, network(name))


@pytest.mark.parametrize("name", SMALL)
def test_what_stays_is_nested_and_ascending(name: str) -> None:
    candidates, grids = problem(name)
    for removed in (random_removed(grids, 0), random_removed(grids, 1)):
        little = candidates.keeps([count // 2 for count in removed])
        for module, sides in candidates.keeps(removed).items():
            for side, kept in sides.items():
                assert kept.tolist() == sorted(kept.tolist())
                assert set(kept.tolist()) <= set(little[module][side].tolist())


def test_a_depthwise_layer_comes_back_from_a_single_channel() -> None:
    candidates, grids = problem("gated", multiple=1, max_ratio=0.99)
    candidates.cut([grid.count(grid.size - 1) for grid in grids])
    depthwise = candidates.skeleton.get_submodule("blocks.0.conv.1.0")
    assert depthwise.groups == depthwise.in_channels == 1
    removed = tuple(grid.total // 2 for grid in grids)
    again = candidates.cut(removed)
    assert str(again) == str(candidates.build(removed))
    with torch.no_grad():
        assert torch.equal(again(images()), candidates.build(removed)(images()))


def test_selection_and_pad_are_the_same_network() -> None:
    selection, pad = ResNet(8, "selection").eval(), ResNet(8, "pad").eval()
    pad.load_state_dict({k: v for k, v in selection.state_dict().items() if "shortcut" not in k})
    with torch.no_grad():
        torch.testing.assert_close(selection(images()), pad(images()))


def test_frozen_parameters_stay_frozen() -> None:
    candidates, grids = problem("concat")
    model = network("concat")
    model.left.weight.requires_grad_(False)
    frozen = Candidates(model, candidates.graph, candidates.orders).cut(random_removed(grids, 0))
    assert {name for name, p in frozen.named_parameters() if not p.requires_grad} == {"left.weight"}
    assert not frozen.training


# ------------------------------------------------------------------------------------------------ masked


@pytest.mark.parametrize(("name", "granularity"), SUITABLE)
def test_what_is_masked_is_zero_and_the_rest_is_the_original_bit_for_bit(name: str, granularity: str) -> None:
    candidates, _, grids = masked(name, granularity)
    removed = random_removed(grids, 0)
    masks = candidates.masks(removed)
    model, original = candidates.cut(removed), network(name)
    assert list(masks) == [grid.name for grid, count in zip(grids, removed, strict=True) if count]
    for grid, count in zip(grids, removed, strict=True):
        if count:
            gone = ~masks[grid.name]
            assert int(gone.sum()) * grid.total == gone.numel() * count
            with torch.no_grad():
                original.get_submodule(grid.name).weight[gone] = 0.0
    assert same_state(model, original)
    assert same_state(candidates.original, network(name))
    assert not model.training
    assert candidates.keeps(removed) == {}


@pytest.mark.parametrize(
    ("name", "granularity"), [("residual", "fine_grained"), ("grouped", "kernel"), ("mlp", "2:4")]
)
def test_a_masked_network_does_not_depend_on_those_before_it(name: str, granularity: str) -> None:
    candidates, _, grids = masked(name, granularity)
    first, second = random_removed(grids, 0), random_removed(grids, 1)
    before = with_state(candidates.cut(first))
    with torch.no_grad():
        for tensor in candidates.cut(second).state_dict().values():
            tensor.fill_(7)  # as a repair would
    again = candidates.cut(first)
    assert again is candidates.skeleton
    assert all(torch.equal(before[key], value) for key, value in again.state_dict().items())
    assert same_state(candidates.cut([0] * len(grids)), network(name))


def test_masked_layers_that_are_frozen_stay_frozen() -> None:
    candidates, _, grids = masked("mlp", "fine_grained")
    model = network("mlp")
    model[1].weight.requires_grad_(False)
    cut = MaskedCandidates(model, grids, candidates.removal_rank).cut([grid.count(1) for grid in grids])
    assert {name for name, p in cut.named_parameters() if not p.requires_grad} == {"1.weight"}
    assert int((weight(cut, "1") == 0).sum()) == 1
