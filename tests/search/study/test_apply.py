"""amc-apply from the command line, and the strategy of a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from journals import content
from refusals import refused
from run_folders import read
from running import SMALL, Command
from safetensors.torch import load_file, save_file

from agents.base import SearchTask
from amc_env.errors import UserError
from amc_env.space import Budget, Grid, Removed, SearchSpace
from search import run_apply
from search.models.resnet import ResNet
from search.study.apply import Given

QUICK = (*SMALL, "finetune.epochs=0", "latency.repeats=0", "export=[safetensors]")
SEARCH = (*QUICK, "agent=random", "search.episodes=4", "finalists.count=1")


@pytest.fixture
def amc_apply(amc_search: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs amc-apply with overrides, as `amc_search` runs that."""

    def command(*overrides: str) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr("search.run_search.main", run_apply.main)
            return amc_search(*overrides)

    return command


def removed(folder: Path) -> list[int]:
    return [decision["removed"] for decision in read(folder, "strategy.json")["decisions"].values()]


# ---------------------------------------------------------------------------------------------- whole runs


def test_one_ratio_cuts_every_layer_alike(amc_apply: Command, tmp_path: Path) -> None:
    ended = amc_apply(*QUICK, "ratio=0.5", "hydra.run.dir=run")
    assert ended.code == 0
    assert removed(tmp_path / "run") == [64, 32]  # of 128 and 64
    result = read(tmp_path / "run")
    assert result["base"]["macs"] == (64 + 1) * 128 + (128 + 1) * 64 + (64 + 1) * 10
    assert result["pruned"]["macs"] == (64 + 1) * 64 + (64 + 1) * 32 + (32 + 1) * 10
    assert result["command"].startswith("amc-apply ")
    assert result["granularity"]["name"] == "channel"
    assert not {"layers", "storage", "pattern"} & set(result)
    assert load_file(tmp_path / "run" / "model.safetensors")["1.weight"].shape == (64, 64)
    assert "amc-apply" in ended.out
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "run_apply.log").exists()


def test_it_is_amc_search_with_the_uniform_policy(
    amc_apply: Command, amc_search: Command, tmp_path: Path
) -> None:
    assert amc_apply(*QUICK, "ratio=0.3", "hydra.run.dir=one").code == 0
    uniform = ("agent=uniform", "agent.ratio=0.3", "budget=none", "finalists.count=1")
    assert amc_search(*QUICK, *uniform, "hydra.run.dir=two").code == 0
    for name in ("strategy.json", "model.safetensors"):
        assert content(tmp_path / "one" / name) == content(tmp_path / "two" / name), name


def test_a_budget_raises_the_ratio(amc_apply: Command, tmp_path: Path) -> None:
    budget = ("budget=params", "budget.ratio=0.4")
    assert amc_apply(*QUICK, "ratio=0.1", *budget, "hydra.run.dir=run").code == 0
    result = read(tmp_path / "run")
    assert result["budget"]["met"]
    first, second = result["strategy"].values()
    assert 0.4 < first < 0.8
    assert first == pytest.approx(second, abs=0.03)


@pytest.mark.parametrize("granularity", ["channel", "fine_grained", "nm"])
def test_the_strategy_of_a_search_gives_its_network_again(
    amc_apply: Command, amc_search: Command, tmp_path: Path, granularity: str
) -> None:
    kind = (f"granularity={granularity}", "finetune.epochs=1")
    assert amc_search(*SEARCH, *kind, "budget.ratio=0.7", "hydra.run.dir=found").code == 0
    assert amc_apply(*QUICK, *kind, "strategy=found/strategy.json", "hydra.run.dir=given").code == 0
    for name in ("strategy.json", "model.safetensors"):
        assert content(tmp_path / "found" / name) == content(tmp_path / "given" / name), name
    found, given = read(tmp_path / "found"), read(tmp_path / "given")
    for stage in ("base", "pruned", "finetuned"):
        assert given[stage] == found[stage]
    assert given["budgets"] == []
    assert given["search"]["agent"] == "given"
    if granularity == "channel":  # the folder names the file as well, and a budget that is met is stated
        assert amc_apply(*QUICK, *kind, "strategy=found", "budget=flops", "budget.ratio=0.7").code == 0


