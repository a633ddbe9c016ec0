"""Figures of a network whose weights are masked, counted on the delivered weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from amc_env import sparse
from amc_env.pruning.granularity import NM, Channel, FineGrained, Granularity, Kernel, Masked, Vector
from amc_env.storage import Storage, params_beside_weights
from amc_env.strategy import Strategy
from search.output.run_result import GranularityFigures, LayerRow, MaskedFigures, Pattern
from search.ranking import Ranked


def granularity_of(granularity: Granularity) -> GranularityFigures:
    """What decisions remove units of, and which hardware gains by it."""
    known = granularity.name, granularity.masked, granularity.speed
    if isinstance(granularity, NM):
        return GranularityFigures(*known, "weights", granularity.n, granularity.m)
    if isinstance(granularity, Vector):
        return GranularityFigures(*known, f"kernel {granularity.axis}s")
    units = {Channel: "channels", FineGrained: "weights", Kernel: "kernels"}
    return GranularityFigures(*known, units.get(type(granularity), "units"))


def masked_figures(ranked: Ranked, network: nn.Module, strategy: Strategy) -> MaskedFigures | None:
    """Counts of masked weights; None where channels are cut.

    Args:
        ranked: The run's decisions.
        network: The masked network.
        strategy: What it was masked by.
    """
    if not ranked.masked:
        return None
    weights = {name: _weight(network, name) for name in strategy.names}
    layers = {name: LayerRow(weight.numel(), int(weight.count_nonzero())) for name, weight in weights.items()}
    pattern, granularity = None, ranked.settings.granularity
    if isinstance(granularity, NM):
        chosen = [name for name, decision in strategy.decisions.items() if decision.removed]
        pattern = _pattern({name: weights[name] for name in chosen}, granularity.n, granularity.m)
    return MaskedFigures(layers, stored_sizes(ranked, weights, strategy.removed), pattern)


def _weight(network: nn.Module, layer: str) -> Tensor:
    weight = network.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight.detach().cpu()


def stored_sizes(ranked: Ranked, weights: Mapping[str, Tensor], removed: Sequence[int]) -> dict[str, int]:
    """Bytes of a masked network by format, each layer dense where that is smaller; see `Storage`.

    The zeros are those of ``weights``: after stages or rounds they lie elsewhere than where the search began.

    Args:
        ranked: The run's decisions.
        weights: The weights of their layers.
        removed: Units removed from each.

    Returns:
        ``dense_fp32`` and at as many bits ``csr`` and, for n:m, ``nm``; ``dense_4bit`` and at as many bits ``eie``.
    """
    graph, grids, granularity = ranked.graph, ranked.grids, cast(Masked, ranked.settings.granularity)
    # What is not zero stays longest: so every unit that was kept has a place before those that were removed.
    places = {
        name: granularity.places((weight != 0).double(), graph.layer(name))
        for name, weight in weights.items()
    }

    def size(format: str, counts: Sequence[int]) -> int:
        return round(Storage(graph.layers, grids, places, params_beside_weights(graph), format)(counts))

    nothing = [0] * len(grids)
    sizes = {"dense_fp32": size("csr", nothing), "csr": size("csr", removed)}
    if isinstance(ranked.settings.granularity, NM):
        sizes["nm"] = size("nm", removed)
    return sizes | {"dense_4bit": size("eie", nothing), "eie": size("eie", removed)}


def _pattern(weights: Mapping[str, Tensor], n: int, m: int) -> Pattern:
    """Whether weights that are to have the n:m pattern have it, packed and unpacked to the bit."""
    holds = all(
        sparse.check(weight, n, m) and torch.equal(sparse.unpack(sparse.pack(weight, n, m)), weight)
        for weight in weights.values()
    )
    return Pattern(n, m, tuple(weights), holds)
