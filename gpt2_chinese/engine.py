"""Decodes many texts at once, step by step; generate.py and server.py share it.

One thread owns the model. A request waits until a row is free, its samples share one prefill, each sample then takes
part in every step until it has ended, and leaves its row to the next. What a sample gets depends on its request and
seed only: alone or in a crowd, the text is the same.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpt2_chinese.compiled_decoder import CompiledDecoder, fastest_decoder, is_at_hand
from gpt2_chinese.decoder import Decoder, Prefix
from gpt2_chinese.sampling import draw, repetition_penalised, row_seed, uniforms
from gpt2_chinese.tokenizer import TextJoiner, Tokenizer
from gpt2_chinese.vocabulary import CLS_ID, MASK_ID, PAD_ID, UNK_ID

LOGGER = logging.getLogger(__name__)
NEVER_PRODUCED = (MASK_ID, PAD_ID, UNK_ID)


SETTING_LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "top_k": (0, 1_000_000),
    "top_p": (0, 1),
    "repetition_penalty": (0.1, 10),
    "seed": (-(2**63), 2**63 - 1),
}
"""What a caller may ask for, both ends included."""


@dataclass(frozen=True)
class Settings:
    """How tokens are drawn; values within SETTING_LIMITS.

    temperature 0 takes the greatest logit; top_k 0 and top_p 0 (or 1) are off; repetition_penalty 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 30
    top_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A context as the model gets it: `[MASK]` (the beginning of a document) and its ids, at most n_ctx of them.

    `cut` counts the tokens that were cut from the left because the context is longer than the model's.
    """

    context: str
    ids: tuple[int, ...]
    cut: int


@dataclass(frozen=True)
class Completion:
    """A finished sample: its context and continuation, its ids without the context's, and why it ended.

    `finish_reason` is "stop" ([CLS], the end of a document), "length" or "cancelled".
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str


class EngineStopped(RuntimeError):
    """The engine takes no more requests: it was closed, or its thread has died of an error."""


class EngineFull(RuntimeError):
    """More sequences wait already than `max_waiting` allows."""


@dataclass(eq=False)
class Ticket:
    """A request in the engine; `future` gets its completions, in the order of the samples."""

    prompt: Prompt
    length: int
    settings: Settings
    seeds: list[int]
    on_token: Callable[[int, int], None] | None
    future: Future[list[Completion]] = field(default_factory=Future)
    cancelled: bool = False
    joined: int = 0
    prefix: Prefix | None = None
    completions: dict[int, Completion] = field(default_factory=dict)

    def cancel(self) -> None:
        """Give up the places at the next step; samples that have not ended end as they are, as "cancelled"."""
        self.cancelled = True


@dataclass(eq=False)
class _Sample:
    """A sample in a row: `held` of its tokens are in the row's buffer, the last one is still to be fed."""

    ticket: Ticket
    number: int
    ids: list[int] = field(default_factory=list)
    held: int = 0


