"""A small vision transformer (Dosovitskiy et al., arXiv 2010.11929) that averages its tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.errors import UserError
from amc_env.validation import Positive
from search.models.source import PRETRAINED, ModelSource

_WEIGHTS = Path(__file__).parents[2] / "conf" / "weights" / "vit_cifar10.safetensors"


def vit_cifar10(
    weights: str | None = None, original_lr: Positive = 0.03, key: str | None = None
) -> ModelSource:
    """A vision transformer of one million parameters for CIFAR-10, with the weights of scripts/train_vit.py."""
    build = partial(build_vit, 4, 6, 128, 4, 3)
    own = str(_WEIGHTS) if weights in (None, PRETRAINED) else weights
    return ModelSource("vit_cifar10", build, original_lr, own, key=key)


def build_vit(
    patch: int, depth: int, width: int, heads: int, ratio: int, shape: tuple[int, int, int], classes: int
) -> nn.Module:
    """A `VisionTransformer` for images of a shape.

    Raises:
        UserError: The images are no squares of whole patches.
    """
    channels, height, size = shape
    if height != size or size % patch:
        raise UserError(
            f"images of {height} x {size} pixels: this network needs squares whose side is a multiple of {patch}",
            code="image_size",
            field="data",
        )
    return VisionTransformer(channels, size, patch, depth, width, heads, ratio, classes)


class Attention(nn.Module):
    """Self-attention of several heads, as four linear layers.

    Attributes:
        num_heads: Heads; the forward pass is right for any number that the layers' widths agree with.
        head_dim: Width of a head.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = (
            layer(x).reshape(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(query, key, value)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, -1))
        return mixed


class Block(nn.Module):
    """Attention and a perceptron of one hidden layer, each after a layer norm and with a shortcut around both."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + out


class VisionTransformer(nn.Module):
    """Patches as tokens, learned positions, blocks, and a linear layer on the mean of all tokens.

    Args:
        in_channels: Channels of an image.
        size: Height and width of an image.
        patch: Height and width of a patch; it divides `size`.
        depth: Number of blocks.
        width: Of a token; a multiple of `heads`.
        heads: Of each attention.
        ratio: Hidden width of a block's perceptron as a multiple of `width`.
        classes: Number of outputs.
    """

    def __init__(
        self,
        in_channels: int,
        size: int,
        patch: int,
        depth: int,
        width: int,
        heads: int,
        ratio: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, patch, patch)
        self.position = nn.Parameter(torch.empty(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, ratio * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the positions to small random numbers; the layers have a method of their own for their weights."""
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits
