"""Pictures: written, of the size asked, and showing what they were given."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import pixels, share_of

from search.output.plots import (
    DPI,
    Candidate,
    Width,
    plot_channels,
    plot_finetune,
    plot_reward,
    plot_tradeoff,
)

pytestmark = pytest.mark.plots
BLUE, ORANGE, VERMILION, SHADE = (0, 114, 178), (230, 159, 0), (213, 94, 0), (208, 211, 214)


def widths(count: int) -> list[Width]:
    return [Width(f"layer{index}.conv1", kept=8, total=16) for index in range(count)]


@pytest.mark.parametrize(("count", "inches"), [(1, 5.8), (27, 5.9), (160, 11.0)])
def test_channels_have_room_for_their_names(tmp_path: Path, count: int, inches: float) -> None:
    image = pixels(plot_channels(widths(count), tmp_path / "plots" / "channels.png"))
    assert image.shape[1] / DPI == pytest.approx(inches, abs=0.1)
    assert share_of(image, BLUE) > 0.05
    assert share_of(image, BLUE) == pytest.approx(share_of(image, SHADE), rel=0.3)  # half of each is kept


def test_channels_that_all_stay_hide_the_original(tmp_path: Path) -> None:
    image = pixels(plot_channels([Width("conv1", 16, 16), Width("conv2", 32, 32)], tmp_path / "c.png"))
    assert share_of(image, SHADE) < 0.01


def test_reward_shows_episodes_best_and_warmup(tmp_path: Path) -> None:
    rewards = [-1.0 / (1 + episode) for episode in range(100)] + [-math.inf, math.nan]
    image = pixels(plot_reward(rewards, tmp_path / "r.png", warmup=50, note="budget 50% of MACs"))
    without = pixels(plot_reward(rewards, tmp_path / "r0.png"))
    assert share_of(image, BLUE) > 0.001
    assert share_of(image, ORANGE) > 0.0002
    shaded = np.abs(image - (234, 235, 236)).sum(axis=2) < 12  # the original's grey, thinned
    assert shaded.mean() > 0.2
    assert (np.abs(without - (234, 235, 236)).sum(axis=2) < 12).mean() < 0.02


def test_every_stage_has_its_own_best_and_warmup(tmp_path: Path) -> None:
    """A second stage far below the first: one search over both would draw the best as one line at the top."""
    rewards = [-0.1] * 50 + [-0.9] * 50
    once = pixels(plot_reward(rewards, tmp_path / "r1.png"))
    staged = pixels(plot_reward(rewards, tmp_path / "r2.png", stages=[50]))

    def height_of_lines(image: np.ndarray) -> int:
        rows = np.nonzero((np.abs(image - BLUE).sum(axis=2) < 12).sum(axis=1) > 100)[0]
        return int(rows.max() - rows.min())

    assert height_of_lines(once) < 20
    assert height_of_lines(staged) > 200
    warm = pixels(plot_reward(rewards, tmp_path / "r3.png", warmup=10, stages=[50]))
    first = pixels(plot_reward(rewards, tmp_path / "r4.png", warmup=10))
    shade = (234, 235, 236)
    assert share_of(warm, shade) == pytest.approx(2 * share_of(first, shade), rel=0.1)


@pytest.mark.parametrize("rewards", [[], [-0.5], [math.nan, -math.inf]])
def test_reward_of_a_short_or_failed_search_is_still_a_picture(tmp_path: Path, rewards: list[float]) -> None:
    assert pixels(plot_reward(rewards, tmp_path / "r.png", warmup=100)).shape[0] > 300


def test_tradeoff_marks_the_chosen_and_what_is_over_budget(tmp_path: Path) -> None:
    candidates = [Candidate(0.5 + index / 100, 0.3 + index / 100, index < 20) for index in range(30)]
    image = pixels(plot_tradeoff(candidates, tmp_path / "t.png", limit=0.5, best=candidates[19]))
    unmarked = pixels(plot_tradeoff(candidates[:20], tmp_path / "t0.png"))
    assert share_of(image, VERMILION) > share_of(unmarked, VERMILION)
    thinned = (243, 202, 115)  # points are drawn at 55%
    assert share_of(image, thinned) > share_of(unmarked, thinned) == 0.0


def test_strategies_that_all_use_the_budget_up_do_not_look_spread_out(tmp_path: Path) -> None:
    candidates = [Candidate(0.1 * index, 0.19999, True) for index in range(1, 9)]
    image = pixels(plot_tradeoff(candidates, tmp_path / "t.png", limit=0.2, best=candidates[3]))
    height, width = image.shape[:2]
    star = np.nonzero((np.abs(image - VERMILION).sum(axis=2) < 12)[height // 4 :].any(axis=0))[0]
    assert 0.4 < star.mean() / width < 0.7


def test_the_unit_is_on_the_axis_alone(tmp_path: Path) -> None:
    channels = pixels(plot_channels(widths(9), tmp_path / "c.png"))
    weights = pixels(plot_channels(widths(9), tmp_path / "w.png", unit="weights"))
    columns = np.nonzero((channels != weights).any(axis=(0, 2)))[0]
    assert len(columns) > 0
    assert columns.max() < channels.shape[1] / 8


def test_fine_tuning_shows_its_losses(tmp_path: Path) -> None:
    image = pixels(plot_finetune([0.5, 0.3, 0.2], tmp_path / "f.png"))
    assert share_of(image, BLUE) > 1e-4


def test_same_data_same_bytes(tmp_path: Path) -> None:
    first, second = (plot_channels(widths(5), tmp_path / name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()


def test_pyplot_stays_out() -> None:
    import search.output.plots

    assert "pyplot" not in vars(search.output.plots)
    source = Path(search.output.plots.__file__).read_text()
    assert "import matplotlib.pyplot" not in source
    assert "matplotlib.figure" in sys.modules
