"""Stages and sparse training: each begins where the one before ended, and a stopped run ends as one that was not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from journals import content
from masking import weight
from networks import network, same_state
from refusals import refused
from run_folders import trials_of
from running import Command
from safetensors.torch import load_file
from small_runs import Stopped, Tracked, go, small

from agents.ddpg import DDPGAgent
from amc_env.pruning.criteria import BatchNormScale
from amc_env.pruning.regularization import L1, BNScale
from amc_env.pruning.schedule import Schedule
from search.data.base import Data
from search.output.run_result import RunResult
from search.settings import FinalistSettings, Settings
from search.study.evaluation import make_evaluator, start_of
from search.study.problem import PruningProblem, builder_of

STAGED = {"stages": (0.6, 0.4), "episodes": 5}


def best(lines: list[dict[str, Any]], start: str) -> dict[str, Any]:
    """The first of the most accurate evaluations of a stage."""
    return max((line for line in lines if line["start"] == start), key=lambda line: line["score"])


def figures(result: RunResult) -> RunResult:
    """All but how long it took and on what, and whether it was stopped in between."""
    return replace(result, machine={}, resumed=False, search=replace(result.search, seconds=0.0))


@pytest.mark.parametrize("granularity", ["channel", "fine_grained"])
def test_each_stage_has_its_budget_and_begins_with_the_network_before(
    small_data: Data, tmp_path: Path, granularity: str
) -> None:
    tracked = Tracked()
    finished = go(tmp_path, small_data, small(granularity, **STAGED), track=tracked)
    whole, lines = sum(p.numel() for p in network("concat").parameters()), trials_of(tmp_path)
    starts = [line["start"] for line in lines]
    assert starts == ["original"] * 5 + ["stage 1 (0.6)"] * 5
    for line in lines:
        assert line["met"]
        limit = 0.6 if line["start"] == "original" else 0.4
        assert line["costs"]["params"] <= limit * whole
    assert any(line["costs"]["params"] > 0.4 * whole for line in lines[:5])
    assert (tracked.episodes, tracked.epochs) == (list(range(1, 11)), [1, 2, 3, 4])
    assert finished.result.budget.ratio == 0.4
    assert finished.result.search.evaluations == 5
    delivered = best(lines, "stage 1 (0.6)")
    assert finished.result.pruned.costs["params"] == round(delivered["costs"]["params"])
    strategy = json.loads((tmp_path / "strategy.json").read_text())
    assert [d["removed"] for d in strategy["decisions"].values()] == delivered["removed"]
    assert strategy["start"] == ["original", "stage 1 (0.6)"]


def test_masks_of_the_first_stage_are_zeros_of_the_second_s_start(small_data: Data, tmp_path: Path) -> None:
    finished = go(tmp_path, small_data, small("fine_grained", **STAGED))
    first = dict(zip(finished.result.strategy, best(trials_of(tmp_path), "original")["removed"], strict=True))
    start = load_file(tmp_path / "starts" / "stage-1.safetensors")
    assert [path.name for path in (tmp_path / "starts").iterdir()] == ["stage-1.safetensors"]
    original = network("concat").state_dict()
    assert {key: value.shape for key, value in start.items()} == {k: v.shape for k, v in original.items()}
    for layer, removed in first.items():
        assert int((start[f"{layer}.weight"] == 0).sum()) == removed
        assert not torch.equal(start[f"{layer}.weight"], original[f"{layer}.weight"])
    last = dict(
        zip(finished.result.strategy, best(trials_of(tmp_path), "stage 1 (0.6)")["removed"], strict=True)
    )
    for layer, removed in last.items():
        gone = weight(finished.model, layer) == 0
        assert int(gone.sum()) >= removed
        if removed >= first[layer]:  # what was gone went first
            assert gone[start[f"{layer}.weight"] == 0].all()


def test_channels_of_the_first_stage_are_zeros_of_the_second_s_start(
    small_data: Data, tmp_path: Path
) -> None:
    finished = go(tmp_path, small_data, small("channel", **STAGED), name="mlp")
    first = best(trials_of(tmp_path), "original")["removed"]
    start = load_file(tmp_path / "starts" / "stage-1.safetensors")
    assert list(finished.result.strategy) == ["1", "3"]
    for layer, reader, removed in zip(("1", "3"), ("3", "5"), first, strict=True):
        silent = (start[f"{layer}.weight"] == 0).all(1)
        assert int(silent.sum()) == removed > 0
        assert (start[f"{layer}.bias"][silent] == 0).all()
        assert (start[f"{reader}.weight"][:, silent] == 0).all()
    parameters = sum(p.numel() for p in finished.model.parameters())
    assert (
        parameters == finished.result.finetuned.costs["params"] <= 0.4 * finished.result.base.costs["params"]
    )


def scored_anew(
    data: Data, settings: Settings, folder: Path, file: str, lines: list[dict[str, Any]]
) -> list[float]:
    """Accuracies of evaluations on the weights of a file."""
    problem = PruningProblem.build(network("concat"), data, settings)
    weights = network("concat")
    weights.load_state_dict(load_file(folder / "starts" / file))
    evaluator = make_evaluator(problem, start=start_of(problem, "again", builder_of(problem, weights)))
    strategies = [problem.space.strategy(line["removed"]) for line in lines]
    return [outcome.score for outcome in evaluator.evaluate(strategies)]


def test_networks_of_the_second_stage_are_cut_from_what_the_first_left(
    small_data: Data, tmp_path: Path
) -> None:
    settings = small("fine_grained", **STAGED)
    go(tmp_path, small_data, settings)
    lines = trials_of(tmp_path)[5:]
    accuracies = [line["score"] for line in lines]
    assert scored_anew(small_data, settings, tmp_path, "stage-1.safetensors", lines) == accuracies
    problem = PruningProblem.build(network("concat"), small_data, settings)
    strategies = [problem.space.strategy(line["removed"]) for line in lines]
    assert [outcome.score for outcome in make_evaluator(problem).evaluate(strategies)] != accuracies


SPARSE = {"regularization": BNScale(weight=1.0, before_epochs=1), "criterion": BatchNormScale()}


@pytest.mark.parametrize(
    ("settings", "stop_at", "trained"),
    [
        (small("fine_grained", **STAGED), 8, [3, 4]),
        (small("channel", **STAGED, finalists=FinalistSettings(2, "none")), 8, [3, 4]),
        (small("channel", **SPARSE), 2, [2, 3]),
        (small("channel", **STAGED, **SPARSE), 7, [4, 5]),
        (small("channel", **STAGED, schedule=Schedule("linear", 2)), 8, [3, 4]),
        (small("kernel", **STAGED), 3, [1, 2, 3, 4]),
        (small("nm", **STAGED | {"stages": (0.9, 0.7)}, agent=DDPGAgent(warmup_episodes=2)), 9, [3, 4]),
    ],
    ids=[
        "masks",
        "channels and finalists",
        "sparse training",
        "both",
        "rounds",
        "in the first stage",
        "ddpg",
    ],
)
def test_a_stopped_run_ends_as_one_that_was_not(
    small_data: Data, tmp_path: Path, settings: Settings, stop_at: int, trained: list[int]
) -> None:
    name = "residual" if settings.granularity.name == "nm" else "concat"
    whole = go(tmp_path / "whole", small_data, settings, name)
    with pytest.raises(Stopped):
        go(tmp_path / "stopped", small_data, settings, name, Tracked(stop_at))
    assert not (tmp_path / "stopped" / "result.json").exists()
    tracked = Tracked()
    again = go(tmp_path / "stopped", small_data, settings, name, tracked)
    assert tracked.epochs == trained  # what was kept in starts/ is not trained again
    for file in ("evaluations.jsonl", "strategy.json", "metrics.csv"):
        assert content(tmp_path / "stopped" / file) == content(tmp_path / "whole" / file), file
    assert figures(again.result) == figures(whole.result)
    assert same_state(again.model, whole.model)
    files = sorted(path.name for path in (tmp_path / "whole" / "starts").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "stopped" / "starts").iterdir())
    for start in files:
        states = [load_file(tmp_path / run / "starts" / start) for run in ("whole", "stopped")]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_sparse_training_comes_before_and_the_base_stays_the_network_given(
    small_data: Data, tmp_path: Path
) -> None:
    finished = go(tmp_path, small_data, small("channel", **SPARSE))
    weaker = SPARSE | {"regularization": BNScale(weight=1e-9, before_epochs=1)}
    go(tmp_path / "weaker", small_data, small("channel", **weaker))
    files = [folder / "starts" / "regularised.safetensors" for folder in (tmp_path, tmp_path / "weaker")]
    scales = [
        sum(float(v.sum()) for k, v in load_file(file).items() if k.endswith("norm.weight")) for file in files
    ]
    assert scales[0] < scales[1] - 0.5  # 24 scales, 4 steps of 0.01 with a pull of 1
    assert {line["start"] for line in trials_of(tmp_path)} == {"regularised"}
    plain = go(tmp_path / "plain", small_data, small("channel"))
    assert finished.result.base == plain.result.base
    lines = trials_of(tmp_path)
    accuracies = [line["score"] for line in lines]
    assert (
        scored_anew(small_data, small("channel", **SPARSE), tmp_path, "regularised.safetensors", lines)
        == accuracies
    )


def test_a_loss_term_during_fine_tuning_alone(small_data: Data, tmp_path: Path) -> None:
    sums = []
    for during in (True, False):
        settings = small("fine_grained", regularization=L1(weight=0.1, before_epochs=0, during=during))
        finished = go(tmp_path / str(during), small_data, settings)
        sums.append(
            sum(float(weight(finished.model, layer).abs().sum()) for layer in finished.result.strategy)
        )
        assert not (tmp_path / str(during) / "starts").exists()
        assert {line["start"] for line in trials_of(tmp_path / str(during))} == {"original"}
    assert sums[0] < 0.95 * sums[1]


@pytest.mark.parametrize(
    "change",
    [
        {"stages": (0.6, 0.5)},
        {"finetune": replace(small().finetune, epochs=3)},
        {"schedule": Schedule("linear", 2)},
        {"finalists": FinalistSettings(2, "none")},
        {"episodes": 9},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_second_stage_depends_on_cannot_change(
    small_data: Data, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Its start hangs on the first stage's best strategy, which more episodes may have found elsewhere."""
    settings = small("fine_grained", **STAGED)
    go(tmp_path, small_data, settings)
    before = content(tmp_path / "evaluations.jsonl")
    with refused("other_configuration", ""):
        go(tmp_path, small_data, replace(settings, **change))
    assert content(tmp_path / "evaluations.jsonl") == before


