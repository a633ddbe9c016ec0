"""A network's decisions, ranked: what each of them removes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from amc_env.budget import Problem
from amc_env.layers import LayerGraph
from amc_env.memory import Activations
from amc_env.pruning.candidate import Candidates, MaskedCandidates
from amc_env.pruning.criteria import ElementCriterion, Sample, rank
from amc_env.pruning.granularity import Masked
from amc_env.pruning.widen import rank_after
from amc_env.strategy import Grid
from search.data import Data, Split
from search.settings import Settings

_GONE = (
    -1e-300
)  # worth of a weight that is zero: below that of an idle one, and nothing in a sum with any other


@dataclass(frozen=True, eq=False)
class Ranked:
    """A network's decisions, and what each of them removes first.

    Attributes:
        model: The network, in eval mode on the device.
        data: Its data.
        settings: The run's settings.
        graph: Its layers and coupled channels.
        grids: The decisions' feasible counts.
    """

    model: nn.Module
    data: Data
    settings: Settings
    graph: LayerGraph
    grids: tuple[Grid, ...]

    def images(self, split: Split, count: int | None = None) -> Tensor:
        """Normalised images of a split on the device, the first ``count`` of them."""
        chosen = split.images if count is None else split.images[:count]
        return self.data.normalise(chosen.to(self.settings.device))

    def batch(self, size: int) -> Tensor:
        """Normalised images of the search split on the device, ``size`` of them: over again where it has fewer."""
        images = self.data.search.images
        return self.data.normalise(images[torch.arange(size) % len(images)].to(self.settings.device))

    @cached_property
    def builder(self) -> Candidates | MaskedCandidates:
        """Builds the networks of strategies. Ranking their units may take passes over training images."""
        return builder_of(self, self.model)

    @cached_property
    def activations(self) -> Activations:
        """How large the activations of cut networks are. Finding out takes a pass over one image for every decision.

        Raises:
            UserError: The network cannot be traced symbolically, or they do not follow from the counts removed.
        """
        return Activations(self.model, self.graph, self.grids, self.images(self.data.search, 1))

    @property
    def masked(self) -> tuple[Grid, ...]:
        """The decisions where they mask weights, nothing where they cut channels."""
        return self.grids if self.settings.granularity.masked else ()


@dataclass(frozen=True, eq=False)
class Prepared(Ranked):
    """A network and data made ready for a search; nothing has been scored yet."""

    problem: Problem


def builder_of(
    ranked: Ranked, network: nn.Module, kept_units: Sequence[Tensor] = ()
) -> Candidates | MaskedCandidates:
    """Ranks the units of ``network`` and gives the builder of its candidates.

    Args:
        ranked: The decisions, criterion and data.
        network: The uncut network, or later weights of it in its shapes.
        kept_units: Units that earlier cuts left of every channel group, in any order; the others go first. Empty: no
            channel was cut. What earlier masks removed is zero, and goes first as well.
    """
    criterion = ranked.settings.criterion
    train = ranked.data.train
    labels = train.labels[: criterion.images].to(ranked.settings.device)
    sample = Sample(ranked.images(train, criterion.images), labels, ranked.settings.seed)
    if not ranked.masked:
        scores = criterion.channel_scores(network, ranked.graph, sample)
        return Candidates(
            network, ranked.graph, rank_after(scores, kept_units) if kept_units else rank(scores)
        )
    granularity = cast(Masked, ranked.settings.granularity)
    layers = {grid.name: ranked.graph.layer(grid.name) for grid in ranked.grids}
    saliency = cast(ElementCriterion, criterion).saliency(network, list(layers.values()), sample)
    places = {}
    for name, layer in layers.items():
        weight = network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        worth = torch.where(weight == 0, _GONE, saliency[name].to(weight.device))
        places[name] = granularity.places(worth, layer)
    return MaskedCandidates(network, ranked.grids, places)
