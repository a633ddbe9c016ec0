"""The arithmetic that candidates are scored in; what it costs in accuracy is shown when a run begins.

Repairs and what is delivered are always computed in full float32: only scoring may be coarser.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from amc_env.errors import UserError

FLOAT32, TF32, BFLOAT16, INT8 = "float32", "tf32", "bfloat16", "int8"


Precision = Literal["float32", "tf32", "bfloat16", "int8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
"""float32; its matrix products and convolutions rounded to 10 bits of mantissa (NVIDIA, from Ampere on); everything in
8 bits of mantissa; convolutions in whole numbers of 8 bits (processors)."""
TrainingPrecision = Literal["float32", "bfloat16"]
"""Of fine-tuning; in bfloat16 weights, losses and gradients of weights are kept in float32."""


def check_precision(precision: str, device: str) -> None:
    """Finds out whether a device computes in a precision.

    Raises:
        UserError: It does not.
    """
    if precision == TF32 and torch.device(device).type != "cuda":
        raise UserError(
            f"evaluator.precision=tf32 is arithmetic of NVIDIA's graphics processors, and the device is {device}; use "
            "bfloat16 or float32",
            code="no_device",
            field="evaluator.precision",
        )
    if precision == INT8 and torch.device(device).type != "cpu":
        raise UserError(
            f"evaluator.precision=int8 is computed by processors, and the device is {device}; use bfloat16, tf32 or "
            "float32, or device=cpu",
            code="no_device",
            field="evaluator.precision",
        )


def dtype_of(precision: str) -> torch.dtype:
    """What weights and images are held in."""
    return torch.bfloat16 if precision == BFLOAT16 else torch.float32


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Computes float32 matrix products and convolutions on graphics processors in TF32, or strictly not, meanwhile.

    PyTorch's own default rounds convolutions to TF32 and says nothing. Processors compute float32 strictly, even where
    `torch.set_float32_matmul_precision` says that less will do.
    """
    graphics = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    switches = *graphics, torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if precision == TF32 and switch in graphics else "ieee"
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
