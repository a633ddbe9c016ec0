"""Watching the calls of layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def watch(layer: nn.Module, called: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call ``called(input, output)`` after every call of a layer, whether its input is given by position or by name."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        called(args[0] if args else next(iter(kwargs.values())), output)

    return layer.register_forward_hook(hook, with_kwargs=True)


def watch_before(layer: nn.Module, called: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``called(input)`` before every call of a layer; it may change the layer's weights."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        called(args[0] if args else next(iter(kwargs.values())))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)
