"""Least squares front to back: inputs are taken from the network as it is pruned so far."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from amc_env.graph.layers import Layer
from amc_env.graph.surgery import Keeps
from amc_env.graph.topology import Batches, Run, Topology, scale_of
from amc_env.inputs import Inputs, count, device_of, pieces
from amc_env.pruning.calibration import Moments, SampledPositions
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.repair.base import absorbs, norm_after, put
from amc_env.pruning.repair.least_squares import RIDGE, repairable_consumers, solve
from amc_env.system import release_heap

# Images of a batch: activations of wide layers should fit the processor's caches.
_SMALL = 100


class FrontToBack:
    """One pass over calibration images that repairs layers as their turn comes, on what reaches them then.

    Args:
        original: The uncut network, whose outputs are the targets.
        layers: Layers that may be repaired.
        topology: The traced network.
        inputs: Calibration inputs; every layer sees all of them before the next one runs.
        per_image: Output positions sampled from each image.
        seed: Seed of the positions.
        ridge: Ridge relative to the mean variance of the inputs.
    """

    name = "sequential"

    def __init__(
        self,
        original: nn.Module,
        layers: Sequence[Layer],
        topology: Topology,
        inputs: Inputs,
        *,
        per_image: int = 16,
        seed: int = 0,
        ridge: float = RIDGE,
    ):
        self._topology = topology
        # a network without a graph runs its layers in turn only within one batch
        self._batches = [inputs] if topology.graph is None else list(pieces(inputs, _SMALL))
        self._ridge = ridge
        self._layers = {layer.name: layer for layer in layers}
        self._positions = {
            name: SampledPositions(layer, count(inputs), per_image, seed)
            for name, layer in self._layers.items()
        }
        self._targets: dict[str, Tensor] = {}
        self._shortcuts: dict[str, Tensor] = {}
        self._record(original)

    @torch.no_grad()
    def _record(self, original: nn.Module) -> None:
        def before(name: str, module: nn.Module, xs: Batches, shortcuts: Batches | None) -> None:
            if name in self._layers and shortcuts is not None:
                self._shortcuts[name] = self._sampled(name, shortcuts)

        def after(name: str, ys: Batches) -> None:
            if name in self._layers:
                self._targets[name] = self._sampled(name, ys)

        Run(original, self._topology)(self._batches, before, after)
        release_heap()

    def _sampled(self, name: str, values: Batches) -> Tensor:
        """Samples [images * positions, channels] of a layer's outputs, or of what is added to them."""
        parts = _parts(values)
        return torch.cat(
            [self._positions[name].outputs(value, part) for value, part in zip(values, parts, strict=True)]
        )

    def _repair_layers(self, model: nn.Module, names: Collection[str], keeps: Keeps) -> None:
        """Repairs the named layers of ``model``, front to back; the others keep the error that reaches them."""
        if not names:
            return

        def before(name: str, module: nn.Module, xs: Batches, shortcuts: Batches | None) -> None:
            if name in names:
                self._repair_layer(model, name, xs, shortcuts, keeps.get(name, {}).get("out"))

        Run(model, self._topology)(self._batches, before)
        release_heap()

    def _repair_layer(
        self, model: nn.Module, name: str, xs: Batches, shortcuts: Batches | None, out: Tensor | None
    ) -> None:
        layer, module = self._layers[name], model.get_submodule(name)
        target, wanted = self._targets[name], self._shortcuts.get(name)
        if out is not None:
            target = target[:, out]
            wanted = None if wanted is None else wanted[:, out]
        if wanted is not None and shortcuts is not None:
            target = target + (wanted - self._sampled(name, shortcuts)) / self._scale(model, name)
        per_image = len(target) // sum(len(x) for x in xs)
        moments: Moments | None = None
        for x, part in zip(xs, _parts(xs), strict=True):
            wanted_here = target[part.start * per_image : part.stop * per_image]
            here = Moments.of(self._positions[name].inputs(module, x, part), wanted_here, layer.groups)
            moments = here if moments is None else moments + here
        assert moments is not None
        weight, intercept = self._solved(layer, module, moments)
        put(model, layer, self._topology, weight, intercept)

    def _solved(self, layer: Layer, module: nn.Module, moments: Moments) -> tuple[Tensor, Tensor | None]:
        """Weights [out, n] and intercept [out]."""
        return solve(moments, absorbs(layer, self._topology), self._ridge)

    def _scale(self, model: nn.Module, name: str) -> Tensor:
        """What the batch norm after a layer multiplies its outputs by, [out]; ones without a batch norm."""
        norm_name = norm_after(self._layers[name], self._topology)
        if norm_name is None:
            return torch.ones(1, device=device_of(self._batches[0]))
        scale = scale_of(model.get_submodule(norm_name))
        tiny = 1e-3 * scale.abs().max()  # a channel that is scaled away cannot carry the shortcut's error
        return torch.where(scale.abs() < tiny, torch.full_like(scale, float("inf")), scale)


class Sequential(FrontToBack):
    """Least squares front to back, on what reaches each layer in the network as cut and repaired so far.

    The target is the uncut network's output before batch norm, repaired for the error that the shortcut
    carries: the difference of the two shortcuts divided by the batch norm's scale is added, where the topology knows
    the shortcut. One pass over the calibration images repairs all layers, each as its turn comes.

    Args:
        candidates: The builder of candidates.
        topology: The traced network.
        inputs: Calibration inputs; every layer sees all of them before the next one runs.
        per_image: Output positions sampled from each image.
        seed: Seed of the positions.
        ridge: Ridge relative to the mean variance of the inputs.
    """

    def __init__(
        self,
        candidates: Candidates,
        topology: Topology,
        inputs: Inputs,
        *,
        per_image: int = 16,
        seed: int = 0,
        ridge: float = RIDGE,
    ):
        layers = repairable_consumers(candidates)
        options = {"per_image": per_image, "seed": seed}
        super().__init__(candidates.original, layers, topology, inputs, ridge=ridge, **options)

    @torch.no_grad()
    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        """Repairs every layer that lost inputs."""
        cut = {
            name
            for name, layer in self._layers.items()
            if "in" in keeps.get(name, {}) and len(keeps[name]["in"]) < layer.in_channels
        }
        self._repair_layers(model, cut, keeps)


def _parts(batches: Batches) -> list[slice]:
    """Where each batch stands among all images."""
    ends = list(accumulate(len(batch) for batch in batches))
    return [slice(end - len(batch), end) for end, batch in zip(ends, batches, strict=True)]
