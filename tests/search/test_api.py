"""compress on a network and loaders that are not this project's."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from journals import content
from refusals import refused
from stable_baselines3 import A2C, DQN, SAC
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from agents.netadapt import NetAdapt
from amc_env.env import PruningEnv
from amc_env.errors import UserError
from amc_env.pruning.granularity import NM, Channel, FineGrained
from search import Compressed, compress, load_pruned, make_env, make_vec_env
from search.api import _agent
from search.config.compose import default_of
from search.data.base import Data
from search.data.loaders import from_loaders
from search.settings import (
    BudgetSettings,
    FinetuneSettings,
    LatencyBudget,
    LatencySettings,
    Settings,
)


class Own(nn.Module):
    """A network with a concatenation that the project has never seen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        return self.head(x.mean((2, 3)))


def loader(count: int, seed: int, channels: int = 1) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, channels, 6, 6, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=16)


def quick(agent: str = "random") -> Settings:
    return Settings(
        agent=default_of("agent", agent),
        episodes=4,
        baselines=(),
        export=("safetensors",),
        latency=LatencySettings(repeats=0),
    )


def own() -> Own:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Own()


def compressed(folder: Path, module: nn.Module | None = None, **more: Any) -> Compressed:
    """`Own`, or another network, after a search of four episodes and no fine-tuning."""
    given = module or own(), loader(64, 1), loader(32, 2)
    return compress(*given, **{"finetune": 0, "folder": folder, "settings": quick()} | more)


def test_compress_gives_a_smaller_network_that_loads_onto_the_class(tmp_path: Path) -> None:
    module = own()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    small = compressed(tmp_path, module, budget=0.5, agent="random", episodes=4, finetune=1)
    assert small.result.pruned.costs["macs"] <= 0.5 * small.result.base.costs["macs"]
    assert small.result.finetuned.split == "search"  # no test loader: the figures say so
    assert sum(p.numel() for p in small.model.parameters()) == small.result.finetuned.costs["params"]
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    restored = load_pruned(own(), tmp_path)
    x = torch.randn(5, 1, 6, 6)
    with torch.no_grad():
        assert torch.equal(restored(x), small.model(x))
    assert (tmp_path / "report.html").exists()


class Storing(Own):
    """Keeps an activation."""

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.relu(self.stem(x))
        return super().forward(x)


def test_a_network_that_stores_activations_is_pruned_and_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Storing()
    module(torch.ones(2, 1, 6, 6))
    with caplog.at_level("INFO"):
        small = compressed(tmp_path, module, finetune=1)
    assert any("features" in record.getMessage() for record in caplog.records)
    assert module.features is not None
    copy.deepcopy(small.model)


class Auxiliary(Own):
    """Has two more heads in train mode only, each a module of its own, like GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList(nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        if not self.training:
            return logits
        return (logits, *(head(torch.relu(self.stem(x))) for head in self.more))


def test_auxiliary_heads_of_train_mode_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        small = compressed(tmp_path, Auxiliary(), finetune=1)
    assert any("not trained: more" in record.getMessage() for record in caplog.records)
    assert small.result.finetuned is not None
    assert small.model.more[1][1].in_features == 8 * 36
    restored = load_pruned(Auxiliary(), tmp_path)
    x = torch.randn(5, 1, 6, 6)
    with torch.no_grad():
        assert torch.equal(restored(x), small.model(x))


class OnlyEval(Own):
    """Cannot be cut in train mode: a parameter is read there without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + torch.relu(self.stem(x)).mean((2, 3)) @ self.weight.T if self.training else logits


