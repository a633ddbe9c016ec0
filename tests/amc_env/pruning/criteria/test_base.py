"""From members to units: sums by hand, aggregation, and ranking."""

import pytest
import torch
from networks import traced
from refusals import refused
from torch import Tensor

from amc_env.pruning.criteria.base import (
    Sample,
    calibration_sample,
    rank,
    scoring_layers,
    scoring_members,
    together,
    unit_sums,
)
from amc_env.pruning.criteria.weights import Norm
from amc_env.system import named_generator


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


PARTS = [double(1, 3), double(30, 10)]


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("mean", (1.0, 1.0)), ("max", (1.5, 1.5)), ("sum", (31.0, 13.0))]
)
def test_members_come_together_by_hand(aggregate: str, expected: tuple[float, float]) -> None:
    assert torch.equal(together(PARTS, 2, aggregate), double(*expected))  # type: ignore[arg-type]


def test_a_member_that_is_all_zero_stays_finite() -> None:
    assert torch.equal(together([double(0, 0), double(1, 3)], 2, "mean"), double(0.25, 0.75))
    assert torch.equal(together([], 3, "mean"), double(0, 0, 0))


def test_units_of_a_grouped_layer_by_hand() -> None:
    _, graph = traced("grouped")
    layer = graph.layer("halves")  # 24 -> 12 in 2 groups, 3x3
    elements = torch.arange(12 * 12 * 9, dtype=torch.float64).reshape(12, 12, 3, 3)
    for group in graph.groups:
        for member in group.members:
            if member.module != "halves":
                continue
            wanted = torch.zeros(group.total, dtype=torch.float64)
            for unit, positions in enumerate(member.positions.tolist()):
                for position in positions:
                    if member.side == "out":
                        wanted[unit] += elements[position].sum()
                    else:  # input channel p is read by the filters of its own half
                        half = position // 12
                        wanted[unit] += elements[6 * half : 6 * half + 6, position % 12].sum()
            assert torch.equal(unit_sums(elements, member, layer), wanted)
            batch = unit_sums(torch.stack([elements, 2 * elements]), member, layer)
            assert torch.equal(batch, torch.stack([wanted, 2 * wanted]))


def test_who_speaks_for_a_group() -> None:
    _, graph = traced("selection")
    stream = next(group for group in graph.groups if group.name == "conv1")
    assert "layer2.0.shortcut" in stream.consumers
    names = {(member.module, member.side) for member, _ in scoring_members(stream, graph, "all")}
    assert ("layer2.0.shortcut", "in") not in names
    assert {side for _, side in names} == {"in", "out"}
    assert {m.side for m, _ in scoring_members(stream, graph, "consumers")} == {"in"}
    assert {m.side for m, _ in scoring_members(stream, graph, "producers")} == {"out"}


def test_depthwise_layers_are_not_heard() -> None:
    _, graph = traced("depthwise")
    names = [layer.name for layer in scoring_layers(graph, "all")]
    assert "features.0.0" not in names
    assert "features.0.3" in names
    assert names == [layer.name for layer in graph.layers if not layer.depthwise]


def test_rank_is_stable() -> None:
    assert rank([double(1, 3, 1, 3, 2)])[0].tolist() == [1, 3, 4, 0, 2]


def test_a_criterion_gets_as_many_images_as_it_wants() -> None:
    class Three(Norm):
        images = 3

    sample = Sample(torch.arange(20.0).view(5, 4), torch.arange(5), seed=9)
    part = calibration_sample(Three(), sample)
    assert part.inputs.shape == (3, 4)
    assert part.targets.tolist() == [0, 1, 2]
    assert part.seed == 9
    with refused("missing", "criterion"):
        calibration_sample(Three(), Sample(torch.empty(0, 4), torch.empty(0, dtype=torch.int64)))


def test_generators_are_functions_of_seed_and_name() -> None:
    def first(seed: int, name: str) -> float:
        return torch.rand((), generator=named_generator(seed, name)).item()

    assert first(0, "a") == first(0, "a")
    assert len({first(0, "a"), first(1, "a"), first(0, "b")}) == 3
