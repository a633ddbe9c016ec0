"""Batch norms folded into the layers before them, for scoring only: what is delivered stays unfolded."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, fx, nn

from amc_env.pruning.topology import Topology

_TOLERANCE = 1e-3  # of the largest logit: far above rounding, far below a wrong fold

log = logging.getLogger(__name__)


class Folder:
    """Turns cut networks into equal ones without batch norms, in the memory layout asked for.

    One folded skeleton serves all candidates. Where the network cannot be traced, or folding changes its
    outputs by more than rounding, candidates are scored as they are, and `reason` says why.

    Args:
        model: The uncut network, in eval mode.
        example: A few inputs, to check the fold with.
        channels_last: Whether weights are laid out for inputs in channels-last memory format.
    """

    def __init__(self, model: nn.Module, example: Tensor, *, channels_last: bool):
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._twin = copy.deepcopy(model).eval()
        topology = Topology.of(self._twin)
        self.reason = topology.reason
        self._norms = topology.norm_after
        self._folded = self._without_norms(topology)
        if self._folded is not None:
            with torch.no_grad():
                want, got = model(example), self(model)(example)
            if not (want - got).abs().max() <= _TOLERANCE * want.abs().max():  # NaN compares false
                self._folded, self.reason = None, "its outputs change when batch norms are folded"
        if self.reason:
            log.info("candidates are scored with their batch norms in place: %s", self.reason)

    def _without_norms(self, topology: Topology) -> fx.GraphModule | None:
        if topology.graph is None:
            return None
        behind = {norm: layer for layer, norm in self._norms.items()}
        for node in list(topology.graph.nodes):
            if node.op == "call_module" and node.target in behind:
                node.replace_all_uses_with(node.all_input_nodes[0])
                topology.graph.erase_node(node)
        return fx.GraphModule(self._twin, topology.graph)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> nn.Module:
        """The network to score in place of ``model``; valid until the next call."""
        if self._folded is None:
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
            target._buffers[key] = buffer
        if isinstance(source, nn.Conv2d) and isinstance(target, nn.Conv2d):
            target.groups = source.groups  # the one size that the forward pass reads

    def _fold(self, layer: nn.Module, norm: nn.Module, target: nn.Module) -> None:
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        weight, bias = layer.weight, layer.bias
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        shift = shift * scale if norm.bias is None else shift * scale + norm.bias
        target._parameters["weight"] = self._own(weight * scale.view(-1, *[1] * (weight.ndim - 1)))
        target._parameters["bias"] = self._own(shift)

    def _own(self, tensor: Tensor) -> nn.Parameter:
        value = tensor.detach()
        if value.ndim == 4:
            value = value.contiguous(memory_format=self._format)
        return nn.Parameter(value, requires_grad=False)
