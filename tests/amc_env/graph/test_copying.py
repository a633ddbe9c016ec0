"""Networks that store activations on themselves are copied without them."""

import torch
from networks import network, same_state
from torch import Tensor, nn

from amc_env.graph.copying import forget_activations, module_copy, stored_activations


class Storing(nn.Module):
    """Keeps what it computed, as a tensor and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.constant = torch.ones(2)
        self.features: Tensor | None = None
        self.all: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.relu(self.first(x))
        self.all = [x, self.features]
        return self.second(self.features)


def test_a_copy_has_no_activations_and_the_original_keeps_them() -> None:
    model = Storing()
    model(torch.ones(3, 4))
    assert stored_activations(model) == ["features", "all"]
    copied = module_copy(nn.Sequential(model))[0]
    assert copied.features is None
    assert torch.equal(copied.constant, model.constant)
    assert same_state(copied, model)
    assert model.features is not None


def test_activations_are_forgotten_in_place() -> None:
    model = Storing()
    model(torch.ones(3, 4))
    forget_activations(model)
    assert (model.features, model.all) == (None, None)
    assert stored_activations(model) == []
    model(torch.ones(3, 4))


def test_a_network_without_any_is_copied_as_it_is() -> None:
    model = network("concat")
    assert same_state(module_copy(model), model)
