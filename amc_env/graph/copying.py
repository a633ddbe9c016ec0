"""Copies of networks that store activations on themselves, like ``self.features = x`` in ``forward``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

_OF_TORCH = ("_parameters", "_buffers", "_modules")
Module = TypeVar("Module", bound=nn.Module)


def module_copy(model: Module) -> Module:
    """A deep copy, with None for activations that the network stores on itself: those of autograd cannot be copied."""
    return copy.deepcopy(model, {id(tensor): None for _, _, tensor in _stored(model)})


def forget_activations(model: nn.Module) -> None:
    """Set attributes that hold activations of autograd to None, in place."""
    for module, name, _ in list(_stored(model)):
        setattr(module, name, None)


def stored_activations(model: nn.Module) -> list[str]:
    """Names of the attributes that hold activations of autograd; not of weights that a hook computes before each pass."""
    names = {id(module): name for name, module in model.named_modules()}
    found = (
        f"{names[id(module)]}.{name}".lstrip(".")
        for module, name, _ in _stored(model)
        if name not in _computed(module)
    )
    return list(dict.fromkeys(found))


def _computed(module: nn.Module) -> set[Any]:
    """Names of the weights that hooks of torch.nn.utils compute: weight_norm, spectral_norm, prune."""
    hooks = module._forward_pre_hooks.values()
    return {getattr(hook, place, None) for hook in hooks for place in ("name", "_tensor_name")}


def _stored(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, value in vars(module).items():
            for tensor in () if name in _OF_TORCH else _tensors(value):
                if tensor.grad_fn is not None:
                    yield module, name, tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
