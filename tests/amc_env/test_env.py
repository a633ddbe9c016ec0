"""PruningEnv: both checkers, the bound by hand, what an episode gives, and several of them side by side."""

import copy
import math
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from masking import masked
from refusals import refused
from stable_baselines3.common.env_checker import check_env as sb3_check

from amc_env.costs.counts import Macs, Params
from amc_env.encoding import DecisionDescription, Encoder, describe
from amc_env.env import EnvHandle, PruningEnv, PruningVectorEnv
from amc_env.rewards import Error, ErrorFlops, Infinity
from amc_env.space import Budget, Grid, SearchSpace, Strategy, Trial


class ChainMacs:
    """Two decisions of ten channels: 1 -> a -> b -> 1, so a + a*b + b MACs; 120 in all."""

    name, unit = "macs", "MACs"

    def __call__(self, removed: Sequence[int]) -> float:
        a, b = 10 - removed[0], 10 - removed[1]
        return float(a + a * b + b)


class Score:
    """Scores by a formula and remembers what it was asked; holds a tensor, as an evaluator does."""

    def __init__(self, space: SearchSpace, accuracy: float | None = None):
        self.space, self.accuracy, self.weights = space, accuracy, torch.zeros(3)
        self.asked: list[Strategy] = []

    def __call__(self, strategy: Strategy) -> Trial:
        self.asked.append(strategy)
        accuracy = 1.0 - 0.5 * float(np.mean(strategy.ratios)) if self.accuracy is None else self.accuracy
        removed = strategy.removed
        costs, met = self.space.cost(removed), self.space.met(removed)
        return Trial(len(self.asked), strategy, "original", "none", accuracy, costs, met, accuracy - 1)


def handle(ratio: float | None = 0.5, accuracy: float | None = None, **more) -> EnvHandle:
    grids = [Grid("a", 10, 2, 8), Grid("b", 10, 2, 6)]
    macs = ChainMacs()
    space = SearchSpace(grids, [macs], [Budget.of(macs, 2, ratio=ratio)] if ratio else [])
    encoder = Encoder([DecisionDescription(g.name, 10, 10, 8, 8, 1, 3) for g in grids], space)
    return EnvHandle(space, encoder, Score(space, accuracy), **{"reward": Error(), **more})


def act(env: gymnasium.Env, *ratios: float) -> list[tuple]:
    env.reset()
    return [env.step(np.array([ratio], np.float32)) for ratio in ratios]


INFINITE = {"ratio": 0.5, "reward": Infinity(), "enforce_budget": False}
KINDS = [{}, {"ratio": None, "reward": ErrorFlops()}, {"ratio": 0.3}, INFINITE]


