"""Channels: grids of a network's decisions."""

import pytest
from networks import traced

from amc_env.errors import UserError
from amc_env.pruning.granularity import Channel


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
    reasons = {w.name: w.reason for w in smaller.whole}
    assert reasons["left"] == "it is too narrow for channel_multiple=8 and max_ratio=0.9"


@pytest.mark.parametrize("max_ratio", [0.1, 0.5, 0.8, 0.9, 0.999])
@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_every_count_is_within_max_ratio_and_keeps_a_channel(multiple: int, max_ratio: float) -> None:
    for name in ("residual", "grouped", "flatten", "mlp"):
        for grid in Channel(multiple, max_ratio).decisions(traced(name)[1])[1]:
            largest = grid.count(grid.size - 1)
            assert 0 < largest < grid.total
            assert largest <= max_ratio * grid.total + 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiple": 0}, "channel_multiple=0"),
        ({"max_ratio": 1.0}, r"max_ratio=1.0 is outside \(0, 1\)"),
        ({"max_ratio": 0.0}, "max_ratio=0.0"),
        ({"max_ratio": float("nan")}, "max_ratio=nan"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Channel(**options)  # type: ignore[arg-type]
