"""The blocks of a GPT-2 as they are trained on a CPU: forward and backward written out.

The products are PyTorch's. What lies between them, which takes most of the time where a processor multiplies bf16 by
itself (Intel's AMX), is compiled code that reads and writes each number once (fused.py). The residual stream and all
sums are float32; what is multiplied is in the type of autocast, or float32 without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from gpt2_chinese.training.attention import LONGEST_KEPT, spans
from gpt2_chinese.training.fused import DTYPES, SUM_ROWS, Operation, run

OF_BLOCK = 12  # parameters


class Dropout(NamedTuple):
    """A mask that is computed from a seed wherever it is needed: `threshold` is the probability of a 0, times 2^32."""

    seed: int = 0
    threshold: int = 0

    @property
    def scale(self) -> float:
        return 1 / (1 - self.threshold / 2**32)


@dataclass(frozen=True)
class Shape:
    """
    Attributes:
        dtype: of what is multiplied.
        epsilon: of the layer norms.
        dropouts: of each block: of attention's weights, of attention's output, of the feed-forward network's.
        first_keys: int64 [B, T], of each query the first key that it may see; None for the window's first.
    """

    windows: int
    length: int
    heads: int
    width: int
    dtype: torch.dtype
    epsilon: float
    dropouts: tuple[tuple[Dropout, Dropout, Dropout], ...]
    first_keys: Tensor | None

    @property
    def rows(self) -> int:
        return self.windows * self.length

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def scale(self) -> float:
        """Of the attention's scores."""
        return self.head_size**-0.5

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)


