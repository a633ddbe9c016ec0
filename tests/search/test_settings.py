"""Settings: what is in range, what is refused, and that all problems are named at once."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from refusals import refused

from agents.baselines import Random, Uniform
from amc_env.costs.base import budget_on
from amc_env.costs.cycles import CyclesBudget
from amc_env.costs.storage import StorageBudget
from amc_env.errors import UserError
from amc_env.pruning.criteria.activations import APoZ
from amc_env.pruning.granularity import FineGrained
from amc_env.pruning.regularization import L2
from amc_env.pruning.schedule import Schedule
from amc_env.rewards import Infinity
from amc_env.tasks import Classification, OwnTask, Regression
from search.settings import (
    BudgetSettings,
    CheckSettings,
    FinalistSettings,
    FinetuneSettings,
    LatencyBudget,
    LatencySettings,
    LatencyStudySettings,
    RepairSettings,
    ScoringSettings,
    SensitivitySettings,
    Settings,
    ShortTermSettings,
)


@pytest.mark.parametrize(
    ("make", "values", "fields"),
    [
        *((BudgetSettings, {"cost": "macs", "ratio": wrong}, ["ratio"]) for wrong in (0, -1, 1.01, math.nan)),
        (BudgetSettings, {"cost": "macs", "limit": -5}, ["limit"]),
        (BudgetSettings, {"cost": "watts"}, ["cost"]),
        (RepairSettings, {"name": "glue"}, ["name"]),
        (RepairSettings, {"images": 0, "norm_images": 1, "ridge": 0.0}, ["images", "norm_images", "ridge"]),
        (FinalistSettings, {"count": -1}, ["count"]),
        (FinetuneSettings, {"epochs": -1, "momentum": 1.0}, ["epochs", "momentum"]),
        (FinetuneSettings, {"lr_fraction": 0, "temperature": 0}, ["lr_fraction", "temperature"]),
        (FinetuneSettings, {"distillation": 1.5, "weight_decay": math.inf}, ["weight_decay", "distillation"]),
        (ShortTermSettings, {"steps": -1, "batch_size": 1}, ["steps", "batch_size"]),
        (ScoringSettings, {"batch_size": 0, "threads": 0}, ["batch_size", "threads"]),
        (LatencySettings, {"batch": 0, "repeats": -1}, ["batch", "repeats"]),
        (LatencySettings, {"runtime": "tflite", "threads": 0}, ["runtime", "threads"]),
        (Settings, {"episodes": 0, "seed": -1}, ["episodes", "seed"]),
        (Settings, {"seed": 2**32}, ["seed"]),
        (Settings, {"stages": (1.2, 0.6)}, ["stages[0]"]),
        (Settings, {"stages": (0.5, 0.5)}, ["search.stages"]),
        (Settings, {"stages": (0.4, 0.6)}, ["search.stages"]),
        (
            Settings,
            {"schedule": Schedule("cubic", 4), "finetune": FinetuneSettings(epochs=3)},
            ["schedule.rounds"],
        ),
        (SensitivitySettings, {"ratios": [0.5, 1.0], "threshold": 1.0}, ["ratios[1]", "threshold"]),
        (SensitivitySettings, {"ratios": []}, ["ratios"]),
        (CheckSettings, {"networks": 2, "seed": -1}, ["networks", "seed"]),
        (LatencyStudySettings, {"tolerance": 1, "points": -1}, ["tolerance", "points"]),
        (LatencyStudySettings, {"check": CheckSettings(seed=0)}, ["check.seed"]),
        (StorageBudget, {"format": "zip", "value_bits": 65}, ["format", "value_bits"]),
        (StorageBudget, {"cost": "macs"}, ["cost"]),
        (CyclesBudget, {"pixel_parallel": 0}, ["pixel_parallel"]),
    ],
)
def test_what_is_out_of_range_is_refused(
    make: Callable[..., Any], values: dict[str, Any], fields: list[str]
) -> None:
    with refused("out_of_range", *fields):
        make(**values)


def test_parts_of_another_kind_are_refused() -> None:
    with refused("wrong_type", "agent", "budgets[0]", "granularity", "reward", "finetune"):
        Settings(agent=3, budgets=["macs"], granularity="channel", reward=1, finetune={"epochs": 1})  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"reward": Infinity()}, "enforce_budget=false"),
        ({"agent": Uniform(), "budgets": ()}, "agent.ratio"),
        (
            {"criterion": APoZ(), "granularity": FineGrained()},
            "criterion=apoz does not fit granularity=fine_grained: it fits channel",
        ),
        ({"stages": (0.6, 0.4), "finetune": FinetuneSettings(epochs=0)}, "finetune.epochs above 0"),
        ({"stages": (0.6,), "budgets": ()}, "set one budget"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_out(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        Settings(**values)
    assert says in str(error.value)


def test_what_is_at_the_edge_is_taken() -> None:
    assert BudgetSettings("params", ratio=1).ratio == 1
    assert BudgetSettings("macs", ratio=None, limit=1.0).limit == 1.0
    assert FinetuneSettings(epochs=0, lr_fraction=1).epochs == 0
    assert LatencySettings(repeats=0).repeats == 0
    assert FinalistSettings(count=0).count == 0
    settings = Settings(Uniform(ratio=0.5), 1, budgets=(), reward=Infinity(), enforce_budget=False)
    assert settings.budgets == ()
    rounds = Settings(Random(), 1, schedule=Schedule("linear", 3), finetune=FinetuneSettings(epochs=3))
    assert rounds.schedule.rounds == rounds.finetune.epochs


def test_fine_tuning_follows_the_unpruned_network_where_the_task_can() -> None:
    default, classes = FinetuneSettings(), Classification()
    assert default.teacher_share(classes) == default.teacher_share(Regression()) == 0.5
    assert default.teacher_share(OwnTask(_nothing, _nothing)) == 0
    assert default.teacher_share(OwnTask(_nothing, _nothing, _nothing)) == 0.5
    assert FinetuneSettings(from_scratch=True).teacher_share(classes) == 0
    assert FinetuneSettings(from_scratch=True, distillation=0.2).teacher_share(classes) == 0.2
    assert FinetuneSettings(distillation=0.0).teacher_share(classes) == 0


def _nothing(*_given: Any) -> Any:
    raise AssertionError


def test_epochs_of_a_whole_run() -> None:
    plain = Settings(Random(), 7, finetune=FinetuneSettings(epochs=3))
    assert (plain.all_epochs, plain.trains_between) == (3, False)
    staged = Settings(
        Random(),
        7,
        stages=(0.5, 0.35, 0.25),
        regularization=L2(1e-4, before_epochs=2),
        finetune=FinetuneSettings(epochs=3),
    )
    assert (staged.all_epochs, staged.trains_between) == (2 + 9, True)


@pytest.mark.parametrize(
    "name, kind", [("storage", StorageBudget), ("cycles", CyclesBudget), ("latency", LatencyBudget)]
)
def test_costs_of_hardware_have_settings_of_their_own(name: str, kind: type[BudgetSettings]) -> None:
    assert kind().cost == name
    assert budget_on(name, 0.3) == kind(ratio=0.3)
    with pytest.raises(UserError) as error:
        BudgetSettings(name)
    assert error.value.field == "cost"


def test_stages_are_shares_and_take_no_absolute_limit() -> None:
    with refused("conflict", "search.stages"):
        Settings(Random(), 1, budgets=(BudgetSettings("macs", limit=5.0),), stages=(0.7, 0.5))


def test_rounds_move_zeros_so_an_eie_limit_is_refused() -> None:
    options = {
        "granularity": FineGrained(),
        "schedule": Schedule("linear", 2),
        "finetune": FinetuneSettings(epochs=4),
    }
    assert Settings(Random(), 1, budgets=(StorageBudget(format="csr"),), **options).schedule.rounds == 2
    with refused("conflict", "budget.format"):
        Settings(Random(), 1, budgets=(StorageBudget(),), **options)
