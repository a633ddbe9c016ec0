"""Numbers and names as people read them; tables of runs that cut channels and of runs that mask weights."""

from dataclasses import replace

import pytest
from made_results import budget, masked_result, network, pattern_result, result, search

from search.output.formatting import (
    amount,
    budget_lines,
    comparison,
    cost_name,
    history_line,
    latency_note,
    layer_table,
    pattern_line,
    size,
    storage_rows,
)


@pytest.mark.parametrize(
    ("count", "text"), [(590_000, "590.00 kB"), (512, "512 B"), (1.5e6, "1.50 MB"), (float("nan"), "–")]
)
def test_sizes_have_their_unit(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("cost", "value", "text"),
    [
        ("storage", 23_300, "23.30 kB"),
        ("memory", 196_608, "196.61 kB"),
        ("cycles", 389, "389"),
        ("cycles", 41_000, "41.00 k"),
        ("macs", 2e7, "20.00 M"),
        ("latency_ms", 1.234, "1.23 ms"),
    ],
)
def test_costs_have_their_unit(cost: str, value: float, text: str) -> None:
    assert amount(cost, value) == text


def test_costs_go_by_their_names() -> None:
    names = [cost_name(cost) for cost in ("macs", "params", "storage", "cycles", "memory", "watts")]
    assert names == ["MACs", "parameters", "stored size", "cycles", "peak memory", "watts"]
    of_masks = [cost_name(cost, masked=True) for cost in ("macs", "params", "storage", "cycles")]
    assert of_masks == ["non-zero MACs", "non-zero parameters", "stored size", "cycles"]


def test_times_that_spread_too_far_are_not_compared() -> None:
    (fine,) = {cells[1].relative for title, cells in comparison(result()).rows.items() if "batch" in title}
    assert (fine, latency_note(result())) == ("49.9%", "")
    noisy = result(pruned=replace(network(0.84, 20.23e6), latency_spread=0.31))
    (cells,) = [cells for title, cells in comparison(noisy).rows.items() if "batch" in title]
    assert [cell.relative for cell in cells] == ["", "", "49.9%"]
    assert "not reliable" in latency_note(noisy)


def test_masked_weights_are_counted_twice() -> None:
    rows = comparison(masked_result()).rows
    assert list(rows)[:5] == [
        "accuracy, test split",
        "MACs, non-zero",
        "MACs, dense",
        "parameters, non-zero",
        "parameters, dense",
    ]
    cells = [[(cell.text, cell.relative) for cell in rows[f"MACs, {what}"]] for what in ("non-zero", "dense")]
    assert cells == [
        [("40.55 M", ""), ("20.23 M", "49.9%"), ("20.23 M", "49.9%")],
        [("40.55 M", ""), ("40.55 M", ""), ("40.55 M", "")],
    ]


@pytest.mark.parametrize(
    ("format", "title"),
    [("eie", "stored size, EIE"), ("csr", "stored size, CSR"), ("nm", "stored size, 2:4")],
)
def test_the_budget_s_format_is_in_the_title(format: str, title: str) -> None:
    networks = {name: network(0.9, 1e6, storage=1000) for name in ("base", "pruned")}
    found = pattern_result(budgets=(budget(cost="storage", format=format),), **networks)
    assert title in comparison(found).rows


def test_layers_have_their_times_where_latency_is_predicted() -> None:
    (layer,) = result().shapes
    titles, rows = layer_table(result())
    assert titles == ("layer", "inputs", "outputs", "weights", "MACs left")
    assert rows == [("layer1.0.conv1", "16", "16 → 12", "2.30 k → 1.73 k", "75%")]
    shapes = replace(layer, ms=(0.1204, 0.0801)), replace(layer, name="fc", ms=(0.01, 0.01)), layer
    titles, rows = layer_table(result(shapes=shapes))
    assert titles[-1] == "predicted ms"
    assert [row[-1] for row in rows] == ["0.120 → 0.080", "0.010", "–"]


def test_cut_channels_are_counted_once() -> None:
    base, pruned = network(0.98, 763_530, cycles=556), network(0.97, 388_970, cycles=385)
    rows = comparison(result(base=base, pruned=pruned, finetuned=None)).rows
    assert list(rows)[:4] == ["accuracy, test split", "MACs", "parameters", "cycles"]
    assert (rows["cycles"][1].text, rows["cycles"][1].relative) == ("385", "69.2%")


def test_a_budget_says_what_it_counts() -> None:
    storage = budget(cost="storage", ratio=0.75, limit=233_262.0, value=232_540.0)
    assert budget_lines([storage], {"storage": 311_016}) == [
        ("stored size at most 233.26 kB (75.0%), reached 232.54 kB (74.8%): met", True)
    ]
    params = budget(cost="params", limit=38_177.0, value=39_000.0, met=False)
    ((line, met),) = budget_lines([params], {"params": 76_353}, masked=True)
    assert line.startswith("non-zero parameters at most 38.18 k")
    assert line.endswith("NOT met")
    assert not met


def test_sizes_stand_beside_dense_at_as_many_bits() -> None:
    rows = [(row.format, row.weights, row.size, row.share) for row in storage_rows(pattern_result())]
    assert rows == [
        ("dense", "32 bits", "1.00 kB", ""),
        ("CSR", "32 bits", "900 B", "90.0%"),
        ("2:4", "32 bits", "531 B", "53.1%"),
        ("dense", "4 bits", "200 B", ""),
        ("EIE", "4 bits", "150 B", "75.0%"),
    ]
    assert storage_rows(result()) == []


def test_a_pattern_that_does_not_hold_is_said_loudly() -> None:
    assert pattern_line(result()) is None
    found = pattern_line(pattern_result())
    assert found is not None
    assert found[1]
    assert found[0].startswith("2:4 holds in 1 of the 3 layers that it fits")
    broken = pattern_line(pattern_result(holds=False))
    assert broken == ("2:4 does NOT hold in all of 1 of the 3 layers that it fits", False)


def test_the_history_of_the_weights_is_shown_where_there_was_one() -> None:
    chain = ("original", "stage 1 (0.5)")
    assert history_line(result()) == ""
    assert history_line(result(search=search(start=chain))) == "original → stage 1 (0.5) → this network"
    rounds = search(start=chain, rounds=4, schedule="cubic")
    assert "rounds" not in history_line(result(search=rounds, finetuned=None))
    assert "fine-tuned over 4 rounds of pruning (cubic)" in history_line(result(search=rounds))
