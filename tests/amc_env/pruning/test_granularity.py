"""Granularities: grids of a network's decisions by hand, and the order in which units go."""

from typing import Any

import pytest
import torch
from constructs import CONSTRUCTS
from masking import GRANULARITIES, SUITABLE, layers, masked, weight
from networks import NETWORKS, images, traced
from refusals import refused
from torch import Tensor, nn

from amc_env.graph.layers import Layer
from amc_env.graph.tracing import trace, trace_layers
from amc_env.pruning.granularity import NM, Channel, FineGrained, Granularity, Kernel, Masked, Vector
from amc_env.testing import check_granularity


def test_grids_by_hand() -> None:
    _, graph = traced("concat")
    _, grids = Channel(multiple=4, max_ratio=0.7).decisions(graph)
    assert {g.name: [g.count(i) for i in range(g.size)] for g in grids} == {
        "left": [0, 4],
        "right": [0, 2],
        "join": [0, 2, 6],
    }


def test_units_of_grouped_convolutions_count_for_all_their_channels() -> None:
    _, graph = traced("grouped")
    _, grids = Channel(multiple=8, max_ratio=0.9).decisions(graph)
    # 4 units of 4 channels: 8 channels are 2 units; 6 of 2: 4 units; 8 single ones leave nothing.
    assert {g.name: [g.count(i) for i in range(g.size)] for g in grids} == {
        "before": [0, 2],
        "grouped": [0, 2, 4],
        "halves": [0, 2],
    }


def test_too_narrow_groups_are_reported() -> None:
    _, graph = traced("concat")
    smaller, grids = Channel(multiple=8, max_ratio=0.9).decisions(graph)
    assert [grid.name for grid in grids] == [group.name for group in smaller.groups] == ["join"]
    reasons = {w.name: w.reason for w in smaller.skipped}
    assert reasons["left"] == "it is too narrow for channel_multiple=8 and max_ratio=0.9"