class Tuples(Own):
    """Gives two outputs in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


def test_what_cannot_be_trained_is_found_before_the_search(tmp_path: Path) -> None:
    model = OnlyEval()
    with refused("cannot_train", "finetune.epochs"):
        compressed(tmp_path, model, finetune=1)
    assert not (tmp_path / "evaluations.jsonl").exists()
    small = compressed(tmp_path, model)
    assert small.result.finetuned is None


def test_the_first_of_several_outputs_is_trained(tmp_path: Path) -> None:
    small = compressed(tmp_path, Tuples(), finetune=1)
    assert small.result.finetuned is not None


def test_a_network_without_anything_to_train_is_found_before_the_search(tmp_path: Path) -> None:
    with refused("cannot_train", ""):
        compressed(tmp_path, own().requires_grad_(False), finetune=1)
    assert not (tmp_path / "evaluations.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ({"budget": "half"}, ["budget"]),
        ({"budget": b"half"}, ["budget"]),
        ({"budget": {"macs": "half"}}, ["budget.ratio"]),
        ({"budget": {3: 0.5}}, ["budget.cost"]),
        ({"budget": [0.5]}, ["budget"]),
        ({"seed": "one"}, ["seed"]),
        ({"seed": 1.5}, ["seed"]),
        ({"episodes": "many"}, ["episodes"]),
        ({"finetune": "much"}, ["finetune"]),
        ({"finetune": True}, ["finetune.epochs"]),
        ({"agent": 3}, ["agent"]),
        (
            {"budget": "half", "seed": "one", "episodes": [3], "finetune": 1.5},
            ["budget", "episodes", "finetune", "seed"],
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [None, Settings()], ids=["defaults", "settings"])
def test_arguments_of_a_wrong_type_come_in_one_error(
    arguments: dict[str, object], fields: list[str], settings: Settings | None
) -> None:
    with pytest.raises(UserError) as error:
        compress(own(), loader(64, 1), loader(32, 2), settings=settings, **arguments)  # type: ignore[arg-type]
    assert sorted(part.field for part in error.value.parts) == fields
    assert {part.code for part in error.value.parts} <= {"wrong_type", "out_of_range"}


def test_arguments_that_are_no_settings_path_or_function_come_in_one_error() -> None:
    given = {"settings": {}, "folder": "a\0b", "score": 3, "loss": 4}
    with refused("wrong_type", *given):
        compress(own(), loader(64, 1), loader(32, 2), **given)  # type: ignore[arg-type]


def test_scalars_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    small = compressed(
        tmp_path,
        budget=np.float32(0.5),
        episodes=np.int64(2),
        finetune=torch.tensor(0),
        original_lr=torch.tensor(0.1),
        seed=np.uint8(3),
        device=torch.device("cpu"),
    )
    assert (small.result.search.episodes, small.result.search.seed) == (2, 3)
    assert json.loads((tmp_path / "config.yaml").read_text())["device"] == "cpu"


def test_several_budgets_all_hold_and_the_test_split_is_named(tmp_path: Path) -> None:
    small = compressed(
        tmp_path,
        budget={"flops": 0.7, "params": 0.4},
        agent="uniform",
        test_loader=loader(32, 3),
        episodes=1,
        settings=quick("uniform"),
    )
    base, pruned = small.result.base, small.result.pruned
    assert pruned.costs["macs"] <= 0.7 * base.costs["macs"]
    assert pruned.costs["params"] <= 0.4 * base.costs["params"]
    assert {budget.cost for budget in small.result.budgets} == {"macs", "params"}
    assert pruned.split == "test"
    assert small.result.finetuned is None


def test_budgets_may_be_settings_with_a_table_measured_elsewhere(tmp_path: Path) -> None:
    table = tmp_path / "phone.json"
    conditions = LatencySettings(repeats=0, threads=1)
    built = LatencyBudget(ratio=1.0, repeats=1, tolerance=10.0, kept=table)
    env = make_env(
        own(), loader(64, 1), loader(32, 2), budget=built, settings=replace(quick(), latency=conditions)
    )
    env.close()
    content = json.loads(table.read_text())
    content["conditions"]["machine"] = "a phone"
    content["correction"] = {"scale": 1000.0, "per_element_ms": 0.0, "constant_ms": 0.0}
    table.write_text(json.dumps(content))
    phone = LatencyBudget(table=str(table), elsewhere=True, ratio=None, limit=1e6)
    small = compressed(
        tmp_path / "run",
        budget=[phone, BudgetSettings("params", 0.6)],
        agent="random",
        episodes=2,
        settings=replace(quick(), latency=conditions),
    )
    latency, params = small.result.budgets
    assert (latency.cost, latency.limit, latency.met) == ("latency", 1e6, True)
    assert (params.cost, params.ratio, params.met) == ("params", 0.6, True)


def test_without_settings_channels_go_in_the_vectors_of_a_latency_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Settings] = []

    def problem(model: nn.Module, data: Data, settings: Settings, *more: object) -> None:
        seen.append(settings)
        raise UserError("seen", code="test")

    monkeypatch.setattr("search.api.PruningProblem.build", problem)
    monkeypatch.setattr("search.api.run", problem)
    for budget in (0.5, {"latency": 0.9}, LatencyBudget(vector_width=4)):
        with pytest.raises(UserError, match="seen"):
            make_env(own(), loader(64, 1), loader(32, 2), budget=budget)
        with pytest.raises(UserError, match="seen"):
            compress(own(), loader(64, 1), loader(32, 2), budget=budget, folder=tmp_path)
    assert [settings.granularity for settings in seen] == [Channel(n) for n in (2, 2, 8, 8, 4, 4)]
    with pytest.raises(UserError, match="seen"):
        make_env(own(), loader(64, 1), loader(32, 2), budget={"latency": 0.9}, settings=quick())
    assert seen[-1].granularity == Channel(2)  # what is given is taken as it is


def test_compress_goes_on_in_its_folder(tmp_path: Path) -> None:
    def once() -> str:
        compressed(tmp_path, agent="random", episodes=4)
        return content(tmp_path / "evaluations.jsonl").decode()

    first = once()
    assert once() == first
    assert len(first.splitlines()) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 1.5}, "budget.ratio"),
        ({"budget": {"watts": 0.5}}, "one of macs, params"),
        ({"budget": 0.001}, "least"),
        ({"budget": [0.5, 0.4]}, r"has 0\.5, 0\.4: give a share, .* LatencyBudget\(ratio=0\.8\)"),
        ({"agent": "genius"}, "cmaes, ddpg, ddpg_near_uniform, evolution, netadapt"),
        ({"val_loader": loader(0, 2)}, "val_loader"),
        ({"val_loader": loader(16, 2, channels=2)}, "does not run"),
    ],
)
def test_mistakes_are_said_in_one_message(tmp_path: Path, change: dict[str, object], message: str) -> None:
    arguments = {
        "train_loader": loader(64, 1),
        "val_loader": loader(32, 2),
        "episodes": 2,
        "finetune": 0,
    } | change
    with pytest.raises(UserError, match=message):
        compress(own(), **arguments, folder=tmp_path, settings=quick())  # type: ignore[arg-type]


def with_labels(labels: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(len(labels), 1, 6, 6), labels), batch_size=16)


@pytest.mark.parametrize(
    "labels", [torch.rand(32), torch.rand(32, 1), torch.eye(3).repeat(11, 1)[:32].long()]
)
def test_targets_that_are_no_classes_are_refused(tmp_path: Path, labels: Tensor) -> None:
    with refused("labels", "val_loader"):
        compress(own(), loader(64, 1), with_labels(labels), folder=tmp_path, settings=quick())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.bool])
def test_labels_of_every_integer_type_are_class_numbers(kind: torch.dtype) -> None:
    labels = torch.randint(2, (32,))
    data = from_loaders(with_labels(labels.to(kind)), with_labels(labels.to(kind)[:, None]))
    assert torch.equal(data.search.targets, labels)


def test_a_network_of_one_output_is_no_classifier(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 1))
    with refused("outputs", ""):
        compressed(tmp_path, model)


@pytest.mark.parametrize("keep", ["better", "last"])
def test_fine_tuning_that_makes_it_worse_is_not_delivered_unless_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: Literal["better", "last"]
) -> None:
    """Ten times the rate of a network trained to learn its labels: what it knew is lost."""
    images, labels = (
        torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(0)),
        torch.arange(64) % 3,
    )
    batches = DataLoader(TensorDataset(images, labels), batch_size=16)
    model = own()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    wrong = DataLoader(TensorDataset(images, (labels + 1) % 3), batch_size=16)
    tuning = FinetuneSettings(epochs=3, lr_fraction=1.0, keep=keep, clip=1e6)
    settings = replace(quick(), finetune=tuning, budgets=(BudgetSettings("macs", 0.9),))
    small = compress(model, wrong, batches, folder=tmp_path, settings=settings, original_lr=0.1)
    assert small.result.finetuned is not None
    assert small.result.finetuned.accuracy < small.result.pruned.accuracy - 0.2
    delivered = "finetuned" if keep == "last" else "pruned"
    assert small.result.delivered_network == delivered
    assert small.result.delivered is getattr(small.result, delivered)
    with torch.no_grad():
        score = float((small.model(images).argmax(1) == labels).float().mean())
    assert score == pytest.approx(small.result.delivered.accuracy)
    assert ("fine-tuning lowered" in caplog.text) is (keep == "better")
    page = (tmp_path / "report.html").read_text()
    assert ("pruned, delivered" in page) is (keep == "better")


@pytest.mark.parametrize("granularity", [Channel(2), FineGrained()])
def test_layers_that_are_to_be_kept_are_left_alone(
    tmp_path: Path, granularity: Channel | FineGrained
) -> None:
    settings = replace(quick(), granularity=granularity, budgets=(BudgetSettings("params", 0.92),))
    small = compressed(tmp_path, keep=["le*", "Linear"], settings=settings)
    assert not {"left", "head"} & set(small.strategy)
    assert "right" in small.strategy
    assert small.model.left.weight.shape[0] == 8
    assert "left" in {layer.name for layer in small.result.skipped}
    with refused("unknown_layer", "keep"):
        compressed(tmp_path / "b", keep=["middle"], settings=settings)


def test_the_result_is_short_in_print_and_has_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"finetune": 0, "settings": quick(), "folder": tmp_path}
    small = compress(own(), loader(64, 1), loader(32, 2), **arguments)
    assert "budget: MACs at most" in capsys.readouterr().out
    assert repr(small).startswith("Compressed(")
    assert len(repr(small)) < 200
    assert "original" in small.table()
    assert "MACs" in small.table()
    assert "stem" in small.table()
    assert "<table>" in small._repr_html_()
    assert small.plot()._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    compress(own(), loader(64, 1), loader(32, 2), **arguments, verbose=False)
    assert capsys.readouterr() == ("", "")


def test_baselines_are_chosen_from_python_too(tmp_path: Path) -> None:
    for baselines in ((), ("uniform",)):
        small = compressed(tmp_path / str(len(baselines)), baselines=baselines)
        assert tuple(other.agent for other in small.result.baselines) == baselines
    with refused("out_of_range", "baselines[0]"):
        compressed(tmp_path / "x", baselines=["best"])


def test_a_saved_outcome_is_loaded_and_its_strategy_applied_again(tmp_path: Path) -> None:
    small = compressed(tmp_path / "run")
    saved = small.save(tmp_path / "saved")
    assert not (saved / "evaluations.jsonl").exists()
    x = torch.randn(5, 1, 6, 6)
    with torch.no_grad():
        assert torch.equal(load_pruned(own(), saved)(x), small.model(x))
    left = {layer.name: layer.outputs[1] for layer in small.result.shapes}
    assert left == {
        name: getattr(small.model, name).weight.shape[0] for name in ("stem", "left", "right", "head")
    }
    for strategy in (saved, dict(small.strategy)):
        again = compressed(tmp_path / str(type(strategy)), strategy=strategy)
        assert again.result.pruned == small.result.pruned
        assert again.result.search.evaluations == 1


@pytest.mark.parametrize(
    ("arguments", "code", "field"),
    [
        ({"strategy": 3}, "wrong_type", "strategy"),
        ({"strategy": [0, 1]}, "wrong_length", "strategy"),
        ({"strategy": {"stem": 0.5}, "agent": "random"}, "conflict", "agent"),
        ({"criterion": "best"}, "unknown_name", "criterion"),
        ({"granularity": "atoms"}, "unknown_name", "granularity"),
        ({"criterion": "apoz", "granularity": "nm"}, "does_not_fit", "criterion"),
    ],
    ids=str,
)
def test_wrong_choices_are_refused(tmp_path: Path, arguments: dict[str, Any], code: str, field: str) -> None:
    with refused(code, field):
        compressed(tmp_path, **arguments)


def test_granularity_and_criterion_go_by_name(tmp_path: Path) -> None:
    small = compressed(tmp_path, granularity="nm", criterion="l1", budget={"params": 0.8})
    assert (small.result.granularity.n, small.result.granularity.m) == (2, 4)
    assert [a > b for layer in small.result.shapes for a, b in [layer.weights]].count(True) > 0


def test_settings_alone_run_the_documented_default() -> None:
    settings = Settings()
    assert (settings.agent.name, settings.episodes, settings.finetune.epochs) == ("surrogate", 300, 10)
    assert (settings.budgets, settings.seed) == ((BudgetSettings("macs", 0.5),), 0)


class Untraceable(nn.Module):
    """Branches on data, which no symbolic trace follows, and flattens by view, which channels-last images break."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if x.sum() < 0:
            x = -x
        x = torch.relu(self.second(x))
        return self.head(x.view(x.size(0), -1))


