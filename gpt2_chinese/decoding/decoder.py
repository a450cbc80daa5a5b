"""GPT-2's forward pass for decoding, in PyTorch: prefill of prompts, and decode steps of a batch over a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_chinese.decoding.prefix_cache import PrefixCache
from gpt2_chinese.decoding.sampling import CompiledSampler

PAD_MULTIPLES = (1, 2, 4, 8, 16)
PROMPT_LOGITS_CHUNK = 64  # tokens at a time where the logits of a whole prompt are computed


@dataclass(frozen=True)
class PrefilledPrompt:
    """The result of a prefill of `length` tokens, on its own, outside of any batch slot.

    Attributes:
        keys, values: of all layers, in the layout of the decoder that made them.
        logits: float32 [V], for the next token.
        ids: the tokens.
    """

    keys: Any
    values: Any
    logits: Tensor
    ids: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Layer:
    """Weights and biases of a block, named as transformers names them; matrices are (out, in)."""

    ln_1: tuple[Tensor, Tensor]
    c_attn: tuple[Tensor, Tensor]
    attn_c_proj: tuple[Tensor, Tensor]
    ln_2: tuple[Tensor, Tensor]
    c_fc: tuple[Tensor, Tensor]
    mlp_c_proj: tuple[Tensor, Tensor]
    scale: float  # of the attention scores


class Decoder:
    """The weights of a GPT2LMHeadModel and a KV cache of `max_num_seqs` batch slots.

    A batch of B sequences is in the slots 0 to B-1; the caller keeps them dense (see `copy_slot`).

    Batch invariance: the logits of a sequence are the same to the bit whatever the other slots hold and however many
    there are. Each sequence attends over its own length only, and the batch is padded to a multiple of
    `pad_to_multiple_of`, found by trying which sizes give the same matrix products on this device.
    """

    trial_batches = 1
    """Batches of each size that are compared for that."""
    vocab_alignment = 1
    """The rows of `lm_head` are padded to a multiple of this."""
    prefix_cache: PrefixCache | None = None
    """Reuses the keys and values of former prompts; see compiled_decoder.py.

    Here they depend to the bit on how many tokens are computed together, so that reuse would change a seed's texts.
    """
    compiled_sampler: CompiledSampler | None = None
    """Samples from the logits where PyTorch need not; see compiled_decoder.py."""

    def __init__(self, model: Any, max_num_seqs: int, dtype: torch.dtype | None = None) -> None:
        """Take the weights of `model` (a transformers GPT2LMHeadModel) on its device, in `dtype` or else in its own.

        Raises:
            ValueError: the model has cross-attention, or weights that are not finite.
        """
        check_model(model)
        dtype = dtype or model.lm_head.weight.dtype
        config = model.config
        body = model.transformer
        self.wte = body.wte.weight.detach().to(dtype)
        self.wpe = body.wpe.weight.detach().to(dtype)
        tied = body.wte.weight.data_ptr() == model.lm_head.weight.data_ptr()
        self.lm_head = self.wte if tied else model.lm_head.weight.detach().to(dtype)
        self.vocab_size = self.lm_head.shape[0]
        if padding := -self.vocab_size % self.vocab_alignment:
            self.lm_head = F.pad(self.lm_head, (0, 0, 0, padding))
        self.ln_f = _weight_and_bias(body.ln_f, dtype)
        self.layers = [_layer(block, dtype) for block in body.h]
        self.activation = _activation(config.activation_function, body)
        self.epsilon = config.layer_norm_epsilon
        # n_positions may exceed n_ctx; the positions from n_ctx on were never trained.
        self.n_ctx = min(getattr(config, "n_ctx", config.n_positions), config.n_positions)
        self.n_head = config.n_head
        self.head_size = config.n_embd // config.n_head
        self.device = self.lm_head.device
        self.dtype = self.lm_head.dtype
        self.max_num_seqs = max_num_seqs
        self._allocate_kv_cache()
        self.pad_to_multiple_of = self._find_pad_multiple()

    def _allocate_kv_cache(self) -> None:
        """One tensor [slots, n_head, n_ctx, head_size] for the keys and one for the values of each layer."""
        shape = (self.max_num_seqs, self.n_head, self.n_ctx, self.head_size)
        self.key_cache = [self._lazy_zeros(shape) for _ in self.layers]
        self.value_cache = [self._lazy_zeros(shape) for _ in self.layers]

    def _lazy_zeros(self, shape: tuple[int, ...]) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # NumPy's zeros use no memory until they are written, unlike PyTorch's: 75 MB a slot for GPT-2 small.
        size = int(np.prod(shape)) * self.dtype.itemsize
        return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(self.dtype).view(shape)

    @torch.inference_mode()
    def _find_pad_multiple(self) -> int:
        """The smallest multiple to pad a batch to so that a row of a product does not depend on the batch's size.

        BLAS libraries have different kernels for one row, few rows and many, which round differently: without padding
        the same seed would give another text in a larger batch.
        """
        layer = self.layers[0]
        products: list[tuple[Tensor, Tensor | None]] = [
            layer.c_attn,
            layer.attn_c_proj,
            layer.c_fc,
            layer.mlp_c_proj,
            (self.lm_head, None),
        ]
        generator = torch.Generator().manual_seed(0)
        for multiple in PAD_MULTIPLES:
            largest = -(-self.max_num_seqs // multiple) * multiple
            for weight, bias in products:
                inputs = torch.randn(largest, weight.shape[1], generator=generator).to(self.device, self.dtype)
                whole = F.linear(inputs, weight, bias)
                if not all(
                    torch.equal(F.linear(part.clone(), weight, bias), expected)
                    for size in range(multiple, largest, multiple)
                    for part, expected in list(zip(inputs.split(size), whole.split(size), strict=True))[
                        : self.trial_batches
                    ]
                ):
                    break
            else:
                return multiple
        return self.max_num_seqs

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], *, store: bool = True) -> PrefilledPrompt:
        """Prefill one prompt of 1 to `n_ctx` tokens; the slots do not change.

        Args:
            store: whether a prefix cache, if the decoder has one, keeps the prompt.
        """
        hidden, keys, values = self._forward_prompt(ids)
        return PrefilledPrompt(keys, values, self._logits(hidden[-1:])[0], tuple(ids))

    @torch.inference_mode()
    def prompt_logits(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """The logits after every token of a prompt, in chunks [tokens, V]; the slots do not change."""
        hidden, _, _ = self._forward_prompt(ids)
        for part in hidden.split(PROMPT_LOGITS_CHUNK):
            yield self._logits(part)

    def _forward_prompt(self, ids: Sequence[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The hidden states [N, n_embd] of a prompt, and each layer's keys and values."""
        assert 1 <= len(ids) <= self.n_ctx
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            keys.append(k[0])
            values.append(v[0])
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.layers[layer].scale)
            return mixed[0].transpose(0, 1)

        tokens = torch.tensor(ids, device=self.device)
        return self._blocks(self.wte[tokens] + self.wpe[: len(ids)], attention), keys, values

    def close(self) -> None:
        """Nothing to end here; CompiledDecoder has threads."""

    def tokens_to_prefill(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt have to be computed now; fewer than it has only with a prefix cache."""
        return len(ids)

    def prefill_batch(self, prompts: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Prefill prompts, given as (slot, ids), into their slots; return their logits [prompts, V]."""
        logits = []
        for slot, ids in prompts:
            prefilled = self.prefill(ids)
            self.load_prefill(slot, prefilled)
            logits.append(prefilled.logits)
        return torch.stack(logits)

    def load_prefill(self, slot: int, prefilled: PrefilledPrompt) -> None:
        """Copy the keys and values of a prefilled prompt into a slot."""
        for caches, parts in ((self.key_cache, prefilled.keys), (self.value_cache, prefilled.values)):
            for cache, part in zip(caches, parts, strict=True):
                cache[slot, :, : prefilled.length] = part

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for cache in (*self.key_cache, *self.value_cache):
            cache[target, :, :length] = cache[source, :, :length]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """A decode step of the first B slots: append `tokens[i]` to the `lengths[i]` tokens of slot i.

        Returns:
            Logits [B, V] in float32.
        """
        batch = len(tokens)
        assert batch == len(lengths) <= self.max_num_seqs and max(lengths) < self.n_ctx
        padding = [0] * (-batch % self.pad_to_multiple_of)
        positions = torch.tensor([*lengths, *padding], device=self.device)
        runs = _runs(lengths)
        slots = torch.arange(batch, device=self.device)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.key_cache[layer], self.value_cache[layer]
            keys[slots, :, positions[:batch]] = k[:batch]
            values[slots, :, positions[:batch]] = v[:batch]
            mixed = torch.zeros_like(q)
            for start, stop, length in runs:
                mixed[start:stop] = F.scaled_dot_product_attention(
                    q[start:stop, :, None],
                    keys[start:stop, :, :length],
                    values[start:stop, :, :length],
                    scale=self.layers[layer].scale,
                )[:, :, 0]
            return mixed

        ids = torch.tensor([*tokens, *padding], device=self.device)
        return self._logits(self._blocks(self.wte[ids] + self.wpe[positions], attention))[:batch]

    def _blocks(self, hidden: Tensor, attention: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """All blocks over `hidden` [N, n_embd]; `attention` gets a layer's index and q, k, v [N, n_head, head_size]."""
        for index, layer in enumerate(self.layers):
            mixed = F.linear(self._layer_norm(hidden, layer.ln_1), *layer.c_attn)
            q, k, v = mixed.view(len(hidden), 3, self.n_head, self.head_size).unbind(1)
            mixed = attention(index, q, k, v).reshape(len(hidden), -1)
            hidden = hidden + F.linear(mixed, *layer.attn_c_proj)
            mixed = self.activation(F.linear(self._layer_norm(hidden, layer.ln_2), *layer.c_fc))
            hidden = hidden + F.linear(mixed, *layer.mlp_c_proj)
        return hidden

    def _layer_norm(self, hidden: Tensor, weight_and_bias: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(hidden, hidden.shape[-1:], *weight_and_bias, self.epsilon)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self._layer_norm(hidden, self.ln_f), self.lm_head)[:, : self.vocab_size].float()


def _runs(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of neighbouring slots of equal length, as (start, stop, length with the new token).

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


def _weight_and_bias(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return module.weight.detach().to(dtype), module.bias.detach().to(dtype)


def _conv1d(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A Conv1D's weight as F.linear takes it: (out, in), contiguous."""
    weight, bias = _weight_and_bias(module, dtype)
    return weight.t().contiguous(), bias


def _layer(block: Any, dtype: torch.dtype) -> _Layer:
    return _Layer(
        ln_1=_weight_and_bias(block.ln_1, dtype),
        c_attn=_conv1d(block.attn.c_attn, dtype),
        attn_c_proj=_conv1d(block.attn.c_proj, dtype),
        ln_2=_weight_and_bias(block.ln_2, dtype),
        c_fc=_conv1d(block.mlp.c_fc, dtype),
        mlp_c_proj=_conv1d(block.mlp.c_proj, dtype),
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
