"""Criteria from what flows through the uncut network: zeros, and who rebuilds the next layer's outputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.graph.copying import module_copy
from amc_env.graph.hooks import watch
from amc_env.graph.layers import Layer, LayerGraph, Member
from amc_env.inputs import Inputs, call, pieces
from amc_env.pruning.calibration import Moments, record, repairable
from amc_env.pruning.criteria.base import CHANNEL, Sample, calibration_sample, scoring_layers, scoring_members
from amc_env.validation import Count, settings

_CHUNK = 250  # images of a calibration batch


_BYTES = 2**29  # of the moments of the layers that are recorded in one pass


@settings
class APoZ:
    """The average percentage of zeros among a channel's activations; what is mostly zero is worth least.

    Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures", 2016.
    Counted at the inputs of the layers that read the channels, over images and positions; several readers are
    averaged. The paper counts at the ReLU: where average pooling comes between, a zero here is a map without any
    activation.

    Attributes:
        images: Calibration images.
    """

    images: Count = 1000

    name: ClassVar[str] = "apoz"
    granularities: ClassVar[tuple[str, ...]] = CHANNEL

    def channel_scores(self, model: nn.Module, graph: LayerGraph, sample: Sample) -> tuple[Tensor, ...]:
        """1 - APoZ, in [0, 1].

        Raises:
            UserError: In some group no activation that reaches a reader is ever zero.
        """
        zeros = zero_shares(
            model, scoring_layers(graph, "consumers"), calibration_sample(self, sample).inputs
        )
        scores, without = [], []
        for group in graph.groups:
            readers = scoring_members(group, graph, "consumers")
            shares = [zeros[layer.name][member.positions].mean(1) for member, layer in readers]
            if not any(bool(share.any()) for share in shares):
                without.append(group.name)
                continue
            scores.append(1 - torch.stack(shares).mean(0))
        if without:
            raise UserError(
                f"criterion=apoz: no activation of {', '.join(without)} that reaches the next layers is ever zero "
                "(there is no ReLU before them, or pooling hides its zeros), so there is nothing to rank by; use "
                "criterion=l1 or criterion=l2",
                code="unsupported",
                field="criterion",
            )
        return tuple(scores)


@torch.no_grad()
def zero_shares(model: nn.Module, layers: Sequence[Layer], inputs: Inputs) -> dict[str, Tensor]:
    """The share of zeros among the inputs of layers, float64 [in_channels] each, padding not counted."""
    copied = module_copy(model).eval()
    zeros = {layer.name: torch.zeros(layer.in_channels, dtype=torch.int64) for layer in layers}
    counts = dict.fromkeys(zeros, 0)

    def add(layer: Layer, read: Tensor, output: Tensor) -> None:
        last = read.movedim(1 if layer.kind == "conv" else -1, -1).reshape(-1, layer.in_channels)
        zeros[layer.name] += (last == 0).sum(0).cpu()
        counts[layer.name] += len(last)

    for layer in layers:
        watch(copied.get_submodule(layer.name), partial(add, layer))
    for batch in pieces(inputs, _CHUNK):
        call(copied, batch)
    return {name: count.double() / counts[name] for name, count in zeros.items()}


@settings
class Lasso:
    """The order in which channels enter the LASSO path that rebuilds the reading layer's outputs.

    He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017: the layer's outputs, at
    sampled positions, are the sum of its input channels' contributions; a LASSO over one coefficient a channel
    selects. The paper searches a penalty for every number of channels; the path gives all of those sets at once,
    made nested. Weights are taken as trained and the path is taken once. Unlike the paper, every output has an
    intercept (contributions are taken about their means), as the least squares that follow have. Those, the
    paper's second step, are repair=least_squares.

    A channel ranks by the largest penalty at which its coefficient is not zero, then by the coefficient at no
    penalty, then (never on the path: dead or a duplicate) by the size of its contribution. Several readers are
    averaged by rank. Channels of other groups that the same layer reads are taken as given. In grouped
    convolutions every group contributes to outputs of its own, so a unit's contributions stand side by side.

    Attributes:
        images: Calibration images.
        per_image: Output positions sampled from each.
    """

    images: Count = 500
    per_image: Count = 10

    name: ClassVar[str] = "lasso"
    granularities: ClassVar[tuple[str, ...]] = CHANNEL

    def channel_scores(self, model: nn.Module, graph: LayerGraph, sample: Sample) -> tuple[Tensor, ...]:
        """Ranks scaled to [0, 1], averaged over readers.

        Raises:
            UserError: Groups are read only by layers that run several times or do not pad with zeros.
        """
        sample = calibration_sample(self, sample)
        layers = [x for x in scoring_layers(graph, "consumers") if repairable(model.get_submodule(x.name), x)]
        ranks: dict[Member, Tensor] = {}
        copied = module_copy(model).eval()
        for layer, moments in self._recorded(copied, layers, sample):
            gram = contributions(copied.get_submodule(layer.name), layer, moments.centred())
            for group in graph.groups:
                for member, reader in scoring_members(group, graph, "consumers"):
                    if reader is layer:
                        ranks[member] = path_ranks(unit_gram(gram, member.positions))
        parts = [
            [ranks[m] for m, _ in scoring_members(g, graph, "consumers") if m in ranks] for g in graph.groups
        ]
        without = [group.name for group, found in zip(graph.groups, parts, strict=True) if not found]
        if without:
            raise UserError(
                f"criterion=lasso cannot rank the channels of {', '.join(without)}: the layers that read them run "
                "several times or do not pad with zeros; use criterion=l1 or criterion=l2",
                code="unsupported",
                field="criterion",
            )
        return tuple(torch.stack(found).mean(0) for found in parts)

    def _recorded(
        self, model: nn.Module, layers: Sequence[Layer], sample: Sample
    ) -> Iterator[tuple[Layer, Moments]]:
        """Moments of all layers, as many layers a pass as memory allows."""
        start = 0
        while start < len(layers):
            end, size = start, 0
            while end < len(layers) and (end == start or size + _moment_bytes(layers[end]) <= _BYTES):
                size += _moment_bytes(layers[end])
                end += 1
            some = layers[start:end]
            found = record(model, some, sample.inputs, per_image=self.per_image, seed=sample.seed)
            for layer in some:
                yield layer, found.pop(layer.name)
            start = end


def _moment_bytes(layer: Layer) -> int:
    columns = layer.in_channels // layer.groups * layer.area
    return 8 * layer.groups * columns * (columns + layer.out_channels // layer.groups)


def contributions(module: nn.Module, layer: Layer, moments: Moments) -> Tensor:
    """The Gram matrix [in_channels, in_channels] of what each input channel adds to the layer's outputs.

    Channel i adds w_i x_i, so the entry of i and j is the trace of (sum of x_j x_i') (w_i' w_j): it follows from
    the moments of the inputs, whatever the number of samples and outputs.
    """
    area = layer.area
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows = weight.detach().double().reshape(layer.groups, layer.out_channels // layer.groups, -1)
    products = moments.xx * (rows.transpose(1, 2) @ rows)
    local = layer.in_channels // layer.groups
    blocks = products.reshape(layer.groups, local, area, local, area).sum((2, 4))
    gram = blocks.new_zeros(layer.groups, local, layer.groups, local)
    own = torch.arange(layer.groups)
    gram[own, :, own] = blocks  # outputs of different groups have nothing in common
    return gram.reshape(layer.in_channels, layer.in_channels).cpu()


def unit_gram(gram: Tensor, positions: Tensor) -> Tensor:
    """The Gram matrix [units, units] of what units add, each the sum of its positions [units, m]."""
    units, width = positions.shape
    chosen = gram[positions.flatten()][:, positions.flatten()]
    return chosen.reshape(units, width, units, width).sum((1, 3))


def path_ranks(gram: Tensor) -> Tensor:
    """Where each column comes on the LASSO path towards the sum of all columns, from their Gram matrix.

    Returns:
        float64 [units] in [0, 1]: 1 enters first; ties share a rank.
    """
    from sklearn.linear_model import lars_path_gram

    scaled = (gram / gram.diagonal().max().clamp_min(1e-300)).numpy()  # its tolerances are absolute
    with warnings.catch_warnings():
        # It warns that it leaves dead and duplicate columns out of the path: they rank last, by length.
        warnings.simplefilter("ignore")
        penalties, _, path = lars_path_gram(
            Xy=scaled.sum(1), Gram=scaled, n_samples=1, method="lasso", max_iter=10 * len(scaled)
        )
    coefficients = torch.from_numpy(path)
    nonzero = coefficients != 0
    # A coefficient is zero at the knot where it enters, and no longer at the next one.
    knots = (nonzero.int().argmax(1) - 1).clamp_min(0)
    entry = torch.from_numpy(penalties)[knots] * nonzero.any(1)
    keys = torch.stack([entry, coefficients[:, -1].abs(), gram.diagonal()], 1)
    places: Tensor = torch.unique(keys, dim=0, return_inverse=True)[1]
    return places.double() / max(1, len(scaled) - 1)
