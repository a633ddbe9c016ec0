"""Networks that come wrapped, reparametrized, in other precisions, or in forms that cannot be pruned."""

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from refusals import refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from amc_env.graph.copying import module_copy
from amc_env.graph.preparing import prepared, unwrapped

INPUTS = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def masked(model: nn.Module) -> None:
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "weight", 0.5)  # a container of both


def old_weight_norm(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])


@pytest.mark.parametrize(
    "change",
    [
        masked,
        old_weight_norm,
        lambda model: nn.utils.spectral_norm(model[0]),
        lambda model: parametrizations.weight_norm(model[0]),
        lambda model: parametrizations.spectral_norm(model[0]),
    ],
)
def test_reparametrized_weights_become_plain_ones(change: Callable[[nn.Module], object]) -> None:
    model = network()
    change(model)
    wanted: Tensor = model.eval()(INPUTS)
    found = prepared(module_copy(model))
    assert set(found.state_dict()) == set(network().state_dict())
    torch.testing.assert_close(found(INPUTS), wanted)
    assert torch.equal(model(INPUTS), wanted)  # the copy alone is changed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_become_float32(dtype: torch.dtype) -> None:
    found = prepared(network().to(dtype))
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32}


def test_decoders_return_no_cache() -> None:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(use_cache=True)
    assert not prepared(model).config.use_cache


def test_wrappers_are_taken_off() -> None:
    model = network()
    assert unwrapped(torch.compile(nn.DataParallel(model), backend="eager")) is model
    assert prepared(copy.deepcopy(model)).training is False


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(network(), {nn.Linear})


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(network(), INPUTS)


@pytest.mark.parametrize(
    "make",
    [
        quantized,
        scripted,
        lambda: torch.export.export(network(), (INPUTS,)),
        lambda: torch.export.export(network(), (INPUTS,)).module(),
        lambda: network().state_dict(),
    ],
)
def test_what_is_no_network_of_modules_is_refused(make: Callable[[], object]) -> None:
    with refused("not_eager", "module"):
        unwrapped(make())


def test_weights_without_values_are_refused() -> None:
    with refused("no_weights", "module"):
        unwrapped(network().to("meta"))
