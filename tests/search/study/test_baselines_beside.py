"""Baselines beside the agent: the same scores, a journal of their own, and nothing changed for the agent."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from journals import content
from networks import network
from small_runs import go, small

from agents.base import Agent
from agents.baselines import Random, Uniform
from agents.surrogate import Surrogate
from search.data.base import Data
from search.settings import Baseline, FinalistSettings, FinetuneSettings, Settings
from search.study import baselines
from search.study.apply import Given
from search.study.baselines import chosen
from search.study.problem import PruningProblem

SETTINGS = replace(
    small("channel", finetune=FinetuneSettings(epochs=0)),
    agent=Surrogate(initial=1),
    finalists=FinalistSettings(1, "none"),
)


def test_baselines_are_scored_beside_the_agent_and_change_nothing(small_data: Data, tmp_path: Path) -> None:
    asked = replace(SETTINGS, baselines=("uniform", "random"))
    alone, beside = (
        go(tmp_path / name, small_data, settings)
        for name, settings in (("alone", SETTINGS), ("beside", asked))
    )
    assert content(tmp_path / "alone" / "evaluations.jsonl") == content(
        tmp_path / "beside" / "evaluations.jsonl"
    )
    assert replace(beside.result, baselines=(), search=alone.result.search) == alone.result
    uniform = go(tmp_path / "uniform", small_data, replace(SETTINGS, agent=Uniform(), episodes=1)).result
    random = go(tmp_path / "random", small_data, replace(SETTINGS, agent=Random())).result
    found = {figures.agent: figures for figures in beside.result.baselines}
    for name, expected in (("uniform", uniform), ("random", random)):
        assert found[name].search_accuracy == expected.search.search_accuracy
        assert found[name].accuracy == expected.pruned.accuracy
        assert found[name].evaluations == expected.search.evaluations
        assert found[name].costs["params"] == expected.pruned.costs["params"]
    assert beside.result.search.evaluations == found["random"].evaluations
    journal = tmp_path / "beside" / "baselines" / "evaluations.jsonl"
    before = journal.read_bytes()
    assert go(tmp_path / "beside", small_data, asked).result.baselines == beside.result.baselines
    assert journal.read_bytes() == before


@pytest.mark.parametrize(
    ("agent", "asked", "cheap", "expected"),
    [
        (Surrogate(), None, True, ("uniform", "random")),
        (Surrogate(), None, False, ("uniform",)),
        (Surrogate(), (), True, ()),
        (Random(), None, True, ("uniform",)),
        (Uniform(), None, True, ()),
        (Uniform(), ("random", "uniform"), False, ("random",)),
        (Given.of({"a": 0.5}), None, True, ()),
    ],
    ids=str,
)
def test_who_is_compared(
    small_data: Data,
    monkeypatch: pytest.MonkeyPatch,
    agent: Agent,
    asked: Sequence[Baseline] | None,
    cheap: bool,
    expected: tuple[str, ...],
) -> None:
    monkeypatch.setattr(baselines, "CHEAP_MACS", 1e12 if cheap else 1.0)
    settings: Settings = replace(SETTINGS, agent=agent, baselines=asked)
    assert chosen(PruningProblem.build(network("concat"), small_data, settings)) == expected
