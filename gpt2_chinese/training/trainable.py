"""The model on its device with all that updates it: the loss, the optimizer, the precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2LMHeadModel

from gpt2_chinese.command_line import remark
from gpt2_chinese.precision import Precision, is_bf16_fast, load_apex
from gpt2_chinese.text.pieces import text_of_tokens
from gpt2_chinese.training.allocator import keep_freed_memory
from gpt2_chinese.training.character_vectors import CharacterVectors
from gpt2_chinese.training.embedding_init import init_embedding_from_cooccurrence
from gpt2_chinese.training.estimates import flops_per_token
from gpt2_chinese.training.loss import WindowLoss, compiler_problem, pad_vocabulary, should_compile
from gpt2_chinese.training.ngram_teacher import NgramTeacher
from gpt2_chinese.training.optimizers import make_optimizer
from gpt2_chinese.training.ranks import Rank
from gpt2_chinese.training.run import Run
from gpt2_chinese.training.teachers import read_teachers, soft_targets

PADDED_DEVICES = {"cuda"}  # a CPU gains nothing by whole tiles


@dataclass(frozen=True)
class Trainable:
    """
    Attributes:
        model: the bare model.
        window_loss: `WindowLoss` of it, or DistributedDataParallel around that.
        vocab_rows: of the embedding, those that are tokens; the model may have more (see `pad_vocabulary`).
        micro_batch: windows that go through the model at once on this device, at most.
        flops_per_token: of a forward and a backward pass.
    """

    model: GPT2LMHeadModel
    window_loss: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    vocab_rows: int
    micro_batch: int
    flops_per_token: float


def _count_ngrams(run: Run, rank: Rank) -> NgramTeacher:
    ngram = NgramTeacher(
        run.corpus.tokens,
        run.document_starts,
        vocab_size=run.config.vocab_size,  # of the logits; a published model may have more rows than tokens
        marks=run.tokenizer.marks,
        device=rank.device,
    )
    if rank.is_main:
        remark(f"trigram    counted in {ngram.counted_tokens:,} of {len(run.corpus.tokens):,} tokens")
    return ngram


def _share_characters(run: Run, rank: Rank) -> CharacterVectors:
    characters = CharacterVectors(text_of_tokens(run.tokenizer), rank.device)
    if rank.is_main:
        remark(f"characters {characters.num_vectors:,} vectors of first and last characters of tokens")
    return characters


def _soft_targets(run: Run, rank: Rank, teachers: list[GPT2LMHeadModel], rows: int, precision: Precision) -> Tensor:
    """The teachers' predictions of the whole text, on the device."""
    own = soft_targets(
        teachers,
        run.corpus.tokens,
        run.span_lengths,
        run.document_starts if run.args.document_mask else None,
        rows=rows,
        n_ctx=run.config.n_ctx,
        autocast=precision.autocast,
        rank=rank.number,
        world_size=rank.world_size,
    )
    if rank.is_main:
        remark(f"teachers   their predictions of the text are kept, {own.nbytes / 2**20:,.0f} MiB")
    return rank.sum(own)


def build(run: Run, rank: Rank, model: GPT2LMHeadModel, *, is_new: bool) -> Trainable:
    """Move a model to its device and prepare it for training; `is_new` for one that no checkpoint will replace."""
    args, device = run.args, rank.device
    teachers = read_teachers(args, run.vocab_file, run.config.n_ctx)
    # DistributedDataParallel gives the other ranks rank 0's weights.
    if args.embedding_init == "cooccurrence" and rank.is_main and is_new:
        counted = init_embedding_from_cooccurrence(model, run.corpus.tokens, seed=args.seed)
        remark(f"embedding  initialised from the co-occurrences of {counted:,} tokens")
    torch.manual_seed(args.seed + rank.number)  # every rank drops out other units
    if device.type == "cpu":
        keep_freed_memory()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = pad_vocabulary(model) if device.type in PADDED_DEVICES else run.config.vocab_size
    model.to(device).train()  # type: ignore[arg-type]
    if run.precision == "fp16-only":
        model.half()
    apex = load_apex() if args.amp_backend == "apex" else None
    precision = Precision(run.precision, device, apex)
    for teacher in teachers:
        teacher.to(device)  # type: ignore[arg-type]
    targets = None
    if run.has_soft_targets:
        targets, teachers = _soft_targets(run, rank, teachers, rows, precision), []
    window_loss = WindowLoss(
        model,
        rows=rows,
        recompute=args.gradient_checkpointing,
        teachers=teachers,
        soft_targets=targets,
        teacher_share=args.teacher_share,
        ngram=_count_ngrams(run, rank) if args.ngram_share else None,
        ngram_share=args.ngram_share,
    )
    micro_batch = math.ceil(args.batch_size / rank.world_size)
    flops = flops_per_token(run.config, parameters)
    if should_compile(args.compile, device, recompute=args.gradient_checkpointing):
        problem = compiler_problem(device)
        if not problem:
            window_loss.compile_for((micro_batch, run.config.n_ctx))
        if rank.is_main:
            remark(f"note: not compiled: {problem}" if problem else "compiling: the first update takes a minute or so")
    optimizer = make_optimizer(
        model,
        args.lr,
        optimizer=args.optimizer,
        muon_lr=args.muon_lr,
        weight_decay=args.weight_decay,
        muon_weight_decay=args.muon_weight_decay,
        dtype=torch.bfloat16 if is_bf16_fast(device) else torch.float32,
        characters=_share_characters(run, rank) if args.character_lr else None,
        character_lr=args.character_lr,
    )
    trained: nn.Module = window_loss
    if apex is not None:
        trained, optimizer = apex.initialize(window_loss, optimizer, opt_level=args.fp16_opt_level)
    if rank.world_size > 1:
        trained = DistributedDataParallel(trained, gradient_as_bucket_view=True)
    return Trainable(
        model=model,
        window_loss=trained,
        optimizer=optimizer,
        precision=precision,
        vocab_rows=rows,
        micro_batch=micro_batch,
        flops_per_token=flops,
    )
