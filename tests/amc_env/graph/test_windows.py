"""Attention in shifted windows with heads that can be removed computes what torchvision's computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from amc_env.graph.preparing import plain
from amc_env.graph.tracing import trace
from amc_env.graph.windows import ShiftedWindowAttention, replaceable


@pytest.fixture
def swin(optional: Callable[[str], Any]) -> Any:
    """torchvision's module of Swin transformers."""
    return optional("torchvision").models.swin_transformer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("version", ["", "V2"])
@pytest.mark.parametrize("size", [(8, 8), (4, 8), (7, 10)], ids=str)
@pytest.mark.parametrize("shift", [[0, 0], [2, 2]], ids=str)
def test_the_same_outputs_and_gradients(
    swin: Any, shift: list[int], size: tuple[int, int], version: str, bias: bool
) -> None:
    torch.manual_seed(0)
    theirs = getattr(swin, f"ShiftedWindowAttention{version}")(12, [4, 4], shift, 3, qkv_bias=bias)
    ours = ShiftedWindowAttention(theirs)
    x = torch.randn(2, *size, 12)
    torch.testing.assert_close(ours(x), theirs(x))
    (ours(x) * x).sum().backward()
    got = ours.out_proj.weight.grad
    (theirs(x) * x).sum().backward()
    torch.testing.assert_close(got, theirs.proj.weight.grad)


@pytest.mark.parametrize("version", ["", "V2"])
def test_a_network_of_it_is_cut_by_whole_heads_and_followed_symbolically(swin: Any, version: str) -> None:
    block = swin.SwinTransformerBlockV2 if version else swin.SwinTransformerBlock
    merging = {"downsample_layer": swin.PatchMergingV2} if version else {}
    torch.manual_seed(0)
    network = swin.SwinTransformer([4, 4], 24, [2, 2], [3, 6], [4, 4], num_classes=5, block=block, **merging)
    example = torch.randn(1, 3, 64, 64)
    want = network.eval()(example)
    ready = plain(network)
    graph = trace(ready, example)  # proves that the cut network computes what the masked one computes
    heads = {group.name: group.total for group in graph.groups if group.name in graph.heads()}
    assert list(heads.values()) == [3, 3, 6, 6]
    assert graph.topology.graph is not None
    torch.testing.assert_close(ready(example), want)


def test_other_modules_are_left() -> None:
    assert not replaceable(nn.MultiheadAttention(12, 3))
    assert not replaceable(nn.Linear(2, 2))
