"""Convolutions in eight bits, for scoring only: several times as fast as float32 where a processor multiplies in them.

Weights have a scale per output channel, values between convolutions one scale per tensor (Jacob et al., 2018, section
2). The scales cover the range that a candidate gives for a few images; values beyond it are clamped. Everything but
convolutions, and what is in the same operation with them, is computed in floats.

The operators are those that torch.compile emits for quantized networks on a processor; they are not public.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from amc_env.errors import UserError, first_line
from amc_env.evaluation.folding import Folder
from amc_env.evaluation.precision import FLOAT32, INT8
from amc_env.graph.topology import Topology, added, values_of
from amc_env.inputs import Inputs, call, count, in_format, output_of, take

_BYTES, _WEIGHTS = 255, 127  # levels in the range of a value, and of a weight on either side of zero


_CHANNELS = 32  # whose products of largest bytes and weights are to be summed exactly


_ALIGNED = 8  # channels


_SMALLEST = 1e-30  # range of a tensor of zeros


_IMAGES = 16  # that the ranges of a candidate's activations are measured on


def identity(x: Tensor) -> Tensor:
    """No activation."""
    return x


Activation = Callable[[Tensor], Tensor]


FUSED: dict[Any, tuple[str, list[float], str]] = {
    identity: ("none", [], ""),
    functional.relu: ("relu", [], ""),
    functional.relu6: ("hardtanh", [0.0, 6.0], ""),
}
"""What oneDNN calls activations: name, scalars and algorithm."""


_BEHIND_ADDITIONS = (functional.relu,)


_IN_PLACE = (operator.iadd, "add_")


class Int8Folder(Folder):
    """`Folder`, with convolutions computed in eight bits.

    Args:
        model: The unpruned network, in eval mode.
        topology: Its topology.
        inputs: What will be scored; ranges of activations are measured on some of them.
        read: What counts of the network's outputs.
        channels_last: Must be true.
        batch_size: Examples of the batches that the network will be given.

    Raises:
        UserError: The network or this processor cannot do that.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        inputs: Inputs,
        *,
        read: Callable[[Any], Any] = output_of,
        channels_last: bool,
        batch_size: int,
    ):
        super().__init__(model, topology, take(inputs, slice(4)), read=read, channels_last=channels_last)
        self._batch_size = batch_size
        # evenly spaced: a user's examples may be sorted by label
        spread = take(inputs, slice(None, None, -(-count(inputs) // _IMAGES)))
        self._inputs = in_format(spread, self._format)
        reason = self.reason or obstacle()
        if not reason and not channels_last:
            reason = "images are not in channels-last memory format, see evaluator.channels_last"
        if not reason:
            reason = self._quantize(take(self._inputs, slice(4)))
        if reason:
            raise UserError(
                f"evaluator.precision={INT8} does not work here ({reason}); use {FLOAT32}",
                code="unsupported",
                field="evaluator.precision",
            )

    def _quantize(self, example: Inputs) -> str:
        """Replace the convolutions; the reason why that cannot be done, else an empty string."""
        assert self._folded is not None
        if overwrites(self._folded, example):
            return "the network overwrites values that it reads again"
        self._folded = quantized(self._folded, example)
        if not any(isinstance(module, QuantizedConv2d) for module in self._folded.modules()):
            return "the network has no convolution of the plain kind"
        return ""

    def __call__(self, model: nn.Module) -> nn.Module:
        """The network to score in place of ``model``; valid until the next call."""
        network = self._refresh(model)
        calibrate(network, self._inputs, self._batch_size)
        return network


class Scales:
    """What the bytes of a tensor stand for: ``size * (byte - zero)``; nothing where ``known`` is false."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """They stand for nothing."""
        self.known = False
        self.size, self.zero = 1.0, 0
        self.wanted = False
        self._low = self._high = 0.0

    def note(self, value: Tensor) -> None:
        """Where a scale is wanted: takes the range of a float tensor, [N, C, H, W], and zero."""
        if self.wanted:
            in_memory = value.permute(0, 2, 3, 1).flatten()  # several times as fast in this order
            self._low, self._high = (float(end) for end in torch.aminmax(in_memory))

    def calibrate(self) -> bool:
        """Take the scale from the range; returns whether that is finite."""
        self.known, self.wanted = math.isfinite(self._low) and math.isfinite(self._high), False
        if self.known:
            low, high = min(self._low, 0.0), max(self._high, 0.0)
            self.size = max(high - low, _SMALLEST) / _BYTES
            self.zero = round(-low / self.size)
        return self.known

    def buffer(self) -> Tensor:
        """Both numbers: they tell candidates apart. Zeros where nothing is known."""
        return torch.tensor([self.size, self.zero], dtype=torch.float64) * self.known


class Quantize(nn.Module):
    """Floats to bytes; nothing is done while their scale is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.gives = Scales()
        self.register_buffer("scales", self.gives.buffer())

    def forward(self, x: Tensor) -> Tensor:
        """Bytes in the shape of ``x``."""
        if not self.gives.known:
            self.gives.note(x)
            return x
        scaled = (x * (1 / self.gives.size)).add_(self.gives.zero + 0.5)  # to bytes rounds down
        return scaled.clamp_(0, _BYTES).to(torch.uint8)


class Dequantize(nn.Module):
    """Bytes to floats; floats pass.

    Args:
        reads: The scale of the bytes.
    """

    def __init__(self, reads: Scales):
        super().__init__()
        self._reads = reads

    def forward(self, x: Tensor) -> Tensor:
        """Floats in the shape of ``x``."""
        if x.is_floating_point():
            return x
        return x.float().sub_(self._reads.zero).mul_(self._reads.size)


class QuantizedConv2d(nn.Conv2d):
    """A convolution, an addition and an activation in eight bits; in floats until it is packed.

    Args:
        conv: The convolution; its parameters are shared.
        size: Height and width of its inputs.
        activation: Applied to the outputs, after the addition.
        shortcut: Whether a second input is added to the outputs.

    Attributes:
        reads: Scale and zero of the inputs.
        adds: Scale and zero of the shortcut.
        gives: Scale and zero of the outputs; None where they are floats.
        depthwise: Whether every channel is convolved by itself.
        pads: Whether outputs get further channels, of zeros, up to a multiple of `_ALIGNED`: oneDNN is faster so.
        padded: Whether inputs have them.
    """

    reads: Scales
    adds: Scales | None = None
    gives: Scales | None = None
    pads = padded = False
    _options: tuple[Any, ...]

    def __init__(self, conv: nn.Conv2d, size: tuple[int, int], activation: Activation, shortcut: bool):
        shape = conv.in_channels, conv.out_channels, conv.kernel_size
        options: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        super().__init__(*shape, **options, groups=conv.groups, device="meta")  # type: ignore[arg-type]
        self._parameters = dict(conv._parameters)
        self._size, self._activation, self._shortcut = size, activation, shortcut
        self._packed: Tensor | None = None
        self.depthwise = 1 < self.groups == self.in_channels == self.out_channels
        self.register_buffer("scales", None)

    def unpack(self) -> None:
        """Compute in floats again."""
        self._packed = None

    def pack(self, images: int) -> None:
        """Rounds the weights and brings them into blocks; all scales are known."""
        scales = self.weight.abs().amax((1, 2, 3)).clamp_min(_SMALLEST) / _WEIGHTS
        weight = (self.weight / scales.view(-1, 1, 1, 1)).round_().to(torch.int8)
        inputs = -weight.shape[1] % _ALIGNED if self.padded and not self.depthwise else 0
        outputs = -len(weight) % _ALIGNED if self.pads else 0
        weight = functional.pad(weight, (0, 0, 0, 0, 0, inputs, 0, outputs))
        scales = functional.pad(scales, (0, outputs), value=1.0)
        bias = None if self.bias is None else functional.pad(self.bias, (0, outputs))
        padding, stride, dilation, groups = self._how
        self._scales = scales, torch.zeros(len(weight), dtype=torch.int32)
        if self._pointwise:
            shape = [images * math.prod(self._size), weight.shape[1]]
            self._packed = torch.ops.onednn.qlinear_prepack(weight.flatten(1), shape)
            self._options = (bias,)
            return
        how = stride, padding, dilation, len(weight) if self.depthwise else groups
        shape = [images, weight.shape[1] * how[-1], *self._size]
        weight = weight.contiguous(memory_format=torch.channels_last)
        self._packed = torch.ops.onednn.qconv_prepack(
            weight, scales, self.reads.size, self.reads.zero, *how, shape
        )
        self._options = bias, *how

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Outputs [N, out, H, W] for inputs [N, in, H, W], the shortcut [N, out, H, W] added, activated."""
        if self._packed is None:
            outputs = self._in_floats(x, shortcut)
            if self.gives is not None:
                self.gives.note(outputs)
            return outputs
        inputs, weight = (x, self.reads.size, self.reads.zero), (self._packed, *self._scales)
        to: tuple[float, int, torch.dtype] = 1.0, 0, torch.float32
        if self.gives is not None:
            to = self.gives.size, self.gives.zero, torch.uint8
        fused = FUSED[self._activation]
        result: Tensor
        if self._pointwise:
            pixels = x.permute(0, 2, 3, 1), self.reads.size, self.reads.zero
            result = torch.ops.onednn.qlinear_pointwise(*pixels, *weight, *self._options, *to, *fused)
            return result.permute(0, 3, 1, 2)
        if self.adds is None:
            result = torch.ops.onednn.qconv2d_pointwise(*inputs, *weight, *self._options, *to, *fused)
            return result
        assert shortcut is not None
        sums = self.adds.size, self.adds.zero, "sum", 1.0
        own = shortcut.clone(memory_format=torch.channels_last)  # it is overwritten
        result = torch.ops.onednn.qconv2d_pointwise.binary(
            *inputs, *weight, own, *self._options, *to, *sums, *fused
        )
        return result

    def _in_floats(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        outputs = super().forward(x)
        return self._activation(outputs if shortcut is None else outputs + shortcut)

    @property
    def _pointwise(self) -> bool:
        """Whether it is a product of the channels at every position: oneDNN does that faster as a linear layer."""
        unstrided = self.kernel_size == self.stride == (1, 1) and self.groups == 1
        return unstrided and not any(int(side) for side in self.padding) and not self._shortcut

    @property
    def _how(self) -> tuple[list[int], list[int], list[int], int]:
        padding = [int(side) for side in self.padding]
        return padding, list(self.stride), list(self.dilation), self.groups


def quantized(network: fx.GraphModule, example: Inputs) -> fx.GraphModule:
    """A network whose convolutions are computed in eight bits, once `calibrate` has been called.

    Args:
        network: A traced network on a processor, its activations in `torch.nn.functional`.
        example: A few of its inputs.
    """
    result = copy.deepcopy(network)
    layers = _replaced(result, example)
    _give_bytes(result, layers)
    _pad(layers)
    _give_floats(result, layers)
    result.graph.lint()
    result.recompile()
    return result


def _replaced(network: fx.GraphModule, example: Inputs) -> dict[fx.Node, QuantizedConv2d]:
    """Replace plain convolutions, in place, and absorb additions and activations behind them."""
    modules, shapes = dict(network.named_modules()), _shapes(network, example)
    calls = Counter(str(node.target) for node in network.graph.nodes if node.op == "call_module")
    layers: dict[fx.Node, QuantizedConv2d] = {}
    for node in list(network.graph.nodes):
        name = str(node.target)
        if node.op == "call_module" and calls[name] == len(node.args) == 1 and _plain(modules[name]):
            height, width = shapes[node.all_input_nodes[0]][2:]
            node = _with_addition(node, shapes)
            shortcut = len(node.args) == 2
            activation = _absorbed(node, shortcut)
            layers[node] = QuantizedConv2d(modules[name], (height, width), activation, shortcut)
            network.set_submodule(name, layers[node])
    return {node: layers[node] for node in network.graph.nodes if node in layers}


def obstacle() -> str:
    """Why this processor, or this PyTorch, cannot do that, or nothing."""
    try:
        exact = all(_exact(side) for side in (1, 2))  # as linear layers, and not
    except (AttributeError, RuntimeError) as error:  # not there, or not for this processor
        return first_line(error)
    return "" if exact else "this processor's sums of products of bytes overflow"


@torch.no_grad()
def _exact(side: int) -> bool:
    """Whether the largest bytes and weights are summed exactly by a kernel of so many pixels to a side."""
    layer: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, _CHANNELS, 1, side, bias=False)  # type: ignore[no-untyped-call]
    nn.init.ones_(layer.weight)
    images = torch.ones(1, _CHANNELS, 2, 2).contiguous(memory_format=torch.channels_last)
    network = quantized(fx.symbolic_trace(nn.Sequential(layer)), images)
    calibrate(network, images, 1)
    return bool((network(images) - _CHANNELS * side**2).abs().max() < 1)


def overwrites(network: fx.GraphModule, inputs: Inputs) -> bool:
    """Whether a value that several operations read is written to after it was made: bytes of it would be made too early."""
    writes: dict[fx.Node, int] = {}

    def note(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and len(node.users) > 1:
            writes[node] = value._version

    values = values_of(network, network.graph, inputs, note)
    return any(values[node]._version != count for node, count in writes.items())


def _give_bytes(network: fx.GraphModule, layers: Mapping[fx.Node, QuantizedConv2d]) -> None:
    """What convolutions read becomes bytes: another one gives them, or they are made."""
    made: dict[fx.Node, tuple[fx.Node, Scales]] = {}
    for node, layer in layers.items():
        read = []
        for value in node.args:
            assert isinstance(value, fx.Node)
            if value in layers:
                giver = layers[value]
                giver.gives = giver.gives or Scales()
                read.append((value, giver.gives))
            else:
                if value not in made:
                    made[value] = _quantize(network, value, node)
                read.append(made[value])
        node.args = tuple(value for value, _ in read)
        layer.reads = read[0][1]
        if len(read) > 1:
            layer.adds, layer.gives = read[1][1], layer.gives or Scales()  # sums are of bytes and give bytes


def _pad(layers: Mapping[fx.Node, QuantizedConv2d]) -> None:
    """Lets convolutions give further channels whose readers are all convolutions that can pass over them."""

    def passes_over(reader: fx.Node, value: fx.Node) -> bool:
        if reader not in layers or value in reader.args[1:]:  # a shortcut has the size of the sum
            return False
        return layers[reader].groups == 1 or (layers[reader].depthwise and reader in padding)

    def may(node: fx.Node) -> bool:
        made = layers[node].groups == 1 or (layers[node].depthwise and node.args[0] in padding)
        return made and all(passes_over(reader, node) for reader in node.users)

    padding = {node for node, layer in layers.items() if layer.adds is None and layer.gives is not None}
    while wrong := {node for node in padding if not may(node)}:
        padding -= wrong
    for node, layer in layers.items():
        layer.pads, layer.padded = node in padding, node.args[0] in padding


def _quantize(network: fx.GraphModule, value: fx.Node, reader: fx.Node) -> tuple[fx.Node, Scales]:
    module, name = Quantize(), f"_{value.name}_bytes"
    network.add_submodule(name, module)
    with network.graph.inserting_before(reader):
        return network.graph.call_module(name, (value,)), module.gives


def _give_floats(network: fx.GraphModule, layers: Mapping[fx.Node, QuantizedConv2d]) -> None:
    """What others read of convolutions that give bytes becomes floats."""
    for node, layer in layers.items():
        others = [user for user in node.users if user not in layers]
        if layer.gives is None or not others:
            continue
        name = f"_{node.name}_floats"
        network.add_submodule(name, Dequantize(layer.gives))
        with network.graph.inserting_after(node):
            floats = network.graph.call_module(name, (node,))
        for user in others:
            user.replace_input_with(node, floats)


@torch.no_grad()
def calibrate(network: nn.Module, inputs: Inputs, batch: int) -> None:
    """Find the scales for a network's present weights, and round these; if one is not finite all stays in floats.

    Args:
        network: What `quantized` gave.
        inputs: A few of its inputs.
        batch: How many examples it will be given at a time.
    """
    layers = [module for module in network.modules() if isinstance(module, QuantizedConv2d)]
    givers = [module for module in network.modules() if isinstance(module, Quantize | QuantizedConv2d)]
    found = [giver.gives for giver in givers if giver.gives is not None]
    for layer in layers:
        layer.unpack()
    for scales in found:
        scales.forget()
        scales.wanted = True
    call(network, inputs)
    if finite(network) and all(scales.calibrate() for scales in found):
        for layer in layers:
            layer.pack(batch)
    else:
        for scales in found:
            scales.forget()
    for giver in givers:
        if giver.gives is not None:
            giver.register_buffer("scales", giver.gives.buffer())


def _plain(module: nn.Module) -> bool:
    """Whether it is a plain convolution: a subclass may compute something else."""
    plain = type(module) is nn.Conv2d and module.padding_mode == "zeros"
    return plain and not isinstance(module.padding, str)


def _shapes(network: fx.GraphModule, example: Inputs) -> dict[fx.Node, torch.Size]:
    """Shapes of the tensors that operations give."""
    values = values_of(network, network.graph, example)
    return {node: value.shape for node, value in values.items() if isinstance(value, Tensor)}


def _with_addition(node: fx.Node, shapes: dict[fx.Node, torch.Size]) -> fx.Node:
    """The convolution that takes the shortcut to be added as a second argument, if there is one, else as it was."""
    shortcut = added(node)
    if shortcut is None or shapes.get(shortcut) != shapes[node]:
        return node
    addition = next(iter(node.users))
    if addition.target in _IN_PLACE and addition.args[0] is not node:  # others may read what it overwrites
        return node
    with node.graph.inserting_before(addition):
        joined = node.graph.call_module(str(node.target), (node.args[0], shortcut))
    shapes[joined] = shapes[node]
    addition.replace_all_uses_with(joined)
    node.graph.erase_node(addition)
    node.graph.erase_node(node)
    return joined


def _absorbed(node: fx.Node, shortcut: bool) -> Activation:
    """The activation that alone reads a convolution's outputs, taken out of the graph."""
    users = list(node.users)
    known = _BEHIND_ADDITIONS if shortcut else FUSED
    if len(users) != 1 or users[0].target not in known:
        return identity
    users[0].replace_all_uses_with(node)
    node.graph.erase_node(users[0])
    activation: Activation = users[0].target  # type: ignore[assignment]
    return activation


def finite(network: nn.Module) -> bool:
    """Whether all parameters and buffers are finite numbers."""
    return all(bool(tensor.isfinite().all()) for tensor in (*network.parameters(), *network.buffers()))