@pytest.mark.parametrize("granularity", [Channel(1), Channel(8), *GRANULARITIES.values()], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_granularity_keeps_its_contract(name: str, granularity: Granularity) -> None:
    check_granularity(granularity, traced(name)[1])


@pytest.mark.parametrize("max_ratio", [0.1, 0.5, 0.8, 0.9, 0.999])
@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_every_count_is_within_max_ratio_and_keeps_a_channel(multiple: int, max_ratio: float) -> None:
    for name in ("residual", "grouped", "flatten", "mlp"):
        for grid in Channel(multiple, max_ratio).decisions(traced(name)[1])[1]:
            largest = grid.count(grid.size - 1)
            assert 0 < largest < grid.total
            assert largest <= max_ratio * grid.total + 1e-6


# ----------------------------------------------------------------------------------------- masked: grids


class Mixed(nn.Module):
    """One layer of every kind: 216, 54, 48, 96 and 20 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.point = nn.Conv2d(6, 8, 1)
        self.wide = nn.Conv2d(8, 4, (1, 3))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.point(self.depthwise(self.conv(x)))).mean((2, 3)))


MIXED = trace_layers(Mixed(), torch.zeros(1, 4, 8, 8))
NOT_DIVISIBLE = "its {} input channels (per group) are not divisible by m={}"


@pytest.mark.parametrize(
    ("granularity", "grids", "whole"),
    [
        # 98% of the weights: 211.68, 52.92, 47.04, 94.08 and 19.6
        (
            FineGrained(),
            {
                "conv": (216, 211),
                "depthwise": (54, 52),
                "point": (48, 47),
                "wide": (96, 94),
                "head": (20, 19),
            },
            {},
        ),
        # 95% of 72, 18 and 32 rows: 68.4, 17.1 and 30.4
        (
            Vector("row"),
            {"conv": (72, 68), "depthwise": (18, 17), "wide": (32, 30)},
            dict.fromkeys(("point", "head"), "a row of its kernels is a single weight"),
        ),
        (
            Vector("column", 0.5),
            {"conv": (72, 36), "depthwise": (18, 9)},
            dict.fromkeys(("point", "wide", "head"), "a column of its kernels is a single weight"),
        ),
        # 95% of 24, 6 and 32 kernels: 22.8, 5.7 and 30.4
        (
            Kernel(),
            {"conv": (24, 22), "depthwise": (6, 5), "wide": (32, 30)},
            dict.fromkeys(("point", "head"), "its kernels are single weights"),
        ),
        (
            NM(2, 4),
            {"conv": (4, 2), "wide": (4, 2), "head": (4, 2)},
            {"depthwise": NOT_DIVISIBLE.format(1, 4), "point": NOT_DIVISIBLE.format(6, 4)},
        ),
        (
            NM(1, 4),
            {"conv": (4, 3), "wide": (4, 3), "head": (4, 3)},
            {"depthwise": NOT_DIVISIBLE.format(1, 4), "point": NOT_DIVISIBLE.format(6, 4)},
        ),
        (
            NM(4, 8),
            {"wide": (8, 4)},
            {
                "conv": NOT_DIVISIBLE.format(4, 8),
                "depthwise": NOT_DIVISIBLE.format(1, 8),
                "point": NOT_DIVISIBLE.format(6, 8),
                "head": NOT_DIVISIBLE.format(4, 8),
            },
        ),
    ],
    ids=str,
)
def test_masked_grids_by_hand(
    granularity: Masked, grids: dict[str, tuple[int, int]], whole: dict[str, str]
) -> None:
    """Units, the most that may go, and the reasons of what stays whole."""
    graph, found = granularity.decisions(MIXED)
    assert {grid.name: (grid.total, grid.count(grid.size - 1)) for grid in found} == grids
    assert [grid.name for grid in found] == [layer.name for layer in graph.layers if layer.name in grids]
    assert {w.name: w.reason for w in graph.skipped} == whole
    assert graph.groups == ()
    assert graph.layers == MIXED.layers


def test_nm_is_all_or_nothing_and_the_others_take_every_count() -> None:
    for n, m in ((2, 4), (1, 4), (4, 8)):
        (wide,) = [grid for grid in NM(n, m).decisions(MIXED)[1] if grid.name == "wide"]
        assert [wide.count(i) for i in range(wide.size)] == [0, m - n]
    for granularity in (FineGrained(0.1), Vector("row", 0.1), Kernel(0.1)):
        for grid in granularity.decisions(MIXED)[1]:
            assert [grid.count(i) for i in range(grid.size)] == list(range(grid.size))


def test_a_layer_too_small_to_lose_a_weight_stays_whole() -> None:
    graph, grids = FineGrained(0.05).decisions(MIXED)
    assert [grid.name for grid in grids] == ["conv", "depthwise", "point", "wide", "head"]
    graph, grids = FineGrained(0.04).decisions(MIXED)  # of 20 weights 0.8
    assert {w.name: w.reason for w in graph.skipped} == {"head": "it is too small for max_ratio=0.04"}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fixed_selections_are_neither_decided_nor_reported(granularity: str) -> None:
    _, graph, grids = masked("selection", granularity)
    costless = {layer.name for layer in graph.layers if layer.costless}
    assert len(costless) == 2
    assert not costless & ({grid.name for grid in grids} | {w.name for w in graph.skipped})


def test_reasons_about_channels_are_dropped_and_those_about_other_layers_kept() -> None:
    class Upsampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.up = nn.ConvTranspose2d(4, 4, 2)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.up(self.second(self.first(x))).mean((2, 3)))

    for graph in (trace_layers(Upsampled(), images(1)), trace(Upsampled(), images(1))):
        decided, grids = FineGrained().decisions(graph)
        assert [grid.name for grid in grids] == ["first", "second", "head"]
        assert "transposed" in next(w.reason for w in decided.skipped if w.name == "up")


def test_masks_need_no_tracer() -> None:
    class Branching(nn.Module):
        """Its two layers share no channels, and no tracer follows it."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(192, 4), nn.Linear(192, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.first(x) if float(x.sum()) > 1e9 else self.second(x)

    with refused("nothing_to_prune", ""):
        trace(Branching(), images(1))
    graph = trace_layers(Branching(), images(1))
    assert [grid.name for grid in FineGrained().decisions(graph)[1]] == ["second"]  # the one that ran
    assert graph.other_params == 192 * 4 + 4
    with refused("nothing_to_prune", ""):
        trace_layers(nn.Flatten(), images(1))


def test_layers_alone_are_those_of_the_traced_graph() -> None:
    for name in ("residual", "selection", "grouped", "flatten"):
        whole, alone = traced(name)[1], layers(name)[1]
        assert alone.layers == whole.layers
        assert (alone.channelwise, alone.other_params) == (whole.channelwise, whole.other_params)
        assert alone.groups == ()


# ---------------------------------------------------------------------------------------- masked: places


def linear(outputs: int, inputs: int) -> Layer:
    return Layer("layer", 0, "linear", inputs, outputs, (1, 1), (1, 1), 1, True, (1, 1), (1, 1))


def conv(outputs: int, inputs: int, kernel: tuple[int, int]) -> Layer:
    return Layer("layer", 0, "conv", inputs, outputs, kernel, (1, 1), 1, False, (8, 8), (8, 8))


def placed(granularity: Masked, saliency: object, layer: Layer) -> object:
    removal_rank = granularity.removal_rank(torch.tensor(saliency, dtype=torch.float64), layer)
    assert removal_rank.dtype == torch.int32
    return removal_rank.tolist()


def test_single_weights_by_hand_ties_by_position() -> None:
    assert placed(FineGrained(), [[3, 1], [2, 3]], linear(2, 2)) == [[0, 3], [2, 1]]


def test_rows_and_columns_by_hand() -> None:
    saliency = [[[[1, 2, 3], [4, 5, 6]], [[0, 9, 0], [0, 0, 0]]]]  # 1 x 2 x 2 x 3
    # Sums of rows 6, 15, 9, 0; of columns 5, 7, 9, 0, 9, 0: the tie to the first kernel, then to the first place.
    rows = [[[[2, 2, 2], [0, 0, 0]], [[1, 1, 1], [3, 3, 3]]]]
    columns = [[[[3, 2, 0], [3, 2, 0]], [[4, 1, 5], [4, 1, 5]]]]
    assert placed(Vector("row"), saliency, conv(1, 2, (2, 3))) == rows
    assert placed(Vector("column"), saliency, conv(1, 2, (2, 3))) == columns


def test_kernels_by_hand() -> None:
    saliency = [[[[1, 1]], [[5, 0]]], [[[2, 2]], [[0, 2]]]]  # 2 x 2 x 1 x 2, sums 2, 5, 4, 2
    removal_rank = [[[[2, 2]], [[0, 0]]], [[[1, 1]], [[3, 3]]]]
    assert placed(Kernel(), saliency, conv(2, 2, (1, 2))) == removal_rank


def test_places_within_blocks_of_m_by_hand() -> None:
    saliency = [[5, 1, 7, 3, 2, 2, 2, 9]]
    assert placed(NM(2, 4), saliency, linear(1, 8)) == [[1, 3, 0, 2, 1, 2, 3, 0]]
    assert placed(NM(4, 8), saliency, linear(1, 8)) == [[2, 7, 1, 3, 4, 5, 6, 0]]
    # Blocks run along the input channels: the two places of the kernel are ranked apart.
    saliency = [[[[4, 1]], [[3, 2]], [[2, 3]], [[1, 4]]]]  # 1 x 4 x 1 x 2
    assert placed(NM(1, 4), saliency, conv(1, 4, (1, 2))) == [[[[0, 3]], [[1, 2]], [[2, 1]], [[3, 0]]]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("shape", [(6, 16), (5, 8, 3, 3)])
def test_every_block_keeps_exactly_n(n: int, m: int, shape: tuple[int, ...]) -> None:
    saliency = torch.randint(3, shape, generator=torch.Generator().manual_seed(0)).double()  # with ties
    layer = linear(*shape) if len(shape) == 2 else conv(shape[0], shape[1], (shape[2], shape[3]))
    kept = NM(n, m).removal_rank(saliency, layer) < n
    blocks = kept.movedim(1, -1).reshape(-1, m)
    assert blocks.sum(1).tolist() == [n] * (kept.numel() // m)
    worth = saliency.movedim(1, -1).reshape(-1, m)
    assert (worth.where(blocks, torch.inf).amin(1) >= worth.where(~blocks, -torch.inf).amax(1)).all()


def unit_sums(saliency: Tensor, granularity: str) -> Tensor:
    """Sums of the units, each given to all of its elements."""
    dims = {"row": 3, "column": 2, "kernel": (2, 3)}.get(granularity)
    return saliency if dims is None else saliency.sum(dims, keepdim=True).expand(saliency.shape)


@pytest.mark.parametrize(("name", "granularity"), [entry for entry in SUITABLE if ":" not in entry[1]])
def test_any_count_removes_the_least_worth(name: str, granularity: str) -> None:
    """n:m compares within its blocks only, and has a test of its own."""
    candidates, _, grids = masked(name, granularity)
    for grid in grids:
        places = candidates.removal_rank[grid.name]
        worth = unit_sums(weight(candidates.original, grid.name).double() ** 2, granularity)
        for removed in {grid.count(1), grid.count(grid.size // 2), grid.count(grid.size - 1)}:
            kept = places < grid.total - removed
            assert worth[kept].min() >= worth[~kept].max()


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Channel, {"multiple": 0}),
        (NM, {"n": 4, "m": 4}),
        (NM, {"n": 5, "m": 4}),
        (NM, {"n": 0}),
        (NM, {"n": -1}),
        (NM, {"m": 1}),
        (Vector, {"axis": "diagonal"}),
    ],
)
def test_options_out_of_range(kind: type, options: dict[str, Any]) -> None:
    with refused("out_of_range", next(iter(options))):
        kind(**options)


@pytest.mark.parametrize("kind", [Channel, FineGrained, Vector, Kernel])
@pytest.mark.parametrize("max_ratio", [0.0, 1.0, -0.5, float("nan")])
def test_masks_must_leave_something_and_take_something(kind: type[FineGrained], max_ratio: float) -> None:
    with refused("out_of_range", "max_ratio"):
        kind(max_ratio=max_ratio)


def test_only_two_of_four_is_promised_speed_on_gpus() -> None:
    assert "twice as fast" in NM(2, 4).speed
    for n, m in ((1, 4), (4, 8)):
        assert NM(n, m).speed.startswith("Sparsity only")
        assert f"{n}:{m}" in NM(n, m).speed
    assert "no special kernels" in Channel().speed
    for granularity in (FineGrained(), Vector(), Kernel()):
        assert granularity.speed.startswith("Sparsity only")


def test_heads_are_counted_singly_and_may_be_kept() -> None:
    construct = CONSTRUCTS["attention"]
    graph = trace(construct.build().eval(), construct.example())
    _, (grid,) = Channel(multiple=8, max_ratio=0.9).decisions(graph)
    assert [grid.count(i) for i in range(grid.size)] == [0, 1, 2, 3]
    kept, grids = Channel(heads=False).decisions(graph)
    assert not grids
    assert "heads=false" in next(s.reason for s in kept.skipped if s.name == "block.q")


def test_layers_keep_at_least_so_many_channels() -> None:
    _, graph = traced("residual")
    _, grids = Channel(multiple=1, max_ratio=0.9, least={"layer1.*": 12}).decisions(graph)
    assert {grid.name: grid.total - grid.most for grid in grids}["layer1.0.conv1"] == 12
    assert {grid.name: grid.total - grid.most for grid in grids}["layer2.0.conv1"] == 4
    with refused("unknown_layer", "granularity.least"):
        Channel(least={"stem": 4}).decisions(graph)
