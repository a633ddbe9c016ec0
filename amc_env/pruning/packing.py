"""Convolutions whose weights are in the blocks that oneDNN computes with, and the activation behind in the same operation.

PyTorch's convolution brings its weights into blocks for every batch. Here that is done once for a candidate. The
operators are those that torch.compile emits for a processor; they are not public, so they are used only where they are
there and give what the plain network gives.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional


def _identity(x: Tensor) -> Tensor:
    return x


_Activation = Callable[[Tensor], Tensor]
_FUSED: dict[Any, tuple[str, list[float], str]] = {
    _identity: ("none", [], ""),
    functional.relu: ("relu", [], ""),
    functional.relu6: ("hardtanh", [0.0, 6.0], ""),
}
"""What oneDNN calls activations: name, scalars and algorithm."""


class PackedConv2d(nn.Conv2d):
    """A convolution and its activation; plain ones until their weights are packed.

    Args:
        conv: The convolution; its parameters are taken over.
        size: Height and width of its inputs.
        activation: What follows it.
    """

    def __init__(self, conv: nn.Conv2d, size: tuple[int, int], activation: _Activation):
        shape = conv.in_channels, conv.out_channels, conv.kernel_size
        options: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        super().__init__(*shape, **options, groups=conv.groups, device="meta")  # type: ignore[arg-type]
        self._parameters = dict(conv._parameters)
        self._size = size
        self._activation = activation
        self._packed: Tensor | None = None

    def pack(self, images: int) -> None:
        """Brings the weights into blocks for batches of so many images; others give the same, slower."""
        size = [images, self.weight.shape[1] * self.groups, *self._size]
        self._packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self._how, size)

    def unpack(self) -> None:
        """Makes it plain again."""
        self._packed = None

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [N, out, H, W] for inputs [N, in, H, W], activated."""
        if self._packed is None:
            return self._activation(super().forward(x))
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, self.bias, *self._how, *_FUSED[self._activation]
        )
        return result

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
    finite = all(tensor.isfinite().all() for tensor in (*network.parameters(), *network.buffers()))
    for module in convolutions:
        module.pack(images) if finite else module.unpack()


def packed(network: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    """A network that gives the same by packed convolutions, once they are packed.

    Args:
        network: A traced network on a processor, its activations in `torch.nn.functional`.
        example: A few of its inputs.
    """
    twin = copy.deepcopy(network)
    modules, sizes = dict(twin.named_modules()), _sizes(twin, example)
    calls = Counter(str(node.target) for node in twin.graph.nodes if node.op == "call_module")
    for node in list(twin.graph.nodes):
        name = str(node.target)
        if node.op == "call_module" and calls[name] == 1 and _packable(modules[name]):
            size = sizes[node.all_input_nodes[0]]
            twin.set_submodule(name, PackedConv2d(modules[name], size, _absorbed(node)))
    twin.recompile()
    return twin


def _packable(module: nn.Module) -> bool:
    """Whether it is a plain convolution: a subclass may compute something else."""
    plain = type(module) is nn.Conv2d and module.padding_mode == "zeros"
    return plain and not isinstance(module.padding, str)


def _sizes(network: fx.GraphModule, example: Tensor) -> dict[fx.Node, tuple[int, int]]:
    """Height and width of what operations give, where it is images."""
    lane = fx.Interpreter(network, garbage_collect_values=False)
    with torch.no_grad():
        lane.run(example)
    values = {
        node: value for node, value in lane.env.items() if isinstance(value, Tensor) and value.ndim == 4
    }
    return {node: (value.shape[2], value.shape[3]) for node, value in values.items()}


def _absorbed(node: fx.Node) -> _Activation:
    """The activation that alone reads a convolution's outputs, taken out of the graph."""
    users = list(node.users)
    if len(users) != 1 or users[0].target not in _FUSED:
        return _identity
    users[0].replace_all_uses_with(node)
    node.graph.erase_node(users[0])
    activation: _Activation = users[0].target  # type: ignore[assignment]
    return activation
