"""Prune for a task of your own: predictions count as right within a tolerance, and large errors weigh little."""

from collections.abc import Iterable
from typing import Any

import torch
from regression import make_loaders, train_network
from torch import Tensor, nn

from amc_env.inputs import Inputs, call
from search import compress

TOLERANCE = 0.5


def score(model: nn.Module, batches: Iterable[tuple[Inputs, Any]]) -> float:
    """The share of predictions within the tolerance, in [0, 1]; higher is better."""
    close = [(call(model, inputs)[:, 0] - targets).abs() < TOLERANCE for inputs, targets in batches]
    return float(torch.cat(close).float().mean())


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """What fine-tuning lowers, a scalar."""
    return nn.functional.smooth_l1_loss(outputs[:, 0], targets)


if __name__ == "__main__":
    train, val, test = make_loaders()
    small = compress(
        train_network(train),
        train,
        val,
        score=score,
        loss=loss,
        test_loader=test,
        episodes=20,
        finetune=3,
        original_lr=0.01,
    )
    print(small)
    print({name: round(ratio, 2) for name, ratio in small.strategy.items()})
