"""A tuned slim network back in the original's shapes, so that further strategies can be cut from it.

Counts of removed units are always counted from the uncut network; iterative pruning and staged searches begin from
weights that an earlier cut left, and those have smaller shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amc_env.pruning.criteria import rank
from amc_env.surgery import Keeps, widened_tensors


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
    wide = copy.deepcopy(original)
    for name, module in wide.named_modules():
        small = slim.get_submodule(name)
        tensors = widened_tensors(module, small, keeps.get(name, {}), name)
        for key, tensor in tensors.items():
            if key in module._parameters:
                trained = bool(getattr(small, key).requires_grad)
                module._parameters[key] = nn.Parameter(tensor, requires_grad=trained)
            else:
                module._buffers[key] = tensor
    return wide.eval()


def rank_after(scores: Sequence[Tensor], kept_units: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Orders of a widened network: like `rank`, with the units that were removed earlier last.

    So the strategy that the slim network came from, and every one that removes more, is cut out of what is left.

    Args:
        scores: Worth of every unit of the widened network, a tensor [units] for each group.
        kept_units: Units that had stayed, int64, a tensor for each group, in any order.
    """
    orders = []
    for order, kept in zip(rank(scores), kept_units, strict=True):
        gone = torch.ones(len(order), dtype=torch.bool)
        gone[kept.cpu()] = False
        order = order.cpu()
        orders.append(torch.cat([order[~gone[order]], order[gone[order]]]))
    return tuple(orders)