@pytest.mark.parametrize("kind", KINDS)
def test_gymnasiums_checker(kind: dict) -> None:
    env = gymnasium.make("amc_env/Pruning-v0", handle=handle(**kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*inf value.*")  # the infinite reward
        gymnasium_check(env.unwrapped)
    assert isinstance(env.unwrapped, PruningEnv)


@pytest.mark.parametrize("kind", KINDS)
def test_stable_baselines_checker(kind: dict) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sb3_check(PruningEnv(handle(**kind)))
    notes = [str(warning.message) for warning in caught]
    excepted = ("symmetric and normalized Box action space", "found inf in rewards")
    assert [note for note in notes if not any(words in note for words in excepted)] == []


def masked_handle(granularity: str, ratio: float = 0.7) -> EnvHandle:
    """Masks over a small network, with a budget on its parameters; scored by a formula."""
    _, graph, grids = masked("residual", granularity)
    params = Params(graph, grids)
    space = SearchSpace(grids, [Macs(graph, grids), params], [Budget.of(params, len(grids), ratio=ratio)])
    return EnvHandle(space, Encoder(describe(graph, grids), space), Score(space), Error())


@pytest.mark.parametrize("granularity", ["fine_grained", "row", "kernel", "2:4"])
def test_checkers_and_bound_over_masks(granularity: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check(gymnasium.make("amc_env/Pruning-v0", handle=masked_handle(granularity)).unwrapped)
        warnings.filterwarnings("ignore", message=".*symmetric and normalized Box action space.*")
        sb3_check(PruningEnv(masked_handle(granularity)))
    rng = np.random.default_rng(0)
    made = masked_handle(granularity)
    env = PruningEnv(made)
    for _ in range(10):
        info = act(env, *rng.uniform(0, 1, len(made.space.grids)) ** 3)[-1][4]
        assert info["met"]
        for grid, count in zip(made.space.grids, info["strategy"].removed, strict=True):
            assert grid.count(grid.index(count)) == count
        assert info["strategy"].removed == env.unwrapped.handle.score.asked[-1].removed
        assert made.space.cost(info["strategy"].removed)["params"] <= made.space.budgets[0].limit + 1e-6


def test_the_bound_by_hand() -> None:
    """60 of 120 MACs. With b at its most (4 left): a + 4a + 4 <= 60 holds for a <= 11, so a is free.

    a whole: 10 + 10b + b <= 60 for b <= 4.5, so 6 of b must go. Two of a gone: 8 + 9b <= 60 for b <= 5.7: 6
    again. Six of a gone: 4 + 5b <= 60 for b <= 11: b is free.
    """
    for first, bound in ((0.0, 0.6), (0.2, 0.6), (0.6, 0.0)):
        env = PruningEnv(handle())
        one, two = act(env, first, 0.0)
        assert one[4]["bound"] == 0.0
        assert two[4]["bound"] == pytest.approx(bound)
        assert two[4]["executed_ratio"] == pytest.approx(bound)


def test_a_tight_budget_raises_the_first_action_too() -> None:
    """36 of 120 MACs: with b at 4, 5a + 4 <= 36 for a <= 6.4: 4 of a go; then 6 + 7b <= 36 for b <= 4.2."""
    one, two = act(PruningEnv(handle(ratio=0.3)), 0.0, 0.0)
    assert (one[4]["bound"], one[4]["executed_ratio"]) == (0.4, 0.4)
    assert one[4]["macs"] == 6 + 60 + 10
    assert two[4]["executed_ratio"] == 0.6
    assert two[4]["macs"] == 6 + 24 + 4
    assert two[4]["met"]


def test_no_action_misses_the_budget() -> None:
    env = PruningEnv(handle(ratio=0.3))
    rng = np.random.default_rng(0)
    for _ in range(200):
        info = act(env, *rng.uniform(-0.5, 1.5, 2))[-1][4]
        assert info["met"]
        assert info["macs"] <= 36


@pytest.mark.parametrize(
    ("action", "executed"), [(0.29, 0.2), (0.31, 0.4), (0.3, 0.2), (9.0, 0.8), (-1.0, 0.0)]
)
def test_an_action_snaps_to_the_nearest_feasible_count(action: float, executed: float) -> None:
    env = PruningEnv(handle(ratio=None))
    env.reset()
    assert env.step(np.array([action]))[4]["executed_ratio"] == pytest.approx(executed)


def test_an_episode() -> None:
    made = handle()
    env = PruningEnv(made)
    observation, info = env.reset(seed=3, options={})
    assert info == {}
    assert observation.tolist() == made.encoder(()).tolist()
    one, two = act(env, 0.4, 0.6)
    assert one[0].tolist() == made.encoder((4,)).tolist()
    assert one[1:4] == (0.0, False, False)
    assert set(one[4]) == {"decision", "executed_ratio", "bound", "macs"}
    assert two[0].tolist() == [0.0] * 11
    assert two[1:4] == (pytest.approx(-0.25), True, False)
    assert two[4]["strategy"] == Strategy(("a", "b"), (10, 10), (4, 6))
    assert two[4]["trial"].strategy == two[4]["strategy"]
    assert (two[4]["accuracy"], two[4]["met"], two[4]["macs"]) == (0.75, True, 6 + 24 + 4)
    assert made.score.asked == [two[4]["strategy"]]


def test_an_episode_that_is_over_or_was_never_begun_takes_no_step() -> None:
    env = PruningEnv(handle())
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(1, np.float32))
    act(env, 0.1, 0.1)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(1, np.float32))


def test_the_infinite_reward_sees_missed_budgets_and_is_refused_under_the_bound() -> None:
    env = PruningEnv(handle(**INFINITE))
    assert act(env, 0.0, 0.0)[-1][1] == -math.inf
    assert act(env, 0.8, 0.6)[-1][1] == pytest.approx(-0.35)
    with refused("conflict", "reward"):
        PruningEnv(handle(reward=Infinity()))


def test_without_a_budget_nothing_is_raised_and_macs_weigh_the_error() -> None:
    two = act(PruningEnv(handle(ratio=None, reward=ErrorFlops())), 0.2, 0.0)[-1]
    assert two[4]["bound"] == two[4]["executed_ratio"] == 0.0
    assert two[1] == pytest.approx(-0.05 * math.log(8 + 80 + 10))


def test_a_reward_of_ones_own() -> None:
    two = act(PruningEnv(handle(reward=lambda accuracy, costs, met: accuracy * 2)), 0.4, 0.6)[-1]
    assert two[1] == 1.5


@pytest.mark.parametrize("action", [[math.nan], [math.inf], [0.1, 0.2], []])
def test_an_action_that_is_not_one_finite_number_is_refused_by_decision(action: list[float]) -> None:
    env = PruningEnv(handle())
    env.reset()
    with pytest.raises(ValueError, match=r"decision 'a'.*finite pruning ratio"):
        env.step(np.array(action, np.float32))


def test_nan_in_the_score_is_one_clear_error() -> None:
    with refused("out_of_range", "reward"):
        act(PruningEnv(handle(accuracy=math.nan)), 0.1, 0.1)
    with refused("nan_reward", ""):
        act(PruningEnv(handle(reward=lambda accuracy, costs, met: math.nan)), 0.1, 0.1)


def test_nothing_behind_the_handle_is_copied() -> None:
    made = handle()
    env = gymnasium.make("amc_env/Pruning-v0", handle=made)
    assert env.unwrapped.handle is made
    assert env.spec.kwargs["handle"] is made
    assert copy.deepcopy(made) is copy.copy(made) is made
    assert env.unwrapped.handle.score.weights.data_ptr() == made.score.weights.data_ptr()
    changed = replace(made, reward=ErrorFlops())
    assert changed is not made


def test_the_action_box_ends_at_the_largest_ratio_of_any_decision() -> None:
    box = PruningEnv(handle()).action_space
    assert (box.low.tolist(), box.high.tolist()) == ([0.0], [pytest.approx(0.8)])
    assert box.dtype == np.float32


def test_registration_imports_nothing_else_of_ours() -> None:
    code = (
        "import sys, amc_env, gymnasium; "
        "assert 'amc_env/Pruning-v0' in gymnasium.registry; "
        "print([m for m in sys.modules if m.startswith(('amc_env.', 'torch', 'agents', 'search'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ side by side


def side_by_side(made: EnvHandle, count: int) -> PruningVectorEnv:
    return gymnasium.make_vec(
        "amc_env/Pruning-v0", num_envs=count, vectorization_mode="vector_entry_point", handle=made
    )


@pytest.mark.parametrize("kind", [*KINDS, {"fill_budget": True}])
@pytest.mark.parametrize("count", [1, 3])
def test_episodes_side_by_side_are_those_of_environments_alone_to_the_bit(kind: dict, count: int) -> None:
    """Observations, rewards, ends and infos as Gymnasium batches those of `PruningEnv`, over three rounds."""
    envs = side_by_side(handle(**kind), count)
    alone = SyncVectorEnv(
        [lambda: PruningEnv(handle(**kind))] * count, autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert envs.metadata == alone.metadata
    assert (envs.action_space, envs.observation_space) == (alone.action_space, alone.observation_space)
    assert envs.single_action_space == alone.single_action_space
    assert envs.single_observation_space == alone.single_observation_space
    assert data_equivalence(envs.reset(seed=3), alone.reset(seed=3), exact=True)
    rng, ends = np.random.default_rng(0), 0
    for _ in range(6):
        actions = rng.uniform(-0.2, 1.2, (count, 1)).astype(np.float32)
        given = envs.step(actions)
        assert data_equivalence(given, alone.step(actions), exact=True)
        ends += int(given[2].sum())
    assert ends == 3 * count


def test_strategies_of_a_round_are_scored_together_and_never_alone() -> None:
    asked: list[Sequence[Strategy]] = []
    score = handle().score

    def score_all(strategies: Sequence[Strategy]) -> list[Trial]:
        asked.append(strategies)
        return [score(strategy) for strategy in strategies]

    made = replace(handle(), score=lambda strategy: pytest.fail("alone"), score_all=score_all)
    envs = side_by_side(made, 3)
    envs.reset()
    actions = np.array([[0.0], [0.2], [0.6]], np.float32)
    envs.step(actions)
    assert asked == []
    infos = envs.step(actions)[4]
    assert [[strategy.removed for strategy in strategies] for strategies in asked] == [
        [(0, 6), (2, 6), (6, 6)]
    ]
    assert infos["final_info"]["strategy"].tolist() == asked[0]
    assert infos["final_info"]["trial"][2].strategy is asked[0][2]


def test_gymnasiums_wrappers_take_the_episodes_side_by_side() -> None:
    envs = RecordEpisodeStatistics(side_by_side(handle(), 2))
    envs.reset()
    for _ in range(4):
        infos = envs.step(np.array([[0.4], [0.8]], np.float32))[4]
    assert infos["episode"]["r"].tolist() == pytest.approx([-0.2, -0.35])


def test_what_episodes_side_by_side_cannot_do_is_refused() -> None:
    envs = side_by_side(handle(), 2)
    with pytest.raises(gymnasium.error.ResetNeeded):
        envs.step(np.zeros((2, 1), np.float32))
    with pytest.raises(ValueError, match="reset_mask.*begin and end together"):
        envs.reset(options={"reset_mask": np.array([True, False])})
    envs.reset(options={"reset_mask": np.array([True, True])})
    with pytest.raises(ValueError, match="3 actions for 2 environments"):
        envs.step(np.zeros((3, 1), np.float32))
    with pytest.raises(ValueError, match=r"decision 'a'.*finite pruning ratio"):
        envs.step(np.array([[0.0], [math.nan]], np.float32))
    envs.step(np.zeros((2, 1), np.float32))  # the refused ones have left no trace
    assert envs.step(np.zeros((2, 1), np.float32))[2].all()
    with refused("out_of_range", "num_envs"):
        PruningVectorEnv(handle(), 0)
    with refused("conflict", "reward"):
        PruningVectorEnv(handle(reward=Infinity()), 2)


@pytest.mark.parametrize("make", [PruningEnv, PruningVectorEnv])
def test_an_environment_without_a_network_says_how_to_make_one(make) -> None:
    with refused("missing", "handle"):
        make()
