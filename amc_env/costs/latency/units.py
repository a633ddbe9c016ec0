"""What the latency table holds times of: a layer with the batch norm and the activation that directly follow it.

They are timed together because runtimes run them together: compilers and ONNX Runtime fuse them into the layer.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from amc_env.errors import UserError
from amc_env.graph.layers import Layer, LayerGraph

_LOG = logging.getLogger(__name__)


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__.lower(): kind
    for kind in (
        *(nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU),
        *(nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.PReLU),
    )
}


_FILL = 0.01  # what a unit computes with: times do not hang on values, and equal ones are quickly written


@dataclass(frozen=True)
class Unit:
    """A layer, its batch norm and its activation, whatever their channels: what has one grid of times.

    Attributes:
        kind: ``conv`` or ``linear``.
        kernel: Height and width of the kernel, (1, 1) for a linear layer.
        stride: Vertical and horizontal stride.
        padding: Vertical and horizontal padding, or PyTorch's word for it.
        dilation: Vertical and horizontal dilation.
        groups: Groups of the convolution; ``depthwise`` where there are as many as channels.
        bias: Whether the layer has a bias.
        in_size: Height and width of its input; (positions, 1) for a linear layer.
        norm: Whether a batch norm follows.
        activation: The activation that follows, like ``relu``; ``relu_`` where it works in place; else empty.
    """

    kind: Literal["conv", "linear"]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int | Literal["depthwise"]
    bias: bool
    in_size: tuple[int, int]
    norm: bool = False
    activation: str = ""

    @property
    def depthwise(self) -> bool:
        """Input and output channels are the same thing."""
        return self.groups == "depthwise"

    def build(self, in_channels: int, out_channels: int) -> nn.Module:
        """The unit as a network in eval mode on the CPU; random states stay as they are.

        Args:
            in_channels: Input channels; of a depthwise unit they are ``out_channels``, whatever is given.
            out_channels: Output channels.
        """
        with torch.device("meta"):
            unit = nn.Sequential(self._layer(in_channels, out_channels), *self._followers(out_channels))
        unit = unit.to_empty(device="cpu").eval()
        with torch.no_grad():
            for tensor in unit.state_dict().values():
                tensor.fill_(_FILL)
        return unit

    def example(self, batch: int, in_channels: int) -> Tensor:
        """An input of the unit: [batch, in_channels, height, width], of a linear layer [batch, (positions,) features]."""
        if self.kind == "conv":
            return torch.full((batch, in_channels, *self.in_size), _FILL)
        positions = () if self.in_size[0] == 1 else self.in_size[:1]
        return torch.full((batch, *positions, in_channels), _FILL)

    def to_json(self) -> dict[str, Any]:
        """A plain object that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, obj: Any) -> Unit:
        """Reads `to_json`'s object.

        Raises:
            UserError: Something is missing, unknown, or of another kind.
        """
        try:
            pairs: dict[str, object] = {
                name: (int(obj[name][0]), int(obj[name][1]))
                for name in ("kernel", "stride", "padding", "dilation", "in_size")
                if not isinstance(obj[name], str)
            }
            unit = cls(**{**obj, **pairs})
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{obj!r} is no unit of a latency table ({error!r})", code="wrong_table"
            ) from error
        name = unit.activation.removesuffix("_")
        if unit.kind not in ("conv", "linear") or (name and name not in _ACTIVATIONS):
            raise UserError(
                f"a unit has kind={unit.kind!r} and activation={unit.activation!r}; allowed are conv, linear and "
                f"{', '.join(_ACTIVATIONS)}, each with _ where it works in place",
                code="wrong_table",
            )
        return unit

    def _layer(self, in_channels: int, out_channels: int) -> nn.Module:
        if self.kind == "linear":
            return nn.Linear(in_channels, out_channels, bias=self.bias)
        depthwise = self.groups == "depthwise"
        return nn.Conv2d(
            out_channels if depthwise else in_channels,
            out_channels,
            self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=out_channels if self.groups == "depthwise" else self.groups,
            bias=self.bias,
        )

    def _followers(self, channels: int) -> list[nn.Module]:
        found: list[nn.Module] = []
        if self.norm:
            found.append(nn.BatchNorm2d(channels) if self.kind == "conv" else nn.BatchNorm1d(channels))
        if self.activation:
            kind = _ACTIVATIONS[self.activation.removesuffix("_")]
            if kind is nn.PReLU:
                found.append(nn.PReLU(channels))
            else:
                found.append(kind(inplace=True) if self.activation.endswith("_") else kind())
        return found