def test_a_network_that_is_hard_to_trace_is_still_compressed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = compressed(tmp_path, Untraceable(), agent="random", episodes=3)
    assert small.result.search.repair == "sequential"
    assert small.result.pruned.costs["macs"] <= 0.5 * small.result.base.costs["macs"]


def test_the_callers_random_states_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    wanted = torch.rand(1).item(), random.random(), np.random.random()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    agent = replace(default_of("agent", "ddpg"), warmup_episodes=2)  # type: ignore[type-var]
    compressed(tmp_path, agent=agent, episodes=3)
    assert (torch.rand(1).item(), random.random(), np.random.random()) == wanted


def test_an_algorithm_of_stable_baselines_stands_for_its_agent() -> None:
    assert _agent(SAC) == default_of("agent", "sac")
    assert _agent(A2C).made_by is A2C
    with refused("wrong_type", "agent"):
        _agent(A2C("MlpPolicy", "Pendulum-v1", device="cpu"))
    with refused("out_of_range", "agent.algorithm"):
        _agent(DQN)


def test_the_search_as_an_environment_for_an_agent_of_ones_own() -> None:
    env = make_env(own(), loader(64, 1), loader(32, 2), budget=0.5, settings=quick())
    observation, _ = env.reset(seed=0)
    terminated, infos = False, []
    while not terminated:
        assert env.observation_space.contains(observation)
        observation, reward, terminated, _, info = env.step(np.zeros(1, dtype=np.float32))
        infos.append(info)
    assert infos[-1]["met"]
    assert reward == pytest.approx(infos[-1]["accuracy"] - 1)


