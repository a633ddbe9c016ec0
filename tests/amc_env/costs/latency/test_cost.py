"""Predicted latency as a cost."""

from types import SimpleNamespace

import numpy as np
import pytest
from networks import SMALL, images, problem, random_removed
from refusals import refused
from test_table import HERE

from amc_env.costs.latency.cost import Latency, LatencyBudget
from amc_env.costs.latency.table import Correction, LatencyTable, Times
from amc_env.costs.latency.units import inside_units, units_of
from amc_env.costs.memory import Activations
from amc_env.graph.tracing import trace_layers
from amc_env.testing import check_cost


def table_of(name: str, correction: Correction | None = None, least: int = 1) -> LatencyTable:
    """A table of a network in which a unit takes (inputs + 2 * outputs) microseconds."""
    candidates, _ = problem(name)
    units = {}
    for unit in units_of(candidates.original, candidates.graph).values():
        inputs, outputs = ([1] if unit.depthwise else [least, 256]), [least, 256]
        ms = 1e-3 * np.add.outer(np.array(inputs), 2 * np.array(outputs))
        units[unit] = Times.fitted(inputs, outputs, ms)
    return LatencyTable(HERE, units, correction or Correction())


def activations(name: str) -> Activations:
    candidates, grids = problem(name)
    return Activations(candidates.original, candidates.graph, grids, images(1))


def test_a_perceptron_by_hand() -> None:
    candidates, _ = problem("mlp")  # 192 - 20 - 16 - 4: the two hidden widths are decided
    latency = Latency(candidates.original, candidates.graph, table_of("mlp"))
    assert latency([0, 0]) == pytest.approx(0.192 + 0.04 + 0.02 + 0.032 + 0.016 + 0.008)
    assert latency([4, 6]) == pytest.approx(0.192 + 0.032 + 0.016 + 0.02 + 0.010 + 0.008)
    assert latency.by_layer([4, 6]) == pytest.approx([0.192 + 0.032, 0.016 + 0.02, 0.010 + 0.008])
    assert (latency.name, latency.unit) == ("latency", "ms")


def test_the_correction_is_of_the_sum_of_elements_outside_of_units_and_of_weights() -> None:
    candidates, grids = problem("residual")
    model, graph = candidates.original, candidates.graph
    plain = Latency(model, graph, table_of("residual"))
    corrected = Latency(
        model, graph, table_of("residual", Correction(1.5, 1e-4, 1e-5, -0.01)), activations("residual")
    )
    removed = random_removed(grids, 3)
    outside = activations("residual").elements(removed, inside=inside_units(model, graph))
    assert outside > 0
    cut = trace_layers(candidates.build(removed), images(1))
    weights = sum(layer.weights for layer in cut.layers)
    assert corrected.parts(removed) == pytest.approx((plain(removed), outside, weights))
    expected = 1.5 * plain(removed) + 1e-4 * outside + 1e-5 * weights - 0.01
    assert corrected(removed) == pytest.approx(expected)


@pytest.mark.parametrize("name", SMALL)
def test_latency_keeps_the_contract_of_costs(name: str) -> None:
    candidates, grids = problem(name)
    table = table_of(name, Correction(1.2, 1e-5, 1e-6, 0.1))
    check_cost(Latency(candidates.original, candidates.graph, table, activations(name)), grids)


def test_another_networks_table_is_refused() -> None:
    candidates, _ = problem("residual")
    with refused("wrong_table", "budget.table"):
        Latency(candidates.original, candidates.graph, table_of("mlp"))


def test_a_table_that_does_not_reach_is_refused_where_it_is_asked() -> None:
    candidates, _ = problem("mlp")
    latency = Latency(candidates.original, candidates.graph, table_of("mlp", least=10))
    with refused("wrong_table", "budget.table"):
        latency([0, 0])


@pytest.mark.parametrize("correction", [Correction(constant_ms=-1e9), Correction(scale=0.0)])
def test_a_table_that_predicts_no_time_is_refused(correction: Correction) -> None:
    candidates, _ = problem("mlp")
    table = table_of("mlp", correction)
    inputs = SimpleNamespace(
        model=candidates.original, graph=candidates.graph, latency_table=lambda _: (table, None)
    )
    with refused("wrong_table", ""):
        Latency.build(inputs, LatencyBudget())  # type: ignore[arg-type]


def test_a_correction_for_elements_needs_them() -> None:
    candidates, _ = problem("mlp")
    table = table_of("mlp", Correction(1.0, 1e-6, 0.0))
    with refused("wrong_table", "budget.table"):
        Latency(candidates.original, candidates.graph, table)
