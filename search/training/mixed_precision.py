"""Mixed precision: matrix products and convolutions in half precision, weights and losses in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@contextmanager
def mixed_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast` to a type; float32: as it is. On processors attention is computed in float32."""
    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        if device.type == "cpu" and dtype is not torch.float32:
            with _AttentionInFloat32():
                yield
        else:
            yield


def in_float32(outputs: Any) -> Any:
    """Tensors of half precision in float32; others stay as they are."""
    halves = torch.float16, torch.bfloat16
    return outputs.float() if isinstance(outputs, Tensor) and outputs.dtype in halves else outputs


class _AttentionInFloat32(TorchFunctionMode):
    """Gives `scaled_dot_product_attention` float32 tensors.

    Its backward pass is then five times as fast as in bfloat16, on a Xeon with AMX.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(
                *map(in_float32, args), **{key: in_float32(value) for key, value in kwargs.items()}
            )
