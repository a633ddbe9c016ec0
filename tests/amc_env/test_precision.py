"""The arithmetic of scoring: switched for a block, put back after it, refused where there is none."""

import pytest
import torch

from amc_env.errors import UserError
from amc_env.precision import BFLOAT16, FLOAT32, TF32, arithmetic, check_precision, pays


@pytest.mark.parametrize(("precision", "switch"), [(FLOAT32, "ieee"), (BFLOAT16, "ieee"), (TF32, "tf32")])
def test_products_on_graphics_processors_are_switched_and_put_back(precision: str, switch: str) -> None:
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [each.fp32_precision for each in switches]
    with pytest.raises(ZeroDivisionError), arithmetic(precision):
        assert [each.fp32_precision for each in switches] == [switch, switch]
        raise ZeroDivisionError
    assert [each.fp32_precision for each in switches] == before


def test_tf32_is_for_cuda_alone() -> None:
    with pytest.raises(
        UserError, match="evaluator.precision=tf32 .* the device is cpu; use bfloat16 or float32"
    ):
        check_precision(TF32, "cpu")
    check_precision(TF32, "cuda:1")
    check_precision(BFLOAT16, "cpu")


def test_a_precision_pays_where_its_products_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    steps = {torch.bfloat16: 1, torch.float32: 2}

    class Timed(torch.Tensor):
        def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
            for _ in range(steps[self.dtype]):
                next(clock)
            return other

    ones = torch.ones
    monkeypatch.setattr("torch.ones", lambda *size: ones(*size).as_subclass(Timed))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    assert pays(BFLOAT16)
    steps[torch.bfloat16] = 3
    assert not pays(BFLOAT16)
    assert pays(FLOAT32)
