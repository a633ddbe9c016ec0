"""NetAdapt's rounds in a run: each starts from the winner's tuned weights, and an interrupted run resumes in its round."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from journals import content
from masking import weight
from networks import network, same_state
from refusals import refused
from run_folders import trials_of
from safetensors.torch import load_file
from small_runs import Stopped, Tracked, go, small

from agents.netadapt import NetAdapt
from amc_env.costs.storage import StorageBudget
from amc_env.evaluation.pruner import Pruned
from amc_env.pruning.candidate import widen
from amc_env.pruning.schedule import Schedule
from search.data.base import Data
from search.output.report import write_report
from search.settings import SHORT_TERM, FinalistSettings, Settings, ShortTermSettings
from search.study.evaluation import make_evaluator
from search.study.kept_weights import KeptWeights, Weights
from search.study.problem import PruningProblem
from search.study.stages import start_at

ADAPTS = {
    "agent": NetAdapt(reduction=0.05, decay=1.0),
    "short_term": ShortTermSettings(3, lr_fraction=1.0, batch_size=16),
}


def states(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each round began with: its first evaluation."""
    firsts: dict[str, dict[str, Any]] = {}
    for line in lines:
        firsts.setdefault(line["start"], line)
    return list(firsts.values())


@pytest.mark.parametrize("granularity", ["channel", "fine_grained"])
def test_rounds_begin_with_what_the_winner_was_tuned_to(
    small_data: Data, tmp_path: Path, granularity: str
) -> None:
    finished = go(tmp_path, small_data, small(granularity, **ADAPTS))
    lines = trials_of(tmp_path)
    rounds = states(lines)
    assert [line["start"] for line in rounds] == ["original", *(f"round {n}" for n in range(1, len(rounds)))]
    assert len(rounds) >= 3
    assert {line["repair"] for line in lines} == {SHORT_TERM}
    for before, after in pairwise(rounds):
        proposals = [line for line in lines if line["start"] == before["start"]][1:]
        winner = max(proposals, key=lambda line: (line["score"], -line["costs"]["params"]))
        assert after["removed"] == winner["removed"]
        assert after["score"] == winner["score"]  # its tuned weights, neither repaired nor tuned again
        assert sum(a > b for a, b in zip(after["removed"], before["removed"], strict=True)) == 1
    assert [line["met"] for line in rounds] == [False] * (len(rounds) - 1) + [True]
    strategy = json.loads((tmp_path / "strategy.json").read_text())
    assert [d["removed"] for d in strategy["decisions"].values()] == rounds[-1]["removed"]
    assert strategy["start"] == [line["start"] for line in rounds]
    assert finished.result.pruned.costs["params"] == round(rounds[-1]["costs"]["params"])
    assert finished.result.search.search_accuracy == rounds[-1]["score"]


def test_what_is_delivered_is_the_last_round_s_network(small_data: Data, tmp_path: Path) -> None:
    settings = small("channel", **ADAPTS)
    finished = go(tmp_path, small_data, replace(settings, finetune=replace(settings.finetune, epochs=0)))
    files = sorted((tmp_path / "starts").iterdir(), key=lambda path: int(path.stem.split("-")[1]))
    state = load_file(files[-1])
    wide = widen(finished.model, finished.keeps, network("concat")).state_dict()
    assert all(torch.equal(wide[key], state[key]) for key in state)


@pytest.mark.parametrize(("granularity", "stop_at"), [("channel", 3), ("channel", 14), ("fine_grained", 8)])
def test_a_stopped_run_goes_on_in_its_round(
    small_data: Data, tmp_path: Path, granularity: str, stop_at: int
) -> None:
    settings = small(granularity, **ADAPTS)
    whole = go(tmp_path / "whole", small_data, settings)
    with pytest.raises(Stopped):
        go(tmp_path / "stopped", small_data, settings, track=Tracked(stop_at))
    known = len(trials_of(tmp_path / "stopped"))
    again = go(tmp_path / "stopped", small_data, settings)
    assert again.result.resumed
    assert known == stop_at
    for file in ("evaluations.jsonl", "strategy.json", "metrics.csv"):
        assert content(tmp_path / "stopped" / file) == content(tmp_path / "whole" / file), file
    assert same_state(again.model, whole.model)


