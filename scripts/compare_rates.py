"""What fine-tuning does where the original learning rate is unknown: `python scripts/compare_rates.py [--seeds 3]`.

Three networks, trained in three ways on the digits, pruned to a part of their MACs at one ratio for all layers, then
fine-tuned for three epochs at the rate that is taken by default and at ten times it. Prints a table in Markdown.
"""

import argparse
import logging
import statistics
from collections.abc import Callable, Iterable
from functools import partial
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
from search.settings import LatencySettings, Settings
from search.training.batches import AugmentedBatches

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
TRAININGS: dict[str, tuple[Callable[[], ModelSource], Optimizer, int]] = {
    "ResNet-8, SGD 0.1, momentum 0.9": (
        digits_cnn,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        15,
    ),
    "MLP, Adam 0.001": (digits_mlp, partial(torch.optim.Adam, lr=1e-3), 30),
    "ViT, AdamW 0.001, decay 0.05": (digits_vit, partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05), 40),
}
BUDGET = 0.3
EPOCHS = 3
RATES = (0.001, 0.01)
"""What `compress` takes where no rate is given, and what is usual after SGD with 0.1."""


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


def figures(network: nn.Module, data: Data, seed: int, rate: float) -> list[float]:
    """Test accuracy in percent: unpruned, pruned, fine-tuned, delivered."""
    settings = Settings(agent=Uniform(), episodes=1, export=(), latency=LatencySettings(repeats=0))
    given = {
        "finetune": EPOCHS,
        "original_lr": 10 * rate,
        "seed": seed,
        "settings": settings,
        "verbose": False,
    }
    with TemporaryDirectory() as folder:
        result = compress(network, data, budget=BUDGET, folder=folder, **given).result
    assert result.pruned is not None
    assert result.finetuned is not None
    found = result.base, result.pruned, result.finetuned, result.delivered
    return [100 * one.accuracy for one in found]


def main() -> None:
    """All trainings and seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    logging.disable(logging.INFO)
    data = digits(search_images=100)
    print(
        "| training | learning rate | unpruned | pruned | fine-tuned | delivered |\n|---|---|---|---|---|---|"
    )
    for name, (make, optimizer_of, epochs) in TRAININGS.items():
        networks = [trained(make(), optimizer_of, epochs, data, seed) for seed in seeds]
        for rate in RATES:
            runs = [figures(network, data, seed, rate) for network, seed in zip(networks, seeds, strict=True)]
            cells = [f"{statistics.mean(x):.1f} ({min(x):.1f}-{max(x):.1f})" for x in zip(*runs, strict=True)]
            print(f"| {name} | {rate:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
