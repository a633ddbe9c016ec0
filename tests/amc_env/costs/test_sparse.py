"""The n:m format: by hand, and bit for bit on random weights."""

import pytest
import torch
from torch import Tensor

from amc_env.errors import UserError
from amc_env.sparse import check, pack, unpack


def random_sparse(shape: tuple[int, ...], n: int, m: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight with the n:m pattern at random places."""
    generator = torch.Generator().manual_seed(0)
    rows, inputs, *kernel = shape
    order = torch.rand(rows, *kernel, inputs // m, m, generator=generator).argsort(-1)
    keep = (order < n).view(rows, *kernel, inputs).movedim(-1, 1)
    return torch.where(keep, torch.randn(shape, generator=generator), 0.0).to(dtype)


def test_by_hand() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, -7.0, 0.0, 0.0, 0.0, 3.0]])
    packed = pack(weight, 2, 4)
    assert packed.values.tolist() == [[5.0, -7.0, 0.0, 3.0]]
    assert packed.indices.tolist() == [[1, 3, 0, 3]]
    assert packed.size == (4 * (32 + 2)) // 8
    assert torch.equal(unpack(packed), weight)


def test_blocks_run_along_the_input_channels_at_each_place_of_the_kernel() -> None:
    weight = torch.zeros(1, 4, 2, 1)
    weight[0, :2, 0, 0] = torch.tensor([1.0, 2.0])
    weight[0, 3, 1, 0] = 4.0
    assert pack(weight, 2, 4).values.tolist() == [[1.0, 2.0, 0.0, 4.0]]
    assert pack(weight, 2, 4).indices.tolist() == [[0, 1, 0, 3]]
    weight[0, 2, 0, 0] = 3.0  # four non-zeros in eight weights, three of them in one block
    assert not check(weight, 2, 4)
    assert check(weight, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 16), (8, 8)])
@pytest.mark.parametrize("shape", [(6, 32), (5, 16, 3, 3), (4, 16, 1, 2)], ids=str)
def test_what_is_unpacked_is_the_masked_weight(
    shape: tuple[int, ...], n: int, m: int, dtype: torch.dtype
) -> None:
    weight = random_sparse(shape, n, m, dtype)
    packed = pack(weight, n, m)
    assert check(weight, n, m)
    assert packed.values.numel() == weight.numel() * n // m
    assert packed.values.dtype == dtype
    assert packed.indices.dtype == torch.uint8
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(unpack(packed).view(bits), weight.view(bits))


def test_sizes_of_2_4_in_16_bits() -> None:
    packed = pack(random_sparse((768, 3072), 2, 4, torch.float16), 2, 4)
    assert packed.size == 768 * 3072 * 2 * 9 // 16


def test_refusals() -> None:
    with pytest.raises(UserError, match="is not 2:4 sparse: 3 of its 6 blocks have more than 2"):
        pack(torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0]] * 3), 2, 4)
    with pytest.raises(UserError, match="6 input channels .* not divisible by m=4"):
        check(torch.zeros(2, 6), 2, 4)
    with pytest.raises(UserError, match="5:4 is no pattern"):
        pack(torch.zeros(2, 8), 5, 4)
