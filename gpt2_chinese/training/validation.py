"""Measurements of a run, which a signal may break off, and of a model folder (`train.py --eval_only`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch

from gpt2_chinese.command_line import remark
from gpt2_chinese.decoding.whole_characters import CharacterMasks
from gpt2_chinese.model_folder import load_model
from gpt2_chinese.precision import Precision, choose_devices, choose_precision
from gpt2_chinese.text.pieces import check_vocabulary, read_manifest
from gpt2_chinese.text.tokenizers import bytes_of_tokens, vocabulary_of_folder
from gpt2_chinese.training.evaluation import (
    AS_IT_IS,
    SCALES,
    Documents,
    Evaluation,
    complete,
    evaluate,
    sum_of_losses,
)
from gpt2_chinese.training.loss import WindowLoss
from gpt2_chinese.training.ranks import Rank
from gpt2_chinese.training.run import Run, choose_vocabulary
from gpt2_chinese.training.stopping import Interrupted, StopSignal
from gpt2_chinese.training.token_cache import read_pieces
from gpt2_chinese.training.trainable import Trainable


class Validation(NamedTuple):
    """One measurement of a run.

    Attributes:
        evaluation: of the validation set; None where no documents are held out.
        completions: of the prompts.
    """

    evaluation: Evaluation | None
    completions: dict[str, str]


def validate(run: Run, rank: Rank, trainable: Trainable, documents: Documents, stop: StopSignal) -> Validation:
    """Measure the validation set and complete the prompts; every rank calls this, rank 0 has the completions.

    Raises:
        Interrupted: on every rank, if one of them has had a signal. No state has changed.
    """
    scales = SCALES if run.args.calibrate else AS_IT_IS
    # the nats of each document at each scale; predicted tokens; ranks that were interrupted
    sums = torch.zeros(len(scales) * len(documents.bounds) + 2, dtype=torch.float64, device=rank.device)
    completions: dict[str, str] = {}
    try:
        with stop.interrupts():
            nats, sums[-2] = sum_of_losses(
                trainable.model,
                documents,
                rows=trainable.vocab_rows,
                batch_size=trainable.micro_batch,
                autocast=trainable.precision.autocast,
                scales=scales,
                rank=rank.number,
                world_size=rank.world_size,
            )
            sums[:-2] = nats.flatten()
            for text, ids in run.prompts.items() if rank.is_main else ():
                completion = complete(
                    trainable.model,
                    ids,
                    rows=trainable.vocab_rows,
                    marks=run.tokenizer.marks,
                    seed=run.args.seed,
                    masks=CharacterMasks(
                        bytes_of_tokens(run.tokenizer), trainable.vocab_rows, run.tokenizer.marks.never_produced
                    ),
                )
                completions[text] = run.tokenizer.decode(completion)
    except Interrupted:
        sums[-1] = 1.0
    sums = rank.sum(sums).cpu()
    if sums[-1]:
        raise Interrupted
    evaluation: Evaluation | None = None
    if documents.windows:
        evaluation = documents.evaluation(sums[:-2].view(len(scales), -1).numpy(), float(sums[-2]), scales)
    return Validation(evaluation, completions)


def evaluate_folder(args: argparse.Namespace) -> int:
    """Measure a model folder on all documents of a folder of pieces, and print what was found: in words and as JSON.

    Raises:
        ValueError, FileNotFoundError: a flag or a file is wrong; the message names it and what mends it.
    """
    if not args.pretrained_model:
        raise ValueError("--eval_only measures a model folder: name it with --pretrained_model")
    devices, note = choose_devices(args.device)
    if note:
        remark(f"note: {note}")
    precision = Precision(choose_precision(args, devices[0])[0], devices[0])
    folder = Path(args.tokenized_data_path)
    manifest = read_manifest(folder)
    own = vocabulary_of_folder(args.pretrained_model)
    vocab_file = own if own is not None and args.vocab_file is None else choose_vocabulary(args.vocab_file, manifest)
    check_vocabulary(folder, manifest, vocab_file)
    marks = tuple(args.document_marks) if args.document_marks else None
    model, tokenizer = load_model(args.pretrained_model, device=devices[0], vocab_file=vocab_file, document_marks=marks)
    corpus = read_pieces(folder, vocab_size=len(tokenizer), marks=tokenizer.marks, manifest=manifest)
    WindowLoss(model)  # sets the attention that needs no mask
    measured = evaluate(
        model,
        Documents(corpus.tokens, model.config.n_ctx, tokenizer),
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
