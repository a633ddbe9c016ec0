"""Convolutions whose weights are in the blocks that oneDNN computes with; what is behind them in the same operation.

PyTorch's convolution brings its weights into blocks for every batch. Here that is done once for a candidate, and the
addition of a shortcut and an activation are no passes of their own. The operators are those that torch.compile emits
for a processor; they are not public, so they are used only where they are there and give what the plain network gives.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from amc_env.pruning.topology import added


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


class PackedConv2d(nn.Conv2d):
    """A convolution, an addition and an activation; plain ones until the weights are packed.

    Args:
        conv: The convolution; its parameters are taken over.
        size: Height and width of its inputs.
        activation: What follows it, or the addition.
        shortcut: Whether one is added to its outputs.
    """

    def __init__(self, conv: nn.Conv2d, size: tuple[int, int], activation: Activation, shortcut: bool):
        shape = conv.in_channels, conv.out_channels, conv.kernel_size
        options: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        super().__init__(*shape, **options, groups=conv.groups, device="meta")  # type: ignore[arg-type]
        self._parameters = dict(conv._parameters)
        self._size = size
        self._activation = activation
        self._shortcut = shortcut
        self._packed: Tensor | None = None

    def pack(self, images: int) -> None:
        """Brings the weights into blocks for batches of so many images; others give the same, slower."""
        if self._pointwise:
            rows = images * self._size[0] * self._size[1]
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.flatten(1), rows)
        else:
            shape = [images, self.weight.shape[1] * self.groups, *self._size]
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self._how, shape)

    def unpack(self) -> None:
        """Makes it plain again."""
        self._packed = None

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Outputs [N, out, H, W] for inputs [N, in, H, W], the shortcut [N, out, H, W] added, activated."""
        if self._packed is None:
            return self._plain(x, shortcut)
        fused = FUSED[self._activation]
        result: Tensor
        if self._pointwise:
            rows = torch.ops.mkldnn._linear_pointwise(x.permute(0, 2, 3, 1), self._packed, self.bias, *fused)
            result = rows.permute(0, 3, 1, 2)
        elif shortcut is None:
            result = torch.ops.mkldnn._convolution_pointwise(x, self._packed, self.bias, *self._how, *fused)
        else:
            name = None if self._activation is identity else fused[0]
            result = torch.ops.mkldnn._convolution_pointwise.binary(
                x, shortcut, self._packed, self.bias, *self._how, "add", 1.0, name, [], None
            )
        return result

    def _plain(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        outputs = super().forward(x)
        return self._activation(outputs if shortcut is None else outputs + shortcut)

    @property
    def _pointwise(self) -> bool:
        """Whether it is a product of the channels at every position: oneDNN does that faster as a linear layer."""
        whole = self.kernel_size == self.stride == (1, 1) and self.groups == 1
        return whole and not any(int(side) for side in self.padding) and not self._shortcut

    @property
    def _how(self) -> tuple[list[int], list[int], list[int], int]:
        padding = [int(side) for side in self.padding]
        return padding, list(self.stride), list(self.dilation), self.groups


def pack(network: nn.Module, images: int) -> None:
    """Packs the convolutions of a network as their weights are now, for batches of so many images.

    All stay plain where a parameter or buffer is not finite: oneDNN's activations make numbers of NaN, which would hide
    it. They hide NaN as well that comes up on the way, where finite values overflow.
    """
    convolutions = [module for module in network.modules() if isinstance(module, PackedConv2d)]
    if not convolutions:  # on a graphics processor every look at a value is waited for
        return
    whole = finite(network)
    for module in convolutions:
        module.pack(images) if whole else module.unpack()


def finite(network: nn.Module) -> bool:
    """Whether all parameters and buffers are finite numbers."""
    return all(bool(tensor.isfinite().all()) for tensor in (*network.parameters(), *network.buffers()))


def packed(
    network: fx.GraphModule, example: Tensor, kind: Callable[..., PackedConv2d] = PackedConv2d
) -> fx.GraphModule:
    """A network that gives the same by packed convolutions, once they are packed.

    Args:
        network: A traced network on a processor, its activations in `torch.nn.functional`.
        example: A few of its inputs.
        kind: What makes packed convolutions.
    """
    twin = copy.deepcopy(network)
    modules, shapes = dict(twin.named_modules()), _shapes(twin, example)
    calls = Counter(str(node.target) for node in twin.graph.nodes if node.op == "call_module")
    for node in list(twin.graph.nodes):
        name = str(node.target)
        if node.op == "call_module" and calls[name] == len(node.args) == 1 and _packable(modules[name]):
            height, width = shapes[node.all_input_nodes[0]][2:]
            node = _with_addition(node, shapes)
            shortcut = len(node.args) == 2
            activation = _absorbed(node, shortcut)
            twin.set_submodule(name, kind(modules[name], (height, width), activation, shortcut))
    twin.graph.lint()
    twin.recompile()
    return twin


def _packable(module: nn.Module) -> bool:
    """Whether it is a plain convolution: a subclass may compute something else."""
    plain = type(module) is nn.Conv2d and module.padding_mode == "zeros"
    return plain and not isinstance(module.padding, str)


def _shapes(network: fx.GraphModule, example: Tensor) -> dict[fx.Node, torch.Size]:
    """Shapes of the tensors that operations give."""
    lane = fx.Interpreter(network, garbage_collect_values=False)
    with torch.no_grad():
        lane.run(example)
    return {node: value.shape for node, value in lane.env.items() if isinstance(value, Tensor)}


def _with_addition(node: fx.Node, shapes: dict[fx.Node, torch.Size]) -> fx.Node:
    """The convolution that takes the shortcut to be added as a second argument, if there is one, else as it was."""
    shortcut = added(node)
    if shortcut is None or shapes.get(shortcut) != shapes[node]:
        return node
    addition = next(iter(node.users))
    if addition.target in _IN_PLACE and addition.args[0] is not node:  # others may read what it overwrites
        return node
    with node.graph.inserting_before(addition):
        whole = node.graph.call_module(str(node.target), (node.args[0], shortcut))
    shapes[whole] = shapes[node]
    addition.replace_all_uses_with(whole)
    node.graph.erase_node(addition)
    node.graph.erase_node(node)
    return whole


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
