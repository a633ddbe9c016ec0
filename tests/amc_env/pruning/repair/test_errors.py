"""Layer errors against least squares solved directly, and what they promise on every network."""

import numpy as np
import pytest
import torch
from networks import SMALL, images, problem, traced

from amc_env.pruning.repair.errors import layer_errors


def errors_of(name: str, count: int = 40) -> tuple[np.ndarray, ...]:
    candidates, grids = problem(name)
    return layer_errors(candidates, grids, traced(name)[1].topology, images(count), per_image=4)


@pytest.mark.parametrize("name", SMALL)
def test_errors_start_at_nothing_and_never_fall(name: str) -> None:
    _, grids = problem(name)
    found = errors_of(name)
    assert [len(curve) for curve in found] == [grid.size for grid in grids]
    for curve in found:
        assert curve[0] == pytest.approx(0, abs=1e-9)
        assert (np.diff(curve) >= 0).all()
        assert np.isfinite(curve).all()
    assert max(curve[-1] for curve in found) > 0


def test_an_error_is_what_least_squares_leaves_unexplained() -> None:
    """The second layer of an MLP, which alone reads the first decision."""
    candidates, grids = problem("mlp")
    x = images(200)
    model = candidates.original
    with torch.no_grad():
        inputs = model[:3](x).double().numpy()  # after the first ReLU
        outputs = model[3](model[:3](x)).double().numpy()
    outputs -= outputs.mean(axis=0)
    order = candidates.orders[0].numpy()
    found = layer_errors(candidates, grids, traced("mlp")[1].topology, x)[0]
    for index in range(1, grids[0].size):
        kept = order[: grids[0].total - grids[0].count(index)]
        given = inputs[:, kept] - inputs[:, kept].mean(axis=0)
        solution, *_ = np.linalg.lstsq(given, outputs, rcond=None)
        left = np.square(outputs - given @ solution).sum() / np.square(outputs).sum()
        assert found[index] == pytest.approx(left, rel=1e-3, abs=1e-6), index
