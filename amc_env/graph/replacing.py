"""Modules replaced by others that compute the same and can be pruned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from amc_env.graph import attention, windows


def replace_modules(model: nn.Module) -> list[str]:
    """Replace modules of a network in place; what it computes in eval mode stays the same.

    - `torch.nn.MultiheadAttention`, and the attention of torchvision's Swin transformers, by one whose heads can be
      removed.
    - Hugging Face's ``Conv1D`` (a linear layer with its weight transposed) by a linear layer.
    - Convolutions that compute their weight from the parameter in every pass, like those with standardised weights, by
      plain ones with that weight.

    Returns:
        What was replaced, like ``blocks.0.attn (MultiheadAttention)``.
    """
    done = []
    for name, module in list(model.named_modules()):
        made = _substitute(module)
        if made is not None and name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made.train(module.training))
            done.append(f"{name} ({type(module).__name__})")
    return done


def _substitute(module: nn.Module) -> nn.Module | None:
    if attention.replaceable(module):
        return attention.MultiheadAttention(module)
    if windows.replaceable(module):
        return windows.ShiftedWindowAttention(module)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return _linear(module)
    if isinstance(module, nn.Conv2d) and type(module).forward is not nn.Conv2d.forward:
        return _plain(module)
    return None


def _linear(module: nn.Module) -> nn.Linear:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    made = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    made.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return made


def _plain(module: nn.Conv2d) -> nn.Conv2d | None:
    """A convolution with the weight that the module computes; None where it uses its own, or does anything else."""
    side = [2 * (size - 1) * step + 1 for size, step in zip(module.kernel_size, module.dilation, strict=True)]
    x = torch.zeros(1, module.in_channels, *side).to(module.weight)
    training, watch = module.training, _Convolutions()
    try:
        with torch.no_grad(), watch:
            module.eval()(x)
    except Exception:  # a module of somebody else's that does not run on such an input stays as it is
        return None
    finally:
        module.train(training)
    if len(watch.calls) != 1 or watch.calls[0][0] is not x or watch.calls[0][1] is module.weight:
        return None
    made = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.dilation,  # type: ignore[arg-type]
        module.groups,
        module.bias is not None,
        module.padding_mode,
        device="meta",
    )
    made.weight = nn.Parameter(watch.calls[0][1].detach().clone(), requires_grad=module.weight.requires_grad)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=module.bias.requires_grad)
    return made


class _Convolutions(TorchFunctionMode):
    """Records the inputs and weights of all two-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.conv2d, nn.functional.conv2d):
            given = {**dict(zip(("input", "weight"), args, strict=False)), **kwargs}
            self.calls.append((given["input"], given["weight"]))
        return func(*args, **kwargs)
