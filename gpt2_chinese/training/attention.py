"""Causal attention for training: by PyTorch's fused kernels on a GPU, in products of whole blocks on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_chinese.training.dropout import draw_kept

CAUSAL_ATTENTION = "causal"
BLOCK = 128  # queries at a time; their scores end with the last key that they may see, so few are made in vain
LONGEST_KEPT = 512  # tokens of a window; of longer ones the backward pass computes the weights again


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    first_keys: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers: causal by itself, so that no mask is ever built.

    Args:
        first_keys: int64 [B, T], of each query the first key that it may see; None for the window's first.
    """
    assert attention_mask is None
    if query.device.type == "cpu":
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output, _weights, _kept = block_attention(query * scaling, key, value, dropout, first_keys)
    elif first_keys is not None:
        output = masked_attention(query, key, value, first_keys, dropout, scaling)
    else:
        output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True)
    return output.transpose(1, 2), None


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_keys: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """Attention by PyTorch's kernels that see no key before `first_keys`, [B, heads, T, head_size]."""
    keys = torch.arange(key.shape[2], device=key.device)
    visible = (keys <= keys[:, None]) & (keys >= first_keys[:, None, :, None])
    return F.scaled_dot_product_attention(query, key, value, visible, dropout_p=dropout, scale=scaling)


# PyTorch's fused kernel for the CPU shares the work out in pieces that are too small for a processor's bf16
# instructions and for MKL, and does not drop out. One operation, opaque to torch.compile, which would unroll the blocks
# of every layer and compile for minutes.
@torch.library.custom_op("gpt2_chinese::block_attention", mutates_args=(), device_types="cpu")
def block_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, first_keys: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of queries that are scaled already.

    Args:
        query, key, value: [B, heads, T, head_size], of one type, in which it is computed.
        dropout: of the attention's weights.
        first_keys: as for `causal_attention`.

    Returns:
        The output, in the shape of the queries; and for the backward pass the weights of all blocks, one behind the
        other (empty where windows are longer than `LONGEST_KEPT`), and which of them dropout kept, as ones and zeros
        (empty without dropout).
    """
    queries, keys, values = _joined(query, key, value)
    output = query.new_empty(queries.shape)  # contiguous, as the fake says; of one window the queries are a view
    weights = query.new_empty(_count_kept(query))
    kept = draw_kept(_count_weights(query) if dropout else 0, dropout, weights.dtype)
    with torch.autocast("cpu", enabled=False):
        for first, last, block_weights, block_kept in _blocks(queries, weights, kept):
            scores = _scores(queries, keys, first, last, first_keys)
            if block_weights is None:
                block_weights = torch.softmax(scores, -1)
            else:
                torch.softmax(scores, -1, out=block_weights)
            dropped = block_weights if block_kept is None else block_weights * block_kept
            output[:, first:last] = torch.bmm(dropped, values[:, :last])
    if dropout:
        output *= 1 / (1 - dropout)  # fewer numbers than the weights, which it belongs to
    return output.view(query.shape), weights, kept


@block_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, first_keys: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    kept = query.new_empty(_count_weights(query) if dropout else 0)
    weights = query.new_empty(_count_kept(query))
    return torch.empty_like(query, memory_format=torch.contiguous_format), weights, kept


@torch.library.custom_op("gpt2_chinese::block_attention_backward", mutates_args=(), device_types="cpu")
def block_attention_backward(
    outer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    kept: Tensor,
    first_keys: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; those of a key or value are summed over the blocks in float32."""
    queries, keys, values = _joined(query, key, value)
    gradient = outer.reshape(queries.shape)
    if dropout:
        gradient = gradient * (1 / (1 - dropout))
    to_queries = query.new_empty(queries.shape)
    wide = torch.promote_types(keys.dtype, torch.float32)
    # Each one for itself, for no operation may return views of one.
    to_keys, to_values = (query.new_zeros(keys.shape, dtype=wide) for _ in range(2))
    with torch.autocast("cpu", enabled=False):
        for first, last, block_weights, block_kept in _blocks(queries, weights, kept):
            if block_weights is None:
                block_weights = torch.softmax(_scores(queries, keys, first, last, first_keys), -1)
            rows = gradient[:, first:last]
            to_weights = torch.bmm(rows, values[:, :last].mT)
            dropped = block_weights
            if block_kept is not None:
                dropped = block_weights * block_kept
                to_weights.mul_(block_kept)
            to_values[:, :last] += torch.bmm(dropped.mT, rows)
            to_scores = torch.ops.aten._softmax_backward_data(to_weights, block_weights, -1, block_weights.dtype)
            to_keys[:, :last] += torch.bmm(to_scores.mT, queries[:, first:last])
            to_queries[:, first:last] = torch.bmm(to_scores, keys[:, :last])
    shape = query.shape
    return to_queries.view(shape), to_keys.to(keys.dtype).view(shape), to_values.to(values.dtype).view(shape)


@block_attention_backward.register_fake
def _(outer: Tensor, query: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(3))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, ctx.dropout, first_keys = inputs
    _, weights, kept = output
    ctx.mark_non_differentiable(weights, kept)
    ctx.save_for_backward(*given, weights, kept, first_keys)


def _backward(ctx: Any, outer: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*block_attention_backward(outer, *ctx.saved_tensors, ctx.dropout), None, None)


block_attention.register_autograd(_backward, setup_context=_save)


def _joined(*parts: Tensor) -> tuple[Tensor, ...]:
    """[B, heads, T, head_size] as [B heads, T, head_size]."""
    return tuple(part.reshape(-1, *part.shape[2:]) for part in parts)


def _scores(queries: Tensor, keys: Tensor, first: int, last: int, first_keys: Tensor | None) -> Tensor:
    """Scores of the queries from `first` to `last`, minus infinity where they may not see a key."""
    scores = torch.bmm(queries[:, first:last], keys[:, :last].mT)
    size = last - first
    scores[:, :, first:].masked_fill_(torch.ones(size, size, dtype=torch.bool).triu_(1), -torch.inf)
    if first_keys is not None:
        before = torch.arange(last) < first_keys[:, None, first:last, None]
        scores.view(len(first_keys), -1, size, last).masked_fill_(before, -torch.inf)
    return scores


def spans(length: int) -> list[tuple[int, int]]:
    return [(first, min(first + BLOCK, length)) for first in range(0, length, BLOCK)]


def _count_weights(query: Tensor) -> int:
    return query.shape[0] * query.shape[1] * sum((last - first) * last for first, last in spans(query.shape[2]))


def _count_kept(query: Tensor) -> int:
    return _count_weights(query) if query.shape[2] <= LONGEST_KEPT else 0


def _blocks(queries: Tensor, weights: Tensor, kept: Tensor) -> list[tuple[int, int, Tensor | None, Tensor | None]]:
    """First and last query of each block, and its part of the weights and of what dropout kept, if they are there."""
    found = spans(queries.shape[1])
    shapes = [(len(queries), last - first, last) for first, last in found]
    sizes = [rows * height * width for rows, height, width in shapes]

    def parts(whole: Tensor) -> Sequence[Tensor | None]:
        if not len(whole):
            return [None] * len(found)
        return [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]

    return [(*span, part, mask) for span, part, mask in zip(found, parts(weights), parts(kept), strict=True)]
