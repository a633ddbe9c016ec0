"""Settings: what is in range, what is refused, and that all problems are named at once."""

from collections.abc import Callable
from typing import Any

import pytest

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
from search.settings import (
    BudgetSettings,
    FinalistSettings,
    FinetuneSettings,
    LatencyBudget,
    LatencySettings,
    RepairSettings,
    ScoringSettings,
    Settings,
)


@pytest.mark.parametrize(
    ("make", "values", "says"),
    [
        (BudgetSettings, {"cost": "macs", "ratio": 0}, "budget.ratio=0 must be in (0, 1]"),
        (BudgetSettings, {"cost": "macs", "ratio": 1.01}, "budget.ratio=1.01"),
        (BudgetSettings, {"cost": "macs", "ratio": None}, "both are null"),
        (BudgetSettings, {"cost": "macs", "limit": -5}, "budget.limit=-5 must be above 0"),
        (BudgetSettings, {"cost": "watts"}, "budget.cost=watts must be one of macs, params, memory"),
        (RepairSettings, {"name": "glue"}, "repair.name=glue must be one of none, least_squares"),
        (
            RepairSettings,
            {"images": 0, "norm_images": 1},
            "repair.images=0 must be at least 1; repair.norm_images=1",
        ),
        (RepairSettings, {"ridge": 0.0}, "repair.ridge=0.0 must be above 0"),
        (FinalistSettings, {"count": -1}, "finalists.count=-1"),
        (
            FinetuneSettings,
            {"epochs": -1, "momentum": 1.0},
            "finetune.epochs=-1 must be at least 0; finetune.mom",
        ),
        (FinetuneSettings, {"lr_fraction": 0}, "finetune.lr_fraction=0 must be in (0, 1]"),
        (ScoringSettings, {"batch_size": 0}, "evaluator.batch_size=0"),
        (
            ScoringSettings,
            {"threads": 0},
            "evaluator.threads=0 must be at least 1, or null",
        ),
        (
            LatencySettings,
            {"batch": 0, "repeats": -1},
            "latency.batch=0 must be at least 1; latency.repeats=-1",
        ),
        (
            LatencySettings,
            {"runtime": "tflite", "threads": 0},
            "latency.runtime=tflite must be one of eager, compile, onnx, cuda, cuda_graph; latency.threads=0",
        ),
        (
            Settings,
            {"agent": Random(), "episodes": 0, "seed": -1},
            "search.episodes=0 must be at least 1; seed=-1",
        ),
        (Settings, {"agent": Random(), "episodes": 1, "seed": 2**32}, "must be in [0, 2**32)"),
        (Settings, {"agent": Random(), "episodes": 1, "reward": Infinity()}, "enforce_budget=false"),
        (Settings, {"agent": Uniform(), "episodes": 1, "budgets": ()}, "agent.ratio"),
        (
            Settings,
            {"agent": Random(), "episodes": 1, "criterion": APoZ(), "granularity": FineGrained()},
            "criterion=apoz does not fit granularity=fine_grained: it fits channel; for granularity=fine_grained use",
        ),
        (
            Settings,
            {"agent": Random(), "episodes": 1, "stages": (0.5, 0.5)},
            "search.stages=[0.5, 0.5] must be shares",
        ),
        (Settings, {"agent": Random(), "episodes": 1, "stages": (0.4, 0.6)}, "each below the one before"),
        (Settings, {"agent": Random(), "episodes": 1, "stages": (1.2, 0.6)}, "shares in (0, 1]"),
        (
            Settings,
            {"agent": Random(), "episodes": 1, "stages": (0.6, 0.4), "finetune": FinetuneSettings(epochs=0)},
            "finetune.epochs above 0",
        ),
        (Settings, {"agent": Random(), "episodes": 1, "stages": (0.6,), "budgets": ()}, "set one budget"),
        (
            Settings,
            {
                "agent": Random(),
                "episodes": 1,
                "schedule": Schedule("cubic", 4),
                "finetune": FinetuneSettings(epochs=3),
            },
            "schedule.rounds=4 must be at most finetune.epochs=3",
        ),
        (StorageBudget, {"format": "zip"}, "budget.format=zip must be eie, csr or nm"),
        (StorageBudget, {"cost": "macs", "value_bits": 0}, "budget.cost=macs must be one of storage"),
        (CyclesBudget, {"pixel_parallel": 0}, "budget.pixel_parallel=0 must be at least 1"),
        (
            FinetuneSettings,
            {"distillation": 1.5, "temperature": 0},
            "finetune.distillation=1.5 must be in [0, 1]",
        ),
    ],
)
def test_what_is_out_of_range_is_refused(make: Callable[..., Any], values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        make(**values)
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
    assert error.value.field == "budget.cost"


def test_stages_are_shares_and_take_no_absolute_limit() -> None:
    with pytest.raises(UserError, match=r"leave budget\.limit=null"):
        Settings(Random(), 1, budgets=(BudgetSettings("macs", limit=5.0),), stages=(0.7, 0.5))


def test_rounds_move_zeros_so_an_eie_limit_is_refused() -> None:
    options = {
        "granularity": FineGrained(),
        "schedule": Schedule("linear", 2),
        "finetune": FinetuneSettings(epochs=4),
    }
    assert Settings(Random(), 1, budgets=(StorageBudget(format="csr"),), **options).schedule.rounds == 2
    with pytest.raises(UserError, match=r"use budget\.format=csr, or schedule=one_shot"):
        Settings(Random(), 1, budgets=(StorageBudget(),), **options)
