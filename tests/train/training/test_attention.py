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


@pytest.mark.parametrize("longest_kept", [0, 512])
def test_gradients_with_dropout_are_those_of_what_was_dropped(monkeypatch, longest_kept):
    monkeypatch.setattr(attention, "BLOCK", 2)
    monkeypatch.setattr(attention, "LONGEST_KEPT", longest_kept)

    def dropping(query, key, value):
        torch.manual_seed(1)
        return block_attention(query, key, value, 0.3)[0]

    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(dropping, given)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("documents", [False, True])
def test_weights_that_are_computed_again_are_the_same(monkeypatch, dropout, documents):
    given = parts(3 * BLOCK - 7, torch.bfloat16)
    first_keys = first_keys_of(*[[100, 3 * BLOCK - 107]] * 2) if documents else None
    results = []
    for longest_kept in (0, 512):
        monkeypatch.setattr(attention, "LONGEST_KEPT", longest_kept)
        torch.manual_seed(0)
        output, weights, _ = block_attention(*given, dropout, first_keys)
        assert (len(weights) > 0) == (longest_kept > 0)
        results.append([output, *torch.autograd.grad(output.sum(), given)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


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


def first_keys_of(*documents: list[int]) -> torch.Tensor:
    """Of windows that hold documents of these lengths, the first key that each query may see."""
    rows = [torch.cat([torch.full((length,), sum(row[:at])) for at, length in enumerate(row)]) for row in documents]
    return torch.stack(rows)


def test_documents_of_one_window_are_attended_to_as_if_each_had_its_own():
    layout = [[3, BLOCK, 6, 2 * BLOCK - 5], [BLOCK + 20, 2 * BLOCK - 16]]
    given = parts(sum(layout[0]), torch.float32)
    output = block_attention(*given, 0.0, first_keys_of(*layout))[0]
    outer = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.cat(
        [
            torch.cat([block_attention(*each, 0.0)[0] for each in zip(*parts_of(given, row), strict=True)], 2)
            for row in enumerate(layout)
        ]
    )
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(result, given, outer) for result in (output, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def parts_of(given: tuple[torch.Tensor, ...], row: tuple[int, list[int]]) -> list[list[torch.Tensor]]:
    """Queries, keys and values of each document of a window; the window's number and its documents' lengths."""
    window, lengths = row
    return [list(part[window : window + 1].split(lengths, 2)) for part in given]


def test_what_is_computed_on_a_gpu_for_documents_is_what_a_cpu_computes():
    query, key, value = (part.detach() for part in parts(12, torch.float32))
    first_keys = first_keys_of([5, 7], [1, 11])
    expected = block_attention(query * 0.25, key, value, 0.0, first_keys)[0]
    torch.testing.assert_close(attention.masked_attention(query, key, value, first_keys), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("windows", [1, 2])
def test_torch_finds_nothing_wrong_with_the_operations(dropout, windows):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = tuple(part.detach() for part in parts(5, torch.float32, windows))
    output, weights, kept = block_attention(*given, dropout)
    assert output.is_contiguous()  # torch.compile builds on it
    others = (weights, kept, None, dropout)
    torch.library.opcheck(block_attention_backward, (output, *given, *others), test_utils=checks)
    given = tuple(part.requires_grad_() for part in given)
    torch.library.opcheck(block_attention, (*given, dropout), test_utils=checks)
    documents = first_keys_of(*[[2, 3]] * windows)
    torch.library.opcheck(block_attention, (*given, dropout, documents), test_utils=checks)
