#!/usr/bin/env python3
"""Trains a GPT-2 on the tokenized corpus and writes it as Hugging Face folders.

Reads   tokenized/tokenized_train_{i}.txt (with tokenized/manifest.json), vocab/vocab_user.txt,
        config/model_config*.json or a model folder to go on from
Writes  model/model_epoch{n}/ after each epoch, model/final_model/, tensorboard_summary/

    python train.py --model_config config/model_config_mini.json --epochs 10 --lr 1e-3
    python train.py --device 0,1 --batch_size 16 --pretrained_model model/final_model
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel

from gpt2_chinese.checkpoint import check_replaceable, load_model, read_config, save_model
from gpt2_chinese.command_line import INTERRUPTED, run_script
from gpt2_chinese.pieces import check_vocabulary, epoch_order, read_manifest, read_pieces, window_starts
from gpt2_chinese.tokenizer import Tokenizer

DEFAULT_VOCABULARY = Path("vocab/vocab_user.txt")
LONGEST_WARMUP = 2000  # updates, unless --warmup_steps says otherwise
CAUSAL_ATTENTION = "causal"
FINAL_MODEL, INTERRUPTED_MODEL = "final_model", "interrupted"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what is read
    parser.add_argument("--tokenized_data_path", default="tokenized/", help="folder of the pieces (default: %(default)s)")
    parser.add_argument(
        "--vocab_file",
        "--vocab_filename",
        help=f"vocabulary of the pieces (default: the one in their manifest, else {DEFAULT_VOCABULARY})",
    )
    parser.add_argument(
        "--model_config",
        default="config/model_config_small.json",
        help="shape of a new model (default: %(default)s)",
    )
    parser.add_argument(
        "--pretrained_model", default="", help="model folder to go on from, ours or GPT2-Chinese's (default: a new model)"
    )
    # what is written
    parser.add_argument("--output_dir", default="model/", help="folder of the model folders (default: %(default)s)")
    parser.add_argument("--writer_dir", default="tensorboard_summary/", help="TensorBoard folder (default: %(default)s)")
    parser.add_argument(
        "--log_step", type=_positive, default=1, help="updates between two TensorBoard points (default: %(default)s)"
    )
    # the run
    parser.add_argument("--epochs", type=_positive, default=5, help="times over the corpus (default: %(default)s)")
    parser.add_argument(
        "--batch_size",
        type=_positive,
        default=8,
        help="windows that go through the model at once, over all devices together (default: %(default)s)",
    )
    parser.add_argument(
        "--gradient_accumulation", type=_positive, default=1, help="batches in one update (default: %(default)s)"
    )
    parser.add_argument(
        "--stride",
        type=_positive,
        default=768,
        help="tokens from one window to the next, at most n_ctx - 1 (default: %(default)s)",
    )
    parser.add_argument("--lr", type=_positive_number, default=1.5e-4, help="highest learning rate (default: %(default)s)")
    parser.add_argument(
        "--warmup_steps",
        type=_not_negative,
        help=f"updates until the learning rate is at its highest (default: {LONGEST_WARMUP}, at most a tenth of the run)",
    )
    parser.add_argument(
        "--max_grad_norm", type=_positive_number, default=1.0, help="clip gradients to this norm (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=_not_negative,
        default=42,
        help="of the weights, the dropout and the order of windows (default: %(default)s)",
    )
    # where and how exactly it is computed
    parser.add_argument(
        "--device",
        default="0,1,2,3",
        help="GPUs, of which those present are used; cpu; or cpu,cpu for two processes on the CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto is bf16 where the device computes it natively, else fp32 (default: %(default)s)",
    )
    parser.add_argument("--fp16", action="store_true", help="the same as --precision fp16")
    parser.add_argument(
        "--fp16_opt_level",
        choices=["O0", "O1", "O2", "O3"],
        default="O1",
        help="with fp16: O0 computes in fp32, O1 in mixed precision with loss scaling, O2 as O1 (apex has another), "
        "O3 in fp16 throughout, which may not converge (default: %(default)s)",
    )
    parser.add_argument(
        "--amp_backend", choices=["torch", "apex"], default="torch", help="of fp16 (default: %(default)s)"
    )
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the loop. They take values, not `args`, and the tests check each against its oracle.


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


# Registered without a mask function, so transformers passes no mask, compiled or not.
AttentionInterface.register(CAUSAL_ATTENTION, causal_attention)


class WindowLoss(nn.Module):
    """A GPT-2 that answers windows with the sum of their tokens' losses, in nats.

    The sum, not the mean: over micro-batches and ranks of different sizes the sums add up to the exact mean.
    """

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        model.set_attn_implementation(CAUSAL_ATTENTION)
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Take int64 [windows, n_ctx]; the first token of a window is not predicted, the last predicts nothing."""
        hidden = self.model.transformer(input_ids, use_cache=False).last_hidden_state
        # Sliced before the head: the logits are most of the memory.
        logits = self.model.lm_head(hidden[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum")


def window_batch(tokens: np.ndarray, starts: np.ndarray, n_ctx: int) -> torch.Tensor:
    """Cut windows out of the corpus: int64 [len(starts), n_ctx]."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(n_ctx)].astype(np.int64))


def share_of_rank(starts: np.ndarray, rank: int, world_size: int, batch_size: int) -> list[np.ndarray]:
    """Split an update's windows into the micro-batches of one rank; every window is in exactly one of one rank.

    A micro-batch of all ranks together has `batch_size` windows. The list is empty if there are fewer windows than
    ranks.
    """
    own = starts[rank::world_size]
    size = math.ceil(batch_size / world_size)
    return [own[begin : begin + size] for begin in range(0, len(own), size)]


def learning_rate_factor(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """The share of the highest learning rate at update `step` (from 0): a line up from 0, then a line down to 0."""
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """The reference's AdamW, save that torch adds eps after the bias correction (docs/differences.md)."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, fused=True)


class Precision:
    """In which numbers the model is computed: what differs between fp32, bf16, fp16 and apex within an update."""

    def __init__(self, name: str, device: torch.device, apex: ModuleType | None = None) -> None:
        self.name = name
        self._device = device
        self._autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name) if apex is None else None
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16" and apex is None)
        self._apex = apex

    def autocast(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._autocast)

    def backward(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        if self._apex is None:
            self._scaler.scale(loss).backward()
        else:
            with self._apex.scale_loss(loss, optimizer) as scaled_loss:
                scaled_loss.backward()

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> torch.Tensor:
        """Unscale, clip and step, once per update; give the norm before clipping, inf or nan for a step left out."""
        self._scaler.unscale_(optimizer)
        norm = clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_grad_norm)
        self._scaler.step(optimizer)
        self._scaler.update()
        return norm

    @property
    def may_skip(self) -> bool:
        """Whether an update may be left out because fp16 overflowed, which is no mistake."""
        return self._scaler.is_enabled() or self._apex is not None


class Update(NamedTuple):
    loss: torch.Tensor  # this rank's part of the mean over the update's predicted tokens; the ranks' parts add up
    grad_norm: torch.Tensor  # before clipping


def train_update(
    window_loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[torch.Tensor],
    *,
    predicted_tokens: int,
    precision: Precision,
    max_grad_norm: float,
    world_size: int = 1,
) -> Update:
    """One update of the weights: the mean loss over all windows of the update, of all micro-batches and ranks.

    Args:
        window_loss: `WindowLoss`, or DistributedDataParallel round it.
        micro_batches: this rank's, at least one; int64 [windows, n_ctx], on the device.
        predicted_tokens: of the update, over all ranks.
    """
    total = torch.zeros((), device=micro_batches[0].device)
    for number, input_ids in enumerate(micro_batches, start=1):
        waits = isinstance(window_loss, DistributedDataParallel) and number < len(micro_batches)
        with window_loss.no_sync() if waits else nullcontext():  # gradients meet once per update
            with precision.autocast():
                loss = window_loss(input_ids) / predicted_tokens
            # DistributedDataParallel takes the mean over the ranks, the parts of a mean must be added.
            precision.backward(loss * world_size, optimizer)
        total += loss.detach()
    norm = precision.step(optimizer, max_grad_norm)
    optimizer.zero_grad(set_to_none=True)
    return Update(total, norm)
