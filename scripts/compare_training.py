"""How fast fine-tuning is in each precision: `python scripts/compare_training.py [--rounds 5] [--steps 8] [--threads 1]`.

Networks for 32 x 32 images with random weights, batches of 128, `search.training.finetune` as a run uses it. Precisions
alternate within a round; prints medians of images a second and of the ratio within a round, in Markdown.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import nn

from search.models.mobilenet import MobileNet
from search.models.resnet import ResNet
from search.models.vit import vit_cifar10
from search.training.finetune import finetune

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": lambda: ResNet(20),
    "ResNet-56": lambda: ResNet(56),
    "MobileNet-V1": MobileNet,
    "ViT": lambda: vit_cifar10().build((3, 32, 32), 10),
}
BATCH = 128


class Repeated:
    """One random batch, so many times an epoch."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.inputs, self.targets = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
        self.example = self.inputs[:2]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        return iter([(self.inputs, self.targets)] * self.steps)


def rate(make: Callable[[], nn.Module], precision: str, steps: int) -> float:
    """Images a second; the first epoch is not timed."""
    seconds: list[float] = []

    def on_epoch(epoch: int, loss: float, lr: float, taken: float) -> None:
        seconds.append(taken)

    finetune(make(), Repeated(steps), epochs=2, lr=1e-3, precision=precision, on_epoch=on_epoch)
    return steps * BATCH / seconds[-1]


def main() -> None:
    """All networks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("--rounds", 5), ("--steps", 8), ("--threads", 1)):
        parser.add_argument(name, type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print("| network | float32, images/s | bfloat16, images/s | ratio |\n|---|---|---|---|")
    for name, make in NETWORKS.items():
        rounds = [
            [rate(make, one, given.steps) for one in ("float32", "bfloat16")] for _ in range(given.rounds)
        ]
        slow, fast = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = sorted(second / first for first, second in rounds)
        print(
            f"| {name} | {slow:.0f} | {fast:.0f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
