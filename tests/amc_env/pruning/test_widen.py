"""A widened network computes what the slim one does, and the same cut gives it back bit for bit."""

import copy

import pytest
import torch
from networks import SMALL, images, network, random_removed, same_state, traced, with_state
from torch import Tensor, nn

from amc_env.graph.layers import LayerGraph
from amc_env.pruning.candidate import Candidates, widen
from amc_env.pruning.criteria import rank
from amc_env.pruning.criteria.base import rank_after
from amc_env.pruning.granularity import Channel
from amc_env.space import Grid

NAMES = (*SMALL, "depthwise")


def random_scores(graph: LayerGraph, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(group.total, generator=generator, dtype=torch.float64) for group in graph.groups)


def problem(name: str, seed: int = 0) -> tuple[Candidates, tuple[Grid, ...]]:
    """Candidates of a network, its units in random order."""
    model, graph = traced(name)
    graph, grids = Channel(1, 0.9).decisions(graph)
    return Candidates(model, graph, rank(random_scores(graph, seed))), grids


def kept_units(candidates: Candidates, removed: tuple[int, ...]) -> list[Tensor]:
    return [order[: len(order) - count] for order, count in zip(candidates.orders, removed, strict=True)]


def tuned(model: nn.Module, seed: int = 5) -> nn.Module:
    """A copy with other values in all of its parameters and buffers, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                value.fill_(321)
            elif name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            else:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NAMES)
def test_widened_is_slim_in_other_shapes(name: str, seed: int) -> None:
    candidates, grids = problem(name, seed)
    removed = random_removed(grids, seed)
    assert any(removed)
    keeps = candidates.keeps(removed)
    slim = tuned(candidates.cut(removed))
    wide = widen(slim, keeps, candidates.original)
    assert {k: v.shape for k, v in wide.state_dict().items()} == {
        k: v.shape for k, v in network(name).state_dict().items()
    }
    assert str(wide) == str(network(name))
    with torch.no_grad():
        torch.testing.assert_close(wide(images()), slim(images()), rtol=1e-5, atol=1e-5)
    again = Candidates(
        wide,
        candidates.graph,
        rank_after(random_scores(candidates.graph, 9), kept_units(candidates, removed)),
    )
    assert all(
        torch.equal(kept, keeps[module][side])
        for module, sides in again.keeps(removed).items()
        for side, kept in sides.items()
    )
    assert same_state(again.cut(removed), slim)
    assert str(again.cut(removed)) == str(slim)


@pytest.mark.parametrize("name", NAMES)
def test_removing_fewer_or_more_from_there(name: str) -> None:
    candidates, grids = problem(name)
    removed = tuple(grid.total // 2 for grid in grids)
    slim = tuned(candidates.cut(removed))
    wide = widen(slim, candidates.keeps(removed), candidates.original)
    again = Candidates(
        wide,
        candidates.graph,
        rank_after(random_scores(candidates.graph, 9), kept_units(candidates, removed)),
    )
    with torch.no_grad():
        for fewer in (tuple(0 for _ in grids), tuple(count // 2 for count in removed)):
            torch.testing.assert_close(again.cut(fewer)(images()), slim(images()), rtol=1e-5, atol=1e-5)
        more = tuple(min(count + 1, grid.total - 1) for count, grid in zip(removed, grids, strict=True))
        assert not torch.allclose(again.cut(more)(images()), slim(images()), atol=1e-4)


def test_what_was_removed_is_silent_by_hand() -> None:
    original = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.PReLU(3), nn.Conv2d(3, 1, 1))
    kept = torch.tensor([0, 2])
    keeps = {"0": {"out": kept}, "1": {"out": kept}, "2": {"out": kept}, "3": {"in": kept}}
    slim = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.PReLU(2), nn.Conv2d(2, 1, 1))
    slim[1].running_mean = torch.tensor([5.0, 6.0])
    slim[1].running_var = torch.tensor([7.0, 8.0])
    slim[1].num_batches_tracked = torch.tensor(42)
    wide = widen(slim, keeps, original)
    assert wide[0].weight[1].abs().sum() == 0
    assert torch.equal(wide[0].weight[kept], slim[0].weight)
    assert wide[0].bias.tolist() == [slim[0].bias[0].item(), 0, slim[0].bias[1].item()]
    assert wide[1].weight.tolist() == [1, 0, 1]
    assert wide[1].bias.tolist() == [0, 0, 0]
    assert wide[1].running_mean.tolist() == [5, 0, 6]
    assert wide[1].running_var.tolist() == [7, 1, 8]
    assert wide[1].num_batches_tracked.item() == 42
    assert wide[2].weight.tolist() == [0.25, 0, 0.25]
    assert wide[3].weight[0, :, 0, 0].tolist() == [
        slim[3].weight[0, 0].item(),
        0,
        slim[3].weight[0, 1].item(),
    ]
    assert not wide.training


def test_nothing_is_shared_and_frozen_stays_frozen() -> None:
    candidates, grids = problem("concat")
    removed = random_removed(grids, 1)
    slim = copy.deepcopy(candidates.cut(removed))
    slim.left.weight.requires_grad_(False)
    original, before = candidates.original, with_state(slim)
    wide = widen(slim, candidates.keeps(removed), original)
    assert {name for name, p in wide.named_parameters() if not p.requires_grad} == {"left.weight"}
    with torch.no_grad():
        for value in wide.state_dict().values():
            value.fill_(7)
    assert same_state(original, network("concat"))
    assert all(torch.equal(before[key], value) for key, value in slim.state_dict().items())


def test_an_uncut_network_is_copied() -> None:
    model = network("residual")
    assert same_state(widen(model, {}, network("residual", 1)), model)


def test_a_network_that_was_cut_otherwise_is_refused() -> None:
    candidates, grids = problem("residual")
    slim = copy.deepcopy(candidates.cut(tuple(1 for _ in grids)))
    other = candidates.keeps(tuple(2 for _ in grids))
    with pytest.raises(ValueError, match=r"conv1\.weight has shape .* cut to what stays it has"):
        widen(slim, other, candidates.original)


def test_units_removed_earlier_come_last_by_hand() -> None:
    scores = [torch.tensor([0.1, 9.0, 0.3, 0.3, 0.0]), torch.tensor([2.0, 1.0])]
    kept = [torch.tensor([4, 2, 0, 3]), torch.tensor([0, 1])]
    first, second = rank_after(scores, kept)
    assert first.tolist() == [2, 3, 0, 4, 1]
    assert second.tolist() == [0, 1]
    assert first.dtype == torch.int64
