#!/usr/bin/env python3
"""Trains a GPT-2 on the tokenized corpus and writes it as Hugging Face folders.

Reads   tokenized/tokenized_train_{i}.txt (with tokenized/manifest.json), vocab/vocab_user.txt,
        config/model_config*.json or a model folder to go on from
Writes  model/model_epoch{n}/ after each epoch, model/final_model/, model/checkpoints/step_{n}/ to go on from,
        model/metrics.jsonl, tensorboard_summary/

    python train.py --model_config config/model_config_mini.json --epochs 10 --lr 1e-3
    python train.py --device 0,1 --batch_size 16 --pretrained_model model/final_model
    python train.py --model_config config/model_config_mini.json --epochs 10 --lr 1e-3 --resume
    python train.py --eval_only --pretrained_model model/final_model --tokenized_data_path other/
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_chinese.allocator import keep_freed_memory
from gpt2_chinese.artifacts import exclusive, sha256_of
from gpt2_chinese.checkpoint import check_replaceable, find_config, load_model, read_config, save_model
from gpt2_chinese.command_line import print_settings, run_script
from gpt2_chinese.embedding_init import begin_at_cooccurrences
from gpt2_chinese.estimates import flops_per_token, learns_by_heart, memory_advice, memory_estimate, peak_flops
from gpt2_chinese.evaluation import Documents, complete, evaluate
from gpt2_chinese.metrics import Metrics
from gpt2_chinese.muon import Muon
from gpt2_chinese.pieces import (
    Corpus,
    check_vocabulary,
    epoch_order,
    read_manifest,
    read_pieces,
    text_of_tokens,
    window_starts,
)
from gpt2_chinese.precision import Precision, choose_devices, choose_precision, has_bf16, load_apex
from gpt2_chinese.tokenizer import Tokenizer
from gpt2_chinese.training_state import (
    check_settings,
    checkpoints_in,
    latest_whole,
    prune,
    random_state,
    read_checkpoint,
    set_random_state,
    verify,
    write_checkpoint,
)
from gpt2_chinese.vocabulary import MASK_ID
from gpt2_chinese.window_loss import WindowLoss, compiler_problem, pad_vocabulary, should_compile, unpadded

DEFAULT_VOCABULARY = Path("vocab/vocab_user.txt")
LONGEST_WARMUP = 2000  # updates, unless --warmup_steps says otherwise
FINAL_MODEL, CHECKPOINTS, METRICS = "final_model", "checkpoints", "metrics.jsonl"
SAVE_SECONDS = 600  # between checkpoints: what a power cut costs, whatever the speed of the machine
PADDED_DEVICES = {"cuda"}  # a CPU gains nothing by whole tiles
TIMED_UPDATES = 10  # before the run is said to take so long


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
    parser.add_argument(
        "--embedding_init",
        choices=["normal", "cooccurrence"],
        default="normal",
        help="where a new model's embedding begins: at random numbers as the other weights, or at vectors of which "
        "tokens stand beside which in the corpus, from where it learns faster (default: %(default)s)",
    )
    # what is written
    parser.add_argument("--output_dir", default="model/", help="folder of the model folders (default: %(default)s)")
    parser.add_argument(
        "--writer_dir", default="tensorboard_summary/", help="TensorBoard folder (default: %(default)s)"
    )
    parser.add_argument(
        "--log_step", type=_positive, default=1, help="updates between two TensorBoard points (default: %(default)s)"
    )
    parser.add_argument(
        "--save_steps",
        type=_not_negative,
        help="updates between two checkpoints, besides those after each epoch; 0 is none (default: one whenever "
        f"{SAVE_SECONDS // 60} minutes have passed)",
    )
    parser.add_argument(
        "--keep_checkpoints", type=_positive, default=2, help="how many stay, the latest (default: %(default)s)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|none|PATH",
        help="go on from the latest whole checkpoint of --output_dir, or from one that is named, exactly as if there "
        "had been no stop; none deletes the checkpoints of an interrupted run and starts anew (default: a new run, "
        "unless there is an interrupted one)",
    )
    # what is measured
    parser.add_argument(
        "--val_fraction",
        type=_fraction,
        default=0.01,
        help="share of the documents held out and measured after every epoch, at least one; 0 trains on all of them "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--val_steps",
        type=_not_negative,
        default=0,
        help="measure every so many updates too; 0 is after epochs only (default: %(default)s)",
    )
    parser.add_argument(
        "--sample_prompts",
        default="",
        help="texts to complete at every measurement, a file with one a line or a list with commas (default: none)",
    )
    parser.add_argument(
        "--eval_only",
        action="store_true",
        help="measure --pretrained_model on all documents of --tokenized_data_path, and train nothing",
    )
    # the run
    parser.add_argument("--epochs", type=_positive, default=5, help="times over the corpus (default: %(default)s)")
    parser.add_argument(
        "--max_steps",
        type=_not_negative,
        default=0,
        help="updates at the most, also in the middle of an epoch; 0 is no limit (default: %(default)s)",
    )
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
        "--schedule",
        choices=["linear", "wsd", "cosine"],
        default="linear",
        help="of the learning rate after the warm-up: a line down to 0; constant and then a line down to 0 over "
        "--decay_fraction of the run; half a cosine down to 0 (default: %(default)s)",
    )
    parser.add_argument(
        "--decay_fraction", type=_share, default=0.4, help="share of the run that wsd falls in (default: %(default)s)"
    )
    parser.add_argument(
        "--optimizer",
        choices=["adamw", "muon"],
        default="adamw",
        help="muon is Muon for the matrices of the layers and AdamW for the rest (default: %(default)s)",
    )
    parser.add_argument(
        "--muon_lr", type=_positive_number, help="highest learning rate of those matrices (default: --lr)"
    )
    parser.add_argument(
        "--max_bad_updates",
        type=_positive,
        default=3,
        help="stop after so many updates in a row whose loss or gradient is no number; none of them is applied "
        "(default: %(default)s)",
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
    parser.add_argument(
        "--compile",
        choices=["auto", "on", "off"],
        default="auto",
        help="torch.compile; auto is on for GPUs, and on a CPU with a C++ compiler for runs that are longer than it "
        "takes (default: %(default)s)",
    )
    parser.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="compute activations twice instead of keeping them: less memory, a third more time",
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


def window_batch(tokens: np.ndarray, starts: np.ndarray, n_ctx: int) -> torch.Tensor:
    """Cut windows out of the corpus: int64 [len(starts), n_ctx]."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(n_ctx)].astype(np.int64))


