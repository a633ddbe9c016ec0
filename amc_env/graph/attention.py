"""Attention whose heads can be removed: `torch.nn.MultiheadAttention` fixes their width to ``embed_dim / num_heads``."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiheadAttention(nn.Module):
    """Computes what `torch.nn.MultiheadAttention` computes, with any number of heads.

    Query, key and value are projected by linear layers of their own, so that they are traced, pruned and repaired like
    all others.

    Args:
        module: The attention that is replaced, without ``add_bias_kv`` and ``add_zero_attn``.
    """

    in_proj_bias = None  # PyTorch's encoder layers read these to decide against their fused kernel
    _qkv_same_embed_dim = False

    def __init__(self, module: nn.MultiheadAttention):
        super().__init__()
        self.num_heads = module.num_heads
        self.head_dim = module.head_dim
        self.dropout = module.dropout
        self.batch_first = module.batch_first
        self.q_proj, self.k_proj, self.v_proj = _projections(module)
        self.out_proj = linear_of(module.out_proj.weight, module.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention.forward`.

        Raises:
            ValueError: ``attn_mask`` has a mask of its own for each head.
        """
        if query.ndim == 2:
            place = 0 if self.batch_first else 1
            query, key, value = (x.unsqueeze(place) for x in (query, key, value))
            padding = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            out, weights = self.forward(
                query, key, value, padding, need_weights, attn_mask, average_attn_weights
            )
            return out.squeeze(place), None if weights is None else weights.squeeze(0)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            self._heads(self.q_proj(query)),
            self._heads(self.k_proj(key)),
            self._heads(self.v_proj(value)),
        )
        mask = _added(attn_mask, key_padding_mask, q.dtype)
        weights = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            mixed = F.dropout(weights, dropout) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _heads(self, x: Tensor) -> Tensor:
        """[N, tokens, heads * width] to [N, heads, tokens, width]."""
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)


def replaceable(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether a module is an attention that `MultiheadAttention` can stand for."""
    plain = type(module) is nn.MultiheadAttention and module.bias_k is None
    return plain and not module.add_zero_attn


def _projections(module: nn.MultiheadAttention) -> list[nn.Linear]:
    if module._qkv_same_embed_dim:
        assert module.in_proj_weight is not None
        weights = list(module.in_proj_weight.chunk(3))
    else:
        found = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        weights = [weight for weight in found if weight is not None]
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return [linear_of(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of a weight and a bias."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return made


def _added(attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one that is added to the scores, [N or 1, 1, queries or 1, keys]."""
    if attn_mask is not None and attn_mask.ndim == 3:
        raise ValueError(
            "an attn_mask of shape [N * heads, queries, keys] does not work once heads are removed"
        )
    masks = []
    if attn_mask is not None:
        masks.append(_numbers(attn_mask, dtype)[None, None])
    if padding is not None:
        masks.append(_numbers(padding, dtype)[:, None, None])
    return sum(masks[1:], masks[0]) if masks else None


def _numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Minus infinity where a boolean mask is True; numbers as they are."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
