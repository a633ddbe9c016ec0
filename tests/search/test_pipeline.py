"""Masked networks from the search to the files: what is reported is what is delivered."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from masking import weight
from networks import images, network, same_state
from running import SMALL, Command
from safetensors.torch import load_file
from small_runs import Stopped, Tracked, go, small
from torch import nn

from agents.base import Agent
from agents.baselines import Uniform
from agents.ddpg import DDPGAgent
from amc_env import sparse
from amc_env.errors import UserError
from amc_env.evaluator import Bench, Removed, Start
from amc_env.layers import LayerGraph
from amc_env.pruning.activations import APoZ
from amc_env.staging import Score
from search import load_pruned
from search.data import Data
from search.judging import Materials
from search.models import ResNet, digits_mlp
from search.settings import (
    REPAIRS,
    BudgetSettings,
    CyclesBudget,
    FinalistSettings,
    FinetuneSettings,
    MemoryBudget,
    RepairSettings,
    ScoringSettings,
    StorageBudget,
)
from search.wiring import default_agent

QUICK = (
    *SMALL,
    "budget=params",
    "budget.ratio=0.6",
    "search.episodes=3",
    "finetune.epochs=1",
    "latency.repeats=0",
    "export=[safetensors]",
)


def read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text())
    assert isinstance(content, dict)
    return content


def counted(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Parameters and MACs that are left when zeros of convolutions and linear layers are not counted."""
    graph = LayerGraph.layers_of(model, example)
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
    result, strategy = read(folder / "result.json"), read(folder / "strategy.json")
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
            assert sparse.check(found, 2, 4) is bool(decision["removed"])
    assert result["granularity"]["name"] == strategy["granularity"] == granularity
    assert read(folder / "channels.json")["channels"] == {}
    return result


