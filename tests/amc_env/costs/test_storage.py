"""Stored sizes by hand, EIE's encoding against the paper's example and an encoder of columns, and that sizes never rise."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from networks import NETWORKS, traced
from refusals import refused
from torch import Tensor

from amc_env.costs.storage import Storage, eie_entries, params_beside_weights
from amc_env.graph.layers import Layer
from amc_env.space import Budget, Grid, SearchSpace
from amc_env.testing import check_cost

EXAMPLE = [0, 0, 1, 2, *[0] * 18, 3]
"""A column that section III of the EIE paper encodes."""


def encoded(column: list[int]) -> tuple[list[int], list[int]]:
    """The paper's vectors v and z of a column, zero by zero."""
    v: list[int] = []
    z: list[int] = []
    run = 0
    for value in column:
        if value == 0 and run < 15:
            run += 1
            continue
        v.append(value)
        z.append(run)
        run = 0
    while v and v[-1] == 0:  # nothing follows: the column's length is known
        v.pop(), z.pop()
    return v, z


def layer(name: str, *shape: int) -> Layer:
    """A layer with a weight of that shape."""
    out_channels, in_channels, *kernel = shape
    size = (kernel[0], kernel[1]) if kernel else (1, 1)
    kind = "conv" if kernel else "linear"
    return Layer(name, 0, kind, in_channels, out_channels, size, (1, 1), 1, True, (4, 4), (4, 4))


