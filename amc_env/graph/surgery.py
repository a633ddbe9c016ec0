"""Cutting channels out of modules by plain indexing.

Everything is said in the coordinates of the uncut network, so several groups may touch one dimension
(concatenation, flattening) without shifting one another's offsets.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

Keeps = dict[str, dict[str, Tensor]]
"""Module name to {side: kept entries}, int64 and ascending; an absent side is unpruned.

Sides are ``in`` and ``out`` of layers and of modules with one entry per channel. ``NAME.DIMENSION`` is a dimension of
another tensor of the module, like ``gamma.0``, and ``.NAME`` a number that its forward pass reshapes by, like
``.num_heads``.
"""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
"""Modules with a weight whose first two dimensions are outputs and inputs, or the other way round where transposed."""

CHANNELWISE = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU)
"""Modules with one entry per channel: they are cut with the channels that pass through them."""


def side_of(module: nn.Module, key: str, dimension: int) -> str:
    """The side that one dimension of a module's tensor belongs to."""
    if isinstance(module, LAYERS) and dimension < 2:
        reads = dimension == (0 if isinstance(module, TRANSPOSED) else 1)
        return "in" if reads and key == "weight" else "out"
    if isinstance(module, CHANNELWISE) and getattr(module, key).ndim == 1:
        return "out"
    return f"{key}.{dimension}"


def shared_parameters(model: nn.Module) -> list[list[tuple[str, str]]]:
    """The places, (module, name), of each parameter that has several."""
    places: dict[nn.Parameter, list[tuple[str, str]]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module_name, name))
    return [found for found in places.values() if len(found) > 1]


def share(model: nn.Module, shared: list[list[tuple[str, str]]]) -> None:
    """Puts one parameter in all places where the uncut network has one, in place."""
    for (owner, own), *others in shared:
        parameter = model.get_submodule(owner)._parameters[own]
        for module_name, name in others:
            model.get_submodule(module_name)._parameters[name] = parameter


def resize(model: nn.Module, keeps: Keeps) -> nn.Module:
    """Cuts an uncut network down to ``keeps``, in place.

    Parameters are replaced by new ones that share no memory with the old; attributes such as ``out_channels``
    follow.

    Returns:
        ``model``.
    """
    modules = dict(model.named_modules())
    shared = shared_parameters(model)
    for name, sides in keeps.items():
        module = modules[name]
        for key, tensor in cut_tensors(module, sides).items():
            if key in module._parameters:
                old = module._parameters[key]
                assert old is not None
                module._parameters[key] = nn.Parameter(tensor, requires_grad=old.requires_grad)
            else:
                module._buffers[key] = tensor
        set_sizes(module, sides)
    share(model, shared)
    return model


def cut_tensors(module: nn.Module, sides: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's own tensors cut to ``sides``, by name; only those that change."""
    cut: dict[str, Tensor] = {}
    for key, value in _own_tensors(module):
        for dimension, kept in _cut_dimensions(module, key, value, sides):
            value = value.index_select(dimension, kept.to(value.device))
            cut[key] = value
    return cut


def widened_tensors(
    module: nn.Module, cut: nn.Module, sides: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """The inverse of `cut_tensors`: all tensors of ``cut``, by name, in the shapes of the uncut ``module``.

    What was cut away is 0; running variances are 1 there.

    Raises:
        ValueError: A tensor of ``cut`` has not the shape that ``module`` has when it is cut to ``sides``.
    """
    wide: dict[str, Tensor] = {}
    for key, value in _own_tensors(module):
        small: Tensor = getattr(cut, key).detach()
        dimensions = _cut_dimensions(module, key, value, sides)
        shape = list(value.shape)
        for dimension, kept in dimensions:
            shape[dimension] = len(kept)
        if list(small.shape) != shape:
            raise ValueError(f"{name}.{key} has shape {list(small.shape)}; cut to what stays it has {shape}")
        for dimension, kept in dimensions:
            shape[dimension] = value.shape[dimension]
            filled = small.new_full(shape, 1.0 if key == "running_var" else 0.0)
            small = filled.index_copy_(dimension, kept.to(small.device), small)
        wide[key] = small if dimensions else small.clone()
    return wide


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [(key, tensor.detach()) for key, tensor in named]


def _cut_dimensions(
    module: nn.Module, key: str, value: Tensor, sides: Mapping[str, Tensor]
) -> list[tuple[int, Tensor]]:
    """Dimensions of one of the module's tensors that ``sides`` cut, with the entries that stay."""
    dimensions: list[tuple[int, Tensor]] = []
    for dimension in range(value.ndim):
        kept: Tensor | None = sides.get(side_of(module, key, dimension))
        if kept is not None and dimension == 1 and isinstance(module, CONVOLUTIONS):
            kept = _local_inputs(module, kept)
        if kept is not None:
            dimensions.append((dimension, kept))
    return dimensions


def _local_inputs(module: _ConvNd, into: Tensor) -> Tensor | None:
    """Entries of the weight's input dimension that stay; every group of a convolution loses the same ones."""
    if module.groups == 1:
        return into
    size = module.in_channels // module.groups
    return None if size == 1 else into[into < size]


def set_sizes(module: nn.Module, sides: Mapping[str, Tensor]) -> None:
    """Makes the module's attributes agree with its cut tensors; ``sides`` index the uncut module."""
    out = sides["out"].numel() if "out" in sides else None
    into = sides["in"].numel() if "in" in sides else None
    if isinstance(module, _ConvNd):
        depthwise = 1 < module.groups == module.in_channels == module.out_channels
        if depthwise and out is not None:
            module.groups = module.in_channels = out
        if into is not None:
            module.in_channels = into
        if out is not None:
            module.out_channels = out
    elif isinstance(module, nn.Linear):
        module.in_features = module.in_features if into is None else into
        module.out_features = module.out_features if out is None else out
    elif isinstance(module, _BatchNorm | _InstanceNorm) and out is not None:
        module.num_features = out
    elif isinstance(module, nn.GroupNorm) and out is not None:
        groups = module.num_groups * out // module.num_channels  # whole ones are cut; one alone stays
        module.num_groups, module.num_channels = max(1, groups), out
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and out is not None:
        module.normalized_shape = (out,)
    elif isinstance(module, nn.PReLU) and out is not None:
        module.num_parameters = out
    for side, kept in sides.items():
        if side.startswith("."):
            setattr(module, side[1:], len(kept))


def silence_inputs(module: nn.Module, gone: Tensor) -> None:
    """Zeroes the weights that read the inputs ``gone``, in place: what these channels hold is ignored."""
    assert isinstance(module, LAYERS)
    with torch.no_grad():
        if isinstance(module, TRANSPOSED):
            module.weight[gone] = 0
            return
        if isinstance(module, nn.Linear) or module.groups == 1:
            module.weight[:, gone] = 0
            return
        size = module.in_channels // module.groups
        per_group = module.weight.view(module.groups, -1, *module.weight.shape[1:])
        for channel in gone.tolist():
            per_group[channel // size, :, channel % size] = 0