def test_rounds_that_are_on_file_are_not_tuned_again(
    small_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small("channel", **ADAPTS)
    go(tmp_path, small_data, settings)
    tuned: list[str] = []
    monkeypatch.setattr(
        "search.training.short_term.ShortTerm.__call__",
        lambda self, model, removed, keeps: tuned.append("again"),
    )
    go(tmp_path, small_data, settings)
    assert not tuned


def test_the_report_shows_rounds_and_no_best_over_them(small_data: Data, tmp_path: Path) -> None:
    go(tmp_path, small_data, small("channel", **ADAPTS))
    page = write_report(tmp_path).read_text()
    assert "Accuracy against cost" in page
    assert "best so far" not in page
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "channels.png",
        "tradeoff.png",
        "finetune.png",
    }


def test_the_winner_alone_is_tuned(small_data: Data, tmp_path: Path) -> None:
    short = ShortTermSettings(3, winner_only=True, batch_size=16)
    go(tmp_path, small_data, small("channel", **ADAPTS | {"short_term": short}))
    lines = trials_of(tmp_path)
    assert {line["repair"] for line in lines} == {"batch_norm"}
    first = [line for line in lines if line["start"] == "original"]
    problem = PruningProblem.build(network("concat"), small_data, small("channel"))
    strategies = [problem.space.strategy(line["removed"]) for line in first]
    repaired = make_evaluator(problem).evaluate(strategies)
    assert [outcome.score for outcome in repaired] == [line["score"] for line in first]
    started = load_file(tmp_path / "starts" / "round-1.safetensors")
    winner = next(line for line in lines if line["start"] == "round 1")["removed"]
    pruned = make_evaluator(problem).apply(problem.space.strategy(winner))
    untuned = Weights.after(pruned, problem.model).network.state_dict()
    changed = [key for key in started if not torch.equal(started[key], untuned[key])]
    assert any(key.endswith("weight") for key in changed)  # it was trained


def test_any_agent_can_have_its_candidates_tuned(small_data: Data, tmp_path: Path) -> None:
    tuned = small(
        "channel",
        short_term=ShortTermSettings(20, lr_fraction=1.0, batch_size=16),
        finalists=FinalistSettings(2),
    )
    go(tmp_path / "tuned", small_data, tuned)
    go(tmp_path / "plain", small_data, small("channel"))
    lines = [trials_of(tmp_path / name) for name in ("tuned", "plain")]
    assert [line["removed"] for line in lines[0]] == [
        line["removed"] for line in lines[1]
    ]  # and no finalists
    assert {line["repair"] for line in lines[0]} == {SHORT_TERM}
    assert [line["score"] for line in lines[0]] != [line["score"] for line in lines[1]]


def test_a_rate_that_is_too_large_is_named_as_the_short_term_s(small_data: Data, tmp_path: Path) -> None:
    wild = replace(ADAPTS["short_term"], steps=20)
    with refused("diverged", "short_term.lr_fraction"):
        go(tmp_path, small_data, small("channel", agent=ADAPTS["agent"], short_term=wild, original_lr=1e9))


def test_masked_weights_stay_zero_through_the_steps(small_data: Data, tmp_path: Path) -> None:
    finished = go(tmp_path, small_data, small("fine_grained", **ADAPTS))
    removed = states(trials_of(tmp_path))[-1]["removed"]
    for layer, count in zip(finished.result.strategy, removed, strict=True):
        assert int((weight(finished.model, layer) == 0).sum()) >= count


def test_weights_and_units_come_back_from_their_file(tmp_path: Path) -> None:
    model, kept = network("concat"), KeptWeights(tmp_path, Hashes())  # type: ignore[arg-type]
    units = (torch.tensor([4, 1]), torch.tensor([0]))
    made = Weights(network("concat", seed=5), units)
    skipped: list[str] = []
    assert kept.get("w", model, lambda: made, lambda: skipped.append("skipped")) is made
    assert not skipped
    read = kept.get("w", model, lambda: pytest.fail("made again"), lambda: skipped.append("skipped"))
    assert skipped == ["skipped"]
    assert same_state(read.network, made.network)
    assert [unit.tolist() for unit in read.units] == [[4, 1], [0]]


