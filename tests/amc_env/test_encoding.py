"""The eleven features by hand, on three decisions of a chain of four layers."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from masking import masked
from refusals import refused

from amc_env.costs.counts import Macs
from amc_env.encoding import FEATURES, DecisionDescription, Encoder, describe
from amc_env.space import Grid, SearchSpace


class ChainMacs:
    """10 = 1*4*... : layers 1 -> a(4) -> b(6) -> c(10) -> 5 with one MAC per weight."""

    name, unit = "macs", "MACs"

    def __call__(self, removed: Sequence[int]) -> float:
        a, b, c = 4 - removed[0], 6 - removed[1], 10 - removed[2]
        return float(1 * a + a * b + b * c + c * 5)


GRIDS = (Grid("a", 4, 1, 3), Grid("b", 6, 2, 4), Grid("c", 10, 2, 8))
DESCRIPTIONS = (
    DecisionDescription("a", 6, 4, 8, 16, 1, 3),
    DecisionDescription("b", 10, 6, 4, 4, 2, 1),
    DecisionDescription("c", 5, 10, 1, 1, 1, 1),
)
WHOLE = 4 + 24 + 60 + 50


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(DESCRIPTIONS, SearchSpace(GRIDS, [ChainMacs()]))


def test_the_first_decision_by_hand(encoder: Encoder) -> None:
    expected = {
        "index": 0.0,
        "out_channels": math.log(7) / math.log(4096),
        "in_channels": math.log(5) / math.log(4096),
        "height": math.log(9) / math.log(512),
        "width": math.log(17) / math.log(512),
        "stride": math.log(2) / math.log(8),
        "kernel": math.log(4) / math.log(16),
        "macs": (4 + 24) / WHOLE,  # without a: its own layer and the one that reads it
        "reduced": 0.0,
        "rest": (24 + 60 + 50) / WHOLE,  # all that b and c take part in
        "previous_ratio": 0.0,
    }
    assert dict(zip(FEATURES, encoder(()), strict=True)) == pytest.approx(expected, abs=1e-6)


def test_costs_follow_the_decisions_taken(encoder: Encoder) -> None:
    second = dict(zip(FEATURES, encoder((2,)), strict=True))
    assert second["index"] == pytest.approx(math.log(2) / math.log(256))
    assert second["macs"] == pytest.approx((24 + 60) / WHOLE)  # of the whole network: it does not follow
    assert second["reduced"] == pytest.approx((2 + 12) / WHOLE)
    assert second["rest"] == pytest.approx((60 + 50) / WHOLE)
    assert second["previous_ratio"] == 0.5
    third = dict(zip(FEATURES, encoder((2, 4)), strict=True))
    assert third["reduced"] == pytest.approx((WHOLE - (2 + 4 + 20 + 50)) / WHOLE)
    assert third["rest"] == 0.0
    assert third["previous_ratio"] == pytest.approx(4 / 6)


def test_every_observation_is_in_the_unit_box(encoder: Encoder) -> None:
    for chosen in ((), (3,), (3, 4), (0, 0), (0,)):
        observation = encoder(chosen)
        assert observation.dtype == np.float32
        assert observation.shape == (11,)
        assert ((observation >= 0) & (observation <= 1)).all()


def test_sizes_beyond_the_scale_are_cut_off() -> None:
    huge = (DecisionDescription("a", 10**6, 10**6, 10**6, 10**6, 100, 100), *DESCRIPTIONS[1:])
    assert Encoder(huge, SearchSpace(GRIDS, [ChainMacs()]))(())[1:7].tolist() == [1.0] * 6


def test_the_scale_does_not_depend_on_the_network() -> None:
    """The same decision in a larger network has the same size features."""
    wide = (DESCRIPTIONS[0], DecisionDescription("b", 512, 512, 224, 224, 2, 7), DESCRIPTIONS[2])
    small, large = (Encoder(d, SearchSpace(GRIDS, [ChainMacs()]))(()) for d in (DESCRIPTIONS, wide))
    assert small.tolist() == large.tolist()


def test_descriptions_of_other_decisions_and_a_missing_cost_are_refused() -> None:
    with refused("does_not_fit", ""):
        Encoder(DESCRIPTIONS[:2], SearchSpace(GRIDS, [ChainMacs()]))
    with refused("missing", ""):
        Encoder(DESCRIPTIONS, SearchSpace(GRIDS, []))


def layer(name: str, index: int, **more: object) -> SimpleNamespace:
    plain = {"in_channels": 4, "out_channels": 8, "kernel": (1, 1), "stride": (1, 1), "in_size": (1, 1)}
    return SimpleNamespace(name=name, index=index, **plain | more)


def test_a_decision_is_described_by_its_first_consumer_in_forward_order() -> None:
    graph = SimpleNamespace(
        layers=(
            layer("conv1", 0),
            layer("conv2", 1, out_channels=6, kernel=(3, 5), stride=(2, 1), in_size=(8, 16)),
            layer("shortcut", 2),
            layer("unused", 3),
        ),
        groups=(
            SimpleNamespace(name="conv1", consumers=("shortcut", "conv2")),
            SimpleNamespace(name="unused", consumers=()),
        ),
    )
    (described,) = describe(graph, [Grid("conv1", 4, 1, 3)])
    assert described == DecisionDescription("conv1", 6, 4, 8, 16, 2, 5)
    with refused("does_not_fit", ""):
        describe(graph, [Grid("unused", 4, 1, 3)])


def test_a_masked_decision_is_described_by_its_own_layer() -> None:
    """The same network's channels of ``conv`` would be described by ``conv2``, which reads them."""
    _, graph, grids = masked("flatten", "fine_grained")
    described = {d.name: d for d in describe(graph, grids)}
    assert list(described) == ["conv", "conv2", "hidden", "head"]
    assert described["conv"] == DecisionDescription("conv", 6, 3, 8, 8, 2, 3)
    assert described["conv2"] == DecisionDescription("conv2", 8, 6, 4, 4, 1, 3)
    assert described["hidden"] == DecisionDescription("hidden", 12, 128, 1, 1, 1, 1)
    with refused("does_not_fit", ""):
        describe(graph, [Grid("nowhere", 4, 1, 3)])


def test_costs_of_masked_decisions_by_hand() -> None:
    """mlp has 3840, 320 and 64 weights and 40 biases; half of each layer can go, and the encoder asks for all."""
    _, graph, grids = masked("mlp", "2:4")
    encoder = Encoder(describe(graph, grids), SearchSpace(grids, [Macs(graph, grids)]))
    first, second = (dict(zip(FEATURES, encoder(taken), strict=True)) for taken in ((), (2,)))
    assert first["macs"] == pytest.approx(3840 / 4264)
    assert first["rest"] == pytest.approx((320 + 64) / 4264)
    assert (second["macs"], second["reduced"]) == (pytest.approx(320 / 4264), pytest.approx(1920 / 4264))
    assert (second["rest"], second["previous_ratio"]) == (pytest.approx(64 / 4264), 0.5)
