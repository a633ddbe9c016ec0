"""What comes after what: batch norms behind layers, and the other operand of residual additions.

Read from a symbolic trace (torch.fx). Of a network that cannot be traced, batch norms are not folded for scoring,
and repair does not know its shortcuts.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from amc_env.graph.copying import module_copy
from amc_env.graph.hooks import watch, watch_before
from amc_env.graph.surgery import CONVOLUTIONS, LAYERS
from amc_env.inputs import Inputs, call, tensors_of

_ADDS = (operator.add, operator.iadd, torch.add)


class _Tracer(fx.Tracer):
    """Leaves every layer whole, also subclasses that live outside torch.nn.

    Args:
        example: Inputs of the network; arguments that they leave out keep their defaults, as constants. None: all
            arguments are inputs.
    """

    def __init__(self, example: Inputs | None = None, numbers: Iterable[tuple[str, str]] = ()):
        super().__init__()
        self._example = example
        self._numbers = numbers

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        function, found = super().create_args_for_root(root_fn, is_module, concrete_args)
        for module, name in self._numbers:
            read = self.create_proxy("get_attr", f"{module}.{name}".lstrip("."), (), {})
            setattr(self.root.get_submodule(module), name, read)
        if self._example is None:
            return function, found
        named = self._example if isinstance(self._example, dict) else {}
        given = 0 if named else len(tensors_of(self._example))
        for place, argument in enumerate(found[1:], start=1):  # after the network itself
            node = argument.node
            if place > given and node.target not in named and node.args:
                found[place] = node.args[0]
                self.graph.erase_node(node)
        return function, found

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, (*LAYERS, nn.BatchNorm1d, nn.BatchNorm2d))
        return known or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True, eq=False)
class Topology:
    """What a symbolic trace tells of a network.

    Attributes:
        graph: The traced operations; None where tracing failed.
        reason: Why tracing failed, else empty.
        norm_after: Layer name to the batch norm that alone reads its output.
        partner: Layer name to the operation whose result is added to its (normalised) output: the shortcut.
    """

    graph: fx.Graph | None
    reason: str = ""
    norm_after: dict[str, str] = field(default_factory=dict)
    partner: dict[str, fx.Node] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, example: Inputs | None = None, numbers: Iterable[tuple[str, str]] = ()
    ) -> Topology:
        """Trace a copy of ``model`` in eval mode: a trace that fails may leave proxies in its attributes.

        Tensors that the forward pass creates become attributes of ``model``, so that the graph runs on it.

        Args:
            model: The network.
            example: A batch of its inputs. Arguments that it leaves out keep their defaults in the trace.
            numbers: Modules and attributes, like ``num_heads``, that the graph reads when it runs: they change when
                channels are cut.
        """
        copied = module_copy(model).eval()
        try:
            graph = _Tracer(example, numbers).trace(copied)
        except Exception as error:  # symbolic tracing fails in many ways; the caller says what that costs
            return cls(None, f"torch.fx cannot trace it ({type(error).__name__}: {error})".splitlines()[0])
        modules = dict(model.named_modules())
        calls: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            name = str(node.target)
            if node.op == "call_module":
                calls.setdefault(name, []).append(node)
            elif node.op == "get_attr" and "." not in name and not hasattr(model, name):
                setattr(model, name, getattr(copied, name))
        norm_after: dict[str, str] = {}
        partner: dict[str, fx.Node] = {}
        for name, nodes in calls.items():
            if len(nodes) != 1 or not isinstance(modules[name], (*CONVOLUTIONS, nn.Linear)):
                continue
            last, norm = nodes[0], _norm(nodes[0], modules, calls)
            if norm is not None:
                norm_after[name] = str(norm.target)
                last = norm
            other = added(last)
            # Two layers that are added to each other (a projection shortcut): the first in forward order is
            # repaired.
            if other is not None and nodes[0] not in _ancestors(other, partner):
                partner[name] = other
        return cls(graph, "", norm_after, partner)

    def order(self) -> list[fx.Node]:
        """The operations in an order where a layer runs after the shortcut that is added to its output."""
        assert self.graph is not None
        done: dict[fx.Node, None] = {}
        stack = [(node, False) for node in reversed(list(self.graph.nodes))]
        while stack:
            node, ready = stack.pop()
            if node in done:
                continue
            if ready:
                done[node] = None
                continue
            stack.append((node, True))
            stack.extend((need, False) for need in reversed(_needs(node, self.partner)) if need not in done)
        return list(done)


UNTRACED = Topology(None, "it has not been traced")


def _needs(node: fx.Node, partner: dict[str, fx.Node]) -> list[fx.Node]:
    """What must have run before an operation: its inputs and, for a layer, its shortcut."""
    shortcut = partner.get(str(node.target)) if node.op == "call_module" else None
    return [*node.all_input_nodes, *([] if shortcut is None else [shortcut])]


def _norm(node: fx.Node, modules: dict[str, nn.Module], calls: dict[str, list[fx.Node]]) -> fx.Node | None:
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    module = modules[str(users[0].target)]
    tracked = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None
    return users[0] if tracked and len(calls[str(users[0].target)]) == 1 else None


def added(node: fx.Node) -> fx.Node | None:
    """What alone is done with an operation's result is an addition: its other operand; None where it is not so."""
    users = list(node.users)
    if len(users) != 1:
        return None
    add = users[0]
    is_add = (add.op == "call_function" and add.target in _ADDS) or (
        add.op == "call_method" and add.target in ("add", "add_")
    )
    others = [arg for arg in add.args if isinstance(arg, fx.Node) and arg is not node]
    return others[0] if is_add and not add.kwargs and len(add.args) == 2 and len(others) == 1 else None