class Hashes(dict[str, str]):
    """Stands for a journal."""

    weights_hash = dict.get
    keep_weights_hash = dict.__setitem__


@pytest.mark.parametrize("damage", [b"", b"cut", None], ids=["empty", "truncated", "another round's"])
def test_weights_that_are_not_the_run_s_are_refused(
    small_data: Data, tmp_path: Path, damage: bytes | None
) -> None:
    settings = small("channel", **ADAPTS)
    whole = go(tmp_path, small_data, settings)
    first, second = (tmp_path / "starts" / f"round-{number}.safetensors" for number in (1, 2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes() if damage is None else content[: len(damage)])
    with refused("damaged", ""):
        go(tmp_path, small_data, settings)
    first.unlink()
    assert same_state(go(tmp_path, small_data, settings).model, whole.model)
    assert first.read_bytes() == content


def test_what_killed_runs_left_is_swept(small_data: Data, tmp_path: Path) -> None:
    (tmp_path / "starts").mkdir()
    (tmp_path / "budgets" / "0.5").mkdir(parents=True)
    left = [
        tmp_path / "starts" / ".tmp-0a0a0a0a-round-1.safetensors",
        tmp_path / ".tmp-0a0a0a0a-result.json",
        tmp_path / "budgets" / "0.5" / ".tmp-0a0a0a0a-strategy.json",
    ]
    for path in left:
        path.touch()
    (tmp_path / ".hidden").touch()
    go(tmp_path, small_data, small("channel"))
    assert {path.name for path in tmp_path.glob(".*")} == {".hidden", ".lock"}
    assert not any(path.exists() for path in left)


def test_a_start_s_own_strategy_is_not_repaired(small_data: Data) -> None:
    problem = PruningProblem.build(network("concat"), small_data, small("channel"))
    evaluator = make_evaluator(problem)
    strategy = problem.space.strategy(problem.space.project([0.3] * len(problem.grids)))
    pruned: Pruned = evaluator.apply(strategy)
    weights = Weights.after(pruned, problem.model)
    evaluator.move(start_at(problem, "moved", weights, strategy.removed))
    assert same_state(evaluator.apply(strategy).network, pruned.network)
    assert evaluator.evaluate([strategy])[0].start == "moved"
    with pytest.raises(ValueError, match="unknown start 'original'; there are moved"):
        evaluator.evaluate([strategy], start="original")


@pytest.mark.parametrize("more", [{"stages": (0.6, 0.4)}, {"schedule": Schedule("linear", 2)}])
def test_stages_and_rounds_of_a_schedule_are_refused(more: dict[str, Any]) -> None:
    with refused("conflict", "agent"):
        small("channel", **ADAPTS, **more)


def test_eie_is_refused_since_every_round_ranks_again() -> None:
    with refused("conflict", "budget.format"):
        small("fine_grained", **ADAPTS, budgets=(StorageBudget(),))


def test_a_run_does_not_go_on_at_another_learning_rate(small_data: Data, tmp_path: Path) -> None:
    go(tmp_path, small_data, small("channel", **ADAPTS, original_lr=0.1))
    with refused("other_configuration", ""):
        go(tmp_path, small_data, small("channel", **ADAPTS, original_lr=0.01))


def test_how_many_steps_there_are_depends_on_the_agent_where_nothing_is_said() -> None:
    assert small(short_term=ShortTermSettings()).short_term_steps == 0
    adapts: Settings = small(agent=NetAdapt(), short_term=ShortTermSettings())
    assert (adapts.short_term_steps, adapts.scored_by) == (50, SHORT_TERM)
    assert replace(adapts, short_term=ShortTermSettings(steps=0)).scored_by == "batch_norm"
    assert replace(adapts, short_term=ShortTermSettings(winner_only=True)).scored_by == "batch_norm"
