"""The arithmetic of scoring: switched for a block, put back after it, refused where there is none."""

import pytest
import torch
from refusals import refused

from amc_env.evaluation.precision import BFLOAT16, FLOAT32, INT8, TF32, arithmetic, check_precision


@pytest.mark.parametrize(("precision", "switch"), [(FLOAT32, "ieee"), (BFLOAT16, "ieee"), (TF32, "tf32")])
def test_products_on_graphics_processors_are_switched_and_put_back(precision: str, switch: str) -> None:
    processor = torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul, *processor
    before = [each.fp32_precision for each in switches]
    with pytest.raises(ZeroDivisionError), arithmetic(precision):
        assert [each.fp32_precision for each in switches] == [switch, switch, "ieee", "ieee"]
        raise ZeroDivisionError
    assert [each.fp32_precision for each in switches] == before


def test_tf32_is_for_cuda_alone() -> None:
    with refused("no_device", "evaluator.precision"):
        check_precision(TF32, "cpu")
    check_precision(TF32, "cuda:1")
    check_precision(BFLOAT16, "cpu")


def test_int8_is_for_processors_alone() -> None:
    with refused("no_device", "evaluator.precision"):
        check_precision(INT8, "cuda:1")
    check_precision(INT8, "cpu")
