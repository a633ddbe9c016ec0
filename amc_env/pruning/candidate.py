"""Networks of strategies: channels cut out, or weights masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from amc_env.graph.copying import module_copy
from amc_env.graph.layers import LayerGraph, keeps_of
from amc_env.graph.surgery import (
    Keeps,
    cut_tensors,
    resize,
    set_sizes,
    share,
    shared_parameters,
    widened_tensors,
)
from amc_env.space import Grid


def widen(slim: nn.Module, keeps: Keeps, original: nn.Module) -> nn.Module:
    """A network in the original's shapes that computes what ``slim`` computes, in eval mode.

    Slim's tensors lie among zeros: what a removed channel is written and read by is 0, and its batch norms give 0
    (scale, shift and mean 0, variance 1). Cutting the same channels again gives slim's state dict bit for bit.

    Args:
        slim: What cutting ``keeps`` out of ``original`` gave, with any weights since.
        keeps: What stayed of every module.
        original: The uncut network; only its shapes are used, and it is not changed.

    Raises:
        ValueError: ``slim`` is not ``original`` cut to ``keeps``.
    """
    wide = module_copy(original)
    for name, module in wide.named_modules():
        small = slim.get_submodule(name)
        tensors = widened_tensors(module, small, keeps.get(name, {}), name)
        for key, tensor in tensors.items():
            if key in module._parameters:
                trained = bool(getattr(small, key).requires_grad)
                module._parameters[key] = nn.Parameter(tensor, requires_grad=trained)
            else:
                module._buffers[key] = tensor
    share(wide, shared_parameters(original))
    return wide.eval()


__all__ = ["Builder", "Candidates", "Keeps", "MaskedCandidates", "resize"]


Masks = dict[str, Tensor]
"""Layer name to a boolean tensor shaped like its weight; True stays."""


class Builder(Protocol):
    """Builds the networks of strategies."""

    @property
    def original(self) -> nn.Module:
        """The uncut network."""
        ...

    def keeps(self, removed: Sequence[int]) -> Keeps:
        """Channels that stay of every module that is cut; none where weights are masked."""
        ...

    def masks(self, removed: Sequence[int]) -> Masks:
        """Weights that stay of every layer that is masked; none where channels are cut."""
        ...

    def units(self, removed: Sequence[int]) -> tuple[Tensor, ...]:
        """Units that stay of every channel group, int64, ascending; none where weights are masked."""
        ...

    def cut(self, removed: Sequence[int], keeps: Keeps | None = None) -> nn.Module:
        """A strategy's network: valid until the next call, in eval mode, its tensors its own."""
        ...


class Candidates:
    """Builds the networks of strategies.

    One skeleton is cut for every strategy: only tensors and sizes change, so a candidate costs
    milliseconds.

    Args:
        model: The network that is pruned; it is copied, not changed.
        graph: Its layer graph, one group a decision.
        orders: For every group its units from worth most to worth least, int64 [units].
    """

    def __init__(self, model: nn.Module, graph: LayerGraph, orders: Sequence[Tensor]):
        self.graph = graph
        self.orders = tuple(orders)
        self._original = module_copy(model).eval()
        self.skeleton = module_copy(self._original)
        self._pairs = [
            (name, module, self.skeleton.get_submodule(name))
            for name, module in self._original.named_modules()
        ]
        self._shared = shared_parameters(self._original)
        self._sizes = {
            name: {k: v for k, v in vars(module).items() if isinstance(v, int)}
            for name, module, _ in self._pairs
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to other processes without the skeleton."""
        return Candidates, (self._original, self.graph, self.orders)

    @property
    def original(self) -> nn.Module:
        """The uncut network."""
        return self._original

    def keeps(self, removed: Sequence[int]) -> Keeps:
        """What stays of every module when ``removed`` units are gone, the least worth first."""
        return keeps_of(self.graph.groups, self.units(removed))

    def units(self, removed: Sequence[int]) -> tuple[Tensor, ...]:
        """Units that stay of every group, int64, ascending."""
        pairs = zip(self.orders, removed, strict=True)
        return tuple(order[: len(order) - count].sort().values for order, count in pairs)

    def masks(self, removed: Sequence[int]) -> Masks:
        """Nothing is masked: channels are cut out."""
        return {}

    def cut(self, removed: Sequence[int], keeps: Keeps | None = None) -> nn.Module:
        """The skeleton cut to a strategy: valid until the next call, in eval mode, its tensors its own.

        Args:
            removed: Units removed from each group.
            keeps: What `keeps` gives for them, where the caller has it already.
        """
        keeps = self.keeps(removed) if keeps is None else keeps
        for name, original, module in self._pairs:
            sides = keeps.get(name, {})
            cut = cut_tensors(original, sides) if sides else {}
            for key, parameter in original._parameters.items():
                if parameter is not None:
                    value = cut[key] if key in cut else parameter.detach().clone()
                    module._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            for key, buffer in original._buffers.items():
                if buffer is not None:
                    module._buffers[key] = cut[key] if key in cut else buffer.clone()
            if sides:
                vars(module).update(self._sizes[name])
                set_sizes(module, sides)
        share(self.skeleton, self._shared)
        return self.skeleton.eval()

    def build(self, removed: Sequence[int]) -> nn.Module:
        """A network of its own, cut to a strategy."""
        return resize(module_copy(self._original), self.keeps(removed))


class MaskedCandidates:
    """Builds the networks of strategies that set weights to zero and leave shapes as they are.

    Args:
        model: The network that is pruned; it is copied, not changed.
        grids: The decisions, each named like its layer.
        removal_rank: For every decision's layer the place of each weight's unit in the order of removal, int32, shaped
            like the weight: a weight stays where its place is below what is kept of the decision.
    """

    def __init__(self, model: nn.Module, grids: Sequence[Grid], removal_rank: Mapping[str, Tensor]):
        self.grids = tuple(grids)
        self.removal_rank = dict(removal_rank)
        self._original = module_copy(model).eval()
        self.skeleton = module_copy(self._original)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to other processes without the skeleton."""
        return MaskedCandidates, (self._original, self.grids, self.removal_rank)

    @property
    def original(self) -> nn.Module:
        """The unpruned network."""
        return self._original

    def keeps(self, removed: Sequence[int]) -> Keeps:
        """No channel is cut."""
        return {}

    def units(self, removed: Sequence[int]) -> tuple[Tensor, ...]:
        """No channel is cut."""
        return ()

    def masks(self, removed: Sequence[int]) -> Masks:
        """What stays of the weights of every decision that removes something."""
        pairs = zip(self.grids, removed, strict=True)
        return {
            grid.name: self.removal_rank[grid.name] < grid.total - count for grid, count in pairs if count
        }

    @torch.no_grad()
    def cut(self, removed: Sequence[int], keeps: Keeps | None = None) -> nn.Module:
        """The skeleton with the weights of a strategy set to zero: valid until the next call, in eval mode."""
        self.skeleton.load_state_dict(self._original.state_dict())
        for name, mask in self.masks(removed).items():
            weight = self.skeleton.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.masked_fill_(~mask.to(weight.device), 0.0)
        return self.skeleton.eval()
