"""What recipes of fine-tuning do to networks that were trained in different ways:

    python scripts/compare_recipes.py [--seeds 3] [--epochs 10]

Three networks, trained in three ways on the digits, pruned to a part of their MACs at one ratio for all layers, then
fine-tuned at several peak rates, with and without distillation. Prints a table in Markdown.
"""

import argparse
import logging
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.nn import functional as F

from agents.baselines import Uniform
from search import compress
from search.data.base import Data
from search.data.digits import digits
from search.data.loaders import seeded
from search.models.digits import digits_cnn, digits_mlp, digits_vit
from search.models.source import ModelSource
from search.settings import FinetuneSettings, LatencySettings, Settings
from search.training.batches import AugmentedBatches

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
TRAININGS: dict[str, tuple[Callable[[], ModelSource], Optimizer, int, float]] = {
    "ResNet-8, SGD 0.1, momentum 0.9": (
        digits_cnn,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        15,
        0.1,
    ),
    "MLP, Adam 0.001": (digits_mlp, partial(torch.optim.Adam, lr=1e-3), 30, 0.1),
    "ViT, AdamW 0.001, decay 0.05": (
        digits_vit,
        partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05),
        40,
        0.25,
    ),
}
"""How a network is made and trained, for how many epochs, and the share of its MACs that is to be left."""

RATES = (0.001, 0.003, 0.01, 0.03)
RECIPES = {
    "1e-4, none": {"weight_decay": 1e-4, "distillation": 0.0},
    "5e-4, 0.5": {"weight_decay": 5e-4, "distillation": 0.5},
}
"""Weight decay and the teacher's share of the loss."""


def trained(source: ModelSource, optimizer_of: Optimizer, epochs: int, data: Data, seed: int) -> nn.Module:
    """A network after an ordinary training: cross entropy, a cosine to 0."""
    with seeded(seed):
        network = source.build(data.image_shape, len(data.classes))
        batches = AugmentedBatches(data.train, data, 64, seed, "cpu")
        optimizer = optimizer_of(network.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
        for _ in range(epochs):
            for inputs, labels in batches:
                optimizer.zero_grad()
                F.cross_entropy(network(inputs), labels).backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def figures(
    network: nn.Module, data: Data, seed: int, budget: float, tuning: FinetuneSettings
) -> list[float]:
    """Test accuracy in percent: unpruned, pruned, fine-tuned."""
    settings = Settings(
        agent=Uniform(),
        episodes=1,
        original_lr=1.0,
        seed=seed,
        finetune=tuning,
        baselines=(),
        export=(),
        latency=LatencySettings(repeats=0),
    )
    with TemporaryDirectory() as folder:
        result = compress(
            network, data, budget=budget, folder=folder, settings=settings, verbose=False
        ).result
    assert result.pruned is not None
    assert result.finetuned is not None
    return [100 * one.accuracy for one in (result.base, result.pruned, result.finetuned)]


def main() -> None:
    """All trainings, recipes and seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    data = digits(search_images=100)
    print(
        "| training | decay, distillation | peak rate | unpruned | pruned | fine-tuned |\n|---|---|---|---|---|---|"
    )
    for name, (make, optimizer_of, epochs, budget) in TRAININGS.items():
        networks = [trained(make(), optimizer_of, epochs, data, seed) for seed in range(options.seeds)]
        for (recipe, terms), rate in product(RECIPES.items(), RATES):
            tuning = FinetuneSettings(epochs=options.epochs, lr_fraction=rate, keep="last", **terms)
            runs = [figures(one, data, seed, budget, tuning) for seed, one in enumerate(networks)]
            cells = [f"{statistics.mean(x):.1f} ({min(x):.1f}-{max(x):.1f})" for x in zip(*runs, strict=True)]
            print(f"| {name} | {recipe} | {rate:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
