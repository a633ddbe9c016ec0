"""Truncated-normal noise and warm-ups against closed forms."""

import math

import numpy as np
import pytest

from agents.exploration import WARMUPS, TruncatedNormalNoise
from amc_env.env import PruningEnv


def draws(mean: float, sigma: float, count: int = 40_000, high: float = 0.8) -> np.ndarray:
    noise = TruncatedNormalNoise(sigma, 0.95, warmup=0)
    rng = np.random.default_rng(0)
    return noise.draw(np.full(count, mean), np.zeros(1), np.full(1, high), 0, rng)


def phi(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize(("mean", "sigma"), [(0.4, 0.5), (0.0, 0.5), (0.75, 0.1), (0.2, 0.05)])
def test_moments_are_those_of_the_truncated_normal(mean: float, sigma: float) -> None:
    a, b = (0 - mean) / sigma, (0.8 - mean) / sigma
    mass = cdf(b) - cdf(a)
    shift = (phi(a) - phi(b)) / mass
    expected_mean = mean + sigma * shift
    expected_var = sigma**2 * (1 + (a * phi(a) - b * phi(b)) / mass - shift**2)
    sample = draws(mean, sigma)
    assert sample.mean() == pytest.approx(expected_mean, abs=4 * math.sqrt(expected_var / len(sample)))
    assert sample.var() == pytest.approx(expected_var, rel=0.03)


def test_truncation_does_not_pile_up_on_the_ends() -> None:
    sample = draws(mean=0.8, sigma=0.5)
    assert sample.min() >= 0.0
    assert sample.max() <= 0.8
    assert np.mean(sample == 0.8) < 1e-3
    assert np.mean(sample == 0.0) < 1e-3


def test_sigma_is_constant_in_the_warm_up_and_decays_by_the_episode() -> None:
    noise = TruncatedNormalNoise(0.5, 0.95, warmup=100)
    assert [noise.sigma_at(e) for e in (0, 99, 100)] == [0.5, 0.5, 0.5]
    assert noise.sigma_at(102) == pytest.approx(0.5 * 0.95**2)


def test_without_sigma_the_mean_is_the_action_and_the_generator_moves_on_all_the_same() -> None:
    quiet, loud = np.random.default_rng(3), np.random.default_rng(3)
    low, high, mean = np.zeros(1), np.ones(1), np.array([0.3])
    assert TruncatedNormalNoise(0.0, 0.95, 0).draw(mean, low, high, 0, quiet) == pytest.approx([0.3])
    TruncatedNormalNoise(0.5, 0.95, 0).draw(mean, low, high, 0, loud)
    assert quiet.random() == loud.random()


NOISE = TruncatedNormalNoise(0.1, 0.95, warmup=100)


def warm_up(name: str, space, noise: TruncatedNormalNoise = NOISE):
    return WARMUPS[name](space, noise, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["landing", "near_uniform"])
def test_a_warm_up_survives_the_bound_and_lands_on_the_budget(toy, name: str) -> None:
    search = toy()
    env, warmup = PruningEnv(search.handle()), warm_up(name, search.space)
    for _ in range(20):
        actions = warmup()
        env.reset()
        for action in actions:
            info = env.step(np.array([action], np.float32))[-1]
            assert info["executed_ratio"] == pytest.approx(action)
        share = info["macs"] / search.space.cost([0] * 4)["macs"]
        assert 0.4 < share <= 0.5


def test_uniform_warm_up_covers_the_action_range(toy) -> None:
    warmup = warm_up("uniform", toy().space)
    sample = np.concatenate([warmup() for _ in range(500)])
    assert sample.mean() == pytest.approx(28 / 32 / 2, abs=0.02)
    assert 0 <= sample.min() < 0.01
    assert 28 / 32 - 0.01 < sample.max() <= 28 / 32


def test_near_uniform_warm_up_begins_with_the_uniform_strategy(toy) -> None:
    """Four layers of 32 in a chain: 10 kept of each leave 10 * (32 + 10 + 10 + 10 + 32) = 940 of 5120 MACs."""
    space = toy(ratio=940 / 5120).space
    first, second = (episode() for episode in [warm_up("near_uniform", space)] * 2)
    assert first.tolist() == [22 / 32] * 4
    assert second.tolist() != first.tolist()


@pytest.mark.parametrize("sigma", [0.05, 0.15])
def test_near_uniform_warm_up_strays_as_far_as_sigma(toy, sigma: float) -> None:
    """The common shift that lands a draw takes one of its degrees of freedom."""
    space = toy(decisions=12).space
    warmup = warm_up("near_uniform", space, TruncatedNormalNoise(sigma, 0.95, warmup=100))
    uniform = warmup()
    sample = np.stack([warmup() for _ in range(30)])
    spread = (sample - uniform).std(axis=1, ddof=1).mean()
    assert spread == pytest.approx(sigma, rel=0.15)
    assert sample.mean() == pytest.approx(uniform.mean(), abs=1 / 32)  # counts are whole


def test_near_uniform_warm_up_without_noise_stays_where_it_is(toy) -> None:
    warmup = warm_up("near_uniform", toy().space, TruncatedNormalNoise(0.0, 0.95, warmup=100))
    assert len({tuple(warmup()) for _ in range(5)}) == 1
