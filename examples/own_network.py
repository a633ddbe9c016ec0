"""Prune a network of your own, trained on data of your own: here a small CNN for scikit-learn's digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from search import compress, load_pruned


def make_network() -> nn.Module:
    """An untrained network; any that torch.fx can trace will do."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def make_loaders() -> list[DataLoader]:
    """Batches (images, labels) of the training, validation and test split."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(
        torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    )
    parts = random_split(data, [1097, 300, 400], torch.Generator().manual_seed(0))
    return [DataLoader(part, batch_size=64) for part in parts]


def train_network(epochs: int = 15) -> nn.Module:
    """The network after a short training."""
    torch.manual_seed(0)
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for images, labels in make_loaders()[0]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    return network.eval()


if __name__ == "__main__":
    train, val, test = make_loaders()
    small = compress(
        train_network(),
        train,
        val,
        budget=0.3,
        test_loader=test,
        episodes=60,
        finetune=5,
        original_lr=0.1,  # of the training; without it fine-tuning is cautious
    )
    for stage in ("base", "pruned", "finetuned"):
        figures = getattr(small.result, stage)
        print(f"{stage:9} accuracy {figures.accuracy:.3f}, {figures.costs['macs']} MACs")
    print({name: round(ratio, 2) for name, ratio in small.strategy.items()})
    restored = load_pruned(make_network(), small.folder)
    assert sum(p.numel() for p in restored.parameters()) == small.result.finetuned.costs["params"]
