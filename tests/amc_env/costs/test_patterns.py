"""The n:m pattern is checked in blocks along the input channels."""

import pytest
import torch

from amc_env.costs.storage import follows_pattern, place_bits
from amc_env.errors import UserError


def test_blocks_run_along_the_input_channels_at_each_kernel_position() -> None:
    weight = torch.zeros(1, 4, 2, 1)
    weight[0, :2, 0, 0] = 1.0
    weight[0, 3, 1, 0] = 4.0
    assert follows_pattern(weight, 2, 4)
    weight[0, 2, 0, 0] = 3.0  # four non-zeros in eight weights, three of them in one block
    assert not follows_pattern(weight, 2, 4)
    assert follows_pattern(weight, 3, 4)


def test_bits_of_a_position() -> None:
    assert [place_bits(m) for m in (2, 4, 8, 9, 16)] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize(("inputs", "n", "m"), [(6, 2, 4), (8, 5, 4), (8, 0, 4)])
def test_what_is_no_pattern_or_does_not_divide_is_refused(inputs: int, n: int, m: int) -> None:
    with pytest.raises(UserError):
        follows_pattern(torch.zeros(2, inputs), n, m)
