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
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from gpt2_chinese.artifacts import exclusive
from gpt2_chinese.checkpoint import check_replaceable, find_config, load_model, read_config, save_model
from gpt2_chinese.command_line import print_settings, run_script
from gpt2_chinese.pieces import check_vocabulary, epoch_order, read_manifest, read_pieces, window_starts
from gpt2_chinese.tokenizer import Tokenizer

DEFAULT_VOCABULARY = Path("vocab/vocab_user.txt")
LONGEST_WARMUP = 2000  # updates, unless --warmup_steps says otherwise
CAUSAL_ATTENTION = "causal"
FINAL_MODEL, INTERRUPTED_MODEL = "final_model", "interrupted"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what is read
    parser.add_argument(
        "--tokenized_data_path", default="tokenized/", help="folder of the pieces (default: %(default)s)"
    )
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
        "--pretrained_model",
        default="",
        help="model folder to go on from, ours or GPT2-Chinese's (default: a new model)",
    )
    # what is written
    parser.add_argument("--output_dir", default="model/", help="folder of the model folders (default: %(default)s)")
    parser.add_argument(
        "--writer_dir", default="tensorboard_summary/", help="TensorBoard folder (default: %(default)s)"
    )
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
        help="tokens from one window to the next, at most n_ctx - 1; a quarter of n_ctx shows a small corpus at other "
        "positions too, instead of being learnt by heart at one (default: %(default)s)",
    )
    parser.add_argument(
        "--lr", type=_positive_number, default=1.5e-4, help="highest learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--warmup_steps",
        type=_not_negative,
        help=f"updates until the learning rate is highest (default: {LONGEST_WARMUP}, at most a tenth of the run)",
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
        help="GPUs, of which those present are used; cpu; cpu,cpu for two processes there (default: %(default)s)",
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


class WindowLoss(nn.Module):
    """A GPT-2 that answers windows with the sum of their tokens' losses, in nats.

    The sum, not the mean: over micro-batches and ranks of different sizes the sums add up to the exact mean.
    """

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        # Registered without a mask function, so transformers passes no mask, compiled or not.
        AttentionInterface.register(CAUSAL_ATTENTION, causal_attention)
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
    weight: float = 1.0,
    world_size: int = 1,
) -> Update:
    """One update of the weights: the mean loss over all windows of the update, of all micro-batches and ranks.

    Args:
        window_loss: `WindowLoss`, or DistributedDataParallel round it.
        micro_batches: this rank's, at least one; int64 [windows, n_ctx], on the device.
        predicted_tokens: of the update, over all ranks.
        weight: 0 for a rank that has no window of its own and only takes part in the exchange of gradients.
    """
    total = torch.zeros((), device=micro_batches[0].device)
    for number, input_ids in enumerate(micro_batches, start=1):
        exchange: AbstractContextManager[Any] = nullcontext()
        if isinstance(window_loss, DistributedDataParallel) and number < len(micro_batches):
            exchange = window_loss.no_sync()  # gradients meet once per update
        with exchange:
            with precision.autocast():
                loss = window_loss(input_ids) * (weight / predicted_tokens)
            # DistributedDataParallel takes the mean over the ranks, the parts of a mean must be added.
            precision.backward(loss * world_size, optimizer)
        total += loss.detach()
    norm = precision.step(optimizer, max_grad_norm)
    optimizer.zero_grad(set_to_none=True)
    return Update(total, norm)


# ---------------------------------------------------------------------------------------------------------------------
# What is decided once, before the first update.