def units_of(model: nn.Module, graph: LayerGraph) -> dict[str, Unit]:
    """The unit of every layer that is run, costless ones too, by the layer's name and in forward order.

    A network that cannot be traced symbolically has layers alone as its units, which is logged. A layer that is
    called several times is timed at the size of its first call.
    """
    if graph.topology.graph is None:
        _LOG.warning("latency: layers are timed without what follows them: %s", graph.topology.reason)
    chains = chains_of(model, graph)
    return {layer.name: _unit(model, layer, chains.get(layer.name, ())) for layer in graph.layers}


def chains_of(model: nn.Module, graph: LayerGraph) -> dict[str, tuple[fx.Node, ...]]:
    """The operations of every layer's unit in the trace: the layer, its batch norm, its activation.

    Layers that the trace does not hold, or holds more than once, are left out: they are units alone.
    """
    topology = graph.topology
    nodes: dict[str, list[fx.Node]] = {}
    for node in topology.graph.nodes if topology.graph is not None else ():
        if node.op == "call_module":
            nodes.setdefault(str(node.target), []).append(node)
    chains: dict[str, tuple[fx.Node, ...]] = {}
    for layer in graph.layers:
        if len(nodes.get(layer.name, ())) != 1:
            continue
        chain = [nodes[layer.name][0]]
        if layer.name in topology.norm_after and (layer.kind == "conv" or layer.positions == 1):
            chain.append(nodes[topology.norm_after[layer.name]][0])
        users = list(chain[-1].users)
        if len(users) == 1 and activation_of(users[0], model):
            chain.append(users[0])
        chains[layer.name] = tuple(chain)
    return chains


def inside_units(model: nn.Module, graph: LayerGraph) -> frozenset[str]:
    """Names of the trace's operations that units hold: every call of a layer, and what is timed with one."""
    topology = graph.topology
    layers = {layer.name for layer in graph.layers}
    calls = (n for n in (topology.graph.nodes if topology.graph is not None else ()) if n.op == "call_module")
    followers = (node for chain in chains_of(model, graph).values() for node in chain[1:])
    return frozenset({*(n.name for n in calls if n.target in layers), *(n.name for n in followers)})


def activation_of(node: fx.Node, model: nn.Module) -> str:
    """The name of the activation that an operation is, like ``relu`` or ``relu_`` (in place); else empty."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        name, in_place = type(module).__name__.lower(), bool(getattr(module, "inplace", False))
    else:
        called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = called.endswith("_") or bool(node.kwargs.get("inplace", False))
        name = called.replace("_", "")
    return f"{name}{'_' * in_place}" if name in _ACTIVATIONS else ""


def _unit(model: nn.Module, layer: Layer, chain: tuple[fx.Node, ...]) -> Unit:
    """The unit of a layer.

    Raises:
        UserError: It is a convolution of another kind than Conv2d.
    """
    module = model.get_submodule(layer.name)
    if not isinstance(module, nn.Conv2d | nn.Linear):
        raise UserError(
            f"latency tables hold Conv2d and Linear; {layer.name} is a {type(module).__name__}: use another budget, like "
            "budget=flops",
            code="not_in_table",
            field="budget.cost",
        )
    convolution = module if isinstance(module, nn.Conv2d) else None
    names = [activation_of(node, model) for node in chain[1:]]
    return Unit(
        kind=layer.kind,
        kernel=layer.kernel,
        stride=layer.stride,
        padding=(0, 0) if convolution is None else _padding(convolution),
        dilation=(1, 1) if convolution is None else (convolution.dilation[0], convolution.dilation[1]),
        groups="depthwise" if layer.depthwise else layer.groups,
        bias=layer.bias,
        in_size=layer.in_size,
        norm="" in names,
        activation=next((name for name in names if name), ""),
    )


def _padding(convolution: nn.Conv2d) -> tuple[int, int] | str:
    padding = convolution.padding
    return padding if isinstance(padding, str) else (padding[0], padding[1])
