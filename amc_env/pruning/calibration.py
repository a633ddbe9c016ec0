"""Calibration: what flows through the uncut network, as far as repair needs it.

Inputs and outputs of layers are sampled at a few random output positions of every image, at the same places
for the same seed, strides and padding respected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.graph.hooks import watch
from amc_env.graph.layers import Layer
from amc_env.graph.surgery import CONVOLUTIONS
from amc_env.inputs import Inputs, call, count, take
from amc_env.system import named_generator

_CHUNK = 250  # images of a calibration batch


class SampledPositions:
    """The output positions at which a layer is sampled.

    Args:
        layer: The layer.
        images: Number of images.
        per_image: Positions drawn from each image; every position is taken once where there are no more than
            that.
        seed: Positions are a function of this seed and the layer's name.
    """

    def __init__(self, layer: Layer, images: int, per_image: int, seed: int):
        height, width = layer.out_size
        generator = named_generator(seed, layer.name)
        if height * width <= per_image:
            flat = torch.arange(height * width).expand(images, -1)
        else:
            flat = torch.randint(height * width, (images, per_image), generator=generator)
        self._channels_last = layer.kind == "linear"
        self._flat = flat

    def outputs(self, output: Tensor, images: slice = slice(None)) -> Tensor:
        """Samples [images * positions, channels] of an output [N, C, ...] or, of a linear layer, [N, ..., C]."""
        flat = self._flat[images].to(output.device)
        if not self._channels_last:
            index = flat[:, None].expand(-1, output.shape[1], -1)
            return output.flatten(2).gather(2, index).transpose(1, 2).reshape(-1, output.shape[1])
        tokens = output.reshape(len(flat), -1, output.shape[-1])
        return tokens.gather(1, flat[..., None].expand(-1, -1, tokens.shape[-1])).flatten(0, 1)

    def inputs(self, module: nn.Module, inputs: Tensor, images: slice = slice(None)) -> Tensor:
        """Samples [images * positions, in_channels * weights of a kernel] of what the layer sees at those positions."""
        if isinstance(module, nn.Linear):
            return self.outputs(inputs, images)
        assert isinstance(module, CONVOLUTIONS)
        padded = F.pad(inputs, module._reversed_padding_repeated_twice)
        flat = self._flat[images].to(inputs.device)
        places = patches(module, padded.shape[2:], flat).flatten(1)
        channels = padded.shape[1]
        taken = padded.flatten(2).gather(2, places[:, None].expand(-1, channels, -1))
        area = math.prod(module.kernel_size)
        return taken.reshape(len(flat), channels, -1, area).transpose(1, 2).reshape(-1, channels * area)


def patches(module: nn.Module, sizes: Sequence[int], flat: Tensor) -> Tensor:
    """What a convolution reads at its output positions.

    Args:
        module: The convolution.
        sizes: Spatial sizes of its padded input.
        flat: Output positions, counted along the last dimension first, [...].

    Returns:
        Flat positions in the padded input, [..., weights of a kernel].
    """
    assert isinstance(module, CONVOLUTIONS)
    axes = list(zip(sizes, module.kernel_size, module.stride, module.dilation, strict=True))
    places = torch.zeros((*flat.shape, 1), dtype=torch.int64, device=flat.device)
    scale = 1
    for size, kernel, stride, dilation in reversed(axes):
        outputs = (size - dilation * (kernel - 1) - 1) // stride + 1
        along = (flat % outputs)[..., None] * stride + torch.arange(kernel, device=flat.device) * dilation
        places = (scale * along[..., :, None] + places[..., None, :]).flatten(-2)
        flat, scale = flat // outputs, scale * size
    return places


def repairable(module: nn.Module, layer: Layer) -> bool:
    """Whether least squares can repair a layer: run once, not depthwise or fixed, padded with zeros alone."""
    zeros = not isinstance(module, CONVOLUTIONS) or module.padding_mode == "zeros"
    plain = type(module).forward in {kind.forward for kind in (*CONVOLUTIONS, nn.Linear)}
    return plain and zeros and layer.calls == 1 and not layer.depthwise and not layer.costless


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over samples of a layer's inputs x and outputs y, float64; g groups of the convolution.

    Attributes:
        xx: Sum of x x', [g, n, n] with n = in_channels / g * kh * kw, columns of a channel side by side.
        xy: Sum of x y', [g, n, out_channels / g].
        x: Sum of x, [g, n].
        y: Sum of y, [g, out_channels / g].
        count: Number of samples.
    """

    xx: Tensor
    xy: Tensor
    x: Tensor
    y: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor, groups: int) -> Moments:
        """Moments of samples x [S, in], y [S, out]."""
        xs = x.double().reshape(len(x), groups, -1).transpose(0, 1)
        ys = y.double().reshape(len(y), groups, -1).transpose(0, 1)
        across = xs.transpose(1, 2)
        return cls(across @ xs, across @ ys, xs.sum(1), ys.sum(1), len(x))

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of samples."""
        sums = (self.xx + other.xx, self.xy + other.xy, self.x + other.x, self.y + other.y)
        return Moments(*sums, self.count + other.count)

    def centred(self) -> Moments:
        """The same about the means."""
        xx = self.xx - self.x[:, :, None] * self.x[:, None, :] / self.count
        xy = self.xy - self.x[:, :, None] * self.y[:, None, :] / self.count
        return Moments(xx, xy, self.x, self.y, self.count)


@torch.no_grad()
def record(
    model: nn.Module, layers: Sequence[Layer], inputs: Inputs, *, per_image: int, seed: int
) -> dict[str, Moments]:
    """Moments of the named layers over calibration images, in one hooked pass.

    Args:
        model: The uncut network, in eval mode.
        layers: Layers to record.
        inputs: Calibration inputs.
        per_image: Positions sampled from each.
        seed: Seed of the positions.
    """
    examples = count(inputs)
    found: dict[str, Moments] = {}
    part = slice(0, 0)
    handles = []
    for layer in layers:
        positions = SampledPositions(layer, examples, per_image, seed)

        module = model.get_submodule(layer.name)

        def add(
            x: Tensor,
            y: Tensor,
            layer: Layer = layer,
            module: nn.Module = module,
            s: SampledPositions = positions,
        ) -> None:
            moments = Moments.of(s.inputs(module, x, part), s.outputs(y, part), layer.groups)
            found[layer.name] = found[layer.name] + moments if layer.name in found else moments

        handles.append(watch(module, add))
    try:
        for start in range(0, examples, _CHUNK):
            part = slice(start, min(start + _CHUNK, examples))
            call(model, take(inputs, part))
    finally:
        for handle in handles:
            handle.remove()
    return found