class Engine:
    """Decoding with one model thread; `with Engine(...) as engine:` starts and stops it.

    Args:
        model: a GPT2LMHeadModel; its dtype and device are the engine's.
        tokenizer: with as many tokens as the model has, or fewer: ids behind its vocabulary are never produced.
        rows: sequences decoded at once. GPT-2 small with n_ctx 1024 takes up to 75 MB for each in float32.
        max_waiting: sequences that may wait for a row.
        precision: on the CPU, how the compiled decoder keeps the weights: fp32, bf16 or int8; "auto" is bf16. None
            takes PyTorch and the model's dtype, as a GPU does.
        wait: where the compiled decoder must be compiled first, wait for it; else begin with PyTorch in float32 and
            switch when it is there (`at_full_speed`).

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
    ) -> None:
        self.tokenizer = tokenizer
        self.decoder: Decoder | CompiledDecoder
        self._next_decoder: Future[Decoder | CompiledDecoder] | None = None
        if precision is None or model.device.type != "cpu":
            self.decoder = Decoder(model, rows)
        elif wait or is_at_hand():
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
        self.error: BaseException | None = None
        device, vocab_size = self.decoder.device, self.decoder.vocab_size
        self._banned = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._banned[list(NEVER_PRODUCED)] = True
        self._banned[len(tokenizer) :] = True
        self._seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        self._rows: list[_Sample] = []  # row i of the decoder holds sample i
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop after the step under way; requests that have not ended get EngineStopped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self.decoder.close()

    @property
    def at_full_speed(self) -> bool:
        """Whether the decoder is the one that stays: none is being compiled."""
        return self._next_decoder is None

    @property
    def alive(self) -> bool:
        """Whether the model thread runs and takes requests."""
        return self._thread.is_alive() and self.error is None and not self._closing

    @property
    def running(self) -> int:
        """Sequences being decoded."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a row."""
        with self._changed:
            return sum(len(ticket.seeds) - ticket.joined for ticket in self._waiting)

    def prompt(self, context: str, length: int) -> Prompt:
        """Give the ids of a context; one longer than n_ctx is cut from the left, with room left for `length` tokens.

        Raises:
            ValueError: the context holds half of a surrogate pair, which is no character.
        """
        try:
            context.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start + 1} is half of a surrogate pair (U+{ord(context[error.start]):04X}), "
                "not a character; send the text as UTF-8"
            ) from None
        ids = [MASK_ID, *self.tokenizer.encode(context)]
        if len(ids) <= self.n_ctx:
            return Prompt(context, tuple(ids), 0)
        kept = max(self.n_ctx - length, self.n_ctx // 2, 1)
        return Prompt(context, tuple(ids[-kept:]), len(ids) - kept)

    def submit(
        self,
        prompt: Prompt,
        *,
        samples: int,
        length: int,
        settings: Settings | None = None,
        seed: int | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Ticket:
        """Queue a request and return at once.

        Args:
            prompt: from `prompt()`, or of ids alone.
            samples: how many completions, at least 1.
            length: tokens a completion has at most, at least 1.
            settings: how tokens are drawn.
            seed: 64 bits; the same seed gives the same texts. None takes a random one.
            on_token: called in the model's thread with a sample's number and its new id; must be quick and not raise.

        Raises:
            EngineFull: too many sequences wait.
            EngineStopped: the engine is closed, or its thread has died.
        """
        if samples < 1 or length < 1:
            raise ValueError(f"samples and length must be 1 or more, they are {samples} and {length}")
        if not 1 <= len(prompt.ids) <= self.n_ctx:
            raise ValueError(f"a prompt must have 1 to {self.n_ctx} ids, this one has {len(prompt.ids)}")
        if seed is None:
            seed = secrets.randbits(63)
        seeds = [row_seed(seed, number) for number in range(samples)]
        ticket = Ticket(prompt, length, settings or Settings(), seeds, on_token)
        # From here on only the engine ends it: asyncio would cancel the future of a client that has gone.
        ticket.future.set_running_or_notify_cancel()
        with self._changed:
            if not self.alive:
                raise EngineStopped(self._why_stopped())
            # A request larger than the limit is taken when nothing waits: it is the caller who limits samples.
            if self._waiting and self.waiting + samples > self.max_waiting:
                raise EngineFull(f"{self.waiting} sequences wait already; try again later")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def complete(
        self,
        context: str,
        *,
        samples: int = 5,
        length: int = 50,
        settings: Settings | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """Complete a context and wait for the texts; each begins with the context exactly as it is given."""
        ticket = self.submit(self.prompt(context, length), samples=samples, length=length, settings=settings, seed=seed)
        return [completion.text for completion in ticket.future.result()]

    def _why_stopped(self) -> str:
        return f"the model thread has stopped: {self.error!r}" if self.error else "the engine is closed"

    def _run(self) -> None:
        """The model thread: cancelled requests leave, waiting ones join, one step; until the engine is closed."""
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._switch_decoder()
                    self._leave_cancelled()
                    self._join()
                    self._step()
        except BaseException as error:  # whatever it is, those who wait must hear of it
            self.error = error
            LOGGER.exception("the model thread has stopped")
        with self._changed:
            self._closing = True
            left = {sample.ticket for sample in self._rows} | set(self._waiting)
            self._rows.clear()
            self._waiting.clear()
        for ticket in left:
            ticket.future.set_exception(EngineStopped(self._why_stopped()))

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

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._rows)
            return not self._closing

    def _leave_cancelled(self) -> None:
        for row in reversed(range(len(self._rows))):
            if self._rows[row].ticket.cancelled:
                self._leave(row, "cancelled")
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.cancelled]
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
        for ticket in gone:
            ticket.prefix = None
            for number in range(ticket.joined, len(ticket.seeds)):
                self._finish(_Sample(ticket, number), "cancelled")

    def _join(self) -> None:
        """Let the first waiting request take the free rows, all its samples behind one prefill.

        One request a step: those that are running wait for one prefill at most.
        """
        free = self.decoder.rows - len(self._rows)
        if not self._waiting or not free:
            return
        ticket = self._waiting[0]
        prompt = ticket.prompt.ids
        if ticket.prefix is None:
            ticket.prefix = self.decoder.prefill(prompt)
        prefix = ticket.prefix
        first = len(self._rows)
        joining = range(ticket.joined, min(ticket.joined + free, len(ticket.seeds)))
        for number in joining:
            row = len(self._rows)
            self.decoder.load(row, prefix)
            self._seen[row] = False
            self._seen[row, list(prompt)] = True
            self._rows.append(_Sample(ticket, number, held=len(prompt)))
        with self._changed:
            ticket.joined = joining.stop
            if ticket.joined == len(ticket.seeds):
                self._waiting.popleft()
                ticket.prefix = None
        self._advance(range(first, len(self._rows)), prefix.logits.expand(len(joining), -1))

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
        """Draw the next token of these rows from their logits; those that have ended leave."""
        samples = [self._rows[row] for row in rows]
        tokens = self._draw(samples, self._seen[rows.start : rows.stop], logits)
        self._seen[list(rows), tokens] = True
        for row, sample, token in reversed(list(zip(rows, samples, tokens.tolist(), strict=True))):
            if token == CLS_ID:
                self._leave(row, "stop")
                continue
            sample.ids.append(token)
            if sample.ticket.on_token is not None:
                sample.ticket.on_token(sample.number, token)
            if len(sample.ids) == sample.ticket.length:
                self._leave(row, "length")

    def _draw(self, samples: Sequence[_Sample], seen: Tensor, logits: Tensor) -> Tensor:
        device = logits.device
        settings = [sample.ticket.settings for sample in samples]
        if any(one.repetition_penalty != 1 for one in settings):
            penalty = torch.tensor([one.repetition_penalty for one in settings], device=device)
            logits = repetition_penalised(logits, seen, penalty)
        return draw(
            logits.masked_fill(self._banned, -torch.inf),
            uniforms([s.ticket.seeds[s.number] for s in samples], [len(s.ids) for s in samples]).to(device),
            torch.tensor([one.temperature for one in settings], device=device),
            torch.tensor([min(one.top_k, logits.shape[1]) for one in settings], device=device),
            torch.tensor([one.top_p for one in settings], device=device),
        )

    def _leave(self, row: int, reason: str) -> None:
        """End the sample of a row; the last row moves into its place."""
        sample = self._rows[row]
        last = len(self._rows) - 1
        if row != last:
            moved = self._rows[row] = self._rows[last]
            self.decoder.copy_row(last, row, moved.held)
            self._seen[row] = self._seen[last]
        self._rows.pop()
        self._finish(sample, reason)

    def _finish(self, sample: _Sample, reason: str) -> None:
        ticket = sample.ticket
        text = ticket.prompt.context + continuation(self.tokenizer, ticket.prompt, sample.ids)
        ticket.completions[sample.number] = Completion(text, tuple(sample.ids), reason)
        if len(ticket.completions) == len(ticket.seeds):
            ticket.future.set_result([ticket.completions[number] for number in range(len(ticket.seeds))])


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
    """The text of ids behind a prompt: a space in between only where the tokenizer joins with one.

    No space is added behind a context that ends with one already.
    """
    joiner = TextJoiner(compat=tokenizer.compat)
    for id_ in prompt.ids[-4:]:  # the joiner remembers one token, or the four bytes of one character
        joiner.push(tokenizer.vocabulary[id_])
    text = "".join(joiner.push(tokenizer.vocabulary[id_]) for id_ in ids)
    return text.removeprefix(" ") if prompt.context[-1:].isspace() else text


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
