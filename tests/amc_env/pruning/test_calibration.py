"""Samples of what layers see: against unfolding, and moments against direct sums."""

import pytest
import torch
from networks import SMALL, images, network, traced
from torch import nn
from torch.nn import functional as F

from amc_env.graph.tracing import trace
from amc_env.pruning.calibration import Moments, SampledPositions, record, repairable

CONVOLUTIONS = {
    "1x1": nn.Conv2d(3, 8, 1),
    "3x3": nn.Conv2d(3, 8, 3, padding=1),
    "strided": nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "unpadded": nn.Conv2d(3, 8, 3),
    "oblong": nn.Conv2d(3, 8, (1, 5), stride=(2, 1), padding=(0, 2)),
    "dilated": nn.Conv2d(3, 8, 3, padding=2, dilation=2),
    "same": nn.Conv2d(3, 8, 4, padding="same"),
}


def layer_of(module: nn.Module):
    model = nn.Sequential(module, nn.Conv2d(8, 4, 1)).eval()
    return trace(model, images(1)).layer("0")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("per_image", [5, 1000])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_inputs_times_weights_are_the_outputs_at_the_same_places(name: str, per_image: int) -> None:
    module = CONVOLUTIONS[name]
    layer = layer_of(module)
    positions = SampledPositions(layer, 4, per_image, seed=0)
    with torch.no_grad():
        x, y = positions.inputs(module, images()), positions.outputs(module(images()))
        torch.testing.assert_close(x @ module.weight.flatten(1).T + module.bias, y, rtol=1e-4, atol=1e-5)
    assert len(x) == 4 * min(per_image, layer.positions)


def test_all_positions_are_what_unfolding_gives() -> None:
    module = CONVOLUTIONS["strided"]
    positions = SampledPositions(layer_of(module), 4, 1000, seed=0)
    unfolded = F.unfold(images(), 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    assert torch.equal(positions.inputs(module, images()), unfolded)


@pytest.mark.parametrize("shape", [(5,), (5, 6), (2, 3, 6)])
def test_linear_layers_on_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    module = nn.Linear(shape[-1], 4)
    layer = next(iter(traced("mlp")[1].layers))
    positions = torch.Size(shape[:-1]).numel()
    layer = type(layer)(**{**vars(layer), "in_size": (positions, 1), "out_size": (positions, 1)})
    places = SampledPositions(layer, 7, 3, seed=1)
    x = torch.randn(7, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sampled, outputs = places.inputs(module, x), places.outputs(module(x))
        torch.testing.assert_close(module(sampled), outputs)
    assert len(sampled) == 7 * min(3, positions)


def test_places_depend_on_the_seed_and_the_layer_alone() -> None:
    module = CONVOLUTIONS["3x3"]
    layer = layer_of(module)
    state = torch.get_rng_state()
    first, again, other = (SampledPositions(layer, 4, 5, seed).outputs(images()) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_moments_add_up_and_centre() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=generator) + 3, torch.randn(50, 4, generator=generator)
    whole = Moments.of(x, y, 2)
    parts = Moments.of(x[:20], y[:20], 2) + Moments.of(x[20:], y[20:], 2)
    for key in ("xx", "xy", "x", "y", "count"):
        torch.testing.assert_close(getattr(whole, key), getattr(parts, key))
    xs, ys = x.double().view(50, 2, 3), y.double().view(50, 2, 2)
    xs, ys = xs - xs.mean(0), ys - ys.mean(0)
    centred = whole.centred()
    torch.testing.assert_close(centred.xx, torch.einsum("sgi,sgj->gij", xs, xs))
    torch.testing.assert_close(centred.xy, torch.einsum("sgi,sgj->gij", xs, ys))


@pytest.mark.parametrize("name", SMALL)
def test_recorded_moments_are_those_of_all_samples(name: str) -> None:
    model, graph = traced(name)
    modules = dict(model.named_modules())
    layers = [layer for layer in graph.layers if repairable(modules[layer.name], layer)]
    many = images(260)  # more than one batch
    found = record(model, layers, many, per_image=3, seed=0)
    assert set(found) == {layer.name for layer in layers}
    assert all(m.count == 260 * min(3, graph.layer(name).positions) for name, m in found.items())
    first = layers[0]
    if first.kind == "conv":
        positions = SampledPositions(first, 260, 3, 0)
        x = positions.inputs(modules[first.name], many).double()
        torch.testing.assert_close(found[first.name].xx[0], x.T @ x)
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_not_repairable() -> None:
    model, graph = traced("depthwise")
    assert not repairable(model.get_submodule("features.0.0"), graph.layer("features.0.0"))
    assert repairable(model.get_submodule("features.0.3"), graph.layer("features.0.3"))
    model, graph = traced("selection")
    assert not repairable(model.get_submodule("layer2.0.shortcut"), graph.layer("layer2.0.shortcut"))
    reflecting = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
    assert not repairable(reflecting, layer_of(reflecting))
    layer = graph.layer("conv1")
    assert not repairable(network("selection").conv1, type(layer)(**{**vars(layer), "calls": 2}))
