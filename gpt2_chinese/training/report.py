"""What a run says: the resolved settings, a progress bar, a line for each epoch and measurement, metrics."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2LMHeadModel

from gpt2_chinese.command_line import is_quiet, localized, text_stream
from gpt2_chinese.model_folder import BEST_MODEL, read_config
from gpt2_chinese.training.estimates import memory_estimate, peak_flops, will_overfit
from gpt2_chinese.training.flags import PRETRAINED_LR
from gpt2_chinese.training.metrics import Metrics
from gpt2_chinese.training.plan import MEASURED_UPDATES, TEACHERS, report_seconds, updates_until
from gpt2_chinese.training.ranks import Rank
from gpt2_chinese.training.run import CHECKPOINTS, METRICS, Run, epoch_name
from gpt2_chinese.training.state import TrainingState
from gpt2_chinese.training.token_cache import Corpus
from gpt2_chinese.training.trainable import Trainable
from gpt2_chinese.training.validation import Validation

SAVING_SECONDS, SAVED_BYTES = 0.5, 200e6  # of a model and a checkpoint: in any case, and written in a second
FORWARD_PART, CALIBRATING_PART = 1 / 3, 0.1  # of an update's time, that measuring its tokens takes
TIMED_UPDATES = 10  # before the remaining time is estimated; the first half of them compiles and allocates
SMALL_MODEL = 30_000_000  # parameters; a smaller one wants higher learning rates, also where it goes on with new texts

_SCHEDULES = {
    "linear": "then linear decay to 0",
    "wsd": "then constant, with linear decay to 0 over the last {decay_fraction:g} of the run",
    "cosine": "then cosine decay to 0",
}


def describe(run: Run, model: GPT2LMHeadModel) -> Iterator[str]:
    """The resolved settings, a line each."""
    args, config, corpus = run.args, run.config, run.corpus
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = len(corpus.tokens)
    yield f"corpus     {args.tokenized_data_path}: {tokens:,} tokens{_held_out(corpus)}"
    stated = read_config(run.config_file).vocab_size
    instead = f" (instead of the {stated:,} of {run.config_file})" if stated != len(run.tokenizer) else ""
    yield f"vocabulary {run.vocab_file}: {len(run.tokenizer):,} tokens{instead}"
    yield (
        f"model      {args.pretrained_model or run.config_file}: {config.n_layer} layers, n_embd {config.n_embd}, "
        f"{config.n_head} heads, n_ctx {config.n_ctx}, dropout {config.resid_pdrop:g}; {parameters:,} parameters"
    )
    clamped = f" (not {args.stride}, which would leave tokens out)" if run.stride != args.stride else ""
    yield (
        f"windows    {len(run.starts):,} of {config.n_ctx} tokens, stride {run.stride}{clamped}; "
        f"shuffled with seed {args.seed}"
    )
    limit = ", --max_steps" if args.max_steps else ""
    yield (
        f"run        {args.epochs} epochs of {run.updates_per_epoch:,} updates{limit} = {run.total_steps:,} updates of "
        f"{args.batch_size} x {args.gradient_accumulation} windows"
    )
    muon_lr = args.muon_lr or args.lr
    optimizer = "AdamW" if args.optimizer == "adamw" else f"Muon at {muon_lr:g} and AdamW"
    if args.character_lr:
        optimizer = f"Muon at {muon_lr:g} and AdamW (vectors of characters: {args.character_lr:g})"
    yield (
        f"optimizer  {optimizer}, learning rate {args.lr:g} after {run.warmup_steps:,} updates of warm-up, "
        f"{_SCHEDULES[args.schedule].format(decay_fraction=args.decay_fraction)}; "
        f"gradients clipped to {args.max_grad_norm:g}{_decay(args)}"
    )
    where = ", ".join(str(device) for device in run.devices)
    yield f"precision  {run.precision} on {where}{f' ({run.precision_note})' if run.precision_note else ''}"
    memory = memory_estimate(
        config,
        parameters,
        windows=math.ceil(args.batch_size / len(run.devices)),
        precision=run.precision,
        optimizer=args.optimizer,
        recompute=args.gradient_checkpointing,
        on_cpu=run.devices[0].type == "cpu",
    )
    memory += run.bytes_of_soft_targets
    yield f"memory     about {memory / 2**30:,.1f} GiB on each device"
    if run.warmup_steps >= run.total_steps:
        yield f"note: the warm-up of {run.warmup_steps:,} updates is longer than the run: --lr is never reached"
    if args.log_step > run.total_steps:
        yield f"note: --log_step {args.log_step} is longer than the run: only its last update is logged"
    if args.pretrained_model and args.optimizer == "adamw" and args.lr <= PRETRAINED_LR and parameters < SMALL_MODEL:
        yield (
            f"note: --lr {args.lr:g} suits models of 100 million parameters; one of {parameters:,} hardly learns new "
            "texts with it: try --optimizer muon --lr 1.5e-2 --muon_lr 6e-3"
        )
    yield f"writes     {args.output_dir}, TensorBoard in {args.writer_dir} every {args.log_step} updates"
    if run.plan is None and not args.ngram_share and will_overfit(tokens, parameters, args.epochs):
        yield (
            f"note: {parameters:,} parameters for {tokens:,} tokens in {args.epochs} epochs: the model will overfit "
            "and memorise the texts. More text, a smaller --model_config or at most 4 epochs help"
        )


def _held_out(corpus: Corpus) -> str:
    """What is held out, if anything is."""
    if not corpus.held_out_tokens:
        return ""
    if not corpus.held_out_slices:
        documents = f"{corpus.held_out_documents:,} of {corpus.documents:,} documents"
        return f"; {documents} held out, {corpus.held_out_tokens:,} tokens"
    held_out = f"{corpus.held_out_slices:,} slices of long documents"
    if corpus.held_out_documents:
        held_out = f"{corpus.held_out_documents:,} documents and {held_out}"
    return (
        f"; {held_out} held out, {corpus.held_out_tokens:,} tokens; {corpus.gap_tokens:,} tokens beside the slices "
        "left out"
    )


def _figure(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _decay(args: argparse.Namespace) -> str:
    """The weight decay, if there is one."""
    muon = args.weight_decay if args.muon_weight_decay is None else args.muon_weight_decay
    if args.optimizer == "muon" and muon != args.weight_decay:
        return f"; weight decay {muon:g} (Muon) and {args.weight_decay:g}"
    return f"; weight decay {args.weight_decay:g}" if args.weight_decay else ""


class Reporter:
    """The progress bar and the metrics of a run; on other ranks than the main one it is silent.

    Args:
        state: where the run begins, or goes on; points of metrics behind it are taken back.
    """

    def __init__(self, run: Run, rank: Rank, state: TrainingState, trainable: Trainable) -> None:
        self._run, self._rank, self._flops = run, rank, trainable.flops_per_token
        self._parameters = sum(parameter.numel() for parameter in trainable.model.parameters())
        self._metrics: Metrics | None = None
        if rank.is_main:
            self._metrics = Metrics(run.args.writer_dir, run.output / METRICS, resumed_from=state.step)
        on_gpu = rank.device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(rank.device)) if on_gpu else None
        in_log_file = not sys.stderr.isatty()  # where every refresh is a line
        self._bar = tqdm(
            total=run.total_steps,
            initial=state.step,
            unit=localized(" updates"),
            disable=not rank.is_main or is_quiet(),
            dynamic_ncols=True,
            mininterval=10 if in_log_file else 0.1,
        )
        self._first_step = state.step
        self._tokens_per_second = 0.0  # of the last updates
        self._windows = 0  # since the last point
        self._has_warned = False
        now = time.perf_counter()
        self._last_point = self._last_checkpoint = self._timing_began = now
        self._timed_from = state.step  # the update behind which the timing began
        self._epoch_began = now - state.epoch_seconds

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._metrics is not None:
            self._metrics.__exit__(kind, error, traceback)

    @property
    def epoch_seconds(self) -> float:
        return time.perf_counter() - self._epoch_began

    @property
    def seconds_since_checkpoint(self) -> float:
        return time.perf_counter() - self._last_checkpoint

    def flush(self) -> None:
        """Before a checkpoint, so that no point of the run is missing if this is where it goes on."""
        if self._metrics is not None:
            self._metrics.flush()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what is done meanwhile out of the speed, which is that of updates."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._last_point += seconds
            self._timing_began += seconds

    def update(self, state: TrainingState, loss: Tensor, grad_norm: Tensor, *, lr_factor: float, windows: int) -> None:
        """An update has been made; the figures, which wait for a GPU, are read at every `--log_step`."""
        self._windows += windows
        if self._run.logs(state.step):
            self._point(state, loss.item(), grad_norm.item(), lr_factor)
        self._bar.update()
        self._estimate_time(state.step)

    def _point(self, state: TrainingState, loss: float, grad_norm: float, lr_factor: float) -> None:
        now = time.perf_counter()
        speed = self._windows * self._run.config.n_ctx / (now - self._last_point)
        smoothed = self._tokens_per_second
        self._tokens_per_second = speed if smoothed == 0 else 0.9 * smoothed + 0.1 * speed
        self._last_point, self._windows = now, 0
        if self._metrics is not None:
            figures = {
                "loss": loss,
                "learning_rate": self._run.args.lr * lr_factor,
                "gradient_norm": grad_norm,
                "tokens_per_second": speed,
            }
            if self._peak is not None:
                figures["mfu"] = self._flops * speed / (self._peak * self._rank.world_size)
            self._metrics.train(state.step, state.step / self._run.updates_per_epoch, **figures)
        self._bar.set_postfix_str(f"loss {loss:.3f}, {self._tokens_per_second:,.0f} tokens/s", refresh=False)

    def updates_in_time(self, state: TrainingState, loss: Tensor) -> int:
        """How many updates a planned run shall have, if all take as long as those since this was asked before.

        At most those that --max_steps allows. Reading `loss` waits for the last one.
        """
        run, plan = self._run, self._run.plan
        assert plan is not None
        loss.item()
        now = time.perf_counter()
        per_update = (now - self._timing_began) / max(1, state.step - self._timed_from)
        self._timing_began, self._timed_from = now, state.step
        windows = len(run.starts) * run.config.n_ctx
        part = FORWARD_PART + (CALIBRATING_PART if run.args.calibrate else 0)
        measuring = per_update * run.updates_per_epoch * run.corpus.held_out_tokens / windows * part
        saving = SAVING_SECONDS + self._parameters * 32 / SAVED_BYTES
        found = state.step + updates_until(
            plan.deadline - (report_seconds(len(run.corpus.tokens)) if run.args.report else 0),
            time.time(),
            per_update=per_update,
            per_epoch=measuring + saving,
            updates_per_epoch=run.updates_per_epoch,
        )
        return min(found, plan.most_updates or found)

    def planned(self, state: TrainingState) -> None:
        """The number of updates has been decided, or corrected."""
        self._bar.total = self._run.total_steps
        epochs = self._run.total_steps / self._run.updates_per_epoch
        if state.step == MEASURED_UPDATES:
            self._remark(f"plan       about {self._run.total_steps:,} updates, {epochs:.1f} epochs, fit into the time")

    def _estimate_time(self, step: int) -> None:
        if step == self._first_step + TIMED_UPDATES // 2:
            self._timing_began, self._timed_from = time.perf_counter(), step
        remaining = self._run.total_steps - step
        is_known = step == self._first_step + TIMED_UPDATES and self._run.plan is None
        if is_known and remaining > TIMED_UPDATES:
            seconds = (time.perf_counter() - self._timing_began) / (TIMED_UPDATES - TIMED_UPDATES // 2) * remaining
            self._remark(f"the remaining {remaining:,} updates will take about {timedelta(seconds=round(seconds))}")

    def epoch(self, state: TrainingState, epoch: int) -> None:
        """Epoch `epoch` (from 1) has ended and its model is saved."""
        tokens = state.running.windows * self._run.config.n_ctx
        bad = state.running.bad
        line = (
            f"epoch {epoch} of {self._run.args.epochs}: loss {state.epoch_loss:.4f}, {state.epoch_seconds:,.0f} s, "
            f"{tokens / state.epoch_seconds:,.0f} tokens/s; saved {self._run.output / epoch_name(epoch)}"
        )
        if state.skipped:
            line += f"; fp16 overflowed and skipped {state.skipped} updates so far"
        elif bad and not self._run.precision.startswith("fp16"):
            line += f"; {bad} updates skipped so far, with a loss or gradient that was not finite"
        self._say(line)

    def epoch_begins(self) -> None:
        self._epoch_began = time.perf_counter()

    def checkpoint(self) -> None:
        self._last_checkpoint = time.perf_counter()

    def validation(self, state: TrainingState, validation: Validation) -> None:
        """The validation set was measured, and prompts were completed."""
        measured, completions = validation
        if self._metrics is None or (measured is None and not completions):
            return
        if self._metrics.has_validation(state.step):
            return  # measured again by a run that resumes from this update
        epoch = state.step / self._run.updates_per_epoch
        figures: dict[str, Any] = measured.figures() if measured is not None else {}
        self._metrics.validation(state.step, epoch, completions=completions, **figures)
        if measured is not None:
            error = f" ± {measured.error:.4f}" if math.isfinite(measured.error) else ""
            scale = "" if measured.scale is None else f", with its logits times {measured.scale:.2f}"
            self._say(
                f"update {state.step:,}: validation loss {measured.loss:.4f}, perplexity "
                f"{_figure(measured.perplexity)}, {measured.bits_per_character:.4f}{error} bits per character{scale}"
            )
            if state.overfits and not self._has_warned:
                self._has_warned = True
                self._say(
                    f"overfitting since update {state.best_step:,}: the training loss falls, the validation loss does "
                    "not"
                )
        for text, completion in completions.items():
            self._say(f"    {text}|{completion}", file=text_stream())

    def stopped(self, state: TrainingState) -> None:
        self._say(
            f"stopped after update {state.step:,} of {self._run.total_steps:,}; the checkpoint is "
            f"{self._run.output / CHECKPOINTS / f'step_{state.step}'}. The same "
            "command with --resume continues exactly from there"
        )

    def finished(self, state: TrainingState, path: Path) -> None:
        """The last model is saved at `path`; the best one may be another."""
        if not self._rank.is_main:
            return
        self._bar.close()
        print(f"trained {state.step:,} updates{self._early(state)}; the last model is in {path}")
        if state.best_step:
            best = self._run.output / BEST_MODEL
            when = "the same" if state.best_step == state.step else f"of update {state.best_step:,}"
            print(f"the best model, {when}, has {state.best_bits:.4f} bits per character and is in {best}")
            path = best
        if self._run.output.parent.name != TEACHERS:  # what a teacher is for is to teach
            print(f"python generate.py --model_path {path}")

    def _early(self, state: TrainingState) -> str:
        if state.step == self._run.total_steps:
            return ""
        return f" of {self._run.total_steps:,}, {state.since_best} measurements without gain"

    def _say(self, line: str, *, file: TextIO | None = None) -> None:
        if self._rank.is_main:
            self._bar.write(line, file=file)

    def _remark(self, line: str) -> None:
        if not is_quiet():
            self._say(line)
