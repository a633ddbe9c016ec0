"""Scoring in stages: who is cut short, and by how many images."""

import math

import pytest
import torch
from torch import Tensor, nn

from amc_env.staging import Score, Staged, score

MODEL = nn.Identity()


class Part:
    """A scorer of known accuracy that counts how often it is asked."""

    def __init__(self, images: Tensor, accuracy: float):
        self.images, self.accuracy, self.asked, self.forgotten = images, accuracy, 0, False
        self.folded = nn.Identity()

    def fold(self, model: nn.Module) -> nn.Module:
        assert model is MODEL
        return self.folded

    def of(self, network: nn.Module) -> float:
        self.network = network
        self.asked += 1
        return self.accuracy

    def forget(self) -> None:
        self.forgotten = True


def staged(first: float, rest: float) -> tuple[Staged, Part]:
    others = Part(torch.ones(300, 1), rest)
    return Staged(Part(torch.zeros(100, 1), first), others), others


# the standard error of 0.8 on 100 images is 0.04
@pytest.mark.parametrize(
    ("floor", "images"), [(0.0, None), (0.9, None), (0.919, None), (0.921, 100), (math.inf, 100)]
)
def test_three_standard_errors_below_the_floor_are_enough(floor: float, images: int | None) -> None:
    scorer, others = staged(0.8, 0.6)
    found = scorer.score(MODEL, floor)
    assert found == Score(pytest.approx(0.65 if images is None else 0.8), images)
    assert others.asked == (images is None)


def test_what_the_first_part_folds_is_scored_on_all() -> None:
    parts = [Part(torch.zeros(1, 1), 0.5) for _ in range(2)]
    Staged(*parts)(MODEL)
    assert parts[0].network is parts[1].network is parts[0].folded


def test_accuracy_on_all_images_is_that_of_all_hits() -> None:
    scorer, _ = staged(0.57, 71 / 300)
    assert scorer(MODEL) == 128 / 400
    assert torch.equal(scorer.images, torch.cat([torch.zeros(100, 1), torch.ones(300, 1)]))


def test_no_hit_at_all_is_judged_by_the_error_of_what_would_matter() -> None:
    scorer, others = staged(0.0, 0.9)
    assert scorer.score(MODEL, 0.05).images is None  # 5 hits are expected, but none is no rarity
    assert scorer.score(MODEL, 0.2) == Score(0.0, 100)
    assert others.asked == 1


def test_a_scorer_without_stages_ignores_the_floor() -> None:
    assert score(lambda model: 0.25, MODEL, floor=0.9) == Score(0.25, None)


def test_both_parts_forget() -> None:
    parts = [Part(torch.zeros(1, 1), 0.5) for _ in range(2)]
    Staged(*parts).forget()
    assert all(part.forgotten for part in parts)
