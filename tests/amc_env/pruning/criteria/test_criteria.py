"""What every criterion keeps to: shapes, finite scores, no side effects, the same result twice; and conf's list."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from networks import SMALL, images, network, traced
from omegaconf import OmegaConf
from refusals import refused
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.graph.layers import LayerGraph
from amc_env.pruning.criteria import (
    CRITERIA,
    OBD,
    Criterion,
    ElementCriterion,
    Lasso,
    Norm,
    Sample,
    Taylor,
    check_fits,
)
from amc_env.testing import check_criterion

CONF = Path(__file__).parents[4] / "conf" / "criterion"
GRANULARITIES = ("channel", "fine_grained", "nm", "vector", "kernel")
SETTINGS = [
    *CRITERIA,
    OBD("fisher"),
    OBD("hutchinson"),
    Norm(1, "consumers", "max"),
    Norm(2, "producers", "sum"),
    Taylor(members="consumers"),
    Taylor(members="producers", aggregate="sum"),
]
NO_SCALE = ("grouped", "gated", "flatten", "mlp")
"""Networks with a group that no batch norm works on."""
NO_ZEROS = ("concat", "gated", "flatten")
"""Networks with a group that is never zero where it is read: pooled, after a linear bottleneck, after a PReLU."""


def sample(seed: int = 3) -> Sample:
    return Sample(images(6), torch.tensor([0, 1, 2, 3, 0, 1]), seed)


def refuses(criterion: Criterion, name: str) -> bool:
    return (criterion.name == "bn_scale" and name in NO_SCALE) or (
        criterion.name == "apoz" and name in NO_ZEROS
    )


def results(criterion: Criterion, model: nn.Module, graph: LayerGraph, data: Sample) -> list[Tensor]:
    found = list(criterion.channel_scores(model, graph, data))
    if isinstance(criterion, ElementCriterion):
        found += criterion.saliency(model, graph.layers, data).values()
    return found


@pytest.mark.parametrize("criterion", SETTINGS, ids=str)
@pytest.mark.parametrize("name", [name for name in SMALL if name != "pad"])
def test_a_criterion_keeps_its_contract(name: str, criterion: Criterion) -> None:
    model, graph = traced(name)
    if refuses(criterion, name):
        with pytest.raises(UserError, match=f"criterion={criterion.name}.*use criterion=l1"):
            criterion.channel_scores(model, graph, sample())
        return
    check_criterion(criterion, model, graph, sample())
    scores = results(criterion, model, graph, sample())
    assert (
        all(len(score.unique()) > 1 for score in scores) or name == "gated"
    )  # channels that are silent here


@pytest.mark.parametrize("criterion", SETTINGS, ids=str)
def test_dead_channels_break_nothing(criterion: Criterion) -> None:
    model, (_, graph) = network("residual"), traced("residual")
    model.get_parameter("layer1.0.conv1.weight").data[2:5] = 0  # three filters, their batch norm
    model.get_parameter("layer1.0.bn1.weight").data[2:5] = 0
    model.get_parameter("layer1.0.bn1.bias").data[2:5] = 0
    model.get_parameter("layer2.0.conv2.weight").data[:] = 0  # and a whole layer
    found = results(criterion, model, graph, sample())
    assert all(bool(value.isfinite().all()) and bool((value >= 0).all()) for value in found)
    if criterion.name not in ("random", "fpgm") and criterion != Norm(1, "consumers", "max"):
        dead = criterion.channel_scores(model, graph, sample())[
            [g.name for g in graph.groups].index("layer1.0.conv1")
        ]
        assert dead[2:5].max() < dead[[0, 1, *range(5, 16)]].quantile(0.5)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c.images], ids=lambda c: c.name)
def test_images_are_needed_where_they_are_used(criterion: Criterion) -> None:
    model, graph = traced("residual")
    nothing = Sample(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64))
    with pytest.raises(UserError, match=f"criterion={criterion.name} needs calibration images"):
        criterion.channel_scores(model, graph, nothing)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c.images], ids=lambda c: c.name)
def test_no_more_images_are_used_than_asked_for(criterion: Criterion) -> None:
    model, graph = traced("residual")
    few = type(criterion)(images=4)  # type: ignore[call-arg]
    data = sample()
    part = Sample(data.inputs[:4], data.targets[:4], data.seed)
    all_of_four, four_of_all = (few.channel_scores(model, graph, s) for s in (part, data))
    assert all(torch.equal(a, b) for a, b in zip(all_of_four, four_of_all, strict=True))
    more = criterion.channel_scores(model, graph, data)
    assert not all(torch.equal(a, b) for a, b in zip(all_of_four, more, strict=True))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_fits_what(granularity: str) -> None:
    fitting = {c.name for c in CRITERIA if granularity in c.granularities}
    everywhere = {"l1", "l2", "taylor", "obd", "random"}
    assert fitting == (
        everywhere | {"bn_scale", "apoz", "lasso", "fpgm"} if granularity == "channel" else everywhere
    )
    for criterion in CRITERIA:
        assert isinstance(criterion, ElementCriterion) == (criterion.name in everywhere)
        if criterion.name in fitting:
            check_fits(criterion, granularity)
        else:
            with pytest.raises(UserError) as error:
                check_fits(criterion, granularity)
            assert str(error.value) == (
                f"criterion={criterion.name} does not fit granularity={granularity}: it fits channel; "
                f"for granularity={granularity} use one of l1, l2, taylor, obd, random"
            )


def test_conf_offers_these_with_these_defaults() -> None:
    files = {path.stem: instantiate(OmegaConf.load(path)) for path in CONF.glob("*.yaml")}
    assert files == {criterion.name: criterion for criterion in CRITERIA}


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (lambda: Taylor(images=0), ["images"]),
        (lambda: OBD("exact"), ["hessian"]),  # type: ignore[arg-type]
        (lambda: OBD(probes=0), ["probes"]),
        (lambda: Lasso(images=0, per_image=0), ["images", "per_image"]),
    ],
)
def test_wrong_settings_are_refused(make, fields: list[str]) -> None:
    with refused("out_of_range", *fields):
        make()