def test_several_environments_side_by_side_give_what_one_gives() -> None:
    given = own(), loader(64, 1), loader(32, 2)
    env, envs = make_env(*given, settings=quick()), make_vec_env(*given, num_envs=2, settings=quick())
    env.reset(seed=0)
    envs.reset(seed=0)
    ended = False
    while not ended:
        reward, ended, _, info = env.step(np.full(1, 0.5, dtype=np.float32))[1:]
        rewards, infos = envs.step(np.array([[0.0], [0.5]], dtype=np.float32))[1::3]
    assert rewards[1] == reward
    assert infos["final_info"]["strategy"][1] == info["strategy"] != infos["final_info"]["strategy"][0]


def episode(env: PruningEnv, keep: float) -> dict[str, Any]:
    """The last step's information of an episode of equal actions."""
    env.reset(seed=0)
    terminated = False
    while not terminated:
        terminated, info = env.step(np.full(1, keep, dtype=np.float32))[2::2]
    return info


def test_an_environment_trains_nothing_though_the_settings_agent_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("search.study.evaluation.ShortTerm", lambda *args: pytest.fail("trained"))
    env = make_env(own(), loader(64, 1), loader(32, 2), settings=quick("netadapt"))
    assert episode(env, 1.0)["met"]


def test_an_environment_without_a_budget_removes_what_it_is_told() -> None:
    env = make_env(own(), loader(64, 1), loader(32, 2), budget=None, settings=quick())
    assert not any(episode(env, 0.0)["strategy"].removed)