def matrix_type() -> torch.dtype:
    """The type of what is multiplied on a CPU now: that of autocast, or float32 without it."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def can_be_written_out(model: Any) -> bool:
    """Whether the model is what this module computes: GPT-2 on a CPU, of float32, with GELU's tanh approximation.

    With autocast to fp16 it is not.
    """
    config = model.config
    return (
        matrix_type() in DTYPES
        and model.device.type == "cpu"
        and all(parameter.dtype == torch.float32 for parameter in model.parameters())
        and config.scale_attn_weights
        and not config.scale_attn_by_inverse_layer_idx
        and not config.add_cross_attention
        and all(type(block) is GPT2Block for block in model.transformer.h)
        and all(_is_tanh_gelu(block.mlp.act) for block in model.transformer.h)
    )


def _is_tanh_gelu(activation: nn.Module) -> bool:
    if isinstance(activation, nn.GELU):
        return activation.approximate == "tanh"
    return isinstance(activation, NewGELUActivation)


def blocks_output(
    model: GPT2LMHeadModel, embedded: Tensor, first_keys: Tensor | None, *, recompute: bool = False
) -> Tensor:
    """What the blocks and the last layer norm make of embeddings [B, T, n_embd], in the type of autocast.

    Args:
        first_keys: as for `Shape`.
        recompute: compute again in the backward pass what else would be kept.
    """
    transformer = model.transformer
    windows, length, width = embedded.shape
    blocks: list[Any] = list(transformer.h)
    shape = Shape(
        windows,
        length,
        model.config.n_head,
        width,
        matrix_type(),
        transformer.ln_f.eps,
        tuple(_dropouts(blocks, model.training)),
        None if first_keys is None else first_keys.contiguous(),
    )
    parameters = [parameter for block in blocks for parameter in _parameters(block)]
    return Blocks.apply(embedded, shape, recompute, *parameters, transformer.ln_f.weight, transformer.ln_f.bias)


def _dropouts(blocks: list[GPT2Block], training: bool) -> Iterator[tuple[Dropout, Dropout, Dropout]]:
    for block in blocks:
        modules = (block.attn.attn_dropout, block.attn.resid_dropout, block.mlp.dropout)
        if not training or not any(module.p for module in modules):
            yield Dropout(), Dropout(), Dropout()
            continue
        seeds = torch.empty(3, dtype=torch.int64).random_().tolist()
        attention, output, network = (
            Dropout(seed, round(module.p * 2**32)) if module.p else Dropout()
            for seed, module in zip(seeds, modules, strict=True)
        )
        yield attention, output, network


def _parameters(block: GPT2Block) -> list[nn.Parameter]:
    modules = (block.ln_1, block.attn.c_attn, block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj)
    return [parameter for module in modules for parameter in (module.weight, module.bias)]


class Branch(NamedTuple):
    """What a branch adds to the residual stream: [rows, width] without its bias."""

    product: Tensor
    bias: Tensor
    dropout: Dropout


class Norm:
    """A layer norm of the residual stream, to which what the branch before gives is added first."""

    def __init__(self, shape: Shape, stream: Tensor, branch: Branch | None, weight: Tensor, bias: Tensor) -> None:
        self._shape, self._weight = shape, weight
        rows, width = shape.rows, shape.width
        self.normal = shape.new(rows, width)
        self._means, self._inverses = torch.empty(rows), torch.empty(rows)
        product, branch_bias, dropout = branch or (None, None, Dropout())
        self.stream = stream if product is None else torch.empty(rows, width)
        run(
            Operation.NORMALIZE,
            shape.dtype,
            rows,
            rows * width,
            stream,
            width,
            product,
            branch_bias,
            self.stream,
            weight,
            bias,
            self.normal,
            self._means,
            self._inverses,
            torch.tensor([shape.epsilon, dropout.scale]),
            *dropout,
        )

    def backward(
        self, outer: Tensor, to_stream: Tensor | None, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Gradients of the stream, of the branch's product (None without a branch), of the weight and of the bias.

        Args:
            outer: the gradient of what is normalized.
            to_stream: that of the stream from behind; None for the last norm.
            dropout: of the branch before; None without one.
        """
        shape, rows, width = self._shape, self._shape.rows, self._shape.width
        portions = -(-rows // SUM_ROWS)
        result = torch.empty(rows, width)
        to_weight, to_bias = torch.empty(portions, width), torch.empty(portions, width)
        to_product = None if dropout is None else shape.new(rows, width)
        dropout = dropout or Dropout()
        run(
            Operation.NORMALIZE_BACKWARD,
            shape.dtype,
            portions,
            rows * width,
            outer,
            width,
            self.stream,
            self._weight,
            self._means,
            self._inverses,
            to_stream,
            result,
            to_weight,
            to_bias,
            rows,
            to_product,
            *dropout,
            torch.tensor([dropout.scale]),
        )
        return result, to_product, to_weight.sum(0), to_bias.sum(0)


class Attention:
    """Causal attention of products [rows, 3 width] of a block, which have no bias yet."""

    def __init__(self, shape: Shape, product: Tensor, bias: Tensor, dropout: Dropout) -> None:
        self._shape, self._dropout = shape, dropout
        self._parts = _split_heads(shape, product, bias, 3, shape.scale)
        self._weights: list[Tensor] | None = [] if shape.length <= LONGEST_KEPT else None
        queries, keys, values = self._parts
        output = shape.new(len(queries), shape.length, shape.head_size)
        for first, last in spans(shape.length):
            weights, kept = self._compute_weights(queries, keys, first, last)
            if self._weights is not None:
                self._weights.append(weights)
            output[:, first:last] = torch.bmm(weights if kept is None else kept, values[:, :last])
        self.output = _join_heads(shape, output[None], dropout.scale)

    def _compute_weights(self, queries: Tensor, keys: Tensor, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """The weights of a block of queries; and, with dropout, those that are kept."""
        shape = self._shape
        scores = torch.bmm(queries[:, first:last], keys[:, :last].mT)
        kept = torch.empty_like(scores) if self._dropout.threshold else None
        run(
            Operation.SOFTMAX,
            shape.dtype,
            len(scores),
            scores.numel(),
            scores,
            last - first,
            last,
            shape.heads,
            shape.length,
            shape.first_keys,
            kept,
            *self._dropout,
        )
        return scores, kept

    def backward(self, outer: Tensor) -> Tensor:
        """The gradient of the products from that of the output."""
        shape, dropout = self._shape, self._dropout
        queries, keys, values = self._parts
        (gradient,) = _split_heads(shape, outer, None, 1, dropout.scale)
        to_parts = torch.empty_like(self._parts)
        blocks = spans(shape.length)
        # Those of a key or value are summed over the blocks in float32.
        sums = torch.zeros(2, *keys.shape) if len(blocks) > 1 else None
        for number, (first, last) in enumerate(blocks):
            if self._weights is None:
                weights, kept = self._compute_weights(queries, keys, first, last)
            else:
                weights = self._weights[number]
                kept = torch.empty_like(weights) if dropout.threshold else None
            rows = gradient[:, first:last]
            to_scores = torch.bmm(rows, values[:, :last].mT)
            run(
                Operation.SOFTMAX_BACKWARD,
                shape.dtype,
                len(weights),
                weights.numel(),
                to_scores,
                last - first,
                last,
                shape.heads,
                shape.length,
                weights,
                kept,
                *dropout,
                shape.first_keys,
            )
            to_parts[0, :, first:last] = torch.bmm(to_scores, keys[:, :last])
            to_keys = torch.bmm(to_scores.mT, queries[:, first:last])
            to_values = torch.bmm((weights if kept is None else kept).mT, rows)
            if sums is None:
                to_parts[1], to_parts[2] = to_keys, to_values
            else:
                sums[0, :, :last] += to_keys
                sums[1, :, :last] += to_values
        if sums is not None:
            to_parts[1:] = sums
        return _join_heads(shape, to_parts, shape.scale)


def _split_heads(shape: Shape, joined: Tensor, bias: Tensor | None, count: int, scale: float) -> Tensor:
    """[rows, count * width] as [count, B * heads, T, head_size], the first part scaled."""
    parts = shape.new(count, shape.windows * shape.heads, shape.length, shape.head_size)
    sizes = (count, shape.windows, shape.heads, shape.length, shape.head_size)
    arguments = (joined, bias, parts, *sizes, torch.tensor([scale]))
    run(Operation.SPLIT_HEADS, shape.dtype, shape.rows, joined.numel(), *arguments)
    return parts


def _join_heads(shape: Shape, parts: Tensor, scale: float) -> Tensor:
    count = len(parts)
    joined = shape.new(shape.rows, count * shape.width)
    sizes = (count, shape.windows, shape.heads, shape.length, shape.head_size)
    arguments = (parts, joined, *sizes, torch.tensor([scale]))
    run(Operation.JOIN_HEADS, shape.dtype, shape.rows, joined.numel(), *arguments)
    return joined


class Network:
    """The feed-forward network's inner layer: products [rows, 4 width], their bias, GELU."""

    def __init__(self, shape: Shape, product: Tensor, bias: Tensor) -> None:
        self._shape, self._product, self._bias = shape, product, bias

    def take_output(self) -> Tensor:
        """It is not kept: the backward pass computes it again."""
        output, (rows, width) = torch.empty_like(self._product), self._product.shape
        run(Operation.GELU, self._shape.dtype, rows, output.numel(), self._product, width, self._bias, output)
        return output

    def backward(self, outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the product (in the place of `outer`) and of the bias; and the output."""
        rows, width = self._product.shape
        portions = -(-rows // SUM_ROWS)
        sums, output = torch.empty(portions, width), torch.empty_like(self._product)
        arguments = (self._product, width, self._bias, outer, sums, rows, output)
        run(Operation.GELU_BACKWARD, self._shape.dtype, portions, outer.numel(), *arguments)
        return outer, sums.sum(0), output


def _sum_of_rows(numbers: Tensor) -> Tensor:
    """The sums of the columns, in float32."""
    rows, width = numbers.shape
    portions = -(-rows // SUM_ROWS)
    sums = torch.empty(portions, width)
    run(Operation.SUM_OF_ROWS, numbers.dtype, portions, numbers.numel(), numbers, width, sums, rows)
    return sums.sum(0)


class Block:
    """One block, forward, with what its backward pass needs."""

    def __init__(
        self,
        shape: Shape,
        stream: Tensor,
        branch: Branch | None,
        parameters: Sequence[Tensor],
        dropouts: tuple[Dropout, Dropout, Dropout],
    ) -> None:
        (norm_1, norm_1_bias, qkv, qkv_bias, projection, projection_bias) = parameters[:6]
        (norm_2, norm_2_bias, up, up_bias, down, down_bias) = parameters[6:]
        self._dropout = dropouts[1]
        self._weights = [weight.to(shape.dtype) for weight in (qkv, projection, up, down)]
        self._first = Norm(shape, stream, branch, norm_1, norm_1_bias)
        self._attention = Attention(shape, self._first.normal @ self._weights[0], qkv_bias, dropouts[0])
        branch = Branch(self._attention.output @ self._weights[1], projection_bias, dropouts[1])
        self._second = Norm(shape, self._first.stream, branch, norm_2, norm_2_bias)
        self._network = Network(shape, self._second.normal @ self._weights[2], up_bias)
        self.branch = Branch(self._network.take_output() @ self._weights[3], down_bias, dropouts[2])

    @property
    def beginning(self) -> Tensor:
        """The residual stream that the block reads."""
        return self._first.stream

    @property
    def stream(self) -> Tensor:
        """The residual stream that `branch` is to be added to."""
        return self._second.stream

    def backward(
        self, to_stream: Tensor, to_product: Tensor, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Gradients of the stream, of the product of the branch before, and of the parameters in their order.

        Args:
            to_stream: of the stream behind the block.
            to_product: of the product that `branch` has.
            dropout: of the branch before; None without one.
        """
        qkv, projection, up, down = self._weights
        of_down_bias = _sum_of_rows(to_product)
        to_up, of_up_bias, output = self._network.backward(to_product @ down.T)
        of_down = output.T @ to_product
        of_up = self._second.normal.T @ to_up
        to_stream, to_attended, *of_second = self._second.backward(to_up @ up.T, to_stream, self._dropout)
        assert to_attended is not None
        of_projection, of_projection_bias = self._attention.output.T @ to_attended, _sum_of_rows(to_attended)
        to_qkv = self._attention.backward(to_attended @ projection.T)
        of_qkv, of_qkv_bias = self._first.normal.T @ to_qkv, _sum_of_rows(to_qkv)
        to_stream, to_before, *of_first = self._first.backward(to_qkv @ qkv.T, to_stream, dropout)
        matrices = [*of_first, of_qkv, of_qkv_bias, of_projection, of_projection_bias]
        matrices += [*of_second, of_up, of_up_bias, of_down, of_down_bias]
        return to_stream, to_before, [gradient.float() for gradient in matrices]


class Blocks(torch.autograd.Function):
    """All blocks and the last layer norm as one function.

    Its parameters are, for each block, those of `_parameters`, and then the last norm's. With `recompute` a block keeps
    the stream that it reads and computes the rest again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, embedded: Tensor, shape: Shape, recompute: bool, *parameters: Tensor) -> Tensor:
        stream = embedded.reshape(shape.rows, shape.width).contiguous()
        branch: Branch | None = None
        kept: list[Block | Tensor] = []
        own = [parameters[first : first + OF_BLOCK] for first in range(0, len(parameters) - 2, OF_BLOCK)]
        with torch.autocast("cpu", enabled=False):
            for of_block, dropouts in zip(own, shape.dropouts, strict=True):
                block = Block(shape, stream, branch, of_block, dropouts)
                stream, branch = block.stream, block.branch
                kept.append(block.beginning if recompute else block)
            last = Norm(shape, stream, branch, parameters[-2], parameters[-1])
        ctx.shape, ctx.own, ctx.kept, ctx.last = shape, own, kept, last
        return last.normal.view(embedded.shape)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.last is not None, "a second backward pass over the same blocks"
        shape: Shape = ctx.shape
        normal = outer[0].reshape(shape.rows, shape.width).to(shape.dtype).contiguous()
        before: list[Dropout | None] = [None, *(dropouts[2] for dropouts in shape.dropouts)]
        to_stream, to_product, *gradients = ctx.last.backward(normal, None, before.pop())
        while ctx.kept:
            block, parameters = ctx.kept.pop(), ctx.own.pop()
            if isinstance(block, Tensor):
                block = Block(shape, block, None, parameters, shape.dropouts[len(ctx.kept)])
            to_stream, to_product, of_block = block.backward(to_stream, to_product, before.pop())
            gradients = of_block + gradients
        ctx.last = None
        return to_stream.view(outer[0].shape), None, None, *gradients
