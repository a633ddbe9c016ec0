"""result.json: what is written is read back, its keys are those that the design promises."""

import json
from pathlib import Path

import pytest
from made_results import budget, masked_result, network, pattern_result, result, search
from refusals import refused

from search.output.run_result import FILE, RunResult

STORAGE = budget(cost="storage", format="eie", ratio=0.7)
STAGED = search(
    stages=(0.7, 0.5), stage_episodes=20, start=("original", "stage 1 (0.7)"), schedule="cubic", rounds=2
)


@pytest.mark.parametrize(
    "made",
    [
        result(),
        result(finetuned=None, budgets=(), exports=(), resumed=True),
        result(budgets=(budget(), STORAGE), search=STAGED),
        masked_result(),
        pattern_result(holds=False),
    ],
    ids=["channels", "bare", "stages", "masked", "pattern"],
)
def test_what_is_written_is_read_back(made: RunResult, tmp_path: Path) -> None:
    made.write(tmp_path)
    assert RunResult.read(tmp_path) == made


def test_keys_of_the_design() -> None:
    content = result().to_json()
    assert {"base", "pruned", "finetuned", "budget", "budgets", "search", "strategy"} <= set(content)
    for name in ("base", "pruned", "finetuned"):
        assert {"accuracy", "macs", "params", "latency_ms", "split"} <= set(content[name])
    assert set(content["budget"]) == {"cost", "ratio", "limit", "value", "met"}
    assert content["budgets"] == [content["budget"]]
    agreed = {"agent", "episodes", "evaluations", "cache_hits", "seconds", "seed", "best_reward"}
    assert agreed <= set(content["search"])
    assert not {"start", "stages", "rounds"} & set(content["search"])
    assert not {"layers", "storage", "pattern", "masked"} & set(content)
    assert {"layers", "storage"} <= set(masked_result().to_json())


def test_the_tightest_budget_is_the_budget() -> None:
    assert result(budgets=(budget(ratio=0.5), budget(cost="params", ratio=0.4))).budget == budget(
        cost="params", ratio=0.4
    )
    assert result(budgets=()).budget is None


def test_the_last_network_is_delivered() -> None:
    assert result().delivered == network(0.9052, 20.23e6)
    assert result(finetuned=None).delivered == network(0.8421, 20.23e6)


def test_keys_may_be_added(tmp_path: Path) -> None:
    content = result().to_json()
    content["search"]["later"] = content["later"] = 1
    (tmp_path / FILE).write_text(json.dumps(content))
    assert RunResult.read(tmp_path) == result()


@pytest.mark.parametrize("text", [None, "{", "{}", "[]"])
def test_a_run_that_has_not_ended_is_a_users_mistake(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with refused("unreadable", ""):
        RunResult.read(tmp_path)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("base", "accuracy", "<b>1</b>"),
        ("base", "macs", "many"),
        ("search", "episodes", None),
        ("budgets", "limit", [1]),
        (None, "latency_batch", "1"),
    ],
)
def test_text_where_a_number_belongs_is_refused(
    tmp_path: Path, section: str | None, name: str, value: object
) -> None:
    content = result().to_json()
    entry = content if section is None else content[section]
    (entry[0] if isinstance(entry, list) else entry)[name] = value
    (tmp_path / FILE).write_text(json.dumps(content))
    with refused("unreadable", ""):
        RunResult.read(tmp_path)
