"""Half precision in matrix products; attention stays in float32 on processors, and gradients are those of float32."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search.models.vit import Attention
from search.training.mixed_precision import mixed_precision

CPU = torch.device("cpu")


class Recorded(nn.Module):
    """Attention whose inputs' types are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.types: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        query = self.linear(x)[:, None]
        out = F.scaled_dot_product_attention(query, query, value=query)
        self.types += [query.dtype, out.dtype]
        return out


@pytest.mark.parametrize(
    ("dtype", "types"),
    [
        (torch.bfloat16, [torch.bfloat16, torch.float32]),
        (torch.float32, [torch.float32, torch.float32]),
    ],
)
def test_attention_gets_and_gives_float32_where_linear_layers_compute_in_half(
    dtype: torch.dtype, types: list[torch.dtype]
) -> None:
    network = Recorded()
    with mixed_precision(CPU, dtype):
        network(torch.randn(2, 4, 8))
    network(torch.randn(2, 4, 8))  # nothing stays switched on
    assert network.types == [*types, torch.float32, torch.float32]


class OwnAttention(nn.Module):
    """`nn.MultiheadAttention`, whose masks are an argument of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        out: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return out


@pytest.mark.parametrize("make", [lambda: Attention(16, 4), OwnAttention], ids=["linear layers", "torch's"])
def test_gradients_are_those_of_float32_but_for_the_rounding(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network, x = make(), torch.randn(4, 6, 16)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        network.zero_grad()
        with mixed_precision(CPU, dtype):
            loss = network(x).float().square().mean()
        loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in network.parameters()]))
    assert 0 < (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 0.02
