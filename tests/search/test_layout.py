"""Channels-last where a network runs in it."""

import torch
from torch import nn

from search.layout import fastest_layout
from search.models import ResNet


class FlattenByView(nn.Module):
    """A network as users write it: `view` on feature maps, which does not run in channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.linear = nn.Linear(4 * 64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).view(x.shape[0], -1))


def test_the_layout_is_channels_last_where_the_network_runs_in_it() -> None:
    example = torch.randn(2, 3, 8, 8)
    assert fastest_layout(ResNet(8), example) is torch.channels_last
    by_view = FlattenByView()
    assert fastest_layout(by_view, example) is torch.contiguous_format
    assert by_view.conv.weight.is_contiguous()
