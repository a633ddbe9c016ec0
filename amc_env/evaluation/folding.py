"""Batch norms folded into the layers before them, for scoring only: what is delivered stays unfolded."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from amc_env.evaluation.precision import FLOAT32, arithmetic
from amc_env.graph.copying import module_copy
from amc_env.graph.topology import Topology, folded
from amc_env.inputs import Inputs, call, output_of, tensors_in

_TOLERANCE = 1e-3  # of the largest logit: far above rounding, far below a wrong fold


log = logging.getLogger(__name__)


class Folder:
    """Turns pruned networks into equal networks without batch norms, in a given memory format and data type.

    One folded network serves all candidates. Activations are computed in place, which saves a tenth of the time. If
    the network cannot be traced, or folding changes its outputs by more than rounding, candidates are scored
    unfolded, and `reason` says why.

    Args:
        model: The unpruned network, in eval mode.
        topology: Its topology.
        example: A few inputs, to compare outputs on.
        read: What counts of the network's outputs.
        channels_last: Whether weights are stored for inputs in channels-last memory format.
        dtype: Data type of the folded weights.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        example: Inputs,
        *,
        read: Callable[[Any], Any] = output_of,
        channels_last: bool,
        dtype: torch.dtype = torch.float32,
    ):
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self.reason = topology.reason
        self._norms = topology.norm_after
        self._dtype = torch.float32  # for the comparison
        self._folded = self._without_norms(module_copy(model).eval(), topology)
        if self._folded is not None and not _alike(
            *(tensors_in(read(_run(network, example))) for network in (self._refresh(model), model))
        ):
            self._folded, self.reason = None, "its outputs change when batch norms are folded"
        if self.reason:
            log.info("candidates are scored with their batch norms in place: %s", self.reason)
        self._dtype = dtype

    def _without_norms(self, model: nn.Module, topology: Topology) -> fx.GraphModule | None:
        if topology.graph is None:
            return None
        graph = copy.deepcopy(topology.graph)
        norms = set(self._norms.values())
        for node in list(graph.nodes):
            if node.op == "call_module" and node.target in norms:
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)
        _activate_in_place(graph, dict(model.named_modules()))
        return fx.GraphModule(model, graph)

    def __call__(self, model: nn.Module) -> nn.Module:
        """The network to score in place of ``model``; valid until the next call."""
        return self._refresh(model)

    @torch.no_grad()
    def _refresh(self, model: nn.Module) -> nn.Module:
        """Copy the tensors of ``model`` into the folded network."""
        if self._folded is None:
            if self._dtype != torch.float32:  # masks are written into the same tensors again and again
                model = module_copy(model).to(self._dtype)
            return model.to(memory_format=self._format)  # type: ignore[call-overload, no-any-return]
        source = dict(model.named_modules())
        for name, module in self._folded.named_modules():
            if name in source and name not in self._norms.values():
                self._copy(source[name], module)
        for layer, norm in self._norms.items():
            self._fold(source[layer], source[norm], self._folded.get_submodule(layer))
        return self._folded

    def _copy(self, source: nn.Module, target: nn.Module) -> None:
        for key, parameter in source._parameters.items():
            if parameter is not None:
                target._parameters[key] = self._own(parameter)
        for key, buffer in source._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                buffer = buffer.to(self._dtype)
            target._buffers[key] = buffer
        for name, value in vars(source).items():  # sizes that forward passes read, like groups and num_heads
            if type(value) is int and name in vars(target):
                setattr(target, name, value)
        if isinstance(source, nn.LayerNorm | nn.RMSNorm) and isinstance(target, nn.LayerNorm | nn.RMSNorm):
            target.normalized_shape = source.normalized_shape

    def _fold(self, layer: nn.Module, norm: nn.Module, target: nn.Module) -> None:
        weight, bias = folded(layer, norm)
        target._parameters["weight"] = self._own(weight)
        target._parameters["bias"] = self._own(bias)

    def _own(self, tensor: Tensor) -> nn.Parameter:
        value = tensor.detach().to(self._dtype)
        if value.ndim == 4:
            value = value.contiguous(memory_format=self._format)
        return nn.Parameter(value, requires_grad=False)


@torch.no_grad()
def _run(network: nn.Module, inputs: Inputs) -> Any:
    with arithmetic(FLOAT32):
        return call(network, inputs)


def _alike(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """Whether outputs are equal but for rounding."""
    return len(got) == len(want) and all(map(_close, got, want))


def _close(got: Tensor, want: Tensor) -> bool:
    if not want.is_floating_point():
        return torch.equal(got, want)
    tolerance = max(_TOLERANCE, 4 * torch.finfo(want.dtype).eps)
    return bool((want - got).abs().max() <= tolerance * want.abs().max())  # NaN compares false


_FRESH = (nn.Conv2d, nn.Linear, operator.add, torch.add)  # what gives memory of its own


_IN_PLACE: dict[Any, Callable[..., Tensor]] = {
    nn.ReLU: functional.relu,
    nn.ReLU6: functional.relu6,
    functional.relu: functional.relu,
    torch.relu: functional.relu,
    functional.relu6: functional.relu6,
}


def _activate_in_place(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Lets activations overwrite what layers and additions have just written, where nothing else reads that."""
    for node in graph.nodes:
        kind = type(modules[str(node.target)]) if node.op == "call_module" else node.target
        inputs = node.all_input_nodes
        if kind not in _IN_PLACE or len(inputs) != 1 or len(inputs[0].users) != 1:
            continue
        made_by = type(modules[str(inputs[0].target)]) if inputs[0].op == "call_module" else inputs[0].target
        if made_by in _FRESH:
            node.op, node.target = "call_function", _IN_PLACE[kind]
            node.args, node.kwargs = (inputs[0],), {"inplace": True}
