"""A cost of your own as a budget: the energy of one inference on a processor without a cache for weights.

    python examples/own_cost.py

The class is registered when it is defined. For the command line, put it into amc_env/costs and name its settings in
conf/budget/energy.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from amc_env.costs.base import BudgetSettings, CostInputs, NetworkCost
from amc_env.costs.counts import Macs, Params
from search import compress
from search.api import Compressed


class Energy(NetworkCost):
    """Picojoules of one example: arithmetic in float32, and one read of every parameter from DRAM.

    Figures for 45 nm: Horowitz, "Computing's Energy Problem", ISSCC 2014.
    """

    name: ClassVar[str] = "energy"
    title: ClassVar[str] = "energy"
    unit: ClassVar[str] = "pJ"

    per_mac: ClassVar[float] = 3.7 + 0.9  # a multiplication and an addition
    per_param: ClassVar[float] = 640.0  # a read of 32 bits

    def __init__(self, macs: Macs, params: Params):
        self._macs, self._params = macs, params

    @classmethod
    def build(cls, problem: CostInputs, settings: BudgetSettings) -> Self:
        """Builds it from the two counts."""
        return cls(Macs.build(problem, settings), Params.build(problem, settings))

    def __call__(self, removed: Sequence[int]) -> float:
        """Picojoules of the pruned network."""
        return self.per_mac * self._macs(removed) + self.per_param * self._params(removed)

    @classmethod
    def format(cls, value: float) -> str:
        """Microjoules, like '1.23 µJ'."""
        return f"{value / 1e6:.2f} µJ"


def main(folder: str | None = None) -> Compressed:
    """Prunes a small network to 60% of its energy."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 3))
    images, labels = torch.randn(96, 1, 6, 6), torch.randint(3, (96,))
    train = DataLoader(TensorDataset(images[:64], labels[:64]), batch_size=16)
    val = DataLoader(TensorDataset(images[64:], labels[64:]), batch_size=16)
    budget = {"energy": 0.6}
    return compress(network, train, val, budget=budget, agent="random", episodes=4, finetune=0, folder=folder)


if __name__ == "__main__":
    print(dict(main().strategy))
