"""The conformance checks find what breaks a contract."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from networks import images, problem, traced

from amc_env.pruning.criteria import Norm, Sample
from amc_env.pruning.granularity import Channel, FineGrained
from amc_env.testing import check_cost, check_criterion, check_granularity

GRIDS = problem("concat")[1]
NOTHING = Sample(images(2), torch.tensor([0, 1]))


class Faulty:
    """A cost that is what a function says."""

    name, unit = "faulty", "units"

    def __init__(self, function):
        self.function = function

    def __call__(self, removed) -> float:
        return self.function(removed)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda removed: 0.0, "must be above 0"),
        (lambda removed: 7.0 - sum(removed) / 100, "is 7.0, not 9.0"),
        (lambda removed: 9.0 + sum(removed), "at 0: .*, at "),
        (lambda removed: 9.0, "at 0: 9.0, at "),
        (lambda removed: 9.0 - torch.rand(()).item() * any(removed), "not the same twice"),
        (lambda removed: 9.0 - 2 * sum(removed), "negative"),
    ],
)
def test_broken_costs(function, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check_cost(Faulty(function), GRIDS, original=9.0, falls=True)


@dataclass(frozen=True)
class Broken(Norm):
    """L2 norms with one fault."""

    fault: ClassVar[str]

    def channel_scores(self, model, graph, sample=None):
        scores = super().channel_scores(model, graph, sample)
        if self.fault == "random":
            torch.rand(1)
        if self.fault == "network":
            next(model.parameters()).data.add_(1.0)
        if self.fault == "mode":
            model.eval()
        if self.fault == "shape":
            return tuple(score[1:] for score in scores)
        if self.fault == "dtype":
            return tuple(score.float() for score in scores)
        if self.fault == "negative":
            return tuple(-score for score in scores)
        return scores


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("random", "global random state"),
        ("network", "changes the network"),
        ("mode", "changes the mode"),
        ("shape", "other shapes"),
        ("dtype", "not float64"),
        ("negative", "negative"),
    ],
)
def test_broken_criteria(fault: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "fault", fault, raising=False)
    with pytest.raises(AssertionError, match=says):
        check_criterion(Broken(), *traced("concat"), NOTHING)


class Silent(FineGrained):
    """Does not report what it leaves out."""

    def decisions(self, graph):
        decided, grids = super().decisions(graph)
        return decided, grids[1:]


class Everything(Channel):
    """Lets a decision remove all of its channels."""

    def decisions(self, graph):
        decided, grids = super().decisions(graph)
        return decided, tuple(replace(grid, step=1, most=grid.total) for grid in grids)


class Uneven(FineGrained):
    """Two weights share a place."""

    def removal_rank(self, saliency, layer):
        return super().removal_rank(saliency, layer).clamp(max=layer.weights - 2)


@pytest.mark.parametrize(
    ("granularity", "says"),
    [(Silent(), "neither decided"), (Everything(), "nothing or everything"), (Uneven(), "weights each")],
    ids=lambda entry: type(entry).__name__,
)
def test_broken_granularities(granularity, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check_granularity(granularity, traced("concat")[1])
