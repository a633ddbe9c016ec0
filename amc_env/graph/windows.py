"""torchvision's attention in shifted windows, with heads that can be removed: it fixes their width to ``C / num_heads``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from amc_env.graph.attention import linear_of


class ShiftedWindowAttention(nn.Module):
    """Computes what torchvision's module of this name computes, or its second version, with any number of heads.

    Liu et al., "Swin Transformer" (arXiv 2103.14030) and "Swin Transformer V2" (arXiv 2111.09883), section 3 of each.
    torchvision's functions read the weights of `qkv` and `proj` without calling them; here they are layers of their own.

    Args:
        module: The attention that is replaced.
    """

    cpb_mlp: nn.Module
    logit_scale: Tensor

    def __init__(self, module: Any):
        super().__init__()
        self.num_heads: int = module.num_heads
        self.head_dim = module.qkv.out_features // (3 * module.num_heads)
        self.window_size, self.shift_size = tuple(module.window_size), tuple(module.shift_size)
        self.attention_dropout, self.dropout = module.attention_dropout, module.dropout
        for name in ("relative_position_bias_table", "logit_scale", "cpb_mlp"):
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))
        for name in ("relative_position_index", "relative_coords_table"):
            if hasattr(module, name):
                self.register_buffer(name, getattr(module, name))
        biases = [None] * 3 if module.qkv.bias is None else list(module.qkv.bias.chunk(3))
        if hasattr(module, "logit_scale"):
            biases[1] = None  # the second version takes zeros
        made = [linear_of(*both) for both in zip(module.qkv.weight.chunk(3), biases, strict=True)]
        self.q_proj, self.k_proj, self.v_proj = made
        self.out_proj = linear_of(module.proj.weight, module.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, H, W, C] to maps of the same shape."""
        windows = into_windows(x, self.window_size, self.shift_size)
        q, k, v = (
            layer(windows).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "logit_scale"):
            scale = self.logit_scale.clamp(max=math.log(100)).exp()
            q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
        else:
            q = q * self.head_dim**-0.5
        mask = added(self._position_bias(), x, self.window_size, self.shift_size)
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=1.0)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        out = F.dropout(out, self.dropout, self.training)
        return from_windows(out, x, self.window_size, self.shift_size)

    def _position_bias(self) -> Tensor:
        """What is added to the scores of two places of a window, [1, heads, places, places]."""
        places = math.prod(self.window_size)
        if hasattr(self, "cpb_mlp"):
            table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        else:
            table = self.relative_position_bias_table
        bias = table[self.relative_position_index].unflatten(0, (places, places)).permute(2, 0, 1)[None]
        return 16 * torch.sigmoid(bias) if hasattr(self, "cpb_mlp") else bias


def shifts(padded: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[int, int]:
    """By how much maps are rolled: not where one window holds the whole side."""
    height, width = (0 if w >= side else s for side, w, s in zip(padded, window, shift, strict=True))
    return height, width


def into_windows(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """[N, H, W, C] to [N * windows, places, C]; maps are padded with zeros to whole windows, then rolled."""
    high, wide = window
    x = F.pad(x, (0, 0, 0, -x.shape[2] % wide, 0, -x.shape[1] % high))
    down, right = shifts(x.shape[1:3], window, shift)
    x = x.roll((-down, -right), (1, 2)) if down or right else x
    rows, columns = x.shape[1] // high, x.shape[2] // wide
    x = x.reshape(x.shape[0], rows, high, columns, wide, x.shape[3])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, high * wide, x.shape[5])


def from_windows(windows: Tensor, like: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The inverse of `into_windows` for maps of this height and width."""
    high, wide = window
    count, height, width = like.shape[:3]
    rows, columns = -(-height // high), -(-width // wide)
    x = windows.reshape(count, rows, columns, high, wide, windows.shape[2])
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(count, rows * high, columns * wide, windows.shape[2])
    down, right = shifts(x.shape[1:3], window, shift)
    x = x.roll((down, right), (1, 2)) if down or right else x
    return x[:, :height, :width]


def added(bias: Tensor, x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The position bias, and -100 between places of a rolled map that were no neighbours; for all windows."""
    high, wide = window
    sides = [-(-side // w) * w for side, w in zip(x.shape[1:3], window, strict=True)]
    moved = shifts(sides, window, shift)
    if not any(moved):
        return bias
    parts = []
    for side, w, s in zip(sides, window, moved, strict=True):
        places = torch.arange(side, device=x.device)
        parts.append((places >= side - w).long() + (places >= side - s).long() * (s > 0))
    regions = 3 * parts[0][:, None] + parts[1]
    regions = (
        regions.reshape(sides[0] // high, high, sides[1] // wide, wide)
        .transpose(1, 2)
        .reshape(-1, high * wide)
    )
    apart = (regions[:, :, None] != regions[:, None]).to(x.dtype) * -100
    return (bias + apart[:, None]).repeat(x.shape[0], 1, 1, 1)


def replaceable(module: nn.Module) -> bool:
    """Whether a module is an attention that `ShiftedWindowAttention` can stand for."""
    kinds = "ShiftedWindowAttention", "ShiftedWindowAttentionV2"
    kind = type(module)
    return kind.__module__ == "torchvision.models.swin_transformer" and kind.__name__ in kinds


# Their branches depend on the sizes of maps.
fx.wrap("into_windows")
fx.wrap("from_windows")
fx.wrap("added")
