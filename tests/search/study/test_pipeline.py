"""Masked networks from the search to the files: what is reported is what is delivered."""

from pathlib import Path
from typing import Any

import pytest
import torch
from journals import content
from masking import weight
from networks import images, network, same_state
from run_folders import read
from running import SMALL, Command
from safetensors.torch import load_file
from small_runs import Stopped, Tracked, go, small
from torch import nn

from agents.base import Agent
from agents.baselines import Uniform
from agents.ddpg import DDPGAgent
from amc_env.costs.storage import StorageBudget, follows_pattern
from amc_env.graph.tracing import trace_layers
from amc_env.pruning.schedule import Schedule
from search import load_pruned
from search.config.compose import default_of
from search.data.base import Data
from search.models.digits import digits_mlp
from search.models.resnet import ResNet
from search.settings import REPAIRS, BudgetSettings, FinetuneSettings, RepairSettings

QUICK = (
    *SMALL,
    "budget=params",
    "budget.ratio=0.6",
    "search.episodes=3",
    "finetune.epochs=1",
    "latency.repeats=0",
    "export=[safetensors]",
)


def counted(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Parameters and MACs that are left when zeros of convolutions and linear layers are not counted."""
    graph = trace_layers(model, example)
    params, macs = sum(p.numel() for p in model.parameters()), 0
    for layer in graph.layers:
        found = weight(model, layer.name)
        params -= int((found == 0).sum())
        macs += layer.positions * int(found.count_nonzero())
        macs += layer.positions * layer.out_channels if layer.kind == "linear" and layer.bias else 0
    return {"params": params, "macs": macs}


def assert_delivered(
    folder: Path, model: nn.Module, example: torch.Tensor, granularity: str
) -> dict[str, Any]:
    """That the files of a run agree with each other and with the weights that can be loaded; its result."""
    result, strategy = read(folder, "result.json"), read(folder, "strategy.json")
    restored = load_pruned(model, folder)
    left = counted(restored, example)
    for stage in ("pruned", "finetuned"):
        assert {cost: result[stage][cost] for cost in left} == left
    assert result["budget"]["met"]
    assert left[result["budget"]["cost"]] <= result["budget"]["limit"]
    state = load_file(folder / "model.safetensors")
    for layer, decision in strategy["decisions"].items():
        found = state[f"{layer}.weight"]
        assert torch.equal(found, weight(restored, layer))
        assert int((found == 0).sum()) * decision["total"] == found.numel() * decision["removed"]
        if granularity == "nm":
            assert follows_pattern(found, 2, 4) is bool(decision["removed"])
    assert result["granularity"]["name"] == strategy["granularity"] == granularity
    assert read(folder, "channels.json")["channels"] == {}
    return result


@pytest.mark.parametrize(
    ("granularity", "overrides"),
    [
        ("fine_grained", ["agent=ddpg", "agent.warmup_episodes=1"]),
        ("nm", ["agent=random", "model=digits_cnn"]),
    ],
)
def test_a_command_delivers_what_it_reports(
    amc_search: Command, tmp_path: Path, granularity: str, overrides: list[str]
) -> None:
    ended = amc_search(*QUICK, f"granularity={granularity}", *overrides, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    model = ResNet(8, "conv", in_channels=1) if granularity == "nm" else digits_mlp().build((1, 8, 8), 10)
    result = assert_delivered(tmp_path / "run", model, torch.zeros(1, 1, 8, 8), granularity)
    whole = (
        {"conv1": "its 1 input channels (per group) are not divisible by m=4"} if granularity == "nm" else {}
    )
    assert {entry["name"]: entry["reason"] for entry in result["skipped"]} == whole


WHOLE = {"fine_grained": 0, "nm": 1, "vector": 3, "kernel": 3}
"""Layers of the small ResNet that cannot be pruned so: its first has 3 inputs, its last and two shortcuts no kernels."""


def agent(name: str) -> Agent:
    return default_of("agent", name) if name != "uniform" else Uniform()


@pytest.mark.parametrize(
    ("granularity", "name"),
    [
        *((granularity, "random") for granularity in WHOLE),
        *(("fine_grained", name) for name in ("uniform", "ddpg", "sensitivity")),
    ],
)
def test_every_agent_searches_every_granularity(
    small_data: Data, tmp_path: Path, granularity: str, name: str
) -> None:
    budgets, repair = (BudgetSettings("macs", 0.7),), RepairSettings("none")
    settings = small(
        granularity, agent=agent(name), episodes=12, budgets=budgets, repair=repair, export=("safetensors",)
    )
    finished = go(tmp_path, small_data, settings, name="residual")
    result = assert_delivered(tmp_path, network("residual"), images(1), granularity)
    assert (result["search"]["agent"], len(result["skipped"])) == (name, WHOLE[granularity])
    assert result["finetuned"]["macs"] <= 0.7 * result["base"]["macs"]
    assert same_state(finished.model, load_pruned(network("residual"), tmp_path))
    assert finished.keeps == {}


def test_two_budgets_hold_for_masks(small_data: Data, tmp_path: Path) -> None:
    budgets = (BudgetSettings("macs", 0.7), StorageBudget(ratio=0.6, format="csr"))
    result = go(tmp_path, small_data, small("fine_grained", budgets=budgets), name="residual").result
    assert [budget.met for budget in result.budgets] == [True, True]
    assert (
        result.masked.storage["csr"] == result.budgets[1].value <= 0.6 * result.masked.storage["dense_fp32"]
    )
    assert result.pruned.costs["macs"] <= 0.7 * result.base.costs["macs"]


def test_a_budget_on_memory_holds_beside_another(small_data: Data, tmp_path: Path) -> None:
    budgets = (BudgetSettings("memory", 0.6), BudgetSettings("params", 0.7))
    finished = go(tmp_path, small_data, small("channel", budgets=budgets), name="residual")
    result = finished.result
    assert [budget.met for budget in result.budgets] == [True, True]
    assert (
        result.base.costs["memory"] == 3 * 16 * 64 * 4
    )  # a block's input, a convolution's output, its norm's
    assert result.budgets[0].value == result.finetuned.costs["memory"] <= 0.6 * result.base.costs["memory"]
    stream = weight(finished.model, "conv1").shape[0]
    assert result.finetuned.costs["memory"] >= 3 * stream * 64 * 4
    assert result.finetuned.costs["params"] <= 0.7 * result.base.costs["params"]


@pytest.mark.parametrize(
    ("granularity", "repair"), [*(("fine_grained", repair) for repair in REPAIRS), ("kernel", "sequential")]
)
def test_no_repair_fills_the_zeros(small_data: Data, tmp_path: Path, granularity: str, repair: str) -> None:
    settings = small(
        granularity,
        repair=RepairSettings(repair, images=16, norm_images=16),
        finetune=FinetuneSettings(epochs=0),
    )
    finished = go(tmp_path, small_data, settings)
    assert finished.result.search.repair == repair
    for layer, ratio in finished.result.strategy.items():
        found = weight(finished.model, layer)
        assert int((found == 0).sum()) == round(ratio * found.numel())
    assert counted(finished.model, images(1)).items() <= finished.result.pruned.costs.items()


# --------------------------------------------------------------------------------------- episodes at once


AT_ONCE = DDPGAgent(n_envs=4, warmup_episodes=4, warmup="landing", hidden=(16, 16))


def test_episodes_at_once_end_the_same_after_a_kill(small_data: Data, tmp_path: Path) -> None:
    settings = small("channel", agent=AT_ONCE, episodes=16, finetune=FinetuneSettings(epochs=0))
    go(tmp_path / "whole", small_data, settings)
    killed = tmp_path / "killed"
    with pytest.raises(Stopped):
        go(killed, small_data, settings, track=Tracked(stop_at=10))  # in the third round
    left = content(killed / "evaluations.jsonl")
    go(killed, small_data, settings)
    for name in ("evaluations.jsonl", "metrics.csv", "strategy.json"):
        assert content(killed / name) == content(tmp_path / "whole" / name), name
    journal = content(killed / "evaluations.jsonl")
    assert journal.startswith(left)
    assert journal != left


@pytest.mark.parametrize("more", [{}, {"schedule": Schedule("cubic", 2)}])
def test_a_run_stopped_in_fine_tuning_continues_at_the_epoch(
    small_data: Data, tmp_path: Path, more: dict[str, Any]
) -> None:
    settings = small("channel", finetune=FinetuneSettings(epochs=4, batch_size=16), **more)
    once = go(tmp_path / "once", small_data, settings)
    with pytest.raises(Stopped):
        go(tmp_path / "run", small_data, settings, track=Tracked(stop_at_epoch=4))
    assert list((tmp_path / "run" / "training").iterdir())
    notes = Tracked()
    again = go(tmp_path / "run", small_data, settings, track=notes)
    assert notes.epochs == [4]
    assert same_state(once.model, again.model)
    assert not (tmp_path / "run" / "training").exists()
