"""What is decided before the first update: read, checked and the same for every rank."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_chinese.artifacts import read_text_file, sha256_of
from gpt2_chinese.best_model import BEST_MODEL, FINAL_MODEL
from gpt2_chinese.command_line import project_file
from gpt2_chinese.model_folder import check_replaceable, find_config, load_model, read_config
from gpt2_chinese.precision import choose_devices, choose_precision, load_apex
from gpt2_chinese.text.pieces import (
    check_unknown,
    check_vocabulary,
    piece_numbers,
    read_manifest,
    read_pieces_tokenizer,
    text_of_tokens,
)
from gpt2_chinese.text.tokenizers import Tokenizer, vocabulary_of_folder
from gpt2_chinese.training.checkpoints import NGRAM_ADDS, TEACHERS_PREDICT
from gpt2_chinese.training.corpus_text import document_starts
from gpt2_chinese.training.hold_out import MAX_BYTES, MIN_BYTES, HoldOut
from gpt2_chinese.training.optimizers import learning_rate_factor
from gpt2_chinese.training.plan import PLAN, Plan, decides_after
from gpt2_chinese.training.state import TrainingState
from gpt2_chinese.training.teachers import bytes_of_soft_targets
from gpt2_chinese.training.token_cache import Corpus, read_pieces
from gpt2_chinese.training.vocabulary_transfer import transfer_vocabulary
from gpt2_chinese.training.windows import (
    MicroBatch,
    document_positions,
    effective_stride,
    epoch_order,
    joined_pieces,
    shifted_starts,
    to_device,
    window_batch,
    window_starts,
)

DEFAULT_VOCABULARY = Path("vocab/vocab_user.txt")
MAX_DEFAULT_WARMUP = 2000  # updates, unless --warmup_steps says otherwise
CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
OTHER_FILES = (PLAN, "report.html", "report.json")
GUESSING_MARGIN = 0.5  # nats; a new model begins a little above the loss of guessing
SAVE_SECONDS = 600  # between checkpoints: what a power cut costs, whatever the speed of the machine

# A run that goes on must have the same values of these flags.
_RESUMED_FLAGS = (
    "batch_size",
    "gradient_accumulation",
    "epochs",
    "lr",
    "schedule",
    "decay_fraction",
    "optimizer",
    "embedding_init",
    "muon_lr",
    "character_lr",
    "weight_decay",
    "muon_weight_decay",
    "max_grad_norm",
    "seed",
    "teacher",
    "teacher_share",
    "ngram_share",
    "val_fraction",
    "val_bytes",
    "calibrate",
    "shift_windows",
    "document_mask",
    "pretrained_model",
)


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        starts: where each window begins in the corpus.
        span_lengths: of what windows do not reach beyond: pieces, or several of them.
        prompts: texts to complete at every measurement, with their ids.
        plan: with --minutes.
    """

    args: argparse.Namespace
    devices: list[torch.device]
    precision: str
    precision_note: str
    vocab_file: Path
    config_file: Path
    config: GPT2Config
    tokenizer: Tokenizer
    corpus: Corpus
    starts: npt.NDArray[np.int64]
    span_lengths: tuple[int, ...]
    stride: int
    prompts: dict[str, list[int]] = field(default_factory=dict)
    plan: Plan | None = None

    @property
    def output(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def windows_per_update(self) -> int:
        return int(self.args.batch_size * self.args.gradient_accumulation)

    @property
    def updates_per_epoch(self) -> int:
        return math.ceil(len(self.starts) / self.windows_per_update)

    @property
    def total_steps(self) -> int:
        whole = int(self.updates_per_epoch * self.args.epochs)
        return min(whole, self.args.max_steps) if self.args.max_steps else whole

    @cached_property
    def document_starts(self) -> npt.NDArray[np.int64]:
        """Where documents, and slices of them, begin in the corpus; 8 bytes each."""
        return document_starts(self.corpus.tokens, self.tokenizer, self.corpus.piece_lengths)

    @property
    def warmup_steps(self) -> int:
        if self.args.warmup_steps is not None:
            return int(self.args.warmup_steps)
        return min(MAX_DEFAULT_WARMUP, self.total_steps // 10)

    # What happens at which update, counted from 0 before it and from 1 behind it.

    def windows(self, step: int) -> npt.NDArray[np.int64]:
        """Where the windows of update `step` begin; every epoch has each window once, in an order of its own."""
        epoch, update = divmod(step, self.updates_per_epoch)
        order = _epoch_order(len(self.starts), self.args.seed, epoch)
        begin = update * self.windows_per_update
        starts = self.starts
        if self.args.shift_windows:
            starts = _shifted_starts(
                self.span_lengths, self.config.n_ctx, self.stride, seed=self.args.seed, epoch=epoch
            )
        return starts[order[begin : begin + self.windows_per_update]]

    def learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(
            step,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            schedule=self.args.schedule,
            decay_fraction=self.args.decay_fraction,
        )

    def epoch(self, step: int) -> int:
        """The epoch that update `step` (from 1) belongs to, from 1."""
        return (step - 1) // self.updates_per_epoch + 1

    def epoch_ends(self, step: int) -> bool:
        return step % self.updates_per_epoch == 0 or step == self.total_steps

    def logs(self, step: int) -> bool:
        return step % self.args.log_step == 0 or step == self.total_steps

    def saves_checkpoint(self, step: int, seconds_since: float) -> bool:
        """Whether a checkpoint is due, so long after the last one; there is one at the end of each epoch too."""
        if self.epoch_ends(step):
            return True
        if self.args.save_steps is None:
            return seconds_since > SAVE_SECONDS
        return bool(self.args.save_steps) and step % self.args.save_steps == 0

    def validates(self, step: int) -> bool:
        return self.epoch_ends(step) or (self.args.val_steps > 0 and step % self.args.val_steps == 0)

    def decides_updates(self, step: int) -> bool:
        """Whether a plan decides behind this update how many there will be, or corrects it.

        A shorter run keeps the first estimate, and so does one that is over with this update. One that goes on after an
        interruption keeps what its checkpoint says, and so ends the same however long it takes.
        """
        may_decide = self.plan is not None and not self.plan.is_settled and step < self.total_steps
        return may_decide and decides_after(step)

    def micro_batch(self, starts: npt.NDArray[np.int64], device: torch.device) -> MicroBatch:
        """The windows that begin there."""
        n_ctx = self.config.n_ctx
        positions = document_positions(self.document_starts, starts, n_ctx) if self.args.document_mask else None
        return MicroBatch(
            to_device(window_batch(self.corpus.tokens, starts, n_ctx), device),
            None if positions is None else to_device(positions, device),
            to_device(torch.from_numpy(np.ascontiguousarray(starts)), device) if self.has_soft_targets else None,
        )

    @property
    def bytes_of_soft_targets(self) -> int:
        """Of the teachers' predictions, if they are computed before training (see teachers.py)."""
        if not self.args.teacher:
            return 0
        epochs = float(self.args.epochs)
        if self.args.max_steps and self.plan is None:  # a plan changes it during the run
            epochs = min(epochs, self.args.max_steps / self.updates_per_epoch)
        return bytes_of_soft_targets(len(self.corpus.tokens), self.config.vocab_size, epochs)

    @property
    def has_soft_targets(self) -> bool:
        return self.bytes_of_soft_targets > 0

    def limit_updates(self, max_steps: int) -> None:
        """End the run after so many updates, 0 for no limit; what is decided once is decided for all ranks."""
        self.args.max_steps = max_steps

    def divergence_limit(self, step: int) -> float:
        """The loss, in nats for a token, above which update `step` (from 1) is clearly worse than guessing."""
        return math.log(len(self.tokenizer)) + GUESSING_MARGIN if step > self.warmup_steps else math.inf

    def is_over(self, state: TrainingState) -> bool:
        return state.step >= self.total_steps or self.is_out_of_patience(state)

    def is_out_of_patience(self, state: TrainingState) -> bool:
        return 0 < self.args.patience <= state.since_best

    def settings(self) -> dict[str, Any]:
        """What a run that goes on must share with the one before, named as a user would."""
        shape = {key: value for key, value in vars(self.config).items() if key.startswith("n_") or "pdrop" in key}
        return {
            "the corpus (SHA-256)": self.corpus.sha256,
            "the vocabulary (SHA-256)": sha256_of(self.vocab_file),
            "the model's shape": json.loads(json.dumps(shape)),
            **{f"--{name}": getattr(self.args, name) for name in _RESUMED_FLAGS},
            "--stride": self.stride,
            NGRAM_ADDS: "a trigram and a cache" if self.args.ngram_share else "a trigram",
            TEACHERS_PREDICT: "once" if self.has_soft_targets else "in every window",
            "the span of windows": "the whole text" if self.args.shift_windows else "a piece",
            "--warmup_steps": self.warmup_steps,
            "--precision": self.precision,
            "the kind of device": self.devices[0].type,
            "the number of updates": self.total_steps,
        }


@lru_cache(maxsize=1)
def _epoch_order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return epoch_order(count, seed=seed, epoch=epoch)


_shifted_starts = lru_cache(maxsize=1)(shifted_starts)


def epoch_name(epoch: int) -> str:
    """The folder of an epoch (from 1) within --output_dir."""
    return f"model_epoch{epoch}"


def epoch_of_name(name: str) -> int:
    """The epoch whose folder has this name; 0 if it is none of an epoch."""
    found = re.fullmatch(r"model_epoch([1-9][0-9]*)", name)
    return int(found[1]) if found else 0


def choose_vocabulary(vocab_file: str | None, manifest: Mapping[str, Any] | None) -> Path:
    """The vocabulary that is named, else the one of the pieces' manifest, else the default."""
    if vocab_file is None and manifest is not None and Path(manifest["vocabulary"]["path"]).is_file():
        return Path(manifest["vocabulary"]["path"])
    return Path(vocab_file or DEFAULT_VOCABULARY)


def read_prompts(text: str) -> list[str]:
    """The texts of --sample_prompts: the lines of a file if there is one of that name, else what commas separate.

    Raises:
        ValueError: the flag has bytes that the terminal's encoding has not, or the file is not UTF-8.

    Example:
        >>> read_prompts("孩子,春天；医生")
        ['孩子', '春天', '医生']
    """
    if not text:
        return []
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(
            "--sample_prompts is not in this terminal's encoding; name a file instead, with a prompt a line"
        )
    lines = read_text_file(text).splitlines() if Path(text).is_file() else re.split("[,，、;；]", text)
    return [line.strip() for line in lines if line.strip()]


def build_model(
    args: argparse.Namespace, vocab_file: Path, tokenizer: Tokenizer, say: Callable[[str], None] = lambda _: None
) -> GPT2LMHeadModel:
    """Make a new model of `--model_config`, the same for the same seed, or read `--pretrained_model`.

    A pretrained model whose vocabulary is not the pieces' keeps its layers and gets rows for the other vocabulary if
    that one is named with `--vocab_file`.
    """
    if args.pretrained_model:
        model = _read_pretrained(args, vocab_file, tokenizer, say)
        if args.dropout is not None:
            _set_dropout(model.config, args.dropout)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = args.dropout
        return model
    config = read_config(project_file(args.model_config), vocab_size=len(tokenizer), marks=tokenizer.marks)
    if args.dropout is not None:
        _set_dropout(config, args.dropout)
    torch.manual_seed(args.seed)
    return GPT2LMHeadModel(config)


def _set_dropout(config: GPT2Config, dropout: float) -> None:
    config.embd_pdrop = config.attn_pdrop = config.resid_pdrop = dropout


def _read_pretrained(
    args: argparse.Namespace, vocab_file: Path, tokenizer: Tokenizer, say: Callable[[str], None]
) -> GPT2LMHeadModel:
    """Read `--pretrained_model`, whose vocabulary is the pieces' or is replaced by it."""
    marks = tuple(args.document_marks) if args.document_marks else None
    own = vocabulary_of_folder(args.pretrained_model)
    if own is None or own.read_bytes().split() == vocab_file.read_bytes().split():
        return load_model(args.pretrained_model, vocab_file=vocab_file, document_marks=marks)[0]
    if args.vocab_file is None:
        raise ValueError(
            f"the pieces were made with {vocab_file}, the model was trained with {own}: make the pieces again with "
            f"make-tokenized.py --vocab_filename {args.pretrained_model}; or add --vocab_file {vocab_file}, which "
            "keeps the model's layers and gives the tokens of that vocabulary rows of their own"
        )
    model, old = load_model(args.pretrained_model, document_marks=marks)
    report = transfer_vocabulary(model, old, tokenizer, seed=args.seed)
    say(
        f"embedding  {len(tokenizer):,} tokens of {vocab_file} on the layers of {args.pretrained_model}: "
        f"{report.found:,} rows found in {own}, {report.composed:,} composed of several, {report.new:,} new"
    )
    return model


def prepare(
    args: argparse.Namespace, world_size: int, say: Callable[[str], None], plan: Plan | None = None
) -> tuple[Run, GPT2LMHeadModel]:
    """Read and check everything, before anything is written, and build the model.

    Args:
        world_size: of torchrun, or 0 without it.
        say: is told the notes.
        plan: that the flags are from, if there is one.

    Raises:
        ValueError, FileNotFoundError: a flag or a file is wrong; the message names it and what mends it.
    """
    # 1) what costs nothing to check: the devices, the places to write to, the model's shape
    if args.character_lr and args.amp_backend == "apex":
        raise ValueError("--character_lr has no form for --amp_backend apex: take torch's, or leave --character_lr out")
    devices, note = choose_devices(args.device)
    if note:
        say(f"note: {note}")
    ranks = world_size or len(devices)
    if args.batch_size < ranks:
        raise ValueError(f"--batch_size {args.batch_size} is less than a window for each of {ranks} devices; raise it")
    precision, precision_note = choose_precision(args, devices[0])
    if args.amp_backend == "apex":
        load_apex()
    for path in Path(args.output_dir).glob("*"):
        if path.name in (FINAL_MODEL, BEST_MODEL) or 1 <= epoch_of_name(path.name) <= args.epochs:
            check_replaceable(path)
    if args.pretrained_model and args.embedding_init != "normal":
        raise ValueError(
            f"--embedding_init {args.embedding_init} is for new models, and --pretrained_model {args.pretrained_model} "
            "has an embedding; leave one of them out"
        )
    if args.calibrate and not args.val_fraction:
        raise ValueError(
            "--calibrate measures held-out text, and --val_fraction 0 holds none out: leave one of them out"
        )
    if args.teacher and args.teacher_share + args.ngram_share > 1:
        raise ValueError(
            f"--teacher_share {args.teacher_share:g} and --ngram_share {args.ngram_share:g} are parts of one whole and "
            "more than 1 together: lower one of them"
        )
    if args.character_lr and args.optimizer != "muon":
        raise ValueError(
            f"--character_lr {args.character_lr:g} is for --optimizer muon: give that too, or leave --character_lr out"
        )
    source = Path(args.pretrained_model or project_file(args.model_config))
    config_file = find_config(source) if args.pretrained_model else source
    n_ctx = read_config(config_file).n_ctx
    if n_ctx < 2:
        raise ValueError(f"{config_file}: n_ctx is {n_ctx}, and a window needs a token to predict another from")

    # 2) the vocabulary and the corpus
    folder = Path(args.tokenized_data_path)
    piece_numbers(folder)  # what is missing first is said first
    manifest = read_manifest(folder)
    vocab_file = choose_vocabulary(args.vocab_file, manifest)
    check_vocabulary(folder, manifest, vocab_file)
    tokenizer = read_pieces_tokenizer(manifest, vocab_file).build()
    if manifest is not None and "unknown_tokens" in manifest:
        inner = manifest["tokens"] - 2 * manifest["documents"]
        allow = args.allow_unk or tokenizer.compat
        if warning := check_unknown(manifest["unknown_tokens"], inner, vocab_file, allow=allow):
            say(warning)
    least, most = args.val_bytes or (MIN_BYTES, MAX_BYTES)
    corpus = read_pieces(
        folder,
        vocab_size=len(tokenizer),
        marks=tokenizer.marks,
        manifest=manifest,
        hold_out=HoldOut(args.val_fraction, least, most, gap=n_ctx),
        token_texts=text_of_tokens(tokenizer),
    )
    if corpus.note:
        say(f"note: {corpus.note}")
    if args.val_fraction and not corpus.held_out_tokens:
        say("note: the corpus is a single short document, so there is no validation set")
    stride = effective_stride(args.stride, n_ctx)
    span_lengths = corpus.piece_lengths
    if args.shift_windows:
        span_lengths = joined_pieces(corpus.tokens, span_lengths, tokenizer.marks)
    starts = window_starts(span_lengths, n_ctx, stride)
    if len(starts) == 0:
        raise ValueError(
            f"{folder} has {len(corpus.tokens):,} tokens to train on, and one window has {n_ctx:,} (n_ctx in "
            f"{config_file}): there is nothing to train on. Put more text into data/ (100,000 characters are a small "
            "corpus) and run build_trainfile.py, make-vocab.py and make-tokenized.py again, or take a --model_config "
            "with a smaller n_ctx (config/model_config_mini.json has 128)"
        )

    # 3) the model
    model = build_model(args, vocab_file, tokenizer, say)
    run = Run(
        args=args,
        devices=devices,
        precision=precision,
        precision_note=precision_note,
        vocab_file=vocab_file,
        config_file=config_file,
        config=model.config,
        tokenizer=tokenizer,
        corpus=corpus,
        starts=starts,
        span_lengths=span_lengths,
        stride=stride,
        prompts={text: [tokenizer.marks.begin, *tokenizer.encode(text)] for text in read_prompts(args.sample_prompts)},
        plan=plan,
    )
    return run, model
