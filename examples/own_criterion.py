"""Write a criterion of your own: a channel is worth its largest weight."""

from dataclasses import dataclass
from typing import ClassVar

from own_network import make_loaders, train_network
from torch import Tensor, nn

from agents.baselines import Uniform
from amc_env.graph.layers import Layer, LayerGraph, Member
from amc_env.graph.tracing import trace
from amc_env.pruning.criteria.base import Sample, unit_scores
from amc_env.testing import check_criterion
from search import compress
from search.settings import Settings


@dataclass(frozen=True)
class LargestWeight:
    """The largest magnitude among the weights that write a channel; for channels only."""

    name: ClassVar[str] = "largest_weight"
    granularities: ClassVar[tuple[str, ...]] = ("channel",)
    images: ClassVar[int] = 0  # no calibration images

    def channel_scores(self, model: nn.Module, graph: LayerGraph, sample: Sample) -> tuple[Tensor, ...]:
        """One float64 tensor [units] for each channel group; coupled layers are averaged."""

        def score(member: Member, layer: Layer) -> Tensor:
            weight = model.get_submodule(layer.name).weight.detach().double().cpu()
            return weight.abs().flatten(1).amax(1)[member.positions].amax(1)

        return unit_scores(graph, "producers", "mean", score)


if __name__ == "__main__":
    (train, val, test), network = make_loaders(), train_network()
    images, labels = next(iter(train))
    check_criterion(LargestWeight(), network, trace(network, images), Sample(images, labels))
    settings = Settings(agent=Uniform(), episodes=1, criterion=LargestWeight())
    small = compress(
        network,
        train,
        val,
        budget=0.3,
        agent=Uniform(),
        test_loader=test,
        episodes=1,
        finetune=0,
        settings=settings,
    )
    print(f"accuracy {small.result.base.accuracy:.3f} -> {small.result.pruned.accuracy:.3f}")
    print({name: round(ratio, 2) for name, ratio in small.strategy.items()})
