"""The n:m format: of every m weights along the input channels at most n are not zero, and only those are stored.

Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378, section 3: the values that stay and,
for each, its place within its block. 2:4 in 16 bits takes 2 x (16 + 2) bits in place of 4 x 16: 56.25%.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amc_env.errors import UserError

_LARGEST = 256  # places within a block are kept in one byte each


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight in n:m format. Blocks run along the input channels at one place of the kernel.

    Attributes:
        values: [O, K * n / m] with K = kh * kw * I / groups: row by row, place by place of the kernel, the n
            weights of each block in their order. A block with fewer non-zeros is filled up with zeros.
        indices: uint8, shaped like ``values``: the place of each within its block, ascending.
        shape: The weight's shape: [O, I / groups, kh, kw] or [O, I].
        n: Weights stored of each block.
        m: Weights of a block.
    """

    values: Tensor
    indices: Tensor
    shape: tuple[int, ...]
    n: int
    m: int

    @property
    def size(self) -> int:
        """Stored size in bytes, with ceil(log2 m) bits an index; rounded up."""
        bits = self.values.numel() * (8 * self.values.element_size() + place_bits(self.m))
        return -(-bits // 8)


def place_bits(m: int) -> int:
    """Bits that tell the ``m`` places of a block apart: ceil(log2 m)."""
    return (m - 1).bit_length()


def check(weight: Tensor, n: int, m: int) -> bool:
    """Whether each block of ``m`` input channels has at most ``n`` weights that are not zero.

    Raises:
        UserError: n:m is no pattern, or the input channels do not divide into blocks.
    """
    return bool((_blocks(weight, n, m) != 0).sum(-1).max() <= n)


def pack(weight: Tensor, n: int, m: int) -> Packed:
    """Stores ``n`` of every ``m`` weights along the input channels.

    Args:
        weight: [O, I / groups, kh, kw] or [O, I].
        n: Weights stored of each block.
        m: Weights of a block, at most 256.

    Raises:
        UserError: The weight has not the pattern, or its input channels do not divide into blocks.
    """
    blocks = _blocks(weight, n, m)
    filled = blocks != 0
    crowded = int((filled.sum(-1) > n).sum())
    if crowded:
        raise UserError(
            f"a weight of shape {tuple(weight.shape)} is not {n}:{m} sparse: {crowded} of its "
            f"{filled[..., 0].numel()} blocks have more than {n} non-zeros; set the others to zero first"
        )
    first = torch.sort(filled.byte(), dim=-1, descending=True, stable=True).indices[..., :n]
    places = first.sort(dim=-1).values
    values = blocks.gather(-1, places)
    shape = tuple(weight.shape)
    return Packed(values.flatten(1), places.to(torch.uint8).flatten(1), shape, n, m)


def unpack(packed: Packed) -> Tensor:
    """The dense weight, zeros in place of what was not stored; a stored value comes back bit for bit."""
    rows, inputs, *kernel = packed.shape
    stored = (rows, -1, packed.n)
    places, values = packed.indices.long().view(stored), packed.values.view(stored)
    blocks = values.new_zeros(rows, values.shape[1], packed.m).scatter_(-1, places, values)
    return blocks.view(rows, *kernel, inputs).movedim(-1, 1).contiguous()


def _blocks(weight: Tensor, n: int, m: int) -> Tensor:
    """[O, blocks, m]: the input channels last, cut into blocks."""
    if not 1 <= n <= m <= _LARGEST:
        raise UserError(f"{n}:{m} is no pattern: 1 <= n <= m <= {_LARGEST} is needed, like 2:4")
    if weight.shape[1] % m:
        raise UserError(
            f"{weight.shape[1]} input channels (per group) are not divisible by m={m}: such a layer is left whole"
        )
    return weight.movedim(1, -1).reshape(len(weight), -1, m)