def test_a_strategy_is_reached_over_rounds(amc_apply: Command, tmp_path: Path) -> None:
    rounds = ("granularity=fine_grained", "schedule=cubic", "schedule.rounds=2", "finetune.epochs=2")
    ended = amc_apply(*QUICK, *rounds, "ratio=0.75", "hydra.run.dir=run")
    assert ended.code == 0
    result = read(tmp_path / "run")
    assert (result["search"]["schedule"], result["search"]["rounds"]) == ("cubic", 2)
    state = load_file(tmp_path / "run" / "model.safetensors")
    for name, layer in result["layers"].items():
        assert layer["nonzero"] == layer["weights"] // 4 == int(state[f"{name}.weight"].count_nonzero())
    assert "fine-tuned over 2 rounds of pruning (cubic)" in ended.out
    assert "fine-tuned over 2 rounds of pruning (cubic)" in (tmp_path / "run" / "report.html").read_text()


def test_a_stopped_run_goes_on_and_another_strategy_is_refused(amc_apply: Command, tmp_path: Path) -> None:
    assert amc_apply(*QUICK, "ratio=0.5", "hydra.run.dir=first").code == 0
    given = ("strategy=first", "hydra.run.dir=run")
    assert amc_apply(*QUICK, *given).code == 0
    before = content(tmp_path / "run" / "evaluations.jsonl")
    assert str(tmp_path).encode() not in before
    again = amc_apply(*QUICK, *given)
    assert "resuming with" in again.out
    assert content(tmp_path / "run" / "evaluations.jsonl") == before
    assert read(tmp_path / "run")["resumed"]
    other = read(tmp_path / "first", "strategy.json")
    other["decisions"]["1"]["removed"] = 66
    (tmp_path / "first" / "strategy.json").write_text(json.dumps(other))
    refused = amc_apply(*QUICK, *given)
    assert refused.code == 2
    assert "agent.decisions." in refused.err


# ---------------------------------------------------------------------------------------------- mistakes


def test_a_strategy_that_does_not_fit_is_refused_before_anything_is_scored(
    amc_apply: Command, tmp_path: Path
) -> None:
    decisions = {"1": {"removed": 3, "total": 128}, "5": {"removed": 1, "total": 10}}
    (tmp_path / "given.json").write_text(json.dumps({"decisions": decisions, "granularity": "channel"}))
    ended = amc_apply(*QUICK, "strategy=given.json", "hydra.run.dir=run")
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    for text in (
        "strategy=given.json",
        "unknown decision '5'",
        "decision '3' is missing",
        "1: 3 removed of 128 is not feasible; allowed: [0, 2, 4",
        "channel_multiple",
        "(granularity=channel)",
    ):
        assert text in ended.err
    assert "accuracy" not in ended.out
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_weights_for_colour_images_on_the_digits_say_which_data_to_take(
    amc_apply: Command, tmp_path: Path
) -> None:
    save_file(ResNet(20).state_dict(), tmp_path / "resnet20.safetensors")
    ended = amc_apply("ratio=0.5", "model=resnet20", "model.weights=resnet20.safetensors")
    assert ended.code == 2
    assert "data=digits (1 x 8 x 8; weights for colour images go with data=cifar10)" in ended.err
    assert "conv1.weight [16, 3, 3, 3] instead of [16, 1, 3, 3]" in ended.err


def test_sections_shared_with_amc_search_have_its_defaults() -> None:
    with initialize_config_module("conf", version_base="1.3"):
        own, search = compose("apply"), compose("search")
    assert set(own) - set(search) == {"strategy", "ratio"}
    of_the_search = {"agent", "baselines", "reward", "enforce_budget", "fill_budget", "also", "short_term"}
    assert set(search) - set(own) == of_the_search
    for name in set(own) & set(search) - {"budget", "search", "finalists"}:
        assert own[name] == search[name], name
    assert own.finalists.repair == search.finalists.repair


def test_help_names_both_ways(amc_apply: Command) -> None:
    ended = amc_apply("--help")
    assert ended.code == 0
    for text in ("strategy=FILE", "ratio=0.5", "amc-apply --cfg job"):
        assert text in ended.out


