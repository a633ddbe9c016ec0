"""Scoring in stages: who is cut short, and by how many images."""

import math
from collections.abc import Generator

import pytest
import torch
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.staging import Score, Staged, Tally, score

MODEL, FOLDED = nn.Identity(), nn.Identity()


class Batches:
    """A scorer of images that are hit or not, ten to a batch, that counts the batches asked for."""

    def __init__(self, hits: Tensor):
        self.images = self.hits = hits.float()
        self.asked, self.forgotten, self.closed = 0, False, False

    def fold(self, model: nn.Module) -> nn.Module:
        assert model is MODEL
        return FOLDED

    def outputs(self, network: nn.Module) -> Generator[tuple[Tensor, Tensor]]:
        assert network is FOLDED
        try:
            for batch in self.hits.split(10):
                self.asked += 1
                yield torch.stack([1 - batch, batch], 1), torch.ones(len(batch), dtype=torch.int64)
        finally:
            self.closed = True

    def forget(self) -> None:
        self.forgotten = True


def hits(*shares: float) -> Tensor:
    """Hundreds of images with these shares of hits, spread evenly."""
    parts = [(torch.arange(1, 101) * share).floor().diff(prepend=torch.zeros(1)) for share in shares]
    return torch.cat(parts).round()


# of 100 among 500 the standard error of 0.8 is sqrt(0.16 / 100 * 0.8)
@pytest.mark.parametrize(
    ("floor", "images"), [(0.0, None), (0.9, None), (0.907, None), (0.908, 100), (math.inf, 100)]
)
def test_three_standard_errors_below_the_floor_are_enough(floor: float, images: int | None) -> None:
    scorer = Batches(hits(0.8, 1, 1, 1, 1))
    found = Staged(scorer, 100).score(MODEL, floor)
    assert found == Score(pytest.approx(0.96 if images is None else 0.8), images)
    assert scorer.asked == (50 if images is None else 10)
    assert scorer.closed


@pytest.mark.parametrize(
    ("first", "shares", "images"),
    [
        (100, (0.8, 0.8, 0.8, 0.8, 0.8), 200),
        (100, (0.9, 0.9, 0.7, 0.7, 0.9), 400),
        (100, (0.9, 0.9, 0.9, 0.9, 0.0), None),  # nobody looks between 400 and 500
        (95, (0.8, 0.8, 0.8, 0.8, 0.8), 200),  # whole batches
    ],
)
def test_whoever_is_not_hopeless_yet_is_scored_on_twice_as_many(
    first: int, shares: tuple[float, ...], images: int | None
) -> None:
    found = Staged(Batches(hits(*shares)), first).score(MODEL, 0.88)
    assert found.images == images
    assert found.accuracy == pytest.approx(sum(shares[: (images or 500) // 100]) / ((images or 500) // 100))


def test_without_a_floor_all_images_count() -> None:
    scorer = Batches(hits(0.57, 0.23))
    assert Staged(scorer, 20)(MODEL) == 80 / 200
    assert Staged(scorer, 20).images is scorer.images


def test_no_hit_at_all_is_judged_by_the_error_of_what_would_matter() -> None:
    scorer = Batches(hits(0.0, 0.9, 0.9, 0.9))
    assert Staged(scorer, 100).score(MODEL, 0.05).images is None  # 5 hits are expected, but none is no rarity
    assert Staged(scorer, 100).score(MODEL, 0.2) == Score(0.0, 100)


def test_a_scorer_without_stages_ignores_the_floor() -> None:
    assert score(lambda model: 0.25, MODEL, floor=0.9) == Score(0.25, None)


def test_the_scorer_forgets() -> None:
    scorer = Batches(hits(0.5))
    Staged(scorer, 10).forget()
    assert scorer.forgotten


def test_outputs_that_are_no_numbers_are_no_hits() -> None:
    tally = Tally(torch.device("cpu"))
    tally.add(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
    assert (tally.accuracy, tally.images) == (0.5, 2)
    tally.add(torch.tensor([[math.nan, 1.0]]), torch.tensor([1]))
    with pytest.raises(UserError, match="not numbers"):
        _ = tally.accuracy
