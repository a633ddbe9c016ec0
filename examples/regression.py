"""Prune a network that predicts a number: an MLP for scikit-learn's diabetes table."""

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from search import compress


def make_loaders() -> list[DataLoader]:
    """Batches (rows, targets) of the training, validation and test split, both scaled to unit variance."""
    rows, targets = (torch.tensor(values, dtype=torch.float32) for values in load_diabetes(return_X_y=True))
    data = TensorDataset(rows / rows.std(0), (targets - targets.mean()) / targets.std())
    parts = random_split(data, [262, 90, 90], torch.Generator().manual_seed(0))
    return [DataLoader(part, batch_size=32) for part in parts]


def train_network(loader: DataLoader, epochs: int = 20) -> nn.Module:
    """The network after a short training: rows [N, 10] to predictions [N, 1]."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(epochs):
        for rows, targets in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(network(rows)[:, 0], targets).backward()
            optimizer.step()
    return network.eval()


if __name__ == "__main__":
    train, val, test = make_loaders()
    small = compress(
        train_network(train),
        train,
        val,
        task="regression",
        budget={"params": 0.4},
        test_loader=test,
        episodes=30,
        finetune=5,
        original_lr=0.01,
    )
    for stage in ("base", "pruned", "finetuned"):
        figures = getattr(small.result, stage)
        print(f"{stage:9} {small.result.metric} {figures.accuracy:.3f}, {figures.costs['params']} parameters")
    print({name: round(ratio, 2) for name, ratio in small.strategy.items()})