def test_weights_of_an_earlier_run_are_not_taken_for_this_one_s(small_data: Data, tmp_path: Path) -> None:
    """Its journal removed, a folder starts over."""
    go(tmp_path / "old", small_data, small("fine_grained", **STAGED))
    (tmp_path / "old" / "evaluations.jsonl").unlink()
    settings = small("fine_grained", **STAGED, seed=1)
    over, fresh = (go(tmp_path / name, small_data, settings) for name in ("old", "fresh"))
    assert same_state(over.model, fresh.model)
    assert content(tmp_path / "old" / "evaluations.jsonl") == content(
        tmp_path / "fresh" / "evaluations.jsonl"
    )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("search.stages=[0.9,0.01]", "budget=params"), "cannot be reached"),
        (("agent=sensitivity", "budget=none"), "set agent.threshold"),
        (
            ("regularization=bn_scale", "regularization.before_epochs=0", "regularization.during=true"),
            "batch norm",
        ),
        (("criterion=bn_scale", "regularization=l1"), "batch norm"),
        (("budget.cost=storage",), "budget.cost=storage must be one of"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_trained_or_scored(
    amc_search: Command, tmp_path: Path, overrides: tuple[str, ...], says: str
) -> None:
    ended = amc_search(
        "model=digits_mlp", "search.episodes=3", "finetune.epochs=1", "hydra.run.dir=run", *overrides
    )
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert says in line
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
    assert "fine-tune" not in ended.out
