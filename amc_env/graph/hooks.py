"""Watching the calls of a layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def watch(layer: nn.Module, called: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call ``called(input, output)`` after every call of a layer, whether its input is given by position or by name."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        called(args[0] if args else next(iter(kwargs.values())), output)

    return layer.register_forward_hook(hook, with_kwargs=True)
