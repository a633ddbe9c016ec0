"""Attention with heads that can be removed computes what PyTorch's attention computes."""

import pytest
import torch
from torch import nn

from amc_env.graph.attention import MultiheadAttention, replaceable

TOKENS = 5


def pair(**options) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, **options).eval()
    return theirs, MultiheadAttention(theirs).eval()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", [{}, {"attn_mask": "causal"}, {"key_padding_mask": "last"}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_same_outputs_and_weights(batch_first: bool, masks: dict, need_weights: bool) -> None:
    theirs, ours = pair(batch_first=batch_first)
    x = torch.randn(2, TOKENS, 12) if batch_first else torch.randn(TOKENS, 2, 12)
    given = {
        "causal": torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1),
        "last": torch.tensor([[False] * 4 + [True], [False] * 5]),
    }
    masks = {name: given[kind] for name, kind in masks.items()}
    want = theirs(x, x, x, need_weights=need_weights, **masks)
    got = ours(x, x, x, need_weights=need_weights, **masks)
    torch.testing.assert_close(got[0], want[0])
    assert (got[1] is None) == (want[1] is None)
    if need_weights:
        torch.testing.assert_close(got[1], want[1])


def test_other_widths_of_keys_and_values_and_examples_without_a_batch() -> None:
    theirs, ours = pair(kdim=7, vdim=9, bias=False)
    query, key, value = torch.randn(4, 12), torch.randn(TOKENS, 7), torch.randn(TOKENS, 9)
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value))


def test_it_works_within_an_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True).eval()
    x = torch.randn(2, TOKENS, 12)
    with torch.no_grad():
        want = layer(x)
        layer.self_attn = MultiheadAttention(layer.self_attn)
        torch.testing.assert_close(layer.eval()(x), want)


def test_what_cannot_be_replaced_is_left() -> None:
    assert replaceable(nn.MultiheadAttention(12, 3))
    assert not replaceable(nn.MultiheadAttention(12, 3, add_bias_kv=True))
    assert not replaceable(nn.MultiheadAttention(12, 3, add_zero_attn=True))
    assert not replaceable(nn.Linear(2, 2))
