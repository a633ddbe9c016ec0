"""A plain baseline: an episode as the AMC release (mit-han-lab/amc, commit 65363c8) computes it, without its agent.

The network keeps its size and channels are masked. The inputs and outputs of every layer are recorded once; then every
episode solves every pruned layer's least squares anew, by scikit-learn in float32, and validates the full-size network
with its batch norms in place. Where this differs: images are decoded and normalised beforehand; convolutions larger than
1 x 1, which the release refuses, are solved as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from amc_env.graph.layers import Layer
from amc_env.pruning.calibration import SampledPositions
from amc_env.pruning.repair.least_squares import repairable_consumers
from search.study.problem import Prepared

BATCH, BATCHES, POSITIONS = 50, 60, 10
ROOM = 2 * 2**30
"""Bytes of recorded inputs and outputs: MobileNet-V1's 30,000 rows take 1.3 GB; where more were needed, rows are fewer."""

Rows = tuple[np.ndarray, np.ndarray]
"""A layer's inputs [rows, in * kh * kw] and its outputs less the bias [rows, out], float32."""


class Drawn(SampledPositions):
    """Positions as the release draws them: the same number of every image, some more than once."""

    def __init__(self, layer: Layer, images: int, seed: int):
        super().__init__(layer, images, POSITIONS, seed)
        positions = layer.out_size[0] * layer.out_size[1]
        shape = images, POSITIONS if positions > 1 else 1
        self._flat = torch.randint(positions, shape, generator=torch.Generator().manual_seed(seed))


class Baseline:
    """The network, what was recorded of it, and the images it is validated on; on the processor."""

    def __init__(self, prepared: Prepared):
        self.model = prepared.model.cpu()
        self.builder = prepared.builder
        self.layers = [layer for layer in repairable_consumers(prepared.builder) if layer.groups == 1]
        self._original = {name: value.clone() for name, value in self.model.state_dict().items()}
        row = sum(
            layer.in_channels * layer.kernel[0] * layer.kernel[1] + layer.out_channels
            for layer in self.layers
        )
        batches = min(BATCHES, max(1, ROOM // (4 * row * BATCH * POSITIONS)))
        self.rows = recorded(
            self.model, self.layers, prepared.images(prepared.data.train, BATCH * batches).cpu()
        )
        search = prepared.data.search
        self._split = prepared.images(search).cpu(), search.labels

    def mend(self, removed: Sequence[int]) -> None:
        """Masks the original network as a strategy says, and reconstructs every layer that lost inputs."""
        self.model.load_state_dict(self._original)
        keeps = self.builder.keeps(removed)
        for layer in self.layers:
            kept = keeps.get(layer.name, {}).get("in")
            if kept is not None and len(kept) < layer.in_channels:
                mask(self.model.get_submodule(layer.name), len(kept), *self.rows[layer.name])

    def validate(self) -> float:
        """Accuracy on all search images in [0, 1], by a plain loop over tensors."""
        return self._accuracy(zip(*(part.split(BATCH) for part in self._split), strict=True))

    def validate_by_loader(self) -> float:
        """The same through a DataLoader without workers, which takes images one by one."""
        return self._accuracy(DataLoader(TensorDataset(*self._split), BATCH))

    @torch.no_grad()
    def _accuracy(self, batches: Iterable[Sequence[Tensor]]) -> float:
        hits = sum(int((self.model(images).argmax(1) == labels).sum()) for images, labels in batches)
        return hits / len(self._split[1])


@torch.no_grad()
def recorded(model: nn.Module, layers: Sequence[Layer], images: Tensor) -> dict[str, Rows]:
    """What flows through layers of the uncut network, batch by batch."""
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {layer.name: ([], []) for layer in layers}
    batch = 0
    handles = []
    for layer in layers:

        def hook(module: nn.Module, x: tuple[Tensor, ...], y: Tensor, layer: Layer = layer) -> None:
            positions, (inputs, outputs) = Drawn(layer, len(y), batch), found[layer.name]
            inputs.append(positions.inputs(module, x[0]))
            outputs.append(positions.outputs(y) - (0 if module.bias is None else module.bias))

        handles.append(model.get_submodule(layer.name).register_forward_hook(hook))
    for batch, part in enumerate(images.split(BATCH)):  # noqa: B007 -- the hooks read it
        model(part)
    for handle in handles:
        handle.remove()
    return {
        name: (torch.cat(inputs).numpy(), torch.cat(outputs).numpy())
        for name, (inputs, outputs) in found.items()
    }


def reconstructed(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Weights [out, columns] that give the outputs best."""
    return LinearRegression(fit_intercept=False).fit(inputs, outputs).coef_


@torch.no_grad()
def mask(module: nn.Module, kept: int, inputs: np.ndarray, outputs: np.ndarray) -> None:
    """Keeps the inputs with the largest summed |W|, reconstructs their weights, sets all others to zero."""
    weight = module.weight
    by_channel = weight.flatten(1).abs().sum(0).view(weight.shape[1], -1).sum(1)
    chosen = by_channel.argsort(descending=True)[:kept].sort().values
    area = weight[0, 0].numel()
    columns = (chosen[:, None] * area + torch.arange(area)).flatten()
    masked = torch.zeros_like(weight).flatten(1)
    masked[:, columns] = torch.from_numpy(reconstructed(inputs[:, columns.numpy()], outputs)).to(weight)
    weight.copy_(masked.view_as(weight))
