"""Numbers and names as people read them; tables of runs that cut channels and of runs that mask weights."""

from typing import Any

import pytest

from search.output.formatting import (
    amount,
    budget_lines,
    comparison,
    cost_name,
    history_line,
    pattern_line,
    size,
    storage_rows,
)


def stage(accuracy: float, macs: int, **more: Any) -> dict[str, Any]:
    return {"accuracy": accuracy, "macs": macs, "params": macs // 10, "split": "test", **more}


def masked_result(**changes: Any) -> dict[str, Any]:
    dense = {"dense_macs": 763_530, "dense_params": 77_754}
    return {
        "granularity": {
            "name": "nm",
            "masked": True,
            "speed": "2:4 on GPUs.",
            "unit": "weights",
            "n": 2,
            "m": 4,
        },
        "base": stage(0.98, 763_530, storage=311_016, **dense),
        "pruned": stage(0.97, 611_660, storage=232_540, **dense),
        "finetuned": None,
        "budgets": [
            {
                "cost": "storage",
                "ratio": 0.75,
                "limit": 233_262.0,
                "value": 232_540.0,
                "met": True,
                "format": "nm",
            }
        ],
        "strategy": {"conv1": 0.5, "conv2": 0.0, "linear": 0.5},
        "pattern": {"n": 2, "m": 4, "layers": ["conv1", "linear"], "holds": True},
        "storage": {
            "dense_fp32": 311_016,
            "csr": 269_790,
            "nm": 232_540,
            "dense_4bit": 41_900,
            "eie": 41_900,
        },
        "latency_batch": 1,
    } | changes


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


def test_masked_weights_are_counted_twice() -> None:
    rows = comparison(masked_result()).rows
    assert list(rows) == [
        "accuracy, test split",
        "MACs, non-zero",
        "MACs, dense",
        "parameters, non-zero",
        "parameters, dense",
        "stored size, 2:4",
    ]
    assert [(cell.text, cell.relative) for cell in rows["MACs, non-zero"]] == [
        ("763.53 k", ""),
        ("611.66 k", "80.1%"),
    ]
    assert [(cell.text, cell.relative) for cell in rows["MACs, dense"]] == [
        ("763.53 k", ""),
        ("763.53 k", ""),
    ]
    assert rows["stored size, 2:4"][1].text == "232.54 kB"


@pytest.mark.parametrize(("format", "title"), [("eie", "stored size, EIE"), ("csr", "stored size, CSR")])
def test_the_budget_s_format_is_in_the_title(format: str, title: str) -> None:
    budget = masked_result()["budgets"][0] | {"format": format}
    assert title in comparison(masked_result(budgets=[budget])).rows


def test_cut_channels_are_counted_once() -> None:
    result = {
        "base": stage(0.98, 763_530, cycles=556),
        "pruned": stage(0.97, 388_970, cycles=385),
        "granularity": {"name": "channel", "masked": False, "speed": "any"},
    }
    rows = comparison(result).rows
    assert list(rows) == ["accuracy, test split", "MACs", "parameters", "cycles"]
    assert (rows["cycles"][1].text, rows["cycles"][1].relative) == ("385", "69.2%")


def test_a_budget_says_what_it_counts() -> None:
    assert budget_lines(masked_result()) == [
        ("stored size at most 233.26 kB (75.0%), reached 232.54 kB (74.8%): met", True)
    ]
    params = {"cost": "params", "ratio": 0.5, "limit": 38_177.0, "value": 38_000.0, "met": True}
    ((line, _),) = budget_lines(masked_result(budgets=[params]))
    assert line.startswith("non-zero parameters at most 38.18 k")
    ((line, _),) = budget_lines({"budgets": [params], "base": {"params": 76_353}})
    assert line.startswith("parameters at most 38.18 k")


def test_sizes_stand_beside_dense_at_as_many_bits() -> None:
    rows = [(row.format, row.weights, row.size, row.share) for row in storage_rows(masked_result())]
    assert rows == [
        ("dense", "32 bits", "311.02 kB", ""),
        ("CSR", "32 bits", "269.79 kB", "86.7%"),
        ("2:4", "32 bits", "232.54 kB", "74.8%"),
        ("dense", "4 bits", "41.90 kB", ""),
        ("EIE", "4 bits", "41.90 kB", "100.0%"),
    ]
    assert storage_rows({}) == []


def test_a_pattern_that_does_not_hold_is_said_loudly() -> None:
    assert pattern_line({}) is None
    found = pattern_line(masked_result())
    assert found is not None
    assert found[1]
    assert found[0].startswith(
        "2:4 holds in 2 of the 3 layers that it fits, checked on the delivered weights"
    )
    broken = pattern_line(masked_result(pattern={"n": 2, "m": 4, "layers": ["conv1"], "holds": False}))
    assert broken == ("2:4 does NOT hold in all of 1 of the 3 layers that it fits", False)


def test_the_way_of_the_weights_is_told_where_there_was_one() -> None:
    assert history_line({"search": {"agent": "ddpg"}}) == ""
    chain = {"start": ["original", "stage 1 (0.5)"]}
    assert history_line({"search": chain}) == "original → stage 1 (0.5) → this network"
    rounds = {"search": chain | {"rounds": 4, "schedule": "cubic"}}
    assert "rounds" not in history_line(rounds)  # nothing was fine-tuned
    assert "fine-tuned over 4 rounds of pruning (cubic)" in history_line(
        rounds | {"finetuned": {"accuracy": 1}}
    )
