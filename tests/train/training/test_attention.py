"""Attention in blocks against PyTorch's own, in values and gradients, at lengths on both sides of a block's border."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpt2_chinese.training import attention
from gpt2_chinese.training.attention import BLOCK, block_attention, block_attention_backward


def parts(length: int, dtype: torch.dtype, windows: int = 2) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as a model cuts them from one matrix: not contiguous."""
    generator = torch.Generator().manual_seed(length)
    joined = torch.randn(windows, length, 3, 3, 16, generator=generator).to(dtype).requires_grad_()
    return tuple(joined[:, :, place].transpose(1, 2) for place in range(3))


@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_are_pytorch_s(length, dtype, tolerance):
    query, key, value = parts(length, dtype)
    output = block_attention(query * 0.25, key, value, 0.0)[0]
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25)
    outer = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(output, (query, key, value), outer)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), outer)
    for mine, theirs in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert mine.dtype == dtype
        # Of a single token the gradients of query and key are 0, and what they come to is rounding.
        atol = tolerance * max(theirs.abs().max().item(), 0.1)
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=atol)


def test_gradients_with_dropout_are_those_of_what_was_dropped(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 2)

    def dropping(query, key, value):
        torch.manual_seed(1)
        return block_attention(query, key, value, 0.3)[0]

    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(dropping, given)


def test_dropout_lets_the_stated_share_through_and_keeps_the_mean():
    query, key = torch.zeros(2, 1, 1, 256, 8)
    value = torch.ones(1, 1, 256, 8)
    torch.manual_seed(0)
    output, weights, kept = block_attention(query, key, value, 0.25)
    seen = weights > 0
    assert kept[seen].float().mean() == pytest.approx(0.75, abs=0.02)
    assert output.mean() == pytest.approx(1, abs=0.03)


def test_no_query_sees_what_comes_later():
    query, key, value = (part.detach() for part in parts(BLOCK + 9, torch.float32))
    before = block_attention(query, key, value, 0.0)[0]
    key[:, :, -1], value[:, :, -1] = 1e9, 1e9
    after = block_attention(query, key, value, 0.0)[0]
    assert torch.equal(before[:, :, :-1], after[:, :, :-1]) and not torch.equal(before, after)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("windows", [1, 2])
def test_torch_finds_nothing_wrong_with_the_operations(dropout, windows):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = tuple(part.detach() for part in parts(5, torch.float32, windows))
    output, weights, kept = block_attention(*given, dropout)
    assert output.is_contiguous()  # torch.compile builds on it
    torch.library.opcheck(block_attention_backward, (output, *given, weights, kept, dropout), test_utils=checks)
    torch.library.opcheck(block_attention, (*(part.requires_grad_() for part in given), dropout), test_utils=checks)
