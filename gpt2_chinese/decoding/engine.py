"""Decodes many texts at once, step by step; generate.py and server.py share it.

One thread owns the model. A request waits until a row is free, its samples share one prefill, each sample then takes
part in every step until it has ended, and leaves its row to the next. What a sample gets depends on its request and
seed only: alone or in a crowd, the text is the same.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2_chinese.decoding.backend import CompletionBackend, Request
from gpt2_chinese.decoding.compiled_decoder import CompiledDecoder, fastest_decoder, is_decoder_cached
from gpt2_chinese.decoding.completion import (
    Completion,
    EngineStopped,
    IncrementalDetokenizer,
    Prompt,
    TextDelta,
    TokenLogprob,
)
from gpt2_chinese.decoding.decoder import Decoder, Prefix
from gpt2_chinese.decoding.graph_decoder import decoder_on_gpu
from gpt2_chinese.decoding.sampling import apply_repetition_penalty, draw, row_seed, uniforms
from gpt2_chinese.precision import to_device
from gpt2_chinese.text.tokenizer import TextJoiner, Tokenizer
from gpt2_chinese.text.vocabulary import CLS_ID, NEVER_PRODUCED

LOGGER = logging.getLogger(__name__)
MAX_PREFILL_TOKENS_PER_STEP = 512
"""Tokens of prompts that are prefilled between two steps; more would let the running texts stand still."""


@dataclass(eq=False)
class _Request(Request):
    """A ticket and how far it has come: `joined` of its samples have or had a row."""

    cancelled: bool = False
    cancelled_samples: set[int] = field(default_factory=set)
    joined: int = 0
    prefix: Prefix | None = None
    completions: dict[int, Completion] = field(default_factory=dict)

    def cancel(self, sample: int | None = None) -> None:
        if sample is None:
            self.cancelled = True
        else:
            self.cancelled_samples.add(sample)

    def gives_up(self, sample: int) -> bool:
        return self.cancelled or sample in self.cancelled_samples


@dataclass(eq=False)
class _Sample:
    """A sample in a row: `held` of its tokens are in the row's buffer, the last one is still to be fed.

    `text` is what `joined` of its ids say; `reported` of its logprobs have gone out with pieces.
    """

    ticket: _Request
    number: int
    text: IncrementalDetokenizer
    ids: list[int] = field(default_factory=list)
    held: int = 0
    joined: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reported: int = 0

    def join(self) -> str:
        """Join the ids that are not yet text; give what is settled by them."""
        settled = self.text.push(*self.ids[self.joined :])
        self.joined = len(self.ids)
        return settled

    def send(self, text: str, reason: str | None) -> None:
        """Hand a piece to whoever streams: this text, the logprobs of the tokens that begin in what went out."""
        if self.ticket.on_delta is None or not (text or reason):
            return
        begin = self.reported
        while self.reported < len(self.logprobs) and (reason or self.logprobs[self.reported].offset < self.text.given):
            self.reported += 1
        self.ticket.on_delta(TextDelta(self.number, text, tuple(self.logprobs[begin : self.reported]), reason))


class Engine(CompletionBackend):
    """Decoding with one model thread; `with Engine(...) as engine:` starts and stops it.

    Args:
        model: a GPT2LMHeadModel; its dtype and device are the engine's.
        tokenizer: with as many tokens as the model has, or fewer: ids behind its vocabulary are never produced.
        rows: sequences decoded at once. GPT-2 small with n_ctx 1024 takes up to 75 MB for each in float32.
        max_waiting: sequences that may wait for a row.
        precision: on the CPU, how the compiled decoder keeps the weights: fp32, bf16 or int8, which multiplies integers
            too; "auto" is bf16. None takes PyTorch and the model's dtype. A GPU computes in fp32 or bf16 where one of
            them is given, else in the model's dtype.
        wait: where the compiled decoder must be compiled first, wait for it; else begin with PyTorch in float32 and
            switch when it is there (`at_full_speed`).
        on_step_end: called in the model's thread after every step, and when it ends.

    Example:
        >>> with Engine(*load_model("model/final_model")) as engine:
        ...     engine.complete("感冒", samples=5, length=50)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        rows: int = 32,
        max_waiting: int = 1024,
        precision: str | None = None,
        wait: bool = True,
        on_step_end: Callable[[], None] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.decoder: Decoder | CompiledDecoder
        self._next_decoder: Future[Decoder | CompiledDecoder] | None = None
        if model.device.type == "cuda":
            self.decoder = decoder_on_gpu(model, rows, precision)
        elif precision is None or model.device.type != "cpu":
            self.decoder = Decoder(model, rows)
        elif wait or is_decoder_cached():
            self.decoder = fastest_decoder(model, rows, precision)
        else:
            self.decoder = Decoder(model, rows)
            self._next_decoder = _in_background(lambda: fastest_decoder(model, rows, precision))
        if len(tokenizer) > self.decoder.vocab_size:
            raise ValueError(
                f"the vocabulary has {len(tokenizer)} tokens and the model {self.decoder.vocab_size}: "
                "they do not belong together"
            )
        if self.decoder.n_ctx < 2:
            raise ValueError(f"the model's n_ctx is {self.decoder.n_ctx}; to go on behind a context it takes 2 or more")
        self.n_ctx = self.decoder.n_ctx
        self.max_waiting = max_waiting
        self.device = str(self.decoder.device)
        self._on_turn = on_step_end
        device, vocab_size = self.decoder.device, self.decoder.vocab_size
        self._banned = torch.tensor([*NEVER_PRODUCED, *range(len(tokenizer), vocab_size)], device=device)
        self._rows: list[_Sample] = []  # row i of the decoder holds sample i
        # Of each row: how its tokens are drawn, and for a repetition penalty which tokens stand in it.
        self._seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        self._seeds = np.zeros(rows, dtype=np.uint64)
        self._drawn = np.zeros(rows, dtype=np.uint64)
        # NumPy's, for PyTorch's operations give Python's lock away, and a busy server's other thread takes it.
        self._temperature, self._top_p, self._penalty = np.zeros((3, rows), dtype=np.float32)
        self._top_k = np.zeros(rows, dtype=np.int64)
        self._waiting: deque[_Request] = deque()
        self._queued = 0  # sequences so far
        self.left_queue = 0
        """Sequences that have joined, or ended before, so far."""
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        if self._next_decoder is not None:
            self._next_decoder.add_done_callback(self._wake)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self.decoder.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.error is None and not self._closing

    @property
    def at_full_speed(self) -> bool:
        return self._next_decoder is None

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return self._queued - self.left_queue

    def _queue(self, **request: Any) -> Request:
        ticket = _Request(**request)
        # From here on only the engine ends it: asyncio would cancel the future of a client that has gone.
        ticket.future.set_running_or_notify_cancel()
        with self._changed:
            if not self.alive:
                raise EngineStopped(self._why_stopped())
            self.check_room(ticket.samples)
            self._waiting.append(ticket)
            self._queued += ticket.samples
            self._changed.notify_all()
        return ticket

    def _run(self) -> None:
        """The model thread: cancelled requests leave, waiting ones join, one step; until the engine is closed."""
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._switch_decoder()
                    self._leave_cancelled()
                    self._join()
                    self._step()
                    self._turned()
        except BaseException as error:  # whatever it is, those who wait must hear of it
            self.error = error
            LOGGER.exception("the model thread has stopped")
        with self._changed:
            self._closing = True
            left = {sample.ticket for sample in self._rows} | set(self._waiting)
            self._rows.clear()
            self._waiting.clear()
            self.left_queue = self._queued
        for ticket in left:
            ticket.future.set_exception(EngineStopped(self._why_stopped()))
        self._turned()

    def _turned(self) -> None:
        if self._on_turn is not None:
            self._on_turn()

    def _switch_decoder(self) -> None:
        """Go on with the compiled decoder as soon as it is there; what the rows hold is prefilled anew."""
        if self._next_decoder is None or not self._next_decoder.done():
            return
        self.decoder, self._next_decoder = self._next_decoder.result(), None
        for row, sample in enumerate(self._rows):
            text = [*sample.ticket.prompt.ids, *sample.ids][:-1]
            self.decoder.load(row, self.decoder.prefill(text[-sample.held :]))
        for ticket in self._waiting:
            ticket.prefix = None  # of the decoder that has gone
        LOGGER.info("decoding at full speed from here on")

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._rows or self._decoder_is_there())
            return not self._closing

    def _decoder_is_there(self) -> bool:
        return self._next_decoder is not None and self._next_decoder.done()

    def _leave_cancelled(self) -> None:
        for row in reversed(range(len(self._rows))):
            if self._rows[row].ticket.gives_up(self._rows[row].number):
                self._leave(row, "cancelled")
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.cancelled]
            if gone:
                self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
                self.left_queue += sum(ticket.samples - ticket.joined for ticket in gone)
        for ticket in gone:
            ticket.prefix = None
            for number in range(ticket.joined, ticket.samples):
                self._finish(self._sample(ticket, number), "cancelled")

    def _join(self) -> None:
        """Let waiting requests take the free rows; the samples of each share one prefill.

        Those that are running wait for `MAX_PREFILL_TOKENS_PER_STEP` of prompts at most, or for one longer prompt.
        """
        prompts: list[tuple[int, tuple[int, ...]]] = []  # with the row that each is prefilled into
        samples: list[int] = []  # of each
        first = len(self._rows)
        tokens = 0
        while self._waiting and (free := self.decoder.rows - len(self._rows)):
            ticket = self._waiting[0]
            if ticket.scored and ticket.prompt_logprobs is None:
                ticket.prompt_logprobs = self._score(ticket.prompt, ticket.logprobs or 0)
            if ticket.length == 0:
                self._end_unsampled(ticket)
                continue
            tokens += len(ticket.prompt.ids)
            if ticket.prefix is not None or ticket.samples > free:
                if not prompts:
                    self._join_in_parts(ticket, free)
                    return
                break
            if prompts and tokens > MAX_PREFILL_TOKENS_PER_STEP:
                break
            prompts.append((len(self._rows), ticket.prompt.ids))
            samples.append(ticket.samples)
            self._take_rows(ticket, ticket.samples)
        if not prompts:
            return
        logits = self.decoder.prefill_rows(prompts)
        self.prompt_tokens += sum(len(prompt) for _, prompt in prompts)
        for (row, prompt), count in zip(prompts, samples, strict=True):
            for other in range(row + 1, row + count):
                self.decoder.copy_row(row, other, len(prompt))
        places = [place for place, count in enumerate(samples) for _ in range(count)]
        self._advance(range(first, len(self._rows)), _rows_of(logits, places))

    def _join_in_parts(self, ticket: _Request, free: int) -> None:
        """Let so many samples of a request join as there are rows; its prefill is kept for the others."""
        if ticket.prefix is None:
            ticket.prefix = self.decoder.prefill(ticket.prompt.ids)
            self.prompt_tokens += len(ticket.prompt.ids)
        prefix, first = ticket.prefix, len(self._rows)
        self._take_rows(ticket, min(free, ticket.samples - ticket.joined))
        for row in range(first, len(self._rows)):
            self.decoder.load(row, prefix)
        self._advance(range(first, len(self._rows)), prefix.logits.repeat(len(self._rows) - first, 1))

    def _end_unsampled(self, ticket: _Request) -> None:
        """End a request at the head of the queue that wants no tokens."""
        with self._changed:
            self._waiting.popleft()
            self.left_queue += ticket.samples - ticket.joined
            ticket.joined = ticket.samples
        for number in range(ticket.samples):
            self._finish(self._sample(ticket, number), "length")

    def _score(self, prompt: Prompt, wanted: int) -> tuple[TokenLogprob, ...]:
        """How likely the model holds each token of a prompt to be, of those that the caller has given."""
        before = 0
        reports: list[tuple[float | None, dict[str, float] | None]] = [] if prompt.implied else [(None, None)]
        for logits in self.decoder.prompt_logits(prompt.ids[:-1]) if len(prompt.ids) > 1 else ():
            following = prompt.ids[before + 1 : before + 1 + len(logits)]
            reports += self._reports([wanted] * len(following), following, logits)
            before += len(following)
        self.prompt_tokens += before
        ids = prompt.ids[prompt.implied :]
        joiner = TextJoiner(compat=self.tokenizer.compat)
        tokens = [self.tokenizer.vocabulary[id_] for id_ in ids]
        lengths = [len(joiner.push(token)) for token in tokens]
        # Counted from the end: what was cut from the left stands in the context too.
        begin = len(prompt.context) - sum(lengths)
        offsets = [max(0, place) for place in itertools.accumulate(lengths, initial=begin)]
        return tuple(
            TokenLogprob(token, *report, offset)
            for token, report, offset in zip(tokens, reports, offsets, strict=False)
        )

    def _take_rows(self, ticket: _Request, count: int) -> None:
        """Give the next samples of the first waiting request their rows."""
        for number in range(ticket.joined, ticket.joined + count):
            row, settings = len(self._rows), ticket.settings
            self._seeds[row], self._drawn[row] = row_seed(ticket.seed, number), 0
            self._temperature[row], self._top_p[row] = settings.temperature, settings.top_p
            self._top_k[row] = min(settings.top_k, self.decoder.vocab_size)
            self._penalty[row] = settings.repetition_penalty
            if settings.repetition_penalty != 1:
                self._seen[row] = False
                self._seen[row, list(ticket.prompt.ids)] = True
            self._rows.append(self._sample(ticket, number))
        with self._changed:
            ticket.joined += count
            self.left_queue += count
            if ticket.joined == ticket.samples:
                self._waiting.popleft()
                ticket.prefix = None

    def _step(self) -> None:
        """One more token for every row; a row whose window is full goes on behind the second half of its text."""
        for row in reversed(range(len(self._rows))):
            sample = self._rows[row]
            if sample.held == self.n_ctx:
                half = max(1, self.n_ctx // 2)
                prefix = self.decoder.prefill([*sample.ticket.prompt.ids, *sample.ids][-half:])
                self.decoder.load(row, prefix)
                sample.held = half
                self._advance(range(row, row + 1), prefix.logits[None])
        if not self._rows:
            return
        logits = self.decoder.step([sample.ids[-1] for sample in self._rows], [sample.held for sample in self._rows])
        for sample in self._rows:
            sample.held += 1
        self._advance(range(len(self._rows)), logits)

    def _advance(self, rows: range, logits: Tensor) -> None:
        """Draw the next token of these rows from their logits, which are spoilt; those that have ended leave."""
        samples = [self._rows[row] for row in rows]
        wanted = {place: count for place, one in enumerate(samples) if (count := one.ticket.logprobs) is not None}
        reporting = list(wanted)
        reported = logits[reporting] if reporting else logits  # a copy, before some are banned
        tokens = self._draw(samples, slice(rows.start, rows.stop), logits)
        logprobs = {}
        if reporting:
            reports = self._reports(list(wanted.values()), tokens[reporting].tolist(), reported)
            logprobs = {rows[place]: report for place, report in zip(reporting, reports, strict=True)}
        now = time.monotonic()
        for row, sample, token in reversed(list(zip(rows, samples, tokens.tolist(), strict=True))):
            ticket = sample.ticket
            ticket.first_token_at = ticket.first_token_at or now
            if token == CLS_ID:
                self._leave(row, "stop")
                continue
            sample.ids.append(token)
            self.generated_tokens += 1
            if row in logprobs:
                chosen, top = logprobs[row]
                sample.logprobs.append(
                    TokenLogprob(self.tokenizer.vocabulary[token], chosen, top, len(sample.text.text))
                )
            if ticket.stop or ticket.on_delta is not None or row in logprobs:
                sample.send(sample.join(), None)
            if sample.text.stopped:
                self._leave(row, "stop")
            elif len(sample.ids) == ticket.length:
                self._leave(row, "length")

    def _reports(
        self, wanted: Sequence[int], tokens: Sequence[int], logits: Tensor
    ) -> list[tuple[float, dict[str, float]]]:
        """For each row: the logprob of its token, and those of its likeliest tokens, so many as are wanted."""
        reports = []
        for count, token, scores in zip(wanted, tokens, logits, strict=True):
            scores = torch.log_softmax(scores.double(), dim=-1)
            best = scores.topk(min(count, len(self.tokenizer)))
            top = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if count else {}
            top.setdefault(token, float(scores[token]))
            names = {self.tokenizer.vocabulary[id_]: score for id_, score in top.items() if id_ < len(self.tokenizer)}
            reports.append((top[token], names))
        return reports

    def _draw(self, samples: Sequence[_Sample], rows: slice, logits: Tensor) -> Tensor:
        """One token for each sample; a copy of the logits only to ban some tokens would take as long as the draw."""
        penalised = any(sample.ticket.settings.repetition_penalty != 1 for sample in samples)
        if penalised:
            penalty = to_device(torch.from_numpy(self._penalty[rows]), logits.device)
            logits = apply_repetition_penalty(logits, self._seen[rows], penalty)
        if logits.is_cpu:  # by NumPy, which keeps Python's lock
            logits.numpy()[:, self._banned.numpy()] = -np.inf
        else:
            logits.index_fill_(1, self._banned, -torch.inf)
        tokens = draw(
            logits,
            uniforms(self._seeds[rows], self._drawn[rows]),
            *(torch.from_numpy(part[rows]) for part in (self._temperature, self._top_k, self._top_p)),
            compiled=self.decoder.compiled_draw,
        )
        self._drawn[rows] += np.uint64(1)
        if penalised:  # of the other rows no one asks
            self._seen[rows].scatter_(1, to_device(tokens[:, None], self._seen.device), True)
        return tokens

    def _leave(self, row: int, reason: str) -> None:
        """End the sample of a row; the last row moves into its place."""
        sample = self._rows[row]
        last = len(self._rows) - 1
        if row != last:
            moved = self._rows[row] = self._rows[last]
            self.decoder.copy_row(last, row, moved.held)
            for part in (self._seeds, self._drawn, self._temperature, self._top_p, self._top_k, self._penalty):
                part[row] = part[last]
            if moved.ticket.settings.repetition_penalty != 1:
                self._seen[row] = self._seen[last]
        self._rows.pop()
        self._finish(sample, reason)

    def _sample(self, ticket: _Request, number: int) -> _Sample:
        text = IncrementalDetokenizer(self.tokenizer, ticket.prompt, ticket.stop)
        return _Sample(ticket, number, text, held=len(ticket.prompt.ids))

    def _finish(self, sample: _Sample, reason: str) -> None:
        ticket = sample.ticket
        settled = sample.join() + sample.text.rest()
        if sample.text.stopped:
            # The tokens of the stop string are in the ids, not in the text.
            sample.logprobs = [one for one in sample.logprobs if one.offset < len(sample.text.text)]
        text = ticket.prompt.context + sample.text.text
        ticket.completions[sample.number] = Completion(text, tuple(sample.ids), reason, tuple(sample.logprobs))
        sample.send(settled, reason)
        if len(ticket.completions) == ticket.samples:
            ticket.future.set_result([ticket.completions[number] for number in range(ticket.samples)])


def _rows_of(logits: Tensor, places: list[int]) -> Tensor:
    """Some rows, as a copy."""
    if logits.is_cpu:
        # PyTorch would share the copy out among its threads, which then spin for a while on what others could use.
        return torch.from_numpy(logits.numpy()[places])
    return logits.index_select(0, to_device(torch.tensor(places), logits.device))


def _in_background(function: Callable[[], Any]) -> Future[Any]:
    """What a function gives, or raises, in a thread of its own that nobody waits for at the end."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # it is raised in the model thread
            future.set_exception(error)

    threading.Thread(target=run, name="decoder-builder", daemon=True).start()
    return future


def continuation(tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int]) -> str:
    """The whole text of ids behind a prompt."""
    text = IncrementalDetokenizer(tokenizer, prompt)
    for id_ in ids:
        text.push(id_)
    return text.text


def choose_device(name: str) -> torch.device:
    """The device that `--device` names: "auto", "cpu", "cuda", or numbers of GPUs, of which the first is taken.

    Raises:
        ValueError: no such device on this machine.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    first = "0" if name in ("auto", "cuda") else name.split(",")[0].strip()
    if not first.isdecimal():
        raise ValueError(f"--device {name}: it must be auto, cpu, cuda or a GPU's number, such as 0")
    if int(first) >= available:
        raise ValueError(f"--device {name}: this machine has {available} CUDA devices; use --device cpu")
    return torch.device("cuda", int(first))