def test_weights_of_any_network_can_be_masked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Untraceable()
    small = compressed(
        tmp_path,
        module,
        budget={"params": 0.3},
        agent="random",
        episodes=3,
        finetune=1,
        settings=replace(quick(), granularity=FineGrained()),
    )
    left = sum(int(parameter.count_nonzero()) for parameter in small.model.parameters())
    assert left == small.result.finetuned.costs["params"] <= 0.3 * small.result.base.costs["params"]
    assert small.keeps == {}
    x = torch.randn(5, 1, 6, 6)
    with torch.no_grad():
        assert torch.equal(load_pruned(Untraceable(), tmp_path)(x), small.model(x))


def test_an_environment_over_masks() -> None:
    env = make_env(
        own(), loader(64, 1), loader(32, 2), settings=replace(quick(), granularity=NM(2, 4)), budget=0.6
    )
    info = episode(env, 1.0)
    assert info["strategy"].names == ("left", "right", "head")  # the stem has one input
    assert set(info["strategy"].removed) <= {0, 2}
    assert info["met"]


def test_an_argument_that_is_given_wins_and_one_that_is_not_leaves_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Settings] = []

    def run(model: nn.Module, data: Data, settings: Settings, *more: object) -> None:
        seen.append(settings)
        raise UserError("far enough", code="test")

    monkeypatch.setattr("search.api.run", run)
    wanted = Settings(NetAdapt(), episodes=50, budgets=(BudgetSettings("params", 0.7),), seed=3)
    for arguments in ({}, {"budget": 0.5, "agent": "random"}):
        with pytest.raises(UserError, match="far enough"):
            compressed(tmp_path, settings=wanted, **arguments)
    kept, changed = seen
    assert (kept.agent, kept.episodes, kept.budgets, kept.seed) == (NetAdapt(), 50, wanted.budgets, 3)
    assert (changed.agent.name, changed.episodes, changed.seed) == ("random", 50, 3)
    assert [(budget.cost, budget.ratio) for budget in changed.budgets] == [("macs", 0.5)]


def test_several_budgets_from_python_name_their_arguments(tmp_path: Path) -> None:
    with refused("conflict", "budget"):
        compressed(tmp_path, budget=0.5, budgets=[0.75, 0.5])
    with refused("out_of_range", "budgets[0]"):
        compressed(tmp_path, budgets=[1.5, 0.5])
    with refused("out_of_range", "budgets"):
        compressed(tmp_path, budgets=[0.5, 0.75])