@pytest.mark.parametrize(
    ("granularity", "overrides"),
    [("fine_grained", ["agent.warmup_episodes=1"]), ("nm", ["agent=random", "model=digits_cnn"])],
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
    return default_agent(name) if name != "uniform" else Uniform()


@pytest.mark.parametrize("name", ["random", "uniform", "ddpg", "sensitivity"])
@pytest.mark.parametrize("granularity", WHOLE)
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
    budgets = (MemoryBudget(ratio=0.6), BudgetSettings("params", 0.7))
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


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("granularity", ["fine_grained", "kernel"])
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


class InThisProcess:
    """Workers that are none: they score what they are handed, the last first."""

    rounds: ClassVar[list[int]] = []

    def __init__(self, materials: Materials, count: int, threads: int | None):
        self._materials = materials

    @contextmanager
    def scoring(
        self, start: Start, repair: str, strategies: Mapping[Removed, float]
    ) -> Iterator[Callable[[Removed], Score]]:
        self.rounds.append(len(strategies))
        bench = Bench(self._materials.scorer())
        jobs = reversed(list(strategies.items()))
        scored = {removed: bench.score(start, repair, removed, floor) for removed, floor in jobs}
        yield scored.__getitem__

    def close(self) -> None:
        pass


AT_ONCE = DDPGAgent(n_envs=4, warmup_episodes=4, warmup="landing", hidden=(16, 16))


@pytest.mark.parametrize("first_images", [None, 12])
def test_episodes_at_once_end_the_same_killed_or_with_workers(
    first_images: int | None, small_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.judging.Workers", InThisProcess)
    monkeypatch.setattr(InThisProcess, "rounds", [])
    monkeypatch.setattr("amc_env.staging._ERRORS", -1)  # an untrained network: errors are all that differs
    scoring = ScoringSettings(first_images=first_images)
    alone = small("channel", agent=AT_ONCE, episodes=16, finetune=FinetuneSettings(epochs=0), scoring=scoring)
    shared = replace(alone, scoring=replace(scoring, workers=2))
    go(tmp_path / "alone", small_data, alone)
    go(tmp_path / "shared", small_data, shared)
    assert max(InThisProcess.rounds) == 4
    killed = tmp_path / "killed"
    with pytest.raises(Stopped):
        go(killed, small_data, shared, track=Tracked(stop_at=10))  # in the third round
    left = (killed / "evaluations.jsonl").read_bytes()
    go(killed, small_data, shared)
    for name in ("evaluations.jsonl", "metrics.csv", "strategy.json"):
        wanted = (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "shared" / name).read_bytes() == (killed / name).read_bytes() == wanted, name
    whole = (killed / "evaluations.jsonl").read_bytes()
    assert whole.startswith(left)
    assert whole != left
    assert (b'"images": 12' in whole) == (first_images is not None)


def test_stages_cannot_be_gone_on_with_for_more_finalists(small_data: Data, tmp_path: Path) -> None:
    staged = small("channel", agent=AT_ONCE, episodes=4, finetune=FinetuneSettings(epochs=0))
    staged = replace(staged, finalists=FinalistSettings(0, "none"))
    more = replace(staged, finalists=FinalistSettings(2, "none"))
    go(tmp_path / "whole", small_data, staged)
    go(tmp_path / "whole", small_data, more)
    staged, more = (
        replace(settings, scoring=ScoringSettings(first_images=12)) for settings in (staged, more)
    )
    go(tmp_path / "staged", small_data, staged)
    with pytest.raises(UserError, match="finalists"):
        go(tmp_path / "staged", small_data, more)


def test_what_is_cut_short_is_counted_and_finalists_never_are(
    small_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amc_env.staging._ERRORS", -1)  # an untrained network: errors are all that differs
    agent = DDPGAgent(warmup_episodes=4, hidden=(16, 16))
    more = {"episodes": 12, "scoring": ScoringSettings(first_images=12)}
    more["finalists"] = FinalistSettings(3, "none")
    finished = go(
        tmp_path, small_data, small("channel", agent=agent, finetune=FinetuneSettings(epochs=0), **more)
    )
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()[1:]]
    searched = [line for line in lines if line["repair"] == "batch_norm"]
    finalists = [line for line in lines if line["repair"] == "none"]
    short = [line for line in searched if "images" in line]
    assert 0 < len(short) < len(searched)
    hits = [line["accuracy"] * line["images"] for line in short]
    assert hits == pytest.approx([round(count) for count in hits])
    assert finalists
    assert not any("images" in line for line in finalists)
    assert finished.result.search.precision == "float32"
    assert not {tuple(line["removed"]) for line in short} & {tuple(line["removed"]) for line in finalists}


def test_stages_of_scoring_must_leave_images_for_the_second(small_data: Data, tmp_path: Path) -> None:
    count = len(small_data.search)
    settings = small("channel", scoring=ScoringSettings(first_images=count))
    with pytest.raises(
        UserError, match=rf"evaluator.first_images={count} must be below the {count} search images"
    ):
        go(tmp_path, small_data, settings)


def test_stages_of_scoring_mean_nothing_to_an_agent_that_compares_all(
    small_data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go(tmp_path, small_data, small("channel", scoring=ScoringSettings(first_images=12)))
    assert "evaluator.first_images=12 changes nothing: agent=random" in caplog.text
    assert '"images"' not in (tmp_path / "evaluations.jsonl").read_text()


def test_episodes_that_make_no_whole_rounds_are_refused_before_anything_is_scored(
    small_data: Data, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"search.episodes=18 .*agent.n_envs=4.*search.episodes=16 or 20"):
        go(tmp_path, small_data, small("channel", agent=AT_ONCE, episodes=18))
    assert not (tmp_path / "evaluations.jsonl").exists()


# ---------------------------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused_before_anything_is_scored(small_data: Data, tmp_path: Path) -> None:
    refused = {
        "granularity=channel masks none: use budget=params": small("channel", budgets=(StorageBudget(),)),
        "budget=cycles counts a dense array processor.*granularity=fine_grained.*use granularity=channel": small(
            budgets=(CyclesBudget(),)
        ),
        "budget=memory counts activations.*granularity=fine_grained.*use granularity=channel": small(
            budgets=(MemoryBudget(),)
        ),
        "is not pruned so: take granularity=nm": small(budgets=(StorageBudget(format="nm"),)),
        "nothing is left to decide: left: its 3 input channels .per group. are not divisible by m=4": small(
            "nm"
        ),
    }
    for message, settings in refused.items():
        with pytest.raises(UserError, match=message):
            go(tmp_path, small_data, settings)
    with pytest.raises(
        UserError, match=r"criterion=apoz does not fit granularity=fine_grained.*use one of l1, l2"
    ):
        small(criterion=APoZ())
    assert not (tmp_path / "evaluations.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["criterion=apoz", "granularity=fine_grained"],
            ("criterion=apoz does not fit", "use one of l1, l2"),
        ),
        (["budget=storage"], ("budget=storage", "granularity=channel masks none", "fine_grained")),
        (["budget=cycles", "granularity=fine_grained"], ("budget=cycles", "use granularity=channel")),
        (["budget=memory", "granularity=fine_grained"], ("budget=memory", "use granularity=channel")),
        (["search.stages=[0.3,0.5]"], ("search.stages=[0.3, 0.5]", "each below the one before")),
        (["granularity=nm", "granularity.n=4"], ("granularity.n=4", "1 <= n < m")),
        (["schedule=cubic", "schedule.rounds=11"], ("schedule.rounds=11", "finetune.epochs=10")),
        (["schedule.rounds=3"], ("one_shot has one round", "schedule=linear")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(amc_search: Command, overrides: list[str], says: tuple[str, ...]) -> None:
    ended = amc_search(*SMALL, *overrides, "hydra.run.dir=run")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    for text in says:
        assert text in line
