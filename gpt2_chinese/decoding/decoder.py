"""GPT-2's forward pass for decoding: prefill of one prompt, and steps of one token for many rows over fixed buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_chinese.decoding.sampling import CompiledDraw

PADDINGS = (1, 2, 4, 8, 16)
PROMPT_LOGITS = 64  # rows of logits at a time where all of a prompt's are wanted


@dataclass(frozen=True)
class Prefix:
    """What a prefill of `length` tokens leaves: keys and values as its decoder keeps them, and the logits [V]."""

    keys: Any
    values: Any
    logits: Tensor
    length: int


@dataclass(frozen=True)
class _Layer:
    norm_1: tuple[Tensor, Tensor]
    attention_in: tuple[Tensor, Tensor]
    attention_out: tuple[Tensor, Tensor]
    norm_2: tuple[Tensor, Tensor]
    feed_in: tuple[Tensor, Tensor]
    feed_out: tuple[Tensor, Tensor]
    scale: float


class Decoder:
    """A GPT2LMHeadModel's weights, laid out for decoding, and a key-value buffer of `rows` sequences.

    Rows 0 to B-1 are in use; whoever calls keeps them dense (see `copy_row`). A row's logits are the same to the last
    bit whatever the other rows hold and however many there are: each row attends over its own length only, and the
    batch is filled up to a multiple of `padding` rows, found by trying which sizes give the same products here.
    """

    tried = 1
    """Batches of each size that are tried for that."""
    compiled_draw: CompiledDraw | None = None
    """What draws tokens from the logits where PyTorch does not; see compiled_decoder.py."""

    def __init__(self, model: Any, rows: int, dtype: torch.dtype | None = None) -> None:
        """Take the weights of `model` (a transformers GPT2LMHeadModel) on its device, in `dtype` or else in its own.

        Raises:
            ValueError: the model has cross-attention, or weights that are not finite.
        """
        check_model(model)
        dtype = dtype or model.lm_head.weight.dtype
        config = model.config
        body = model.transformer
        self.token_embedding = body.wte.weight.detach().to(dtype)
        self.position_embedding = body.wpe.weight.detach().to(dtype)
        tied = body.wte.weight.data_ptr() == model.lm_head.weight.data_ptr()
        self.head = self.token_embedding if tied else model.lm_head.weight.detach().to(dtype)
        self.norm = _pair(body.ln_f, dtype)
        self.layers = [_layer(block, dtype) for block in body.h]
        self.activation = _activation(config.activation_function, body)
        self.epsilon = config.layer_norm_epsilon
        # Positions behind n_ctx, where there are any, were never trained.
        self.n_ctx = min(getattr(config, "n_ctx", config.n_positions), config.n_positions)
        self.n_head = config.n_head
        self.head_size = config.n_embd // config.n_head
        self.vocab_size = self.head.shape[0]
        self.device = self.head.device
        self.dtype = self.head.dtype
        self.rows = rows
        self._make_room()

    def _make_room(self) -> None:
        """Make the buffers of the rows, and find out how far a batch is filled up."""
        shape = (self.rows, self.n_head, self.n_ctx, self.head_size)
        self.keys = [self._buffer(shape) for _ in self.layers]
        self.values = [self._buffer(shape) for _ in self.layers]
        self.padding = self._find_padding()

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # NumPy's zeros take no memory until they are written, torch's do: 75 MB a row for GPT-2 small.
        size = int(np.prod(shape)) * self.dtype.itemsize
        return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(self.dtype).view(shape)

    @torch.inference_mode()
    def _find_padding(self) -> int:
        """The smallest multiple to fill batches up to so that a row's products do not depend on the batch's size.

        The libraries choose another kernel for one row, few rows and many, which round differently; a seed would give
        another text in a crowd.
        """
        layer = self.layers[0]
        products: list[tuple[Tensor, Tensor | None]] = [
            layer.attention_in,
            layer.attention_out,
            layer.feed_in,
            layer.feed_out,
            (self.head, None),
        ]
        generator = torch.Generator().manual_seed(0)
        for padding in PADDINGS:
            most = -(-self.rows // padding) * padding
            for weight, bias in products:
                inputs = torch.randn(most, weight.shape[1], generator=generator).to(self.device, self.dtype)
                whole = F.linear(inputs, weight, bias)
                if not all(
                    torch.equal(F.linear(part.clone(), weight, bias), expected)
                    for size in range(padding, most, padding)
                    for part, expected in list(zip(inputs.split(size), whole.split(size), strict=True))[: self.tried]
                ):
                    break
            else:
                return padding
        return self.rows

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> Prefix:
        """Run one prompt of 1 to `n_ctx` tokens; the buffers of the rows are not touched."""
        hidden, keys, values = self._read(ids)
        return Prefix(keys, values, self._logits(hidden[-1:])[0], len(ids))

    @torch.inference_mode()
    def prompt_logits(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """The logits behind every token of a prompt, in parts [tokens, V]; the buffers of the rows are not touched."""
        hidden, _, _ = self._read(ids)
        for part in hidden.split(PROMPT_LOGITS):
            yield self._logits(part)

    def _read(self, ids: Sequence[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The hidden states [N, n_embd] of a prompt, and each layer's keys and values."""
        assert 1 <= len(ids) <= self.n_ctx
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attention(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            keys.append(k[0])
            values.append(v[0])
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.layers[number].scale)
            return mixed[0].transpose(0, 1)

        tokens = torch.tensor(ids, device=self.device)
        hidden = self.token_embedding[tokens] + self.position_embedding[: len(ids)]
        return self._blocks(hidden, attention), keys, values

    def close(self) -> None:
        """Nothing to end; CompiledDecoder has threads."""

    def prefill_rows(self, prompts: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Run prompts into the buffers of rows, given as (row, ids); give their logits [prompts, V]."""
        logits = []
        for row, ids in prompts:
            prefix = self.prefill(ids)
            self.load(row, prefix)
            logits.append(prefix.logits)
        return torch.stack(logits)

    def load(self, row: int, prefix: Prefix) -> None:
        """Copy a prefix into a row's buffers."""
        for buffers, parts in ((self.keys, prefix.keys), (self.values, prefix.values)):
            for buffer, part in zip(buffers, parts, strict=True):
                buffer[row, :, : prefix.length] = part

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row to another."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :length] = buffer[source, :, :length]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Give row i its next token, `tokens[i]`, behind the `lengths[i]` tokens it holds, for the first B rows.

        Returns:
            Logits [B, V] in float32.
        """
        batch = len(tokens)
        assert batch == len(lengths) <= self.rows and max(lengths) < self.n_ctx
        filling = [0] * (-batch % self.padding)
        positions = torch.tensor([*lengths, *filling], device=self.device)
        runs = _runs(lengths)
        row_numbers = torch.arange(batch, device=self.device)

        def attention(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[number], self.values[number]
            keys[row_numbers, :, positions[:batch]] = k[:batch]
            values[row_numbers, :, positions[:batch]] = v[:batch]
            mixed = torch.zeros_like(q)
            for start, stop, length in runs:
                mixed[start:stop] = F.scaled_dot_product_attention(
                    q[start:stop, :, None],
                    keys[start:stop, :, :length],
                    values[start:stop, :, :length],
                    scale=self.layers[number].scale,
                )[:, :, 0]
            return mixed

        ids = torch.tensor([*tokens, *filling], device=self.device)
        hidden = self._blocks(self.token_embedding[ids] + self.position_embedding[positions], attention)
        return self._logits(hidden)[:batch]

    def _blocks(self, hidden: Tensor, attention: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """All layers over `hidden` [N, n_embd]; `attention` gets a layer's number and q, k, v [N, heads, head size]."""
        for number, layer in enumerate(self.layers):
            mixed = F.linear(self._norm(hidden, layer.norm_1), *layer.attention_in)
            q, k, v = mixed.view(len(hidden), 3, self.n_head, self.head_size).unbind(1)
            mixed = attention(number, q, k, v).reshape(len(hidden), -1)
            hidden = hidden + F.linear(mixed, *layer.attention_out)
            mixed = self.activation(F.linear(self._norm(hidden, layer.norm_2), *layer.feed_in))
            hidden = hidden + F.linear(mixed, *layer.feed_out)
        return hidden

    def _norm(self, hidden: Tensor, weight_and_bias: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(hidden, hidden.shape[-1:], *weight_and_bias, self.epsilon)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self._norm(hidden, self.norm), self.head)[:, : self.vocab_size].float()


def _runs(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbouring rows of equal length as (start, stop, length with the new token).

    Example:
        >>> _runs([7, 7, 3])
        [(0, 2, 8), (2, 3, 4)]
    """
    runs = []
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or lengths[stop] != lengths[start]:
            runs.append((start, stop, lengths[start] + 1))
            start = stop
    return runs


def _pair(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return module.weight.detach().to(dtype), module.bias.detach().to(dtype)


def _transposed(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A Conv1D's weight as F.linear wants it: (out, in), contiguous."""
    weight, bias = _pair(module, dtype)
    return weight.t().contiguous(), bias


def _layer(block: Any, dtype: torch.dtype) -> _Layer:
    return _Layer(
        norm_1=_pair(block.ln_1, dtype),
        attention_in=_transposed(block.attn.c_attn, dtype),
        attention_out=_transposed(block.attn.c_proj, dtype),
        norm_2=_pair(block.ln_2, dtype),
        feed_in=_transposed(block.mlp.c_fc, dtype),
        feed_out=_transposed(block.mlp.c_proj, dtype),
        scale=block.attn.scaling,
    )


def _activation(name: str, body: Any) -> Callable[[Tensor], Tensor]:
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return lambda hidden: F.gelu(hidden, approximate="tanh")
    return body.h[0].mlp.act


def check_model(model: Any) -> None:
    """Raise ValueError for a model that cannot be decoded: cross-attention, or weights that are not finite."""
    if model.config.add_cross_attention:
        raise ValueError("the model has cross-attention; only a plain GPT-2 can be decoded")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(
                f"the model's weight {name} has values that are not finite: its training diverged; "
                "take an earlier model_epoch folder, or train again with a smaller --lr"
            )