# ------------------------------------------------------------------------------------------------- Given


class Kept:
    """A cost: all units that stay."""

    name, unit = "units", "units"

    def __call__(self, removed: Any) -> float:
        return float(30 - sum(removed))


def space(limit: float | None = None) -> SearchSpace:
    grids = (Grid("a", 10, 2, 8), Grid("b", 20, 4, 16))
    budgets = [] if limit is None else [Budget.of(Kept(), 2, limit=limit)]
    return SearchSpace(grids, [Kept()], budgets)


def given(folder: Path, **content: Any) -> Given:
    decisions = {"b": {"removed": 8, "total": 20}, "a": {"removed": 4, "total": 10}}
    file = folder / "strategy.json"
    file.write_text(json.dumps({"decisions": decisions} | content))
    return Given.read(str(file))


def test_counts_come_in_the_problem_s_order_and_are_scored_once(tmp_path: Path) -> None:
    asked: list[Any] = []

    def score(proposals: Sequence[Removed]) -> list[Any]:
        asked.extend(proposals)
        return []

    given(tmp_path).search(SearchTask(space(), pytest.fail, score, episodes=7, seed=0))  # no environment
    assert asked == [(4, 8)]


def test_a_budget_that_is_missed_is_said_with_its_figures(tmp_path: Path) -> None:
    given(tmp_path).check(space(limit=18), 1)
    with refused("out_of_reach", "strategy"):
        given(tmp_path).check(space(limit=17), 1)


@pytest.mark.parametrize(
    ("decisions", "says"),
    [
        ({"a": {"removed": 4, "total": 10}}, ["decision 'b' is missing"]),
        ({"a": {"removed": 3}, "b": {"removed": 8}}, ["a: 3 removed of 10 is not feasible"]),
        (
            {"a": {"removed": 4, "total": 12}, "b": {"removed": 20}},
            ["a: made for 12 units, the network has 10", "b: 20 removed of 20"],
        ),
        ({"a": {"removed": 4}, "b": {"removed": 1.5}, "c": 1}, ["removed=1.5", "unknown decision 'c'"]),
        ({"a": 4, "b": {"removed": True}}, ["decision 'a'", "removed=True"]),
    ],
)
def test_all_that_does_not_fit_is_in_one_message(
    tmp_path: Path, decisions: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        given(tmp_path, decisions=decisions).check(space(), 1)
    for text in says:
        assert text in str(error.value)


def test_a_strategy_found_on_tuned_weights_is_applied_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given(tmp_path).check(space(), 1)
    assert not caplog.records
    given(tmp_path, start=["original", "stage 1 (0.5)"]).check(space(), 1)
    assert "original → stage 1 (0.5)" in caplog.text


def test_what_is_zero_stays_zero_bit_for_bit(amc_apply: Command, tmp_path: Path) -> None:
    """2:4 along the inputs holds in every block of the weights that are exported, and fine-tuning does not end it."""
    ended = amc_apply(*QUICK, "granularity=nm", "ratio=0.5", "finetune.epochs=1", "hydra.run.dir=run")
    assert ended.code == 0
    result = read(tmp_path / "run")
    assert result["pattern"] == {"n": 2, "m": 4, "layers": ["1", "3", "5"], "holds": True}
    assert "2:4 holds in 3 of the 3 layers that it fits" in ended.out
    for name in ("1", "3", "5"):
        weight = load_file(tmp_path / "run" / "model.safetensors")[f"{name}.weight"]
        assert torch.equal((weight.unflatten(1, (-1, 4)) != 0).sum(2).unique(), torch.tensor([2]))


def test_another_criterion_than_the_searchs_is_said(amc_search: Command, amc_apply: Command) -> None:
    quick = (*SMALL, "finetune.epochs=0", "export=[]", "latency.repeats=0")
    assert amc_search(*quick, "agent=uniform", "hydra.run.dir=a").code == 0
    for criterion in ("l1", "l2"):
        ended = amc_apply(*quick, "strategy=a", f"criterion={criterion}", f"hydra.run.dir={criterion}")
        assert ended.code == 0
        said = "found with criterion=l2 and is applied with criterion=l1: other units go"
        assert (said in ended.out + ended.err) == (criterion == "l1")
