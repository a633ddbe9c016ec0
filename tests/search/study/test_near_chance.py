"""When a network's own score is warned of."""

import pytest

from search.study.evaluation import near_chance


@pytest.mark.parametrize(
    ("score", "classes", "warned"),
    [
        (0.54, 2, True),
        (0.56, 2, False),
        (0.99, 2, False),
        (0.18, 10, True),
        (0.2, 10, False),
        (0.0, 0, True),
        (0.1, 0, False),
    ],
)
def test_a_score_near_chance(score: float, classes: int, warned: bool) -> None:
    assert near_chance(score, classes) == warned
