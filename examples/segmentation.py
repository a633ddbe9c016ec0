"""Prune a U-Net that labels pixels: bright discs on a noisy background, made here."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from search import compress

SIZE = 16


class UNet(nn.Module):
    """One level down and up again, with a connection across."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.Upsample(scale_factor=2)
        self.last = nn.Sequential(nn.Conv2d(24, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 1, H, W] to logits [N, 2, H, W]."""
        fine = self.first(images)
        return self.last(torch.cat([fine, self.up(self.middle(self.down(fine)))], 1))


def make_loader(count: int, seed: int) -> DataLoader:
    """Batches (images, labels): float32 [N, 1, H, W] and the class of each pixel, int64 [N, H, W]."""
    draw = torch.Generator().manual_seed(seed)
    centre = SIZE * torch.rand(count, 2, 1, 1, generator=draw)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    labels = (rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 < (SIZE / 4) ** 2
    images = labels[:, None] + 0.5 * torch.randn(count, 1, SIZE, SIZE, generator=draw)
    return DataLoader(TensorDataset(images, labels.long()), batch_size=32)


def train_network(loader: DataLoader, epochs: int = 6) -> nn.Module:
    """The network after a short training."""
    torch.manual_seed(0)
    network = UNet()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    return network.eval()


if __name__ == "__main__":
    train = make_loader(128, seed=0)
    small = compress(
        train_network(train),
        train,
        make_loader(64, seed=1),
        task="segmentation",
        test_loader=make_loader(64, seed=2),
        episodes=12,
        finetune=2,
        original_lr=0.05,
    )
    print(small)
    print({name: round(ratio, 2) for name, ratio in small.strategy.items()})
