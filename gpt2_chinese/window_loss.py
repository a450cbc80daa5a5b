"""The model as it is trained: windows in, their loss out, compiled where that pays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, GPT2LMHeadModel

CAUSAL_ATTENTION = "causal"


def causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for training: causal by a flag, so that no mask is ever built and the fast kernels apply."""
    assert attention_mask is None
    output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True)
    return output.transpose(1, 2), None


class WindowLoss(nn.Module):
    """A GPT-2 that answers windows with the sum of their tokens' losses, in nats.

    The sum, not the mean: over micro-batches and ranks of different sizes the sums add up to the exact mean.

    Args:
        rows: of the embedding, those that are tokens (see `pad_vocabulary`); None for all.
        recompute: compute activations and logits again in the backward pass instead of keeping them.
    """

    def __init__(self, model: GPT2LMHeadModel, *, rows: int | None = None, recompute: bool = False) -> None:
        super().__init__()
        # Registered without a mask function, so transformers passes no mask, compiled or not.
        AttentionInterface.register(CAUSAL_ATTENTION, causal_attention)
        model.set_attn_implementation(CAUSAL_ATTENTION)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = model
        self._rows = rows or model.config.vocab_size
        self._recompute = recompute
        self._compiled: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._compiled_shape: tuple[int, ...] = ()

    def compile_for(self, shape: tuple[int, ...]) -> None:
        """Compile for windows of this shape; others, as the last ones of an epoch, are not worth another minute."""
        self._compiled, self._compiled_shape = torch.compile(self._loss, dynamic=False), shape

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Take int64 [windows, n_ctx]; the first token of a window is not predicted, the last predicts nothing."""
        if self._compiled is not None and tuple(input_ids.shape) == self._compiled_shape:
            return self._compiled(input_ids)
        return self._loss(input_ids)

    def _loss(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.model.transformer(input_ids, use_cache=False).last_hidden_state
        if not self._recompute:
            return self._head_loss(hidden, input_ids)
        losses = [
            checkpoint(self._head_loss, hidden[row : row + 1], input_ids[row : row + 1], use_reentrant=False)
            for row in range(len(input_ids))
        ]
        return torch.stack(losses).sum()

    def _head_loss(self, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        # Sliced before the head: the logits are most of the memory.
        logits = self.model.lm_head(hidden[:, :-1])[..., : self._rows]
        return F.cross_entropy(logits.float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum")


def pad_vocabulary(model: GPT2LMHeadModel, multiple: int = 64) -> int:
    """Give the embedding rows that no token uses, up to a multiple that matrix products are fast at.

    Their logits are cut off before the loss, so they change no figure and stay 0. Gives the number of true rows.
    """
    rows = int(model.config.vocab_size)
    weight = model.transformer.wte.weight
    padded = F.pad(weight.detach(), (0, 0, 0, -rows % multiple))
    _set_embedding(model, nn.Parameter(padded))
    return rows


@contextmanager
def unpadded(model: GPT2LMHeadModel, rows: int) -> Iterator[GPT2LMHeadModel]:
    """The model with its true rows only, to be saved; it shares its memory with the one that is trained."""
    padded = model.transformer.wte.weight
    _set_embedding(model, nn.Parameter(padded.detach()[:rows]))
    try:
        yield model
    finally:
        _set_embedding(model, padded)


def _set_embedding(model: GPT2LMHeadModel, weight: torch.Tensor) -> None:
    """The embedding and the head, which are one matrix."""
    model.transformer.wte.weight = model.lm_head.weight = weight


def should_compile(
    choice: str, *, run_flops: float, device: torch.device, ranks: int = 1, recompute: bool = False
) -> bool:
    """Whether to compile; auto is always on a GPU, and on a CPU for runs of more than twenty minutes or so.

    Args:
        choice: auto, on or off.
        run_flops: operations of the whole run; a core of a CPU does some 5e10 of them a second.
    """
    if choice != "auto":
        return choice == "on"
    if recompute:
        return False
    if device.type == "cuda":
        return True
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    has_compiler = any(name and shutil.which(name) for name in compilers)
    return has_compiler and ranks == 1 and run_flops / (torch.get_num_threads() * 5e10) > 1200


def compiler_problem(device: torch.device) -> str:
    """Why torch.compile does not work here, found by compiling one line; empty where it does."""
    try:
        line = torch.compile(lambda x: (x * x).sum(), dynamic=False)
        line(torch.ones(8, device=device, requires_grad=True)).backward()
    except (RuntimeError, OSError, ImportError) as error:
        return str(error).strip().splitlines()[0]
    return ""