def to_device(input_ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a GPU from memory that is never paged out, so that the copy waits for no update; nothing on a CPU."""
    return input_ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else input_ids


def share_of_rank(starts: np.ndarray, rank: int, world_size: int, batch_size: int) -> list[np.ndarray]:
    """Split an update's windows into the micro-batches of one rank; every window is in exactly one of one rank.

    A micro-batch of all ranks together has `batch_size` windows. The list is empty if there are fewer windows than
    ranks.
    """
    own = starts[rank::world_size]
    size = math.ceil(batch_size / world_size)
    return [own[begin : begin + size] for begin in range(0, len(own), size)]


def learning_rate_factor(
    step: int, *, warmup_steps: int, total_steps: int, schedule: str = "linear", decay_fraction: float = 0.4
) -> float:
    """The share of the highest learning rate at update `step` (from 0): a line up from 0, then down to 0.

    Args:
        schedule: linear; wsd, which stays up and falls in a line over the last `decay_fraction` of the run; cosine.
    """
    if step < warmup_steps:
        return step / warmup_steps
    left = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    if schedule == "wsd":
        return min(1.0, max(0, total_steps - step) / max(1.0, decay_fraction * total_steps))
    if schedule == "cosine":
        return 0.5 - 0.5 * math.cos(math.pi * left)
    return left


def make_optimizer(
    model: nn.Module,
    lr: float,
    *,
    optimizer: str = "adamw",
    muon_lr: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """The reference's AdamW, save that torch adds eps after the bias correction (docs/differences.md); or Muon.

    Args:
        muon_lr: of the matrices that Muon steps; `lr` if None.
        dtype: in which Muon orthogonalises.
    """
    made: torch.optim.Optimizer
    if optimizer == "muon":
        made = Muon(model, lr=lr, muon_lr=muon_lr or lr, dtype=dtype)
    else:
        made = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, fused=True)
    for group in made.param_groups:
        group["highest_lr"] = group["lr"]
    return made


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
    corpus: Corpus
    starts: np.ndarray  # of the windows in the corpus
    stride: int
    prompts: dict[str, list[int]] = field(default_factory=dict)  # texts to complete, with their ids

    @property
    def windows_per_update(self) -> int:
        return self.args.batch_size * self.args.gradient_accumulation

    @property
    def updates_per_epoch(self) -> int:
        return math.ceil(len(self.starts) / self.windows_per_update)

    @property
    def total_steps(self) -> int:
        whole = self.updates_per_epoch * self.args.epochs
        return min(whole, self.args.max_steps) if self.args.max_steps else whole

    @property
    def warmup_steps(self) -> int:
        if self.args.warmup_steps is not None:
            return int(self.args.warmup_steps)
        return min(LONGEST_WARMUP, self.total_steps // 10)

    def settings(self) -> dict[str, Any]:
        """What a run that goes on must share with the one before, named as a user would."""
        args = self.args
        flags = ("batch_size", "gradient_accumulation", "epochs", "lr", "schedule", "decay_fraction", "optimizer")
        flags += ("embedding_init", "muon_lr", "max_grad_norm", "seed", "val_fraction", "pretrained_model")
        shape = {key: value for key, value in vars(self.config).items() if key.startswith("n_") or "pdrop" in key}
        return {
            "the corpus (SHA-256)": self.corpus.sha256,
            "the vocabulary (SHA-256)": sha256_of(self.vocab_file),
            "the model's shape": json.loads(json.dumps(shape)),
            **{f"--{name}": getattr(args, name) for name in flags},
            "--stride": self.stride,
            "--warmup_steps": self.warmup_steps,
            "--precision": self.precision,
            "the kind of device": self.devices[0].type,
            "the number of updates": self.total_steps,
        }


def choose_vocabulary(vocab_file: str | None, manifest: Mapping[str, Any] | None) -> Path:
    """The vocabulary that is named, else the one of the pieces' manifest, else the default."""
    if vocab_file is None and manifest is not None and Path(manifest["vocabulary"]["path"]).is_file():
        return Path(manifest["vocabulary"]["path"])
    return Path(vocab_file or DEFAULT_VOCABULARY)


def read_prompts(text: str) -> list[str]:
    """The texts of --sample_prompts: the lines of a file if there is one of that name, else what commas separate."""
    if not text:
        return []
    lines = Path(text).read_text(encoding="utf-8").splitlines() if Path(text).is_file() else text.split(",")
    return [line.strip() for line in lines if line.strip()]


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
    for name in [FINAL_MODEL, *(epoch_name(epoch) for epoch in range(args.epochs))]:
        check_replaceable(output / name)
    if args.pretrained_model and args.embedding_init != "normal":
        raise ValueError(
            f"--embedding_init {args.embedding_init} is for new models, and --pretrained_model {args.pretrained_model} "
            "has an embedding; leave one of them out"
        )
    source = Path(args.pretrained_model or args.model_config)
    config_file = find_config(source) if args.pretrained_model else source
    n_ctx = read_config(config_file).n_ctx
    if n_ctx < 2:
        raise ValueError(f"{config_file}: n_ctx is {n_ctx}, and a window needs a token to predict another from")

    # 2) the vocabulary and the corpus
    folder = Path(args.tokenized_data_path)
    manifest = read_manifest(folder)
    vocab_file = choose_vocabulary(args.vocab_file, manifest)
    # Pieces without a manifest are the reference's, and so is the way to cut a context for their model.
    compat = manifest is None or bool(manifest["options"]["compat"])
    tokenizer = Tokenizer.from_file(vocab_file, compat=compat)
    check_vocabulary(folder, manifest, vocab_file)
    corpus = read_pieces(
        folder,
        vocab_size=len(tokenizer),
        manifest=manifest,
        val_fraction=args.val_fraction,
        token_texts=text_of_tokens(tokenizer.vocabulary),
    )
    if corpus.note:
        say(f"note: {corpus.note}")
    if args.val_fraction and not corpus.held_out_documents:
        say("note: the corpus is a single document, so none is held out to be measured")
    stride = effective_stride(args.stride, n_ctx)
    starts = window_starts(corpus.piece_lengths, n_ctx, stride)
    if len(starts) == 0:
        raise ValueError(
            f"{folder} has {len(corpus.tokens):,} tokens to train on, and one window has {n_ctx:,} (n_ctx in "
            f"{config_file}): there is nothing to train on. Put more text into data/ (100,000 characters are a small "
            "corpus) and run build_trainfile.py, make-vocab.py and make-tokenized.py again, or take a --model_config "
            "with a smaller n_ctx (config/model_config_mini.json has 128)"
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
        corpus=corpus,
        starts=starts,
        stride=stride,
        prompts={text: [MASK_ID, *tokenizer.encode(text)] for text in read_prompts(args.sample_prompts)},
    )
    for line in describe(run, model, config_file, precision_note):
        say(line)
    return run, model


def describe(run: Run, model: GPT2LMHeadModel, config_file: Path, precision_note: str) -> Iterator[str]:
    """The resolved settings, a line each."""
    args, config = run.args, run.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = len(run.corpus.tokens)
    held_out = (
        f"; {run.corpus.held_out_documents:,} of {run.corpus.documents:,} documents held out, "
        f"{run.corpus.held_out_tokens:,} tokens"
        if run.corpus.held_out_documents
        else ""
    )
    yield f"corpus     {args.tokenized_data_path}: {tokens:,} tokens{held_out}"
    stated = read_config(config_file).vocab_size
    rows = f" (not the {stated:,} of {config_file})" if stated != len(run.tokenizer) else ""
    yield f"vocabulary {run.vocab_file}: {len(run.tokenizer):,} tokens{rows}"
    yield (
        f"model      {args.pretrained_model or config_file}: {config.n_layer} layers, {config.n_embd} wide, "
        f"{config.n_head} heads, n_ctx {config.n_ctx}, dropout {config.resid_pdrop:g}; {parameters:,} parameters"
    )
    limit = ", --max_steps" if args.max_steps else ""
    clamped = f" (not {args.stride}, which would leave tokens out)" if run.stride != args.stride else ""
    yield (
        f"windows    {len(run.starts):,} of {config.n_ctx} tokens, one every {run.stride}{clamped}; "
        f"shuffled with seed {args.seed}"
    )
    yield (
        f"run        {args.epochs} epochs of {run.updates_per_epoch:,} updates{limit} = {run.total_steps:,} updates of "
        f"{args.batch_size} x {args.gradient_accumulation} windows"
    )
    optimizer = "AdamW" if args.optimizer == "adamw" else f"Muon at {args.muon_lr or args.lr:g} and AdamW"
    falling = {
        "linear": "falling to 0",
        "wsd": f"constant, falling to 0 over the last {args.decay_fraction:g} of the run",
        "cosine": "falling to 0 as a cosine does",
    }[args.schedule]
    yield (
        f"optimizer  {optimizer}, learning rate {args.lr:g} after {run.warmup_steps:,} updates of warm-up, then "
        f"{falling}; gradients clipped to {args.max_grad_norm:g}"
    )
    where = ", ".join(str(device) for device in run.devices)
    yield f"computed   on {where} in {run.precision}{f' ({precision_note})' if precision_note else ''}"
    memory = memory_estimate(
        config,
        parameters,
        windows=math.ceil(args.batch_size / len(run.devices)),
        precision=run.precision,
        optimizer=args.optimizer,
        recompute=args.gradient_checkpointing,
        on_cpu=run.devices[0].type == "cpu",
    )
    yield f"memory     about {memory / 2**30:,.1f} GiB on each device"
    yield f"writes     {args.output_dir}, TensorBoard in {args.writer_dir} every {args.log_step} updates"
    if learns_by_heart(tokens, parameters, args.epochs):
        yield (
            f"note: {parameters:,} parameters for {tokens:,} tokens, {args.epochs} times over: the model will learn "
            "the texts by heart. More text, a smaller --model_config or at most 4 epochs make it learn the language"
        )


def epoch_name(epoch: int) -> str:
    """The folder of an epoch (from 0) within --output_dir; people count from 1."""
    return f"model_epoch{epoch + 1}"


# ---------------------------------------------------------------------------------------------------------------------
# The run.


@dataclass
class Progress:
    """Where a run stands; with the weights and the random states it decides all that follows."""

    step: int = 0  # updates so far
    skipped: int = 0  # of them left out because fp16 overflowed: the learning rate waits
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)  # see `train_rank`
    epoch_seconds: float = 0.0  # in the epoch at hand
    epoch_loss: float = math.nan  # mean of the last whole epoch


