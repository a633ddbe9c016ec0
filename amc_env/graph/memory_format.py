"""The memory format that a network is trained or run in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amc_env.graph.copying import module_copy
from amc_env.inputs import Inputs, call, device_of, holds_images, in_format, tensors_in

_VECTOR = 16
"""Channels of a oneDNN block with AVX-512; 8 with AVX2."""


_GRADIENT_TOLERANCE = 1e-2
"""Relative difference of gradients; rounding causes less than 1e-4, the oneDNN fault up to 1."""


def fastest_format(model: nn.Module, example: Inputs) -> torch.memory_format:
    """Convert `model` to channels-last if it runs in that format, else leave it contiguous.

    Channels-last shortens a training step of ResNet-20 by a fifth (batch 128, one CPU thread: 0.37 s instead of 0.46).
    A network that calls `view` on feature maps does not run in it.

    Args:
        model: The network; it is converted in place and left in eval mode.
        example: Two of its inputs; without a tensor [2, C, H, W] the network stays contiguous.

    Returns:
        The format that the model has now.
    """
    if not holds_images(example):
        model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        return torch.contiguous_format
    model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    try:
        with torch.no_grad():
            call(model, in_format(example, torch.channels_last))
    except RuntimeError:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return torch.contiguous_format
    return torch.channels_last


def training_format(model: nn.Module, example: Inputs) -> torch.memory_format:
    """Convert `model` to channels-last if it can be trained correctly in that format, else to contiguous.

    On CPUs, oneDNN's weight gradient of some convolutions is wrong in channels-last, or writes outside its workspace
    and ends the process (uxlfoundation/oneDNN#6035). Networks with such a convolution are trained contiguous. As a guard
    against further cases, the gradients of one step are compared in the two formats.

    Args:
        model: The network; it is converted in place and left in eval mode.
        example: Two of its inputs, on the device of the model.

    Returns:
        The format that the model has now.
    """
    on_cpu = device_of(example).type == "cpu"
    if not (on_cpu and any(map(_crashes_channels_last, model.modules()))):
        layout = fastest_format(model, example)
        if layout is torch.contiguous_format or not on_cpu or _same_gradients(model, example):
            return layout
    model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return torch.contiguous_format


def _crashes_channels_last(module: nn.Module) -> bool:
    """Whether oneDNN's weight gradient of a layer can overrun its workspace in channels-last."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.in_channels < _VECTOR
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
    )


def _same_gradients(model: nn.Module, example: Inputs) -> bool:
    """Whether channels-last and contiguous give the same gradients of all weights, up to rounding."""
    expected = _gradients(model, example, torch.contiguous_format)
    try:
        found = _gradients(model, example, torch.channels_last)
    except RuntimeError:  # runs forward in channels-last, but not backward
        return False
    return all((a - b).norm() <= _GRADIENT_TOLERANCE * a.norm() for a, b in zip(expected, found, strict=True))


def _gradients(model: nn.Module, example: Inputs, layout: torch.memory_format) -> list[Tensor]:
    """Gradients of the mean squared output, on a copy of the network in eval mode."""
    network = module_copy(model).to(memory_format=layout).eval()  # type: ignore[call-overload]
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        outputs = tensors_in(call(network, in_format(example, layout)))
        loss = sum(output.square().mean() for output in outputs if output.requires_grad)
        found = torch.autograd.grad(torch.as_tensor(loss), weights, allow_unused=True)
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]