@dataclass(frozen=True)
class Run:
    """What every rank must know, read and checked before the first of them starts."""

    args: argparse.Namespace
    devices: list[torch.device]
    precision: str
    vocab_file: Path
    config: GPT2Config
    tokenizer: Tokenizer
    tokens: torch.Tensor  # all ids; a tensor, so that ranks share its memory
    starts: np.ndarray  # of the windows in `tokens`
    stride: int

    @property
    def windows_per_update(self) -> int:
        return self.args.batch_size * self.args.gradient_accumulation

    @property
    def updates_per_epoch(self) -> int:
        return math.ceil(len(self.starts) / self.windows_per_update)

    @property
    def total_steps(self) -> int:
        return self.updates_per_epoch * self.args.epochs

    @property
    def warmup_steps(self) -> int:
        if self.args.warmup_steps is not None:
            return int(self.args.warmup_steps)
        return min(LONGEST_WARMUP, self.total_steps // 10)


def choose_devices(text: str) -> tuple[list[torch.device], str]:
    """Turn `--device` into devices, and say what of it is not there.

    Raises:
        ValueError: not a list of GPU numbers and not `cpu`, or none of the GPUs is there.
    """
    names = [name.strip() for name in text.split(",")]
    if all(name == "cpu" for name in names):
        return [torch.device("cpu")] * len(names), ""
    if not all(name.isascii() and name.isdigit() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"--device {text}: give numbers of GPUs, as 0 or 0,1, or cpu")
    count = torch.cuda.device_count()
    if count == 0:
        return [torch.device("cpu")], "no CUDA GPU is to be seen: training on the CPU"
    present = [name for name in names if int(name) < count]
    if not present:
        raise ValueError(f"--device {text}: this machine has {count} GPUs, numbered from 0")
    missing = [name for name in names if name not in present]
    note = f"GPU {', '.join(missing)} is not there: training on {', '.join(present)}" if missing else ""
    return [torch.device("cuda", int(name)) for name in present], note


def choose_precision(args: argparse.Namespace, device: torch.device) -> tuple[str, str]:
    """Give fp32, bf16, fp16 or fp16-only (O3), and what there is to say about it.

    Raises:
        ValueError: flags that contradict each other.
    """
    if args.fp16 and args.precision not in ("auto", "fp16"):
        raise ValueError(f"--fp16 and --precision {args.precision} contradict each other: leave one out")
    if args.fp16 or args.precision == "fp16":
        level = args.fp16_opt_level
        if args.amp_backend == "apex":
            return "fp16", f"fp16 by apex, {level}"
        if level == "O2":
            return "fp16", "O2 is computed as O1: torch has no fp16 weights with fp32 masters"
        return {"O0": "fp32", "O1": "fp16", "O3": "fp16-only"}[level], f"--fp16_opt_level {level}"
    if args.amp_backend == "apex":
        raise ValueError("--amp_backend apex is for fp16: add --fp16, or leave it out")
    if args.precision != "auto":
        return args.precision, ""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return ("bf16", "") if native else ("fp32", f"this {device.type.upper()} has no bf16 instructions")


def load_apex() -> ModuleType:
    """Import `apex.amp`.

    Raises:
        ValueError: it is not there, with the reason why it hardly can be.
    """
    try:
        return importlib.import_module("apex.amp")
    except ImportError as error:
        raise ValueError(
            f"--amp_backend apex: {error}. NVIDIA removed amp from apex in May 2025 (and the package `apex` on PyPI is "
            "another program); leave the flag out, torch has had the same inside since 1.6"
        ) from error


def effective_stride(stride: int, n_ctx: int) -> int:
    """The stride that leaves no token out: one less than a window, since a window's first token is not predicted."""
    return min(stride, n_ctx - 1)


def build_model(args: argparse.Namespace, vocab_file: Path, vocab_size: int) -> GPT2LMHeadModel:
    """Make a new model of `--model_config`, the same for the same seed, or read `--pretrained_model`."""
    if args.pretrained_model:
        return load_model(args.pretrained_model, vocab_file=vocab_file)[0]
    torch.manual_seed(args.seed)
    return GPT2LMHeadModel(read_config(args.model_config, vocab_size=vocab_size))


def prepare(args: argparse.Namespace, world_size: int, say: Callable[[str], None]) -> tuple[Run, GPT2LMHeadModel]:
    """Read and check everything, tell what will be done, and build the model; `world_size` is 0 without torchrun."""
    # 1) what costs nothing to check: the devices, the places to write to, the model's shape
    devices, note = choose_devices(args.device)
    if note:
        say(f"note: {note}")
    ranks = world_size or len(devices)
    if args.batch_size < ranks:
        raise ValueError(f"--batch_size {args.batch_size} is less than a window for each of {ranks} devices; raise it")
    precision, precision_note = choose_precision(args, devices[0])
    if args.amp_backend == "apex":
        load_apex()
    output = Path(args.output_dir)
    for name in [FINAL_MODEL, INTERRUPTED_MODEL, *(epoch_name(epoch) for epoch in range(args.epochs))]:
        check_replaceable(output / name)
    source = Path(args.pretrained_model or args.model_config)
    config_file = find_config(source) if args.pretrained_model else source
    n_ctx = read_config(config_file).n_ctx
    if n_ctx < 2:
        raise ValueError(f"{config_file}: n_ctx is {n_ctx}, and a window needs a token to predict another from")

    # 2) the vocabulary and the corpus
    folder = Path(args.tokenized_data_path)
    manifest = read_manifest(folder)
    vocab_file = Path(args.vocab_file or DEFAULT_VOCABULARY)
    if args.vocab_file is None and manifest is not None and Path(manifest["vocabulary"]["path"]).is_file():
        vocab_file = Path(manifest["vocabulary"]["path"])
    # Pieces without a manifest are the reference's, and so is the way to cut a context for their model.
    compat = manifest is None or bool(manifest["options"]["compat"])
    tokenizer = Tokenizer.from_file(vocab_file, compat=compat)
    check_vocabulary(folder, manifest, vocab_file)
    corpus = read_pieces(folder, vocab_size=len(tokenizer), manifest=manifest)
    stride = effective_stride(args.stride, n_ctx)
    starts = window_starts(corpus.piece_lengths, n_ctx, stride)
    if len(starts) == 0:
        raise ValueError(
            f"{folder} has {len(corpus.tokens):,} tokens, and one window has {n_ctx:,} (n_ctx in {config_file}): "
            "there is nothing to train on. Put more text into data/ (100,000 characters are a small corpus) and run "
            "build_trainfile.py, make-vocab.py and make-tokenized.py again, or take a --model_config with a smaller "
            "n_ctx (config/model_config_mini.json has 128)"
        )

    # 3) the model
    model = build_model(args, vocab_file, len(tokenizer))
    run = Run(
        args=args,
        devices=devices,
        precision=precision,
        vocab_file=vocab_file,
        config=model.config,
        tokenizer=tokenizer,
        tokens=torch.from_numpy(corpus.tokens),
        starts=starts,
        stride=stride,
    )
    for line in describe(run, model, config_file, precision_note):
        say(line)
    return run, model


def describe(run: Run, model: GPT2LMHeadModel, config_file: Path, precision_note: str) -> Iterator[str]:
    """The resolved settings, a line each."""
    args, config = run.args, run.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield f"corpus     {args.tokenized_data_path}: {len(run.tokens):,} tokens"
    stated = read_config(config_file).vocab_size
    rows = f" (not the {stated:,} of {config_file})" if stated != len(run.tokenizer) else ""
    yield f"vocabulary {run.vocab_file}: {len(run.tokenizer):,} tokens{rows}"
    yield (
        f"model      {args.pretrained_model or config_file}: {config.n_layer} layers, {config.n_embd} wide, "
        f"{config.n_head} heads, n_ctx {config.n_ctx}, dropout {config.resid_pdrop:g}; {parameters:,} parameters"
    )
    clamped = f" (not {args.stride}, which would leave tokens out)" if run.stride != args.stride else ""
    yield (
        f"windows    {len(run.starts):,} of {config.n_ctx} tokens, one every {run.stride}{clamped}; "
        f"shuffled with seed {args.seed}"
    )
    yield (
        f"run        {args.epochs} epochs of {run.updates_per_epoch:,} updates = {run.total_steps:,} updates of "
        f"{args.batch_size} x {args.gradient_accumulation} windows"
    )
    yield (
        f"optimizer  AdamW, learning rate {args.lr:g} after {run.warmup_steps:,} updates of warm-up, then falling "
        f"to 0; gradients clipped to {args.max_grad_norm:g}"
    )
    where = ", ".join(str(device) for device in run.devices)
    yield f"computed   on {where} in {run.precision}{f' ({precision_note})' if precision_note else ''}"
    yield f"writes     {args.output_dir}, TensorBoard in {args.writer_dir} every {args.log_step} updates"


def epoch_name(epoch: int) -> str:
    """The folder of an epoch (from 0) within --output_dir; people count from 1."""
    return f"model_epoch{epoch + 1}"


# ---------------------------------------------------------------------------------------------------------------------
# The run.


class StopRequest:
    """Makes Ctrl-C and SIGTERM a wish that the loop grants after the update at hand; a second Ctrl-C breaks off."""

    def __init__(self) -> None:
        self.signal = 0

    def note(self, number: int, _: object) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def train_rank(rank: int, world_size: int, device: torch.device, run: Run, model: GPT2LMHeadModel) -> int:
    """Train as one of `world_size` processes; rank 0 reports and saves. Gives the exit status.

    Raises:
        ValueError: the loss is no number any more; what was saved before stays.
    """
    args, n_ctx, total_steps = run.args, run.config.n_ctx, run.total_steps
    tokens = run.tokens.numpy()
    torch.manual_seed(args.seed + rank)  # every rank drops out other neurons

    # 1) model, optimizer, precision
    model.to(device).train()
    if run.precision == "fp16-only":
        model.half()
    window_loss: nn.Module = WindowLoss(model)
    optimizer: torch.optim.Optimizer = make_optimizer(model, args.lr)
    apex = load_apex() if args.amp_backend == "apex" else None
    if apex is not None:
        window_loss, optimizer = apex.initialize(window_loss, optimizer, opt_level=args.fp16_opt_level)
    if world_size > 1:
        window_loss = DistributedDataParallel(window_loss, gradient_as_bucket_view=True)
    precision = Precision(run.precision, device, apex)

    def save(name: str, **facts: Any) -> Path:
        path = Path(args.output_dir) / name
        save_model(path, model, run.tokenizer, facts={**facts, "corpus_tokens": len(tokens), "settings": vars(args)})
        return path

    # 2) epochs of updates
    step = skipped = 0  # updates so far, and those of them that fp16 left out
    speed = 0.0  # tokens per second, of the last updates
    writer = SummaryWriter(args.writer_dir) if rank == 0 else None
    in_log_file = not sys.stderr.isatty()  # where every refresh is a line
    bar = tqdm(
        total=total_steps,
        unit=" updates",
        disable=rank > 0,
        dynamic_ncols=True,
        mininterval=10 if in_log_file else 0.1,
    )
    stop = StopRequest()
    with signal_handlers({signal.SIGINT: stop.note, signal.SIGTERM: stop.note}), bar, writer or nullcontext():
        for epoch in range(args.epochs):
            order = epoch_order(len(run.starts), seed=args.seed, epoch=epoch)
            epoch_loss, epoch_began = torch.zeros((), device=device), time.perf_counter()
            epoch_windows = log_windows = 0
            log_began = epoch_began
            for begin in range(0, len(order), run.windows_per_update):
                windows = run.starts[order[begin : begin + run.windows_per_update]]
                shares = share_of_rank(windows, rank, world_size, args.batch_size)
                micro_batches = [window_batch(tokens, share, n_ctx).to(device) for share in shares or [windows[:1]]]
                learning_rate = args.lr * learning_rate_factor(
                    step - skipped, warmup_steps=run.warmup_steps, total_steps=total_steps
                )
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                loss, grad_norm = train_update(
                    window_loss,
                    optimizer,
                    micro_batches,
                    predicted_tokens=len(windows) * (n_ctx - 1),
                    precision=precision,
                    max_grad_norm=args.max_grad_norm,
                    weight=1.0 if shares else 0.0,
                    world_size=world_size,
                )
                stopping = torch.tensor(float(stop.signal > 0), device=device)
                if world_size > 1:  # the loss is the sum of the parts, and all ranks stop if one was asked to
                    dist.all_reduce(shared := torch.stack([loss, stopping]))
                    loss, stopping = shared
                step += 1
                log_windows += len(windows)
                if precision.may_skip and not math.isfinite(grad_norm):
                    skipped += 1
                else:
                    epoch_loss += loss * len(windows)
                    epoch_windows += len(windows)
                if step % args.log_step == 0 or step == total_steps:
                    # Reading the figures waits for the GPU: a larger --log_step is faster.
                    if not precision.may_skip:
                        check_finite(step, loss=loss.item(), grad_norm=grad_norm.item())
                    now = time.perf_counter()
                    latest = log_windows * n_ctx / (now - log_began)
                    speed = latest if speed == 0 else 0.9 * speed + 0.1 * latest
                    log_began, log_windows = now, 0
                    if writer is not None:
                        writer.add_scalar("loss", loss.item(), step)
                        writer.add_scalar("learning_rate", learning_rate, step)
                        writer.add_scalar("gradient_norm", grad_norm.item(), step)
                        writer.add_scalar("tokens_per_second", latest, step)
                    bar.set_postfix_str(f"loss {loss.item():.3f}, {speed:,.0f} tokens/s", refresh=False)
                bar.update()

                if (stopping.item() if world_size > 1 else stop.signal) and step < total_steps:
                    if rank == 0:
                        path = save(INTERRUPTED_MODEL, epoch=epoch + 1, updates=step)
                        bar.write(
                            f"stopped after update {step:,} of {total_steps:,}: the model as it is now is in {path}; "
                            f"go on from its weights with --pretrained_model {path}"
                        )
                    return 128 + (stop.signal or signal.SIGINT)

            # 3) a model folder after each epoch
            seconds = time.perf_counter() - epoch_began
            if not epoch_windows:
                raise ValueError(f"every update of epoch {epoch + 1} overflowed in fp16; take --precision fp32 or bf16")
            mean = epoch_loss.item() / epoch_windows
            check_finite(step, loss=mean, grad_norm=0.0 if precision.may_skip else grad_norm.item())
            if rank == 0:
                path = save(epoch_name(epoch), epoch=epoch + 1, updates=step, loss=mean)
                bar.write(
                    f"epoch {epoch + 1} of {args.epochs}: loss {mean:.4f}, {seconds:,.0f} s, "
                    f"{len(order) * n_ctx / seconds:,.0f} tokens/s; saved {path}"
                    + (f"; fp16 overflowed and left out {skipped} updates so far" if skipped else "")
                )

    # 4) and at the end
    if rank == 0:
        path = save(FINAL_MODEL, epoch=args.epochs, updates=step, loss=mean)
        print(f"trained {step:,} updates; the model is in {path}: python generate.py --model_path {path}")
    return 0


def check_finite(step: int, *, loss: float, grad_norm: float) -> None:
    """Stop a run whose weights are lost before it saves them."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise ValueError(
            f"update {step}: the loss is {loss}, the norm of its gradient {grad_norm}; take a lower --lr (the model "
            "folders of earlier epochs are untouched)"
        )


@contextmanager
def process_group(rank: int, world_size: int, device: torch.device, address: str) -> Iterator[None]:
    """Join the other ranks, over NCCL on GPUs and gloo on the CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_spawned(rank: int, run: Run, address: str, outcome: Any) -> None:
    """A process started by `train_on_all`; rank 0 hands back the exit status, or what is wrong."""
    device, world_size = run.devices[rank], len(run.devices)
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    try:
        model = build_model(run.args, run.vocab_file, len(run.tokenizer))
        with process_group(rank, world_size, device, address):
            result: int | str = train_rank(rank, world_size, device, run, model)
    except ValueError as error:
        result = str(error)
    if rank == 0:
        outcome.put(result)


def train_on_all(run: Run) -> int:
    """Start a process for each device and wait for them; gives the exit status.

    Raises:
        ValueError: as in `train_rank`.
    """
    with tempfile.TemporaryDirectory() as folder:
        outcome = torch.multiprocessing.get_context("spawn").SimpleQueue()
        address = (Path(folder) / "ranks").as_uri()
        run.tokens.share_memory_()
        ranks = torch.multiprocessing.spawn(
            run_spawned, args=(run, address, outcome), nprocs=len(run.devices), join=False
        )

        def pass_on(number: int, _: object) -> None:
            for pid in ranks.pids():
                os.kill(pid, number)

        # A terminal sends Ctrl-C to every process; this one only waits while the ranks save.
        handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: pass_on}
        with signal_handlers(handlers):
            while not ranks.join():
                pass
        if outcome.empty():  # Ctrl-C before the ranks could listen
            raise KeyboardInterrupt
        result = outcome.get()
    if isinstance(result, str):
        raise ValueError(result)
    return int(result)


@contextmanager
def signal_handlers(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Install handlers and put the old ones back; nothing in a thread, where Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    by_torchrun = {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()
    rank, local_rank, world_size = (
        int(os.environ[name]) if by_torchrun else 0 for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    if rank == 0:
        print_settings(args)
    run, model = prepare(args, world_size, say=print if rank == 0 else lambda _: None)
    with exclusive(args.output_dir) if rank == 0 else nullcontext():
        if by_torchrun:
            on_cpu = run.devices[0].type == "cpu"
            if not on_cpu and local_rank >= len(run.devices):
                raise ValueError(f"--device {args.device} has no GPU for local rank {local_rank}; list one for each")
            device = run.devices[0 if on_cpu else local_rank]
            with process_group(rank, world_size, device, "env://"):
                return train_rank(rank, world_size, device, run, model)
        if len(run.devices) > 1:
            del model  # every rank builds its own
            return train_on_all(run)
        return train_rank(0, 1, run.devices[0], run, model)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


if __name__ == "__main__":
    run_script(main)
