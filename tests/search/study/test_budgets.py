"""Budgets from the configuration to the search problem: latency and its table, several budgets at once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from networks import network
from omegaconf import DictConfig
from refusals import refused
from small_runs import go, small

from agents.netadapt import NetAdapt
from amc_env.costs.base import COSTS, budget_on
from amc_env.costs.latency.cost import Latency
from amc_env.costs.latency.sampling import build_table
from amc_env.costs.latency.table import LatencyTable
from amc_env.costs.memory import Activations
from amc_env.errors import UserError
from amc_env.pruning.granularity import Channel
from search.config import compose as wiring
from search.data.base import Data
from search.settings import BudgetSettings, LatencyBudget, LatencySettings, Settings, ShortTermSettings
from search.study.problem import PruningProblem, check

QUICK = LatencySettings(batch=1, repeats=0, threads=1)


def configured(*overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose("search", list(overrides))


def limited(folder: Path, ratio: float = 0.9, **more: Any) -> Settings:
    budget = LatencyBudget(ratio=ratio, repeats=2, tolerance=1.0, **more)
    return small("channel", budgets=(budget,), latency=QUICK).in_folder(folder)


def stretched(folder: Path, factor: float) -> None:
    """The table in a run folder, with all times and what is added to them multiplied."""
    path = folder / "latency.json"
    content = json.loads(path.read_text())
    for unit in content["units"]:
        unit["ms"] = [[factor * ms for ms in row] for row in unit["ms"]]
    content["correction"] = {"scale": 1.0, "per_element_ms": 0.0, "constant_ms": 0.0}
    path.write_text(json.dumps(content))


def posed(folder: Path, data: Data, **more: Any) -> PruningProblem:
    return PruningProblem.build(network("concat"), data, limited(folder, 1.0, **more))


def test_a_table_is_built_for_the_run_and_read_when_it_goes_on(
    small_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = posed(tmp_path, small_data).space
    cost = next(cost for cost in space.costs if cost.name == "latency")
    assert isinstance(cost, Latency)
    assert space.budgets[0].cost is cost
    assert (tmp_path / "latency.json").exists()
    monkeypatch.setattr(
        "search.study.latency_table.build_table", lambda *args, **more: pytest.fail("built again")
    )
    again = posed(tmp_path, small_data).space
    assert again.cost([0] * 3) == space.cost([0] * 3)
    assert again.cost(again.most)["latency"] <= again.cost([0] * 3)["latency"]


def test_a_table_s_limit_is_what_the_search_keeps_to(small_data: Data, tmp_path: Path) -> None:
    posed(tmp_path, small_data)
    stretched(tmp_path, 1.0)  # without a correction, whose constant is noise at this size
    space = posed(tmp_path, small_data).space
    ratio = (1 + space.least_ratio(space.budgets[0].cost)) / 2
    settings = limited(tmp_path, ratio)
    finished = go(tmp_path, small_data, settings)
    budget = finished.result.budget
    assert (budget.cost, budget.met) == ("latency", True)
    assert budget.value <= budget.limit == pytest.approx(ratio * space.cost([0] * 3)["latency"])
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert all(line["costs"]["latency"] <= budget.limit * (1 + 1e-12) for line in lines[1:])
    assert lines[0]["header"]["latency_ms"] == [
        space.cost([0] * 3)["latency"],
        space.cost(space.most)["latency"],
    ]


def test_a_run_does_not_go_on_with_another_table(small_data: Data, tmp_path: Path) -> None:
    settings = limited(tmp_path, 1.0)
    go(tmp_path, small_data, settings)
    stretched(tmp_path, 2.0)
    with refused("other_configuration", ""):
        go(tmp_path, small_data, settings)


def test_a_table_of_other_conditions_is_refused_unless_it_is_wanted(small_data: Data, tmp_path: Path) -> None:
    posed(tmp_path, small_data)
    phone = tmp_path / "phone.json"
    content = json.loads((tmp_path / "latency.json").read_text())
    content["conditions"] |= {"machine": "a phone", "threads": 4}
    phone.write_text(json.dumps(content))
    with refused("wrong_table", "budget.table"):
        posed(tmp_path, small_data, table=str(phone))
    taken = posed(tmp_path, small_data, table=str(phone), elsewhere=True).space
    assert taken.cost([0] * 3) == posed(tmp_path, small_data).space.cost([0] * 3)


def test_a_table_of_another_network_and_a_missing_one_are_refused(small_data: Data, tmp_path: Path) -> None:
    posed(tmp_path, small_data)
    table = str(tmp_path / "latency.json")
    with refused("wrong_table", "budget.table"):
        PruningProblem.build(network("residual"), small_data, limited(tmp_path / "other", 1.0, table=table))
    with refused("unreadable", ""):
        posed(tmp_path, small_data, table=str(tmp_path / "none.json"))


def test_a_table_is_of_the_batch_that_is_asked_for(small_data: Data, tmp_path: Path) -> None:
    batch = len(small_data.search) + 1
    settings = replace(limited(tmp_path, 1.0), latency=replace(QUICK, batch=batch))
    PruningProblem.build(network("concat"), small_data, settings)
    assert LatencyTable.load(tmp_path / "latency.json").conditions.batch == batch


def test_the_runtime_of_a_table_is_looked_for_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu = replace(QUICK, runtime="cuda")
    for more in ({}, {"table": "t.json"}):
        with refused("no_device", "latency.runtime"):
            check(replace(limited(tmp_path, **more), latency=gpu))
    check(replace(limited(tmp_path, table="t.json", elsewhere=True), latency=gpu))  # nothing is measured here
    check(small("channel", latency=gpu))


def test_operations_that_cannot_be_counted_are_warned_of_once_and_points_are_capped(
    small_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def uncountable(*_: object) -> Activations:
        raise UserError("no trace", code="test")

    asked: dict[str, Any] = {}

    def built(*arguments: Any, **options: Any) -> LatencyTable:
        asked.update(options)
        return build_table(*arguments, **options)

    monkeypatch.setattr("search.study.problem.Activations", uncountable)
    monkeypatch.setattr("search.study.latency_table.build_table", built)
    posed(tmp_path, small_data, points=7)
    assert caplog.text.count("predicted as a constant: no trace") == 1
    assert asked["points"] == 7


def test_what_cannot_be_reached_is_said_in_milliseconds(small_data: Data, tmp_path: Path) -> None:
    with refused("out_of_reach", "budget"):
        PruningProblem.build(network("concat"), small_data, limited(tmp_path, 0.001))


def test_masks_have_no_latency(small_data: Data, tmp_path: Path) -> None:
    settings = replace(small("kernel", latency=QUICK), budgets=(LatencyBudget(),)).in_folder(tmp_path)
    with pytest.raises(UserError) as error:
        PruningProblem.build(network("concat"), small_data, settings)
    assert (error.value.code, error.value.field) == ("does_not_fit", "budget.cost")


def test_several_budgets_hold_at_once_with_netadapt_too(small_data: Data, tmp_path: Path) -> None:
    budgets = BudgetSettings("macs", 0.7), BudgetSettings("memory", 0.9), BudgetSettings("params", 0.6)
    agent, short = NetAdapt(reduction=0.1, decay=1.0), ShortTermSettings(0)
    finished = go(tmp_path, small_data, small("channel", agent=agent, short_term=short, budgets=budgets))
    found = finished.result.budgets
    assert [budget.cost for budget in found] == ["macs", "memory", "params"]
    assert all(budget.met and budget.value <= budget.limit for budget in found)


def test_further_budgets_are_shares_beside_the_main_one() -> None:
    cfg = configured("budget=latency", "also.params=0.4", "also.flops=0.7")
    budgets = wiring.settings_of(cfg, 0.1).budgets
    assert [(budget.cost, budget.ratio) for budget in budgets] == [
        ("latency", 0.5),
        ("macs", 0.7),
        ("params", 0.4),
    ]
    assert [
        b.cost for b in wiring.settings_of(configured("budget=none", "also.memory=0.5"), 0.1).budgets
    ] == ["memory"]
    with refused("out_of_range", "also.params"):
        wiring.settings_of(configured("also.params=1.5"), 0.1)
    with refused("out_of_range", "also"):
        wiring.resolved(configured("also.weight=0.5"))
    with refused("wrong_type", "also.params"):
        wiring.resolved(configured("also.params=half"))


@pytest.mark.parametrize("name", ["flops", *COSTS])
def test_conf_and_python_build_the_same_budget(name: str) -> None:
    option = "flops" if name == "macs" else name
    assert wiring.settings_of(configured(f"budget={option}"), 0.1).budgets == (budget_on(name, 0.5),)


def test_two_budgets_of_one_cost_are_refused() -> None:
    with refused("conflict", "budgets"):
        wiring.settings_of(configured("budget=latency", "also.latency=0.8"), 0.1)


def test_channels_go_in_vectors_under_a_latency_budget_unless_something_else_is_said() -> None:
    for overrides, multiple in (
        (["budget=params"], 2),
        (["budget=latency"], 8),
        (["budget=latency", "budget.vector_width=4"], 4),
        (["also.latency=0.9"], 8),
        (["also.latency=0.9", "channel_multiple=2"], 2),
        (["budget=latency", "channel_multiple=4"], 4),
        (["budget=latency", "granularity.multiple=3"], 3),
        (["preset=amc_paper"], 8),
    ):
        cfg = configured(*overrides)
        assert wiring.settings_of(cfg, 0.1).granularity == Channel(multiple, cfg.max_ratio), overrides


@pytest.mark.parametrize("command", ["apply", "sensitivity"])
def test_channels_go_in_vectors_in_every_command(command: str) -> None:
    def multiple(*overrides: str) -> int:
        with initialize_config_module("conf", version_base="1.3"):
            cfg = compose(command, list(overrides))
        settings = wiring.settings_of(cfg)
        assert isinstance(settings.granularity, Channel)
        return settings.granularity.multiple

    assert multiple("budget=latency") == 8
    assert multiple("budget=params") == 2
    assert multiple("budget=latency", "channel_multiple=2") == 2


def test_a_wrong_budget_is_said_once_though_the_multiple_of_channels_asks_for_it() -> None:
    with pytest.raises(UserError) as error:
        wiring.settings_of(configured("budget.ratio=7", "finetune.epochs=-1"), 0.1)
    assert str(error.value).count("budget.ratio=7") == 1
    assert "finetune.epochs=-1" in str(error.value)