def random_places(shape: tuple[int, ...], granularity: str, seed: int) -> tuple[Tensor, int]:
    """Places in a random order of removal, and the number of units."""
    rng = np.random.default_rng(seed)
    o, i, *kernel = shape
    if granularity == "element":
        total = int(np.prod(shape))
        places = rng.permutation(total).reshape(shape)
    elif granularity == "kernel":
        total = o * i
        places = np.broadcast_to(rng.permutation(total).reshape(o, i, *[1] * len(kernel)), shape)
    else:
        total = 4
        blocks = rng.permuted(np.broadcast_to(np.arange(4), (o, *kernel, i // 4, 4)), axis=-1)
        places = np.moveaxis(blocks.reshape(o, *kernel, i), -1, 1)
    return torch.tensor(places, dtype=torch.int32), total


def test_the_papers_example() -> None:
    assert encoded(EXAMPLE) == ([1, 2, 0, 3], [2, 0, 15, 2])
    assert eie_entries(np.array(EXAMPLE)[:, None] != 0) == 4


@pytest.mark.parametrize(("zeros", "entries"), [(0, 1), (15, 1), (16, 2), (31, 2), (32, 3)])
def test_a_padding_zero_for_every_16th_zero_of_a_run(zeros: int, entries: int) -> None:
    column = np.array([False] * zeros + [True] + [False] * 40)
    assert eie_entries(column[:, None]) == entries


@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.3, 1.0])
def test_entries_are_those_of_the_encoder(density: float) -> None:
    keep = np.random.default_rng(0).random((97, 23)) < density
    assert eie_entries(keep) == sum(len(encoded(column.tolist())[0]) for column in keep.T.astype(int))


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        # entries: rows 2 and 40 of column 0 and row 99 of column 1, with 0, 2 and 6 padding zeros
        ({"format": "eie"}, ("eie", (8 * 11 + 32 * 3 + 512) // 8)),
        ({"format": "eie", "pointer_bits": 16}, ("eie", (8 * 11 + 16 * 3 + 512) // 8)),
        ({"format": "csr"}, ("csr", (3 * (32 + 16) + 32 * 101) // 8)),
        ({"format": "csr", "index_bits": 9}, ("csr", (3 * 41 + 32 * 101 + 5) // 8)),
        ({"format": "csr", "value_bits": 16}, ("dense", 400)),  # 416 bytes as CSR
    ],
)
def test_sizes_by_hand(options: dict, stored: tuple[str, int]) -> None:
    places = torch.full((100, 2), 3, dtype=torch.int32)
    places[2, 0], places[40, 0], places[99, 1] = 0, 2, 1
    whole = layer("whole", 10, 3)
    cost = Storage(
        [layer("fc", 100, 2), whole], [Grid("fc", 200, 1, 199)], {"fc": places}, other_params=110, **options
    )
    dense_whole = {"eie": (4 * 30 + 512) // 8, "csr": 30 * options.get("value_bits", 32) // 8}
    sizes = {"fc": stored, "whole": ("dense", dense_whole[options["format"]])}
    assert cost.sizes([197]) == sizes
    assert cost([197]) == 440 + sum(size for _, size in sizes.values())
    assert cost.sizes([0])["fc"][0] == "dense"
    assert (cost.name, cost.unit) == ("storage", "bytes")


def test_n_of_m_by_hand() -> None:
    places, total = random_places((8, 12, 3, 3), "block", 0)
    cost = Storage(
        [layer("conv", 8, 12, 3, 3)], [Grid("conv", total, 4, 2, first=2)], {"conv": places}, 8, "nm"
    )
    assert cost([0]) == 32 + 864 * 4
    assert cost([2]) == 32 + 216 * 2 * (32 + 2) // 8


@pytest.mark.parametrize(
    ("format", "granularity"),
    [
        ("eie", "element"),
        ("eie", "kernel"),
        ("eie", "block"),
        ("csr", "element"),
        ("csr", "kernel"),
        ("csr", "block"),
        ("nm", "block"),
    ],
)
@pytest.mark.parametrize("shape", [(60, 32), (70, 4, 3, 3), (40, 16, 1, 2)], ids=str)
def test_sizes_never_rise_when_more_is_removed(format: str, granularity: str, shape: tuple[int, ...]) -> None:
    for seed in range(3):
        places, total = random_places(shape, granularity, seed)
        grid = Grid("a", total, 1, total - 1)
        for value_bits in (32, 8):
            cost = Storage([layer("a", *shape)], [grid], {"a": places}, 0, format, value_bits=value_bits)
            values = [cost([count]) for count in range(total)]
            assert all(later <= earlier for earlier, later in pairwise(values))
            assert values[-1] < values[0]


def test_removing_an_entry_never_lengthens_the_list() -> None:
    for seed in range(5):
        places, total = random_places((120, 6), "element", seed)
        entries = [eie_entries(places.numpy() < kept) for kept in range(total + 1)]
        assert all(np.diff(entries) >= 0)
        assert entries[0] == 0


def test_a_budget_on_it_is_met_by_bisection() -> None:
    names, shape = ("a", "b"), (64, 8, 3, 3)
    places = {name: random_places(shape, "element", seed)[0] for seed, name in enumerate(names)}
    grids = [Grid(name, 4608, 1, 4500) for name in names]
    cost = Storage([layer(name, *shape) for name in names], grids, places, 128)
    check_cost(cost, grids, original=128 * 4 + 2 * (64 + 4608 // 2), seeds=1)
    space = SearchSpace(grids, [cost], [Budget.of(cost, 2, ratio=0.6)])
    removed = space.project([0.0, 0.0])
    assert space.met(removed)
    assert not space.met([count - 20 for count in removed])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_a_weight_or_beside_them(name: str) -> None:
    model, graph = traced(name)
    weights = sum(entry.weights for entry in graph.layers if not entry.costless)
    assert weights + params_beside_weights(graph) == sum(p.numel() for p in model.parameters())


def test_refusals() -> None:
    places, total = random_places((8, 8), "element", 0)
    grid = Grid("a", total, 1, 10)
    with refused("unknown_name", "budget.format"):
        Storage([layer("a", 8, 8)], [grid], {"a": places}, 0, "zip")
    with refused("does_not_fit", "budget.format"):
        Storage([layer("a", 8, 8)], [grid], {"a": places}, 0, "nm")