class StopRequest:
    """Makes Ctrl-C and SIGTERM a wish that the loop grants after the update at hand; a second Ctrl-C breaks off."""

    def __init__(self) -> None:
        self.signal = 0

    def note(self, number: int, _: object) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def train_rank(
    rank: int, world_size: int, device: torch.device, run: Run, model: GPT2LMHeadModel, resume: Path | None
) -> int:
    """Train as one of `world_size` processes; rank 0 reads and writes. Gives the exit status.

    Args:
        resume: the checkpoint to go on from, found whole; only rank 0 reads it.

    Raises:
        ValueError: the loss is no number any more, or memory does not suffice; what was saved before stays.
    """
    args, n_ctx, total_steps = run.args, run.config.n_ctx, run.total_steps
    output, tokens = Path(args.output_dir), run.corpus.tokens
    checkpoints = output / CHECKPOINTS
    if args.embedding_init == "cooccurrence" and rank == 0 and resume is None:  # the others get their weights from it
        counted = begin_at_cooccurrences(model, tokens, seed=args.seed)
        print(f"embedding  begins at what stands beside what in {counted:,} tokens")
    torch.manual_seed(args.seed + rank)  # every rank drops out other neurons
    if device.type == "cpu":
        keep_freed_memory()

    # 1) model, optimizer, precision
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = pad_vocabulary(model) if device.type in PADDED_DEVICES else run.config.vocab_size
    model.to(device).train()
    if run.precision == "fp16-only":
        model.half()
    window_loss = WindowLoss(model, rows=rows, recompute=args.gradient_checkpointing)
    micro_batch = math.ceil(args.batch_size / world_size)
    flops = flops_per_token(run.config, parameters)
    if should_compile(
        args.compile,
        run_flops=flops * args.epochs * len(run.starts) * n_ctx,
        device=device,
        ranks=world_size,
        recompute=args.gradient_checkpointing,
    ):
        problem = compiler_problem(device)
        if not problem:
            window_loss.compile_for((micro_batch, n_ctx))
        if rank == 0:
            print(f"note: not compiled: {problem}" if problem else "compiling: the first update takes a minute or so")
    optimizer = make_optimizer(
        model,
        args.lr,
        optimizer=args.optimizer,
        muon_lr=args.muon_lr,
        dtype=torch.bfloat16 if has_bf16(device) else torch.float32,
    )
    apex = load_apex() if args.amp_backend == "apex" else None
    trained: nn.Module = window_loss
    if apex is not None:
        trained, optimizer = apex.initialize(window_loss, optimizer, opt_level=args.fp16_opt_level)
    if world_size > 1:
        trained = DistributedDataParallel(trained, gradient_as_bucket_view=True)
    precision = Precision(run.precision, device, apex)
    documents = Documents(run.corpus.held_out, n_ctx, run.tokenizer) if run.corpus.held_out_documents else None

    # 2) where the run stands: at its beginning, or exactly where the checkpoint was written
    progress = Progress()
    made_with = f"torch {torch.__version__}, {torch.get_num_threads()} threads"  # these decide the order of sums
    state = read_checkpoint(resume) if resume is not None and rank == 0 else None
    metrics: Metrics | None = None
    if rank == 0:
        resumed_from = state["progress"]["step"] if state is not None else 0
        metrics = Metrics(args.writer_dir, output / METRICS, resumed_from=resumed_from)
        if state is not None:
            state["measured"] = metrics.has_validation(resumed_from)
            if state["made_with"] != made_with:
                print(f"note: the checkpoint was made with {state['made_with']}, this is {made_with}: not bit for bit")
    if world_size > 1:
        dist.broadcast_object_list(shared := [state])  # other machines need not see the folder
        state = shared[0]
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        precision.load_state_dict(state["scaler"])
        set_random_state(state["random"][rank], device)
        progress = Progress(**state["progress"])
    # Loss times windows, windows, and updates left out for a bad number: in a row and in all; on the device, so that
    # nothing waits for it.
    sums = torch.tensor(progress.sums, dtype=torch.float64, device=device)

    def save_folder(name: str, **facts: Any) -> Path:
        with unpadded(model, rows):
            facts |= {"corpus_tokens": len(tokens), "settings": vars(args)}
            save_model(output / name, model, run.tokenizer, facts=facts)
        return output / name

    def save_checkpoint() -> Path:
        """Every rank calls this, rank 0 writes."""
        progress.sums = sums.tolist()
        random_states = [random_state(device)]
        if world_size > 1:
            dist.all_gather_object(random_states := [{}] * world_size, random_state(device))
        path = checkpoints / f"step_{progress.step}"
        if metrics is not None:
            metrics.flush()  # before, so that no point of the run is missing if this is where it goes on
            contents = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": precision.state_dict(),
                "random": random_states,
                "progress": vars(progress),
                "made_with": made_with,
            }
            write_checkpoint(checkpoints, progress.step, contents, run.settings() | {"ranks": world_size})
            prune(checkpoints, keep=args.keep_checkpoints)
        return path

    def measure() -> None:
        """Every rank calls this, rank 0 reports."""
        measured = None
        if documents is not None:
            measured = evaluate(
                model,
                documents,
                rows=rows,
                batch_size=micro_batch,
                autocast=precision.autocast,
                rank=rank,
                world_size=world_size,
            )
        if metrics is None or (measured is None and not run.prompts):
            return
        completions = {
            text: run.tokenizer.decode(complete(model, ids, rows=rows, seed=args.seed))
            for text, ids in run.prompts.items()
        }
        epoch = progress.step / run.updates_per_epoch
        metrics.validation(
            progress.step, epoch, completions=completions, **(measured.figures() if measured is not None else {})
        )
        if measured is not None:
            bar.write(
                f"update {progress.step:,}: held-out loss {measured.loss:.4f}, perplexity {measured.perplexity:,.2f}, "
                f"{measured.bits_per_character:.4f} bits per character"
            )
        for text, completion in completions.items():
            bar.write(f"    {text}|{completion}")

    def measured_here() -> bool:
        at_step = args.val_steps > 0 and progress.step % args.val_steps == 0
        return at_step or progress.step % run.updates_per_epoch == 0 or progress.step == total_steps

    # 3) updates
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    speed = 0.0  # tokens per second, of the last updates
    first_step, log_windows = progress.step, 0
    began = saved = logged = timed = time.perf_counter()
    began -= progress.epoch_seconds
    order = np.empty(0, np.int64)
    in_log_file = not sys.stderr.isatty()  # where every refresh is a line
    bar = tqdm(
        total=total_steps,
        initial=progress.step,
        unit=" updates",
        disable=rank > 0,
        dynamic_ncols=True,
        mininterval=10 if in_log_file else 0.1,
    )
    stop = StopRequest()
    with signal_handlers({signal.SIGINT: stop.note, signal.SIGTERM: stop.note}), bar, metrics or nullcontext():
        if state is not None and measured_here() and not state["measured"]:
            measure()  # the run before was killed between its checkpoint and this
        del state
        while progress.step < total_steps:
            epoch, update = divmod(progress.step, run.updates_per_epoch)
            if update == 0 or len(order) == 0:
                order = epoch_order(len(run.starts), seed=args.seed, epoch=epoch)
            begin = update * run.windows_per_update
            windows = run.starts[order[begin : begin + run.windows_per_update]]
            shares = share_of_rank(windows, rank, world_size, args.batch_size)
            micro_batches = [to_device(window_batch(tokens, share, n_ctx), device) for share in shares or [windows[:1]]]
            factor = learning_rate_factor(
                progress.step - progress.skipped,
                warmup_steps=run.warmup_steps,
                total_steps=total_steps,
                schedule=args.schedule,
                decay_fraction=args.decay_fraction,
            )
            for group in optimizer.param_groups:
                group["lr"] = group["highest_lr"] * factor
            with memory_advice(
                len(micro_batches[0]), n_ctx, batch_size=args.batch_size, accumulation=args.gradient_accumulation
            ):
                loss, grad_norm = train_update(
                    trained,
                    optimizer,
                    micro_batches,
                    predicted_tokens=len(windows) * (n_ctx - 1),
                    precision=precision,
                    max_grad_norm=args.max_grad_norm,
                    weight=1.0 if shares else 0.0,
                    world_size=world_size,
                )
            progress.step += 1
            log_windows += len(windows)
            epoch_ends = progress.step % run.updates_per_epoch == 0 or progress.step == total_steps
            stopping = stop.signal > 0
            saving = epoch_ends or stopping
            if args.save_steps is None:
                saving |= time.perf_counter() - saved > SAVE_SECONDS
            elif args.save_steps:
                saving |= progress.step % args.save_steps == 0
            if world_size > 1:  # the loss is the sum of the parts, and what one rank wishes all of them do
                wishes = torch.tensor([float(stopping), float(saving)], device=device)
                dist.all_reduce(parts := torch.cat([loss[None], wishes]))
                loss, (stopping, saving) = parts[0], (wish > 0 for wish in parts[1:].tolist())
            if precision.may_skip:
                progress.skipped += not math.isfinite(grad_norm)
            good = torch.isfinite(grad_norm) & torch.isfinite(loss)
            sums[:2] += torch.where(good, torch.stack([loss.double(), torch.ones_like(sums[0])]) * len(windows), 0.0)
            sums[2] = torch.where(good, 0.0, sums[2] + 1)
            sums[3] += ~good

            # 4) figures; reading them waits for the GPU: a larger --log_step is faster
            logging = progress.step % args.log_step == 0 or progress.step == total_steps
            if (logging or saving or device.type == "cpu") and not precision.may_skip:
                most = 1 if epoch_ends else args.max_bad_updates  # no lost model takes the place of a good one
                check_finite(progress.step, int(sums[2]), most, loss=loss.item(), grad_norm=grad_norm.item())
            if logging:
                now = time.perf_counter()
                latest = log_windows * n_ctx / (now - logged)
                speed = latest if speed == 0 else 0.9 * speed + 0.1 * latest
                logged, log_windows = now, 0
                if metrics is not None:
                    figures = {
                        "loss": loss.item(),
                        "learning_rate": args.lr * factor,
                        "gradient_norm": grad_norm.item(),
                        "tokens_per_second": latest,
                    }
                    if peak is not None:
                        figures["mfu"] = flops * latest / (peak * world_size)
                    metrics.train(progress.step, progress.step / run.updates_per_epoch, **figures)
                bar.set_postfix_str(f"loss {loss.item():.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            left = total_steps - progress.step
            if progress.step == first_step + TIMED_UPDATES // 2:  # the first ones compile and allocate
                timed = time.perf_counter()
            elif progress.step == first_step + TIMED_UPDATES and left > TIMED_UPDATES and rank == 0:
                seconds = (time.perf_counter() - timed) / (TIMED_UPDATES - TIMED_UPDATES // 2) * left
                bar.write(f"the other {left:,} updates will take about {timedelta(seconds=round(seconds))}")

            # 5) a model folder after each epoch; checkpoints; and measurements only when all of it is safe
            paused = time.perf_counter()
            progress.epoch_seconds = paused - began
            if epoch_ends:
                loss_sum, epoch_windows, _, bad = sums.tolist()
                if not epoch_windows:
                    raise ValueError(
                        f"every update of epoch {epoch + 1} overflowed in fp16; take --precision fp32 or bf16"
                    )
                progress.epoch_loss = loss_sum / epoch_windows
                if rank == 0:
                    path = save_folder(
                        epoch_name(epoch), epoch=epoch + 1, updates=progress.step, loss=progress.epoch_loss
                    )
                    bar.write(
                        f"epoch {epoch + 1} of {args.epochs}: loss {progress.epoch_loss:.4f}, "
                        f"{progress.epoch_seconds:,.0f} s, "
                        f"{epoch_windows * n_ctx / progress.epoch_seconds:,.0f} tokens/s; saved {path}"
                        + (f"; fp16 overflowed and left out {progress.skipped} updates so far" * (progress.skipped > 0))
                        + (
                            f"; {bad:.0f} updates left out so far, with a loss that was no number"
                            * (bad > 0 and not precision.may_skip)
                        )
                    )
                sums[:2] = 0.0
                progress.epoch_seconds = 0.0
            if saving:
                path = save_checkpoint()
                saved = time.perf_counter()
            if stopping and progress.step < total_steps:
                if rank == 0:
                    bar.write(
                        f"stopped after update {progress.step:,} of {total_steps:,}; the checkpoint is {path}. Go on "
                        "exactly from there with the same command and --resume"
                    )
                return 128 + (stop.signal or signal.SIGINT)
            if measured_here():
                measure()
            logged += time.perf_counter() - paused  # speed is that of updates
            if epoch_ends:
                began = time.perf_counter()

    # 6) and at the end
    if rank == 0:
        path = save_folder(FINAL_MODEL, epoch=args.epochs, updates=progress.step, loss=progress.epoch_loss)
        print(f"trained {progress.step:,} updates; the model is in {path}: python generate.py --model_path {path}")
    return 0


def check_finite(step: int, bad_in_a_row: int, most: int, *, loss: float, grad_norm: float) -> None:
    """Stop a run whose weights are lost before it saves them."""
    if bad_in_a_row >= most:
        raise ValueError(
            f"update {step}: the loss is {loss}, the norm of its gradient {grad_norm}, {bad_in_a_row} updates in a "
            "row; take a lower --lr with --resume none (the model folders of earlier epochs and the checkpoints are "
            "untouched)"
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


def run_spawned(rank: int, run: Run, resume: Path | None, address: str, outcome: Any) -> None:
    """A process started by `train_on_all`; rank 0 hands back the exit status, or what is wrong."""
    device, world_size = run.devices[rank], len(run.devices)
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    try:
        model = build_model(run.args, run.vocab_file, len(run.tokenizer))
        with process_group(rank, world_size, device, address):
            result: int | str = train_rank(rank, world_size, device, run, model, resume)
    except ValueError as error:
        result = str(error)
    if rank == 0:
        outcome.put(result)


def train_on_all(run: Run, resume: Path | None) -> int:
    """Start a process for each device and wait for them; gives the exit status.

    Raises:
        ValueError: as in `train_rank`.
    """
    with tempfile.TemporaryDirectory() as folder:
        outcome = torch.multiprocessing.get_context("spawn").SimpleQueue()
        address = (Path(folder) / "ranks").as_uri()
        ranks = torch.multiprocessing.spawn(
            run_spawned, args=(run, resume, address, outcome), nprocs=len(run.devices), join=False
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


def find_resume(args: argparse.Namespace, run: Run, ranks: int) -> Path | None:
    """The checkpoint to go on from, found whole and of the same settings; None for a new run, after clearing its way.

    Raises:
        ValueError: there is none that is whole, or it is of another run, or an interrupted run would be lost.
    """
    folder = Path(args.output_dir) / CHECKPOINTS
    found = checkpoints_in(folder)
    if args.resume in (None, "none"):
        if found and args.resume is None:
            step, path = found[0]
            total = verified_settings(path).get("the number of updates")
            if step != total:
                raise ValueError(
                    f"{path} is of a run that was interrupted after update {step:,} of {total or 'an unknown number'}: "
                    "go on with --resume, take another --output_dir, or start anew with --resume none, which deletes it"
                )
        if found:
            print(f"note: the checkpoints of an earlier run in {folder} are deleted")
        prune(folder, keep=0)
        return None
    if args.resume == "auto":
        path = latest_whole(folder, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
        if path is None:
            print(f"note: there is no checkpoint in {folder}: starting at the beginning")
            return None
    else:
        path = Path(args.resume)
        if not path.is_dir():
            raise FileNotFoundError(f"--resume {path}: there is no such checkpoint; they are in {folder}")
    manifest = verify(path)
    check_settings(path, manifest["settings"], run.settings() | {"ranks": ranks})
    # What came after it will come again.
    prune(folder, keep=args.keep_checkpoints, up_to=manifest["step"])
    print(f"going on from {path}, after update {manifest['step']:,} of {run.total_steps:,}")
    return path


def verified_settings(path: Path) -> dict[str, Any]:
    """The settings of a checkpoint, or nothing if it is damaged."""
    try:
        return dict(verify(path)["settings"])
    except ValueError:
        return {}


def evaluate_only(args: argparse.Namespace) -> int:
    """Measure a model folder on all documents of a folder of pieces, and print what was found: in words and as JSON.

    Raises:
        ValueError, FileNotFoundError: as in `prepare`.
    """
    if not args.pretrained_model:
        raise ValueError("--eval_only measures a model folder: name it with --pretrained_model")
    devices, note = choose_devices(args.device)
    if note:
        print(f"note: {note}")
    precision = Precision(choose_precision(args, devices[0])[0], devices[0])
    folder = Path(args.tokenized_data_path)
    manifest = read_manifest(folder)
    own = find_config(args.pretrained_model).with_name("vocab.txt")
    vocab_file = own if own.is_file() and args.vocab_file is None else choose_vocabulary(args.vocab_file, manifest)
    check_vocabulary(folder, manifest, vocab_file)
    model, tokenizer = load_model(args.pretrained_model, device=devices[0], vocab_file=vocab_file)
    corpus = read_pieces(folder, vocab_size=len(tokenizer), manifest=manifest)
    n_ctx = model.config.n_ctx
    WindowLoss(model)  # sets the attention that needs no mask
    measured = evaluate(
        model,
        Documents(corpus.tokens, n_ctx, tokenizer),
        rows=len(tokenizer),
        batch_size=args.batch_size,
        autocast=precision.autocast,
    )
    print(
        f"{args.pretrained_model} on {corpus.documents:,} documents of {folder}: loss {measured.loss:.4f}, perplexity "
        f"{measured.perplexity:,.2f}, {measured.bits_per_character:.4f} bits per character"
    )
    print(json.dumps(measured.figures() | {"tokens": measured.tokens}))
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    by_torchrun = {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()
    rank, local_rank, world_size = (
        int(os.environ[name]) if by_torchrun else 0 for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    if rank == 0:
        print_settings(args)
    if args.eval_only:
        return evaluate_only(args)
    run, model = prepare(args, world_size, say=print if rank == 0 else lambda _: None)
    with exclusive(args.output_dir) if rank == 0 else nullcontext():
        resume = find_resume(args, run, world_size or len(run.devices)) if rank == 0 else None
        if by_torchrun:
            on_cpu = run.devices[0].type == "cpu"
            if not on_cpu and local_rank >= len(run.devices):
                raise ValueError(f"--device {args.device} has no GPU for local rank {local_rank}; list one for each")
            device = run.devices[0 if on_cpu else local_rank]
            with process_group(rank, world_size, device, "env://"):
                return train_rank(rank, world_size, device, run, model, resume)
        if len(run.devices) > 1:
            del model  # every rank builds its own
            return train_on_all(run, resume)
        return train_rank(0, 1, run.devices[0], run, model, resume)


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


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0, at most 1")
    return value


def _positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


if __name__ == "__main__":
    run_script(main)
