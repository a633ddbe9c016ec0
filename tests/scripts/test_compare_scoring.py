"""scripts/compare_scoring.py: a row says how far a coarser way of scoring is off, and in what order."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import compare_scoring  # noqa: E402 -- scripts are no package

from amc_env.evaluation.evaluator import Outcome
from amc_env.evaluation.int8 import obstacle
from amc_env.space import Strategy


def outcomes(accuracies: list[float], images: list[int | None]) -> list[Outcome]:
    strategy = Strategy(("a",), (8,), (2,))
    return [
        Outcome(strategy, accuracy, {}, True, "none", images=count)
        for accuracy, count in zip(accuracies, images, strict=True)
    ]


def test_a_row_by_hand() -> None:
    exact = outcomes([0.5, 0.7, 0.9, 0.6], [None] * 4)
    coarse = outcomes([0.5, 0.72, 0.88, 0.48], [None, None, None, 20])
    # differences 0, 2, -2, -12; ranks 1 3 4 2 against 2 3 4 1: 1 - 6 x 2 / 60
    line = compare_scoring.row("way", exact, coarse, 100)
    assert line == "| way | 80% | -3.00 | 5.39 | 12.00 | 0.8000 | 0.00 |"
    assert compare_scoring.row("way", exact, exact[::-1], 100).endswith("| 20.00 |")


def test_the_same_strategies_are_scored_again(tmp_path: Path) -> None:
    small = ["search.images=60", "repair.images=60", "agent.hidden=[8,8]", "agent.warmup_episodes=2"]
    told = [*small, "search.episodes=4", "+first=[20]", f"hydra.run.dir={tmp_path}"]
    command = [sys.executable, str(SCRIPTS / "compare_scoring.py"), *told]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert any(line.endswith("strategies, 60 search images") for line in printed)
    rows = [line.split(" | ")[0] for line in printed if line.startswith("| ")]
    assert rows == ["| way", "| bfloat16", *([] if obstacle() else ["| int8"]), "| first 20 images"]
