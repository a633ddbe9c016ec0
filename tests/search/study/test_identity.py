"""What the journal's header holds, and that both doors write the same one."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import network
from running import QUICK, Command
from small_runs import small

from agents.baselines import Random, Uniform
from search import compress
from search.config.compose import default_of
from search.data.base import Data
from search.data.digits import digits
from search.models.digits import digits_mlp
from search.settings import (
    BudgetSettings,
    FinetuneSettings,
    LatencyBudget,
    LatencySettings,
    ScoringSettings,
    Settings,
    ShortTermSettings,
)
from search.study.identity import describe, identity, score_identity
from search.study.problem import PruningProblem

CHANGES: dict[str, dict[str, Any]] = {
    "agent": {"agent": Uniform()},
    "episodes": {"episodes": 5},
    "budgets": {"budgets": (BudgetSettings("params", 0.7),)},
    "seed": {"seed": 1},
    "scoring": {"scoring": ScoringSettings(batch_size=8)},
    "enforce_budget": {"enforce_budget": False},
}


def of(data: Data, settings: Settings) -> dict[str, Any]:
    return identity(PruningProblem.build(network("concat"), data, settings))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_search_is_seen_under_its_name(small_data: Data, name: str) -> None:
    before, after = of(small_data, small()), of(small_data, small(**CHANGES[name]))
    assert {key for key in before if before[key] != after[key]} == {name}


def test_what_follows_the_search_is_left_out_unless_the_search_depends_on_it(small_data: Data) -> None:
    later = {"finetune": FinetuneSettings(epochs=7), "original_lr": 0.01, "export": ("pt2",)}
    assert of(small_data, small(**later)) == of(small_data, small())
    tuned = small(short_term=ShortTermSettings(steps=2))
    assert of(small_data, tuned) != of(small_data, replace(tuned, original_lr=0.01))
    staged = small(stages=(0.8, 0.6))
    assert of(small_data, staged) != of(small_data, replace(staged, finetune=FinetuneSettings(epochs=7)))


def test_a_score_does_not_depend_on_the_agent_and_the_budget(small_data: Data) -> None:
    def scored(**more: Any) -> dict[str, Any]:
        return score_identity(PruningProblem.build(network("concat"), small_data, small(**more)))

    assert scored(**CHANGES["agent"]) == scored(**CHANGES["budgets"]) == scored()
    assert scored(seed=1) != scored()


def test_weights_and_normalisation_count(small_data: Data) -> None:
    shifted = network("concat")
    next(iter(shifted.parameters())).data[0] += 1
    before = of(small_data, small())
    other = identity(PruningProblem.build(shifted, small_data, small()))
    assert {key for key in before if before[key] != other[key]} == {"weights"}
    assert of(replace(small_data, mean=(0.5,), std=(2.0,)), small())["data"] != before["data"]


@dataclass(frozen=True)
class Described:
    """With a file that does not matter."""

    size: int
    file: str = field(default="", metadata={"identity": False})


class Attributes:
    """A plug-in that is no dataclass."""

    def __init__(self) -> None:
        self.size, self.other = 3, object()


def test_settings_become_json() -> None:
    assert describe(Described(3, "here")) == {"class": f"{__name__}.Described", "size": 3}
    assert describe(Attributes()) == {"class": f"{__name__}.Attributes", "size": 3}
    assert describe(describe) == "search.study.identity.describe"
    assert describe({"a": (np.float32(0.5), Path("b"))}) == {"a": [0.5, "b"]}
    assert "table" not in describe(LatencyBudget(table="phone.json"))
    assert json.loads(json.dumps(describe(Settings(agent=default_of("agent", "ddpg"))))) is not None


def test_a_run_is_continued_from_the_other_door(amc_search: Command, tmp_path: Path) -> None:
    """From the command line to Python and back: nothing is scored twice, nothing is refused."""
    options = [option for option in QUICK if not option.startswith("search.episodes")]
    options = [o for o in options if not o.startswith("agent") and "model" not in o and "images" not in o]
    command = [*options, "model=digits_mlp", "agent=random", "finetune.epochs=0", "hydra.run.dir=run"]
    assert amc_search(*command, "search.episodes=3").code == 0
    journal = tmp_path / "run" / "evaluations.jsonl"
    first = [line for line in journal.read_text().splitlines()[1:] if '"least_squares"' in line]
    data = digits()
    model = digits_mlp().load(data)
    settings = Settings(agent=Random(), latency=LatencySettings(repeats=0), export=())
    arguments: dict[str, Any] = {"budget": 0.5, "finetune": 0, "settings": settings}
    small = compress(model, data, episodes=5, folder=tmp_path / "run", **arguments)
    assert small.result.resumed
    assert journal.read_text().splitlines()[1 : len(first) + 1] == first
    assert amc_search(*command, "search.episodes=6").code == 0
    assert len(journal.read_text().splitlines()) > len(first) + 3
