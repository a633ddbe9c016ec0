"""Regularisers: loss terms that make weights, batch-norm scales or whole channels small before they are cut.

A regulariser makes its loss term once; the term is then computed, at every step, for the network that is being
trained. Its gradient is the subgradient that is 0 at 0. Gradient descent brings weights near to zero, never exactly
there: what is removed is the criterion's to say.

SGD pulls an element by up to weight * (learning rates of all steps, summed) / (1 - momentum). The papers' weights (1e-5
to 1e-4 for L1 and batch-norm scales) are for whole trainings at full rate; the defaults here are larger, for some ten
epochs at a tenth of it.

Sources:
    L1, L2: Han et al., "Learning both Weights and Connections", NIPS 2015, section 3.1.
    BNScale: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    GroupLasso: Wen et al., "Learning Structured Sparsity in Deep Neural Networks", NIPS 2016, over coupled
        channels as in DepGraph (Fang et al., CVPR 2023); the root of the group's size as in Yuan and Lin, 2006.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import field
from typing import TypeGuard

import torch
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.graph.layers import LayerGraph
from amc_env.validation import Natural, Positive, settings

LossTerm = Callable[[nn.Module], Tensor]
"""The network that is being trained to a scalar, which is added to its loss."""


@settings
class Regularization(ABC):
    """A loss term, and when it is there.

    Attributes:
        weight: Factor of the term, above 0.
        before_epochs: Epochs for which the original network is trained with it before anything is cut.
        during: Whether it stays in fine-tuning, between and after cuts.
    """

    weight: Positive
    before_epochs: Natural = 10
    during: bool = False

    @abstractmethod
    def penalty(self, model: nn.Module, graph: LayerGraph | None = None) -> LossTerm | None:
        """The loss term for ``model`` as it is trained, or None where there is none.

        Args:
            model: The network that will be trained.
            graph: Its own layer graph; only the group lasso needs one.

        Raises:
            UserError: The network has nothing that the term could be taken of.
        """


@settings
class NoRegularization(Regularization):
    """No loss term, and nothing to set."""

    weight: float = field(default=0.0, init=False)
    before_epochs: int = field(default=0, init=False)
    during: bool = field(default=False, init=False)

    def penalty(self, model: nn.Module, graph: LayerGraph | None = None) -> None:
        """None."""


@settings
class L1(Regularization):
    """weight * sum |w| over the weights (not the biases) of convolutions and linear layers."""

    weight: Positive = 1e-4

    def penalty(self, model: nn.Module, graph: LayerGraph | None = None) -> LossTerm:
        """See `Regularization.penalty`."""
        _some(_weights(model), "l1", "convolutions or linear layers")
        return lambda network: self.weight * _total([w.abs().sum() for w in _weights(network)])


@settings
class L2(Regularization):
    """weight / 2 * sum w^2 over the weights of convolutions and linear layers.

    With plain SGD that is weight decay of ``weight``, which spares biases and batch norms.
    """

    weight: Positive = 5e-4
    during: bool = True

    def penalty(self, model: nn.Module, graph: LayerGraph | None = None) -> LossTerm:
        """See `Regularization.penalty`."""
        _some(_weights(model), "l2", "convolutions or linear layers")
        return lambda network: self.weight / 2 * _total([w.square().sum() for w in _weights(network)])


@settings
class BNScale(Regularization):
    """Network slimming: weight * sum |gamma| over the scales of all batch norms."""

    weight: Positive = 5e-3

    def penalty(self, model: nn.Module, graph: LayerGraph | None = None) -> LossTerm:
        """See `Regularization.penalty`."""
        _some(_scales(model), "bn_scale", "batch norms with a scale")
        return lambda network: self.weight * _total([scale.abs().sum() for scale in _scales(network)])


@settings
class GroupLasso(Regularization):
    """weight * sum over channels of sqrt(n) * ||w||, w being the n weights that are cut with the channel.

    These are the rows and columns of all convolutions and linear layers of its group: what writes the channel
    and what reads it; a weight that does both (a convolution within a residual stage) counts twice. Biases and batch
    norms are left out. With the root of n every weight is pulled by about ``weight``, however large its channel.
    """

    weight: Positive = 5e-4

    def penalty(self, model: nn.Module, graph: LayerGraph | None = None) -> LossTerm:
        """See `Regularization.penalty`.

        Raises:
            UserError: ``graph`` is missing, or another network's: once channels are cut, the shapes are others.
        """
        if graph is None:
            raise UserError(
                "regularization=group_lasso needs the layer graph of the network that is trained",
                code="missing",
                field="regularization",
            )
        channels = _Channels(model, graph)
        return lambda network: self.weight * channels.lasso(network)


class _Channels:
    """The slices of weights that belong to each unit of a graph's groups.

    A slice is a row or a column of one weight. The slices of the whole network stand in one line, so that a step
    adds them up by unit all at once.
    """

    def __init__(self, model: nn.Module, graph: LayerGraph) -> None:
        modules = dict(model.named_modules())
        self._shapes: dict[tuple[str, str], torch.Size] = {}
        self._count = sum(group.total for group in graph.groups)
        owners: dict[tuple[str, str], Tensor] = {}
        sizes: list[Tensor] = []
        first = 0
        for group in graph.groups:
            for member in group.members:
                module = modules.get(member.module)
                if not _penalised(module):
                    continue
                if _length(module, member.side) != member.size:
                    raise _other_shape(member.module)
                key = member.module, member.side
                if key not in owners:
                    self._shapes[key] = module.weight.shape
                    # Slices that no group cuts belong to one unit more, which is dropped.
                    owners[key] = torch.full((member.size,), self._count)
                    sizes.append(torch.full((member.size,), module.weight.numel() / member.size))
                owners[key][member.positions] = torch.arange(first, first + group.total)[:, None]
            first += group.total
        _some([*owners.values()], "group_lasso", "channels that can be cut")
        device = next(model.parameters()).device
        self._units = torch.cat([*owners.values()]).to(device)
        self._roots = self._summed(torch.cat(sizes).to(device)).sqrt()

    def lasso(self, network: nn.Module) -> Tensor:
        """The sum over units of sqrt(n) * ||w||, of a network of the same shapes."""
        slices = []
        for (name, side), shape in self._shapes.items():
            module = network.get_submodule(name)
            if not _penalised(module) or module.weight.shape != shape:
                raise _other_shape(name)
            slices.append(_squares(module, side))
        squares = self._summed(torch.cat(slices))
        alive = squares > 0
        # The root's gradient at 0 is infinite: dead units take another path, on which it is 0.
        return (self._roots * torch.where(alive, squares, 1).sqrt() * alive).sum()

    def _summed(self, slices: Tensor) -> Tensor:
        """What the slices of each unit sum up to, [units]."""
        total = slices.new_zeros(self._count + 1).index_add(0, self._units, slices)
        return total[: self._count]


def _squares(module: nn.Conv2d | nn.Linear, side: str) -> Tensor:
    """The sum of squares of each row (``out``) or column (``in``) of a weight, [channels of that side]."""
    square = module.weight.square()
    if side == "out":
        return square.flatten(1).sum(1)
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    blocks = square.reshape(groups, -1, *square.shape[1:])
    return blocks.sum((1, *range(3, blocks.ndim))).flatten()


def _length(module: nn.Conv2d | nn.Linear, side: str) -> int:
    """Rows or columns of its weight; those of all groups of a convolution."""
    rows, columns = module.weight.shape[:2]
    return rows if side == "out" else columns * (module.groups if isinstance(module, nn.Conv2d) else 1)


def _other_shape(name: str) -> UserError:
    return UserError(
        f"regularization=group_lasso: {name} has another shape than in the layer graph, whose network was cut "
        "since or is another one: trace the network that is trained",
        code="does_not_fit",
        field="regularization",
    )


def _penalised(module: nn.Module | None) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Whether it is a convolution or linear layer with a weight to train; fixed selections have none."""
    return isinstance(module, nn.Conv2d | nn.Linear) and isinstance(module.weight, nn.Parameter)


def _weights(network: nn.Module) -> list[Tensor]:
    """Weights of convolutions and linear layers, each once."""
    found = [module.weight for module in network.modules() if _penalised(module)]
    return list({id(weight): weight for weight in found}.values())


def _scales(network: nn.Module) -> list[Tensor]:
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    return [norm.weight for norm in norms if norm.affine]


def _some(found: list[Tensor], name: str, what: str) -> None:
    if not found:
        raise UserError(
            f"regularization={name}: the network has no {what}; use regularization=none",
            code="unsupported",
            field="regularization",
        )


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum()