def _ancestors(node: fx.Node, partner: dict[str, fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(_needs(node, partner))
    return found


def placed(graph: fx.Graph, inputs: Inputs) -> dict[str, Any]:
    """What a batch of inputs gives the placeholders of a traced network, by the placeholders' targets.

    Raises:
        KeyError: A placeholder without a default is given nothing.
    """
    named = dict(inputs) if isinstance(inputs, dict) else {}
    rest = [] if isinstance(inputs, dict) else list(tensors_of(inputs))
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name.startswith("**"):
            found[name], named = named, {}
        elif name.startswith("*"):
            found[name], rest = tuple(rest), []
        elif rest:
            found[name] = rest.pop(0)
        else:
            found[name] = named.pop(name, *node.args)
    return found


def values_of(
    model: nn.Module,
    graph: fx.Graph,
    example: Inputs,
    after: Callable[[fx.Node, Any], None] | None = None,
) -> dict[fx.Node, Any]:
    """Run a traced network without gradients and return what every operation gives.

    All values are kept until the end, so no storage is used twice.

    Args:
        model: The network, or one with the same modules, cut or not.
        graph: Its traced operations.
        example: A batch of inputs.
        after: Called with every operation and its value as soon as it has run.
    """
    interpreter = _Interpreter(model, graph, example, after)
    with torch.no_grad():  # not inference mode: its tensors have no versions
        interpreter.run()
    return interpreter.env


class _Interpreter(fx.Interpreter):
    """Keeps all values and reports each operation that has run."""

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        inputs: Inputs,
        after: Callable[[fx.Node, Any], None] | None = None,
    ):
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self._given = placed(graph, inputs)
        self._after = after

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._given[target]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self._after is not None:
            self._after(n, value)
        return value


Batches = list[Tensor]


Before = Callable[[str, nn.Module, Batches, Batches | None], None]
"""Called before a layer runs: (name, module, its inputs, the shortcuts added to its outputs or None)."""


After = Callable[[str, Batches], None]
"""Called after a layer has run: (name, its outputs)."""


class Run:
    """Executes a network so that layers can be changed as their turn comes, on all inputs that reach them.

    A traced network is executed operation by operation. Every operation is run for all batches before the next one is:
    a layer sees all of its inputs at once, in pieces small enough for the processor's caches. A batch's inputs are let
    go of as soon as its outputs are there. A network without a graph is run on a single batch, and shortcuts are not
    known.

    Args:
        model: The network, or a skeleton of it, that the topology was taken from.
        topology: Its topology.
    """

    def __init__(self, model: nn.Module, topology: Topology):
        self._model = model
        self._topology = topology
        self._order = topology.order() if topology.graph is not None else []
        last = {need: node for node in self._order for need in _needs(node, topology.partner)}
        self._over: dict[fx.Node, list[fx.Node]] = {node: [] for node in self._order}
        for need, node in last.items():
            self._over[node].append(need)

    def __call__(self, inputs: Sequence[Inputs], before: Before, after: After | None = None) -> list[Any]:
        """The network's outputs on batches of inputs; a network without a graph takes one batch.

        Without ``after``, batch norms are folded into the convolutions before them: that spares a pass over the
        activations, and moves outputs by rounding only.
        """
        if self._topology.graph is None:
            (batch,) = inputs
            return [self._hooked(batch, before, after)]
        lanes = [self._lane(batch) for batch in inputs]
        norms = self._foldable() if after is None else {}
        outputs: list[Any] = []
        for node in self._order:
            layer = self._layer(node)
            if layer is not None:
                before(str(node.target), layer, *self._read(node, lanes))
            operation = self._operation(node, norms)
            outputs = []
            for lane in lanes:
                lane.env[node] = operation(lane)
                outputs.append(lane.env[node])
                for need in self._over[node]:
                    lane.env.pop(need, None)
            if layer is not None and after is not None:
                after(str(node.target), outputs)
        return outputs

    def _hooked(self, batch: Inputs, before: Before, after: After | None) -> Any:
        """The outputs of a network that is not traced: hooks report its layers."""
        with ExitStack() as hooks:
            for name, layer in self._model.named_modules():
                if isinstance(layer, LAYERS):
                    hooks.callback(watch_before(layer, partial(_reached, before, name, layer)).remove)
                    if after is not None:
                        hooks.callback(watch(layer, partial(_ended, after, name)).remove)
            return call(self._model, batch)

    def _foldable(self) -> dict[str, str]:
        """The batch norms that can be folded: convolution to batch norm."""
        norms = self._topology.norm_after
        return {name: norms[name] for name in norms if type(self._model.get_submodule(name)) in CONVOLUTIONS}

    def _operation(self, node: fx.Node, norms: dict[str, str]) -> Callable[[fx.Interpreter], Any]:
        """What is run for an operation, with the weights that the layers have now."""
        name = str(node.target) if node.op == "call_module" else ""
        if name in norms:
            layer = _normalised(self._model.get_submodule(name), self._model.get_submodule(norms[name]))
            return lambda lane: layer(lane.env[node.all_input_nodes[0]])
        if name in norms.values():
            return lambda lane: lane.env[node.all_input_nodes[0]]
        return lambda lane: lane.run_node(node)

    def _lane(self, batch: Inputs) -> fx.Interpreter:
        assert self._topology.graph is not None
        return _Interpreter(self._model, self._topology.graph, batch)

    def _layer(self, node: fx.Node) -> nn.Module | None:
        module = self._model.get_submodule(str(node.target)) if node.op == "call_module" else None
        return module if isinstance(module, LAYERS) else None

    def _read(self, node: fx.Node, lanes: list[fx.Interpreter]) -> tuple[Batches, Batches | None]:
        """A layer's inputs and shortcuts."""
        partner = self._topology.partner.get(str(node.target))
        shortcuts = None if partner is None else [lane.env[partner] for lane in lanes]
        return [lane.env[node.all_input_nodes[0]] for lane in lanes], shortcuts


def _reached(before: Before, name: str, layer: nn.Module, x: Tensor) -> None:
    before(name, layer, [x], None)


def _ended(after: After, name: str, _: Tensor, y: Tensor) -> None:
    after(name, [y])


def scale_of(norm: nn.Module) -> Tensor:
    """What a batch norm multiplies its channels by in eval mode, [C]."""
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight


def folded(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias with which a layer gives what the batch norm after it gives in eval mode."""
    assert isinstance(layer, (*CONVOLUTIONS, nn.Linear))
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_mean is not None
    scale = scale_of(norm)
    shift = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias
    return layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1)), shift


def _normalised(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """A copy of a layer with the batch norm after it folded in."""
    copied = copy.copy(layer)
    weight, bias = folded(layer, norm)
    copied._parameters = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": nn.Parameter(bias, requires_grad=False),
    }
    return copied
