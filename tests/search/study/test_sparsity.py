"""What is counted on masked weights: non-zeros, sizes and patterns, against numbers by hand."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

from agents.baselines import Random
from amc_env.costs.storage import Storage, StorageBudget
from amc_env.pruning.granularity import NM, Channel, FineGrained, Granularity, Kernel, Vector
from amc_env.space import Strategy
from search.data.base import Data, Split, fingerprint
from search.output.run_result import LayerRow, Pattern
from search.settings import Settings
from search.study.problem import PruningProblem
from search.study.results import granularity_of, masked_figures, stored_sizes


def problem(granularity: Granularity, inputs: int = 48, hidden: int = 4) -> PruningProblem:
    """Two linear layers: ``hidden`` x ``inputs`` weights, then 4 x ``hidden``."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 4))
    split = Split(torch.randint(0, 256, (8, 1, 1, inputs), dtype=torch.uint8), torch.arange(8) % 4)
    data = Data("random", split, split, None, tuple("abcd"), (0.5,), (0.5,), False, fingerprint(split))
    settings = Settings(Random(), episodes=1, budgets=(), granularity=granularity, export=())
    return PruningProblem.build(model, data, settings)


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: network.get_submodule(name).weight.detach() for name in ("1", "3")}


def strategy(ranked: PruningProblem, *removed: int) -> Strategy:
    return ranked.space.strategy(removed)


def test_sizes_by_hand() -> None:
    ranked = problem(FineGrained())
    network = ranked.builder.cut((184, 0))  # 8 of 192 weights stay, and all 16
    sizes = stored_sizes(ranked, weights_of(network), (184, 0))
    biases = 4 * (4 + 4)
    assert sizes["dense_fp32"] == 4 * (192 + 16) + biases
    # CSR: a value of 32 bits and an index of 16 for each, 4 rows and one more; the second layer is smaller dense.
    assert sizes["csr"] == 8 * (4 + 2) + 4 * 5 + 4 * 16 + biases
    # 4-bit codes with a codebook of 16 weights in 32 bits for each layer; EIE's 49 pointers make it larger here.
    dense = 192 // 2 + 64 + 16 // 2 + 64 + biases
    assert (sizes["dense_4bit"], sizes["eie"]) == (dense, dense)
    assert "nm" not in sizes


@pytest.mark.parametrize("granularity", [FineGrained(), NM(2, 4)], ids=["fine_grained", "nm"])
def test_sizes_are_those_that_a_budget_counts(granularity: Granularity) -> None:
    ranked = problem(granularity)
    removed = ranked.space.snap([0.5, 0.5])
    sizes = stored_sizes(ranked, weights_of(ranked.builder.cut(removed)), removed)
    formats = ["csr", "eie", *(["nm"] if isinstance(granularity, NM) else [])]
    assert {name: sizes[name] for name in formats} == {
        name: Storage.build(ranked, StorageBudget(format=name))(removed) for name in formats
    }
    assert sizes["csr"] < sizes["dense_fp32"] or isinstance(granularity, NM)


def test_two_of_four_in_32_bits_take_half_and_two_bits_a_value() -> None:
    ranked = problem(NM(2, 4))
    sizes = stored_sizes(ranked, weights_of(ranked.builder.cut((2, 0))), (2, 0))
    assert sizes["nm"] == 96 * 34 // 8 + 4 * 16 + 4 * 8


def test_zeros_are_counted_where_they_lie_and_not_where_the_search_began() -> None:
    """All zeros at the ends of the columns take no entry in EIE, whatever the ranking of the first weights was."""
    ranked = problem(FineGrained(), inputs=4, hidden=64)
    weights = {name: torch.ones_like(weight) for name, weight in weights_of(ranked.model).items()}
    weights["1"][8:] = 0.0
    removed = (4 * 56, 0)
    sizes = stored_sizes(ranked, weights, removed)
    second = 256 // 2 + 64
    # 8 entries of a byte in each of 4 columns, 5 pointers of 4 bytes, the codebook.
    assert sizes["eie"] == 4 * 8 + 4 * 5 + 64 + second + 4 * (64 + 4)
    assert sizes["eie"] < Storage.build(ranked, StorageBudget(format="eie"))(removed)


def test_non_zeros_of_every_layer_are_stated() -> None:
    ranked = problem(FineGrained())
    chosen = strategy(ranked, 100, 4)
    found = masked_figures(ranked, ranked.builder.cut(chosen.removed), chosen)
    assert found is not None
    assert found.layers == {"1": LayerRow(192, 92), "3": LayerRow(16, 12)}
    assert found.pattern is None


def test_a_pattern_is_found_and_its_loss_too() -> None:
    ranked = problem(NM(2, 4))
    chosen = strategy(ranked, 2, 0)
    network = ranked.builder.cut(chosen.removed)

    def pattern() -> Pattern | None:
        found = masked_figures(ranked, network, chosen)
        return found and found.pattern

    assert pattern() == Pattern(2, 4, ("1",), holds=True)
    with torch.no_grad():
        network.get_submodule("1").weight.fill_(1.0)
    assert pattern() == Pattern(2, 4, ("1",), holds=False)


def test_channels_have_no_zeros_to_speak_of() -> None:
    ranked = problem(Channel())
    chosen = strategy(ranked, 2)
    assert masked_figures(ranked, ranked.builder.cut(chosen.removed), chosen) is None


@pytest.mark.parametrize(
    ("granularity", "says"),
    [
        (Channel(), {"name": "channel", "masked": False, "unit": "channels"}),
        (FineGrained(), {"name": "fine_grained", "masked": True, "unit": "weights"}),
        (Vector("column"), {"name": "vector", "unit": "kernel columns"}),
        (Kernel(), {"name": "kernel", "unit": "kernels"}),
        (NM(1, 4), {"name": "nm", "n": 1, "m": 4, "unit": "weights"}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_granularity_says_what_it_is(granularity: Granularity, says: dict[str, Any]) -> None:
    found = asdict(granularity_of(granularity))
    assert says.items() <= found.items()
    assert found["speed"] == granularity.speed
