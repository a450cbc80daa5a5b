#!/usr/bin/env python3
"""Trains a GPT-2 on the tokenized corpus and writes it as Hugging Face folders.

Reads   tokenized/tokenized_train_{i}.txt (with tokenized/manifest.json), vocab/vocab_user.txt,
        config/model_config*.json or a model folder to go on from
Writes  model/model_epoch{n}/ after each epoch, model/final_model/, model/best_model/ (of the validation set),
        model/checkpoints/step_{n}/ to resume from, model/metrics.jsonl, tensorboard_summary/; with --report
        model/report.html and model/report.json

    python train.py --model_config config/model_config_mini.json --epochs 10 --lr 1e-3
    python train.py --device 0,1 --batch_size 16 --pretrained_model model/final_model --output_dir model2/
    python train.py --model_config config/model_config_mini.json --epochs 10 --lr 1e-3 --resume
    python train.py --minutes 30
    python train.py --eval_only --pretrained_model model/final_model --tokenized_data_path other/
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import gpt2_chinese.openmp  # noqa: F401  # isort: skip  (torch reads what it sets)
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2LMHeadModel

from gpt2_chinese.artifacts import exclusive_lock
from gpt2_chinese.best_model import BEST_MODEL, FINAL_MODEL
from gpt2_chinese.command_line import check_stdout, prepare_streams, print_settings, remark, run_script, set_quiet
from gpt2_chinese.messages import language_of
from gpt2_chinese.precision import Precision
from gpt2_chinese.training.estimates import memory_advice
from gpt2_chinese.training.evaluation import Documents
from gpt2_chinese.training.flags import given_flags, parse_args
from gpt2_chinese.training.html_report import report_of_folder, write_report
from gpt2_chinese.training.loss import keep_compiled_code_private
from gpt2_chinese.training.optimizers import set_learning_rate
from gpt2_chinese.training.plan import PLAN, plan_run
from gpt2_chinese.training.ranks import Rank, Torchrun, process_group, run_on_all
from gpt2_chinese.training.report import Reporter, describe
from gpt2_chinese.training.run import DEFAULT_VOCABULARY, Run, build_model, epoch_name, prepare
from gpt2_chinese.training.saving import find_checkpoint, restore, save_checkpoint, save_model_folder
from gpt2_chinese.training.state import TrainingState
from gpt2_chinese.training.stopping import Interrupted, StopSignal, stop_signal
from gpt2_chinese.training.trainable import Trainable, build
from gpt2_chinese.training.validation import evaluate_folder, validate
from gpt2_chinese.training.windows import MicroBatch, share_of_rank


def train(rank: Rank, run: Run, model: GPT2LMHeadModel, resume: Path | None) -> int:
    """Train as one of the ranks; rank 0 reads, writes and prints. Gives the exit status.

    Args:
        resume: the checkpoint to go on from, found valid; None for a new run.

    Raises:
        ValueError: the loss is not finite any more, or memory does not suffice; what was saved before stays.
    """
    args, n_ctx = run.args, run.config.n_ctx
    trainable = build(run, rank, model, is_new=resume is None)
    state = restore(run, rank, trainable, resume)
    run.limit_updates(rank.broadcast(run.args.max_steps))  # rank 0 knows what a checkpoint had planned
    documents = Documents(run.corpus.held_out, n_ctx, run.tokenizer, run.corpus.held_out_lengths)
    with Reporter(run, rank, state, trainable) as report, stop_signal() as stop:
        # A checkpoint is written before its update is measured; the measurement decides which model is the best.
        if resume is not None and run.validates(state.step) and not run.is_out_of_patience(state):
            try:
                measure(run, rank, trainable, documents, state, report, stop)
            except Interrupted:
                report.stopped(state)
                return stop.exit_status

        while not run.is_over(state):
            # 1) this rank's windows, and the learning rate; a rank without a window of its own has a weight of 0
            windows = run.windows(state.step)
            shares = share_of_rank(windows, rank.number, rank.world_size, args.batch_size)
            micro_batches = [run.micro_batch(starts, rank.device) for starts in shares or [windows[:1]]]
            lr_factor = run.learning_rate_factor(state.step - state.skipped)
            set_learning_rate(trainable.optimizer, lr_factor)

            # 2) the update
            with memory_advice(
                len(micro_batches[0].input_ids),
                n_ctx,
                batch_size=args.batch_size,
                accumulation=args.gradient_accumulation,
            ):
                loss, grad_norm = train_update(
                    trainable.window_loss,
                    trainable.optimizer,
                    micro_batches,
                    predicted_tokens=len(windows) * (n_ctx - 1),
                    precision=trainable.precision,
                    max_grad_norm=args.max_grad_norm,
                    weight=1.0 if shares else 0.0,
                    world_size=rank.world_size,
                )

            # 3) what all ranks know of it: the whole loss, and whether one of them is to stop or to save
            flags = [stop.requested, run.saves_checkpoint(state.step + 1, report.seconds_since_checkpoint)]
            loss, (stopping, saving) = rank.reduce(loss, flags)
            may_skip = trainable.precision.may_skip
            limit = run.divergence_limit(state.step + 1)
            state.advance(loss, grad_norm, windows=len(windows), may_skip=may_skip, limit=limit)
            if run.decides_updates(state.step):
                run.limit_updates(rank.broadcast(report.updates_in_time(state, loss)))
                report.planned(state)
            epoch_ends = run.epoch_ends(state.step)

            # 4) figures; reading them waits for a GPU: a larger --log_step is faster
            reads_figures = run.logs(state.step) or stopping or saving or rank.device.type == "cpu"
            if reads_figures and not may_skip:  # at an epoch's end no lost model takes the place of a good one
                state.check_finite(loss, grad_norm, max_bad_updates=1 if epoch_ends else args.max_bad_updates)
            if reads_figures:
                state.check_converging(limit, max_bad_updates=args.max_bad_updates)
            report.update(state, loss, grad_norm, lr_factor=lr_factor, windows=len(windows))
            state.epoch_seconds = report.epoch_seconds

            # 5) a model folder for each epoch, checkpoints, and a measurement only when all of it is safe
            with report.pause():
                if epoch_ends:
                    epoch = run.epoch(state.step)
                    state.end_epoch(epoch)
                    if rank.is_main:
                        save_model_folder(run, trainable, state, epoch_name(epoch), epoch=epoch)
                    report.epoch(state, epoch)
                    state.start_epoch()
                if saving or stopping:
                    report.flush()
                    save_checkpoint(run, rank, trainable, state)
                    report.checkpoint()
                if run.validates(state.step) and not stopping:
                    try:
                        measure(run, rank, trainable, documents, state, report, stop)
                    except Interrupted:  # on every rank
                        stopping = True
                        if not saving:
                            report.flush()
                            save_checkpoint(run, rank, trainable, state)
            if stopping:
                report.stopped(state)
                return stop.exit_status
            if epoch_ends:
                report.epoch_begins()

        # 6) the end
        if state.step < run.total_steps:
            save_checkpoint(run, rank, trainable, state, is_last=True)
        if rank.is_main:
            report.finished(state, save_model_folder(run, trainable, state, FINAL_MODEL, epoch=run.epoch(state.step)))
    return 0


def measure(
    run: Run,
    rank: Rank,
    trainable: Trainable,
    documents: Documents,
    state: TrainingState,
    report: Reporter,
    stop: StopSignal,
) -> None:
    """Measure the validation set, and keep the model if it is the best so far.

    Raises:
        Interrupted: on every rank, if one of them has had a signal. No state has changed.
    """
    validation = validate(run, rank, trainable, documents, stop)
    measured = validation.evaluation
    if measured is not None and state.measured(measured.bits_per_character, measured.scale) and rank.is_main:
        save_model_folder(run, trainable, state, BEST_MODEL, epoch=run.epoch(state.step))
    report.validation(state, validation)


class Update(NamedTuple):
    loss: torch.Tensor  # this rank's part of the mean over the update's predicted tokens; the ranks' parts add up
    grad_norm: torch.Tensor  # before clipping


def train_update(
    window_loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    predicted_tokens: int,
    precision: Precision,
    max_grad_norm: float,
    weight: float = 1.0,
    world_size: int = 1,
) -> Update:
    """One update of the weights: the mean loss over all windows of the update, of all micro-batches and ranks.

    Args:
        window_loss: `WindowLoss`, or DistributedDataParallel around it.
        micro_batches: this rank's, at least one.
        predicted_tokens: of the update, over all ranks.
        weight: 0 for a rank that has no window of its own and only takes part in the exchange of gradients.
    """
    total = torch.zeros((), device=micro_batches[0].input_ids.device)
    for number, windows in enumerate(micro_batches, start=1):
        exchange: AbstractContextManager[Any] = nullcontext()
        if isinstance(window_loss, DistributedDataParallel) and number < len(micro_batches):
            exchange = window_loss.no_sync()  # gradients meet once per update
        with exchange:
            with precision.autocast():
                loss = window_loss(*windows) * (weight / predicted_tokens)
            # DistributedDataParallel takes the mean over the ranks, the parts of a mean must be added.
            precision.backward(loss * world_size, optimizer)
        total += loss.detach()
    norm = precision.step(optimizer, max_grad_norm)
    optimizer.zero_grad(set_to_none=True)
    return Update(total, norm)


def train_spawned(rank: Rank, run: Run, resume: Path | None) -> int:
    """Train as a rank in a process of its own, which makes its own model."""
    prepare_streams(language_of(os.environ, sys.argv[1:]))
    set_quiet(run.args.quiet)
    return train(rank, run, build_model(run.args, run.vocab_file, run.tokenizer), resume)


def train_teachers(run: Run) -> int:
    """Train the models of a plan that the last one is to learn from and that are not there yet; gives the status."""
    assert run.plan is not None
    for number, (args, plan) in enumerate(run.plan.teacher_runs(run.args), 1):
        if (Path(args.output_dir) / FINAL_MODEL).is_dir():
            continue
        minutes, count = plan.seconds / 60, run.plan.teachers
        remark(f"plan       teacher {number} of {count} in {args.output_dir}, {minutes:.1f} minutes")
        teacher, model = prepare(args, 0, remark, plan)
        if teacher.corpus.sha256 != run.corpus.sha256:
            folder = args.tokenized_data_path
            raise ValueError(f"{folder}: another run has put other pieces there; start this run again")
        status = train_on_devices(teacher, model, find_checkpoint(teacher, len(teacher.devices)))
        if status:
            return status
    remark(f"plan       the last model learns from the text and from the teachers ({run.plan.teachers})")
    return 0


def train_on_devices(run: Run, model: GPT2LMHeadModel, resume: Path | None) -> int:
    """Train in this process, or in one for each device; gives the exit status."""
    if len(run.devices) == 1:
        return train(Rank(0, 1, run.devices[0]), run, model, resume)
    del model  # every rank builds its own
    if run.args.compile != "off":
        keep_compiled_code_private()  # in the same folder for all of them
    return run_on_all(run.devices, train_spawned, run, resume)


def tokenize(args: argparse.Namespace) -> None:
    """Run stage 3, as GPT2-Chinese's train.py does with --raw.

    Raises:
        ValueError: it ended with an error, which it has printed.
    """
    flags = ["--raw_data_path", args.raw_data_path, "--tokenized_data_path", args.tokenized_data_path]
    flags += ["--num_pieces", str(args.num_pieces), "--min_length", str(args.min_length)]
    flags += ["--vocab_filename", args.vocab_file or args.pretrained_model or str(DEFAULT_VOCABULARY)]
    if args.segment or args.bpe_token:
        flags += ["--tokenizer", "word" if args.segment else "bpe"]
    if args.document_marks:
        flags += ["--document_marks", *args.document_marks]
    flags += ["--allow_unk"] if args.allow_unk else []
    flags += ["--quiet"] if args.quiet else []
    flags += ["--lang", args.lang] if args.lang else []
    script = Path(__file__).with_name("make-tokenized.py")
    if subprocess.run([sys.executable, str(script), *flags], check=False).returncode:
        raise ValueError("--raw: make-tokenized.py ended with the error above; nothing was trained")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv, description=__doc__)
    set_quiet(args.quiet)
    torchrun = Torchrun.from_environment()
    is_main = torchrun is None or torchrun.rank == 0
    for flag in ("raw", "minutes"):
        if getattr(args, flag) and torchrun is not None and torchrun.world_size > 1:
            raise ValueError(f"--{flag} is for a run without torchrun; run the same without it, once, for what it does")
    if args.raw:
        tokenize(args)
    plan = plan_run(args, given_flags(argv)) if args.minutes and not args.eval_only else None
    if args.plan:
        check_stdout()
        return 0
    if is_main:
        print_settings(args)
    if args.eval_only:
        status = evaluate_folder(args)
        check_stdout()
        return status
    if args.report_only:
        return report_of_folder(args)

    run, model = prepare(args, torchrun.world_size if torchrun else 0, remark if is_main else lambda _: None, plan)
    if is_main:
        for line in describe(run, model):
            remark(line)
    with exclusive_lock(args.output_dir) if is_main else nullcontext():
        ranks = torchrun.world_size if torchrun else len(run.devices)
        resume = find_checkpoint(run, ranks) if is_main else None
        if plan is not None:
            plan.write(run.output / PLAN)
        if torchrun is not None:
            rank = Rank(torchrun.rank, torchrun.world_size, torchrun.device(run.devices, args.device))
            with process_group(rank):
                status = train(rank, run, model, resume)
        else:
            status = train_teachers(run) if plan is not None and plan.teachers else 0
            status = status or train_on_devices(run, model, resume)
        if args.report and is_main and status == 0:
            device = str(run.devices[0])
            print(f"report: {write_report(run.output, run.corpus, run.tokenizer, device=device, say=remark)}")
    return status


if __name__ == "__main__":
    run_script(main)
