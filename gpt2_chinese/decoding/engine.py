"""Decodes many sequences at once with continuous batching; used by generate.py, and by server.py in a process.

One thread owns the model. A request waits in the queue until a batch slot is free; its samples share one prefill; each
of them, a sequence, then takes part in every decode step until it ends, and its slot goes to the next one. A sequence
depends on its request and seed only: the text is the same whatever else is in the batch.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpt2_chinese.decoding.backend import CompletionBackend, PrefixCacheState, Request
from gpt2_chinese.decoding.batch_sampler import BatchSampler
from gpt2_chinese.decoding.compiled_decoder import CompiledDecoder, is_decoder_cached, make_cpu_decoder
from gpt2_chinese.decoding.completion import MISSING, Completion, EngineStopped, Prompt, TextDelta, TokenLogprob
from gpt2_chinese.decoding.decoder import Decoder, PrefilledPrompt
from gpt2_chinese.decoding.detokenizer import IncrementalDetokenizer
from gpt2_chinese.decoding.distinct import STUCK, UNIT, first_code
from gpt2_chinese.decoding.graph_decoder import make_gpu_decoder
from gpt2_chinese.decoding.request_words import RequestWords, VocabularyWords
from gpt2_chinese.decoding.sampling import request_bits, sequence_seed
from gpt2_chinese.decoding.whole_characters import CharacterMasks
from gpt2_chinese.precision import to_device
from gpt2_chinese.text.tokenizers import Tokenizer, bytes_of_tokens

LOGGER = logging.getLogger(__name__)
MAX_PREFILL_TOKENS_PER_STEP = 512
"""Prompt tokens that are prefilled between two decode steps; more would interrupt the running sequences for longer."""
MAX_ROUNDS = 4
"""How often samples that have found no text of their own begin again, without the ways that lead to no other text."""
TAKEN, BAD = "taken", "bad"
ROUNDING = 64
"""By so much the interval of a token that has no alternative may differ from that of the tokens before it."""
MAX_REDRAWS = 100
"""Draws of one token, each without those that were unwanted, before the sample is taken to have no other text."""


@dataclass(eq=False)
class _EngineRequest(Request):
    """A request and its progress.

    Attributes:
        order: the samples in the order of their admission; those that begin again are there again.
        num_admitted: how many of `order` have, or had, a batch slot.
        prefilled: the prompt's prefill, kept while some samples still wait for a slot.
        completions: of the samples that have ended.
        num_finished: samples that have ended, those without a text included.
        words: what its settings mean for the vocabulary.
        texts: of the samples that have ended, if these must be different.
        round: how often samples have begun again.
        num_in_round: samples that have begun in this round.
        stuck: samples of this round that have found no text of their own.
        dead_ends: by the tokens so far, those that lead to texts of other samples only.
        has_new_dead_end: whether one was found in this round.
    """

    cancelled: bool = False
    cancelled_samples: set[int] = field(default_factory=set)
    num_admitted: int = 0
    prefilled: PrefilledPrompt | None = None
    completions: dict[int, Completion] = field(default_factory=dict)
    num_finished: int = 0
    words: RequestWords | None = None
    texts: set[str] = field(default_factory=set)
    round: int = 0
    num_in_round: int = 0
    stuck: list[int] = field(default_factory=list)
    dead_ends: dict[tuple[int, ...], set[int]] = field(default_factory=dict)
    has_new_dead_end: bool = False

    def __post_init__(self) -> None:
        self.order = list(range(self.samples))
        self.num_in_round = self.samples
        params = self.sampling_params
        self.must_differ = self.distinct and self.samples > 1
        """Whether each sample must have a text of its own."""
        self.checks_tokens = self.must_differ or bool(params.bad_words)
        """Whether a token may be drawn again for the text that it makes."""
        self.checks_all_tokens = bool(params.bad_words or self.stop or self.until_sentence or params.stop_token_ids)
        """Whether any token may be, and not only one that ends a document or reaches the length."""

    def cancel(self, sample: int | None = None) -> None:
        if sample is None:
            self.cancelled = True
        else:
            self.cancelled_samples.add(sample)

    def is_cancelled(self, sample: int) -> bool:
        return self.cancelled or sample in self.cancelled_samples


@dataclass(eq=False)
class _Sequence:
    """A sample of a request in a batch slot.

    Attributes:
        ids: the sampled tokens.
        cache_length: tokens whose keys and values are in the slot; all but the last token after a step.
        num_detokenized: how many of `ids` the detokenizer has got.
        num_logprobs_sent: how many of `logprobs` were in a TextDelta.
        unsent: text that is settled and was in no TextDelta.
        logprob_sum, num_scored: of the sampled tokens, if scores were asked for.
        masses: before each token, of a sample with a code that shares all its tokens with another one (distinct.py).
        is_taken: whether all texts that it could have become are those of other samples.
    """

    request: _EngineRequest
    sample: int
    detokenizer: IncrementalDetokenizer
    cache_length: int
    ids: list[int] = field(default_factory=list)
    num_detokenized: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_logprobs_sent: int = 0
    unsent: str = ""
    logprob_sum: float = 0.0
    num_scored: int = 0
    masses: list[int] = field(default_factory=list)
    is_taken: bool = False

    def dead_end(self) -> int | None:
        """The place of the last token that had an alternative; None if there was none.

        A token without one has got the whole interval.
        """
        assert len(self.masses) == len(self.ids) + 1
        ends = [*self.masses[1:], 0]  # the last token was not found: its place is no dead end
        places = [
            place
            for place, (mass, after) in enumerate(zip(self.masses, ends, strict=True))
            if abs(after - mass) > ROUNDING
        ]
        return next((place for place in reversed(places) if place < len(self.ids)), None)

    @property
    def score(self) -> float | None:
        """The mean log-probability of the sampled tokens, None if it was not asked for."""
        return self.logprob_sum / self.num_scored if self.num_scored else None

    def detokenize(self) -> None:
        """Detokenize the new ids."""
        self.unsent += self.detokenizer.push(*self.ids[self.num_detokenized :])
        self.num_detokenized = len(self.ids)

    def send_delta(self, finish_reason: str | None) -> None:
        """Call `on_delta` with the unsent text and the logprobs of the tokens that begin in the text sent so far."""
        text, self.unsent = self.unsent, ""
        if self.request.on_delta is None or not (text or finish_reason):
            return
        begin, sent = self.num_logprobs_sent, self.detokenizer.num_emitted
        while self.num_logprobs_sent < len(self.logprobs) and (
            finish_reason or self.logprobs[self.num_logprobs_sent].offset < sent
        ):
            self.num_logprobs_sent += 1
        logprobs = tuple(self.logprobs[begin : self.num_logprobs_sent])
        score = self.score if finish_reason else None
        self.request.on_delta(TextDelta(self.sample, text, logprobs, finish_reason, score))


class Engine(CompletionBackend):
    """Decoding with one model thread; `with Engine(...) as engine:` starts and stops it.

    Args:
        model: a GPT2LMHeadModel, on the device that decodes.
        tokenizer: with as many tokens as the model, or fewer: ids from the end of its vocabulary on are never sampled.
        max_num_seqs: slots of the batch. The KV cache of GPT-2 small takes up to 75 MB a slot in float32 and
            half of that otherwise.
        max_waiting: sequences that may wait in the queue.
        precision: on a CPU the precision of the compiled decoder's weights, fp32, bf16 ("auto") or int8, which also
            quantizes the inputs of the products; None decodes with PyTorch in the model's dtype. On a GPU fp32 or bf16;
            anything else is the model's dtype.
        wait: compile the compiled decoder, where it is not cached, before this returns. Otherwise decoding begins with
            PyTorch in float32 and switches to the compiled decoder when it is ready (`at_full_speed`).
        on_step_end: called in the model thread after every decode step, and when it ends.
        prefix_cache_bytes: keep the keys and values of so many bytes of prompts for those that begin like them; 0 keeps
            none. Only the compiled decoder has such a cache.

    Raises:
        ValueError: the vocabulary is larger than the model's, or the model cannot be decoded.

    Example:
        >>> with Engine(*load_model("model/final_model")) as engine:
        ...     engine.complete("感冒", samples=5, length=50)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        max_num_seqs: int = 32,
        max_waiting: int = 1024,
        precision: str | None = None,
        wait: bool = True,
        on_step_end: Callable[[], None] | None = None,
        prefix_cache_bytes: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.decoder: Decoder | CompiledDecoder
        self._next_decoder: Future[Decoder | CompiledDecoder] | None = None

        def make_compiled() -> Decoder | CompiledDecoder:
            assert precision is not None
            return make_cpu_decoder(model, max_num_seqs, precision, prefix_cache_bytes)

        if model.device.type == "cuda":
            self.decoder = make_gpu_decoder(model, max_num_seqs, precision)
        elif precision is None or model.device.type != "cpu":
            self.decoder = Decoder(model, max_num_seqs)
        elif wait or is_decoder_cached():
            self.decoder = make_compiled()
        else:
            self.decoder = Decoder(model, max_num_seqs)
            self._next_decoder = _in_background(make_compiled)
        vocab_size = self.decoder.vocab_size
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"the vocabulary has {len(tokenizer)} tokens and the model {vocab_size}: they do not belong together"
            )
        if self.decoder.n_ctx < 2:
            raise ValueError(f"the model's n_ctx is {self.decoder.n_ctx}; completing a context needs 2 or more")
        self.n_ctx = self.decoder.n_ctx
        self.max_waiting = max_waiting
        self.device = str(self.decoder.device)
        self._on_step_end = on_step_end
        masks = CharacterMasks(bytes_of_tokens(tokenizer), vocab_size, tokenizer.marks.never_produced)
        self.sampler = BatchSampler(max_num_seqs, masks, end_id=tokenizer.marks.end, device=self.decoder.device)
        self._vocabulary_words = VocabularyWords(tokenizer, vocab_size)
        self._sequences: list[_Sequence] = []  # sequence i is in slot i of the decoder and of the sampler
        self._waiting: deque[_EngineRequest] = deque()
        self._num_enqueued = 0  # sequences so far
        self.num_dequeued = 0
        """Sequences that have left the queue so far: admitted, or ended before."""
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
        return len(self._sequences)

    @property
    def waiting(self) -> int:
        return self._num_enqueued - self.num_dequeued

    @property
    def prefix_cache(self) -> PrefixCacheState:
        cache = self.decoder.prefix_cache
        return cache.state() if cache else PrefixCacheState()

    def _enqueue(self, **fields: Any) -> Request:
        request = _EngineRequest(**fields)
        # From here on the future cannot be cancelled: asyncio would do that when a client disconnects.
        request.future.set_running_or_notify_cancel()
        with self._changed:
            if not self.alive:
                raise EngineStopped(self._why_stopped())
            self.check_room(request.samples)
            self._waiting.append(request)
            self._num_enqueued += request.samples
            self._changed.notify_all()
        return request

    # The model thread.

    def _run(self) -> None:
        """Release cancelled sequences, admit waiting ones, do a decode step; until the engine is closed."""
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._switch_decoder()
                    self._release_cancelled()
                    self._admit()
                    self._step()
                    self._end_step()
        except BaseException as error:  # whatever it is, the waiting requests must fail too
            self.error = error
            LOGGER.exception("the model thread has stopped")
        with self._changed:
            self._closing = True
            unfinished = {sequence.request for sequence in self._sequences} | set(self._waiting)
            self._sequences.clear()
            self._waiting.clear()
            self.num_dequeued = self._num_enqueued
        for request in unfinished:
            request.future.set_exception(EngineStopped(self._why_stopped()))
        self._end_step()

    def _end_step(self) -> None:
        if self._on_step_end is not None:
            self._on_step_end()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when the engine is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._waiting or self._sequences or self._next_decoder_is_ready()
            )
            return not self._closing

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()

    def _next_decoder_is_ready(self) -> bool:
        return self._next_decoder is not None and self._next_decoder.done()

    def _switch_decoder(self) -> None:
        """Switch to the compiled decoder as soon as it is ready; the running sequences are prefilled again."""
        if self._next_decoder is None or not self._next_decoder.done():
            return
        self.decoder, self._next_decoder = self._next_decoder.result(), None
        for slot, sequence in enumerate(self._sequences):
            ids = [*sequence.request.prompt.ids, *sequence.ids][:-1]
            self.decoder.load_prefill(slot, self.decoder.prefill(ids[-sequence.cache_length :], store=False))
        for request in self._waiting:
            request.prefilled = None  # in the layout of the former decoder
        LOGGER.info("the compiled decoder is ready and in use")

    def _release_cancelled(self) -> None:
        for slot in reversed(range(len(self._sequences))):
            if self._sequences[slot].request.is_cancelled(self._sequences[slot].sample):
                self._release(slot, "cancelled")
        with self._changed:
            cancelled = [request for request in self._waiting if request.cancelled]
            if cancelled:
                self._waiting = deque(request for request in self._waiting if not request.cancelled)
                self.num_dequeued += sum(
                    request.samples - request.num_admitted for request in cancelled if not request.round
                )
        for request in cancelled:
            request.prefilled = None
            for sample in request.order[request.num_admitted :]:
                self._finish(self._new_sequence(request, sample), "cancelled")

    # Admission.

    def _admit(self) -> None:
        """Admit waiting requests into free slots; the samples of each share one prefill.

        Prompts of at most `MAX_PREFILL_TOKENS_PER_STEP` tokens in all, or one longer prompt, are prefilled at once; the
        running sequences wait for that. Tokens that the prefix cache has do not count.
        """
        prompts: list[tuple[int, tuple[int, ...]]] = []  # with the slot that each is prefilled into
        samples: list[int] = []  # of each prompt
        first_slot = len(self._sequences)
        num_tokens = 0
        while self._waiting and (free := self.decoder.max_num_seqs - len(self._sequences)):
            request = self._waiting[0]
            if request.score_prompt and request.prompt_logprobs is None:
                request.prompt_logprobs = self._score_prompt(request.prompt, request.logprobs or 0)
            if request.length == 0:
                self._finish_scored(request)
                continue
            num_tokens += self.decoder.tokens_to_prefill(request.prompt.ids)
            count = len(request.order) - request.num_admitted
            if request.prefilled is not None or count > free:
                if not prompts:
                    self._admit_partly(request, free)
                    return
                break
            if prompts and num_tokens > MAX_PREFILL_TOKENS_PER_STEP:
                break
            prompts.append((len(self._sequences), request.prompt.ids))
            samples.append(count)
            self._allocate_slots(request, count)
        if not prompts:
            return
        logits = self.decoder.prefill_batch(prompts)
        self.prompt_tokens += sum(len(ids) for _, ids in prompts)
        for (slot, ids), count in zip(prompts, samples, strict=True):
            for other in range(slot + 1, slot + count):
                self.decoder.copy_slot(slot, other, len(ids))
        rows = [row for row, count in enumerate(samples) for _ in range(count)]
        self._append_next_tokens(range(first_slot, len(self._sequences)), _gather_rows(logits, rows))

    def _admit_partly(self, request: _EngineRequest, free: int) -> None:
        """Admit as many samples of a request as slots are free; its prefill is kept for the others."""
        if request.prefilled is None:
            request.prefilled = self.decoder.prefill(request.prompt.ids)
            self.prompt_tokens += len(request.prompt.ids)
        prefilled, first_slot = request.prefilled, len(self._sequences)
        self._allocate_slots(request, min(free, len(request.order) - request.num_admitted))
        slots = range(first_slot, len(self._sequences))
        for slot in slots:
            self.decoder.load_prefill(slot, prefilled)
        self._append_next_tokens(slots, prefilled.logits.repeat(len(slots), 1))

    def _allocate_slots(self, request: _EngineRequest, count: int) -> None:
        """Put the next samples of the request at the head of the queue into the next slots."""
        if request.words is None:
            request.words = self._vocabulary_words.of_request(request)
        first_of_round = len(request.order) - request.num_in_round
        for place in range(request.num_admitted, request.num_admitted + count):
            sample, code = request.order[place], None
            if request.must_differ:
                # In a later round a unit is left for the texts that are taken.
                bits, codes = request_bits(request.seed + request.round), request.num_in_round + bool(request.round)
                code = first_code(bits, place - first_of_round, codes), codes * UNIT
            self.sampler.assign(
                len(self._sequences),
                request.sampling_params,
                sequence_seed(request.seed, sample),
                request.prompt.ids,
                length=request.length,
                bad_words=request.words.bad_words,
                code=code,
                end_table=request.words.end_table,
                scores=request.scores,
            )
            self._sequences.append(self._new_sequence(request, sample))
        with self._changed:
            request.num_admitted += count
            self.num_dequeued += count if not request.round else 0
            if request.num_admitted == len(request.order):
                self._waiting.popleft()
                request.prefilled = None

    def _new_sequence(self, request: _EngineRequest, sample: int) -> _Sequence:
        return _Sequence(request, sample, self._new_detokenizer(request), cache_length=len(request.prompt.ids))

    def _new_detokenizer(self, request: _EngineRequest) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(
            self.tokenizer, request.prompt, request.stop, until_sentence=request.until_sentence
        )

    def _score_prompt(self, prompt: Prompt, num_alternatives: int) -> tuple[TokenLogprob, ...]:
        """The log-probabilities of the tokens of a prompt that the caller has given."""
        num_scored = 0
        logprobs: list[tuple[float | None, dict[str, float] | None]] = [] if prompt.added else [(None, None)]
        for logits in self.decoder.prompt_logits(prompt.ids[:-1]) if len(prompt.ids) > 1 else ():
            ids = prompt.ids[num_scored + 1 : num_scored + 1 + len(logits)]
            logprobs += self._logprobs([num_alternatives] * len(ids), ids, logits)
            num_scored += len(ids)
        self.prompt_tokens += num_scored
        joiner = self.tokenizer.joiner()
        own = prompt.ids[prompt.added :]
        tokens = [self.tokenizer.vocabulary[id_] for id_ in own]
        lengths = [len(joiner.push(id_)) for id_ in own]
        # Counted from the end, since the context also contains what was truncated.
        begin = len(prompt.context) - sum(lengths)
        offsets = [max(0, offset) for offset in itertools.accumulate(lengths, initial=begin)]
        return tuple(
            TokenLogprob(token, *logprob, offset)
            for token, logprob, offset in zip(tokens, logprobs, offsets, strict=False)
        )

    def _finish_scored(self, request: _EngineRequest) -> None:
        """Finish the request at the head of the queue, which only wants its prompt to be scored."""
        with self._changed:
            self._waiting.popleft()
            self.num_dequeued += request.samples - request.num_admitted
            request.num_admitted = request.samples
        for sample in range(request.samples):
            self._finish(self._new_sequence(request, sample), "length")

    # A decode step.

    def _step(self) -> None:
        """Append one token to every sequence. One that fills n_ctx continues after the second half of its tokens."""
        for slot in reversed(range(len(self._sequences))):
            sequence = self._sequences[slot]
            if sequence.cache_length == self.n_ctx:
                half = max(1, self.n_ctx // 2)
                ids = [*sequence.request.prompt.ids, *sequence.ids][-half:]
                prefilled = self.decoder.prefill(ids, store=False)  # no prompt will begin like this
                self.decoder.load_prefill(slot, prefilled)
                sequence.cache_length = half
                self._append_next_tokens(range(slot, slot + 1), prefilled.logits[None])
        if not self._sequences:
            return
        logits = self.decoder.step(
            [sequence.ids[-1] for sequence in self._sequences],
            [sequence.cache_length for sequence in self._sequences],
        )
        for sequence in self._sequences:
            sequence.cache_length += 1
        self._append_next_tokens(range(len(self._sequences)), logits)

    def _append_next_tokens(self, slots: range, logits: Tensor) -> None:
        """Sample the next token of these slots from their logits, which are overwritten; release those that end."""
        sequences = [self._sequences[slot] for slot in slots]
        num_alternatives = {
            row: count for row, one in enumerate(sequences) if (count := one.request.logprobs) is not None
        }
        rows = list(num_alternatives)
        raw_logits = logits[rows] if rows else logits  # a copy: the sampler suppresses some
        # A token that is looked at is detokenized at once, so where it begins is taken before.
        offsets = {slots[row]: len(sequences[row].detokenizer.text) for row in rows}
        where = slice(slots.start, slots.stop)
        if any(one.request.must_differ for one in sequences):
            for sequence, (mass, is_settled) in zip(sequences, self.sampler.masses(where), strict=True):
                if sequence.request.must_differ and (sequence.request.round or not is_settled):
                    sequence.masses.append(mass)
        tokens = self.sampler.sample(where, logits, self.decoder.compiled_sampler)
        if any(one.request.checks_tokens for one in sequences):
            self._redraw_unwanted(slots, sequences, tokens, logits)
        if any(one.request.scores for one in sequences):
            for row, logprob in self.sampler.logprobs(where, logits, tokens):
                sequences[row].logprob_sum += logprob
                sequences[row].num_scored += 1
        self.sampler.commit(where, tokens.numpy())
        logprobs = {}
        if rows:
            reported = self._logprobs(list(num_alternatives.values()), tokens[rows].tolist(), raw_logits)
            logprobs = {slots[row]: logprob for row, logprob in zip(rows, reported, strict=True)}
        now = time.monotonic()
        # From the last slot on, since the last sequence moves into a slot that is released.
        for slot, sequence, token in reversed(list(zip(slots, sequences, tokens.tolist(), strict=True))):
            request = sequence.request
            request.first_token_at = request.first_token_at or now
            if token == STUCK:
                reason = self._why_stuck(slot, sequence)
                self._release(slot, reason, begins_again=reason == MISSING and not self._is_settled(slot, sequence))
                continue
            if token == self.tokenizer.marks.end or token in request.sampling_params.stop_token_ids:
                self._release(slot, "stop")
                continue
            sequence.ids.append(token)
            self.generated_tokens += 1
            if slot in logprobs:
                token_text = self.tokenizer.vocabulary[token]
                sequence.logprobs.append(TokenLogprob(token_text, *logprobs[slot], offsets[slot]))
            if request.stop or request.until_sentence or request.on_delta is not None or slot in logprobs:
                sequence.detokenize()
                # What another sample may still end as is not sent.
                if not request.must_differ or self._is_settled(slot, sequence):
                    sequence.send_delta(None)
            if sequence.detokenizer.stopped:
                self._release(slot, "stop")
            elif len(sequence.ids) == request.length:
                self._release(slot, "length")

    # Tokens that are drawn again: those that would give a text twice, or complete a bad word.

    def _redraw_unwanted(self, slots: range, sequences: Sequence[_Sequence], tokens: Tensor, logits: Tensor) -> None:
        """Have unwanted tokens drawn again, each from its row of logits, which `sample` has processed."""
        for row, (slot, sequence, drawn) in enumerate(zip(slots, sequences, tokens.tolist(), strict=True)):
            request = sequence.request
            if not request.checks_tokens:
                continue
            if request.dead_ends and (dead := request.dead_ends.get(tuple(sequence.ids))):
                drawn = tokens[row] = self._redraw(slot, logits[row : row + 1], dead, within_filters=True)
            # Most tokens need no look: they end nothing.
            is_end = drawn == self.tokenizer.marks.end or len(sequence.ids) + 1 == request.length
            if not (is_end or request.checks_all_tokens):
                continue
            for _ in range(MAX_REDRAWS):
                token = int(tokens[row])
                if token == STUCK or not (unwanted := self._why_unwanted(sequence, token)):
                    break
                sequence.is_taken = unwanted == TAKEN
                tokens[row] = self._redraw(slot, logits[row : row + 1], [token], within_filters=sequence.is_taken)
            else:
                tokens[row] = STUCK

    def _redraw(self, slot: int, logits: Tensor, without: Iterable[int], *, within_filters: bool) -> int:
        compiled = self.decoder.compiled_sampler
        return self.sampler.redraw(slot, logits, without, compiled, within_filters=within_filters)

    def _why_unwanted(self, sequence: _Sequence, token: int) -> str | None:
        """TAKEN if a token would end the text as another sample's has ended, BAD if it would complete a bad word.

        The text of a wanted token is detokenized by this.
        """
        request, words = sequence.request, sequence.request.words
        assert words is not None
        is_end = token == self.tokenizer.marks.end or token in request.sampling_params.stop_token_ids
        is_last = is_end or len(sequence.ids) + 1 == request.length
        before, unsent = len(sequence.detokenizer.text), sequence.unsent
        if not is_end:
            sequence.ids.append(token)
        sequence.detokenize()
        text = sequence.detokenizer.text
        ends = is_last or sequence.detokenizer.stopped
        unwanted = TAKEN if request.must_differ and ends and text in request.texts else None
        if words.has_bad_text(request.prompt.context, text, before):
            unwanted = BAD
        if not is_end:
            sequence.ids.pop()  # whoever has asked appends it
        if unwanted and not is_end:
            sequence.detokenizer = self._new_detokenizer(request)
            sequence.detokenizer.push(*sequence.ids)
            sequence.num_detokenized, sequence.unsent = len(sequence.ids), unsent
        elif not unwanted and ends:
            request.texts.add(text)
        return unwanted

    def _is_settled(self, slot: int, sequence: _Sequence) -> bool:
        """Whether the text so far is this sample's own and may be sent: it will not begin again."""
        return not sequence.request.round and self.sampler.is_settled(slot)

    def _why_stuck(self, slot: int, sequence: _Sequence) -> str:
        """The finish_reason of a sequence that has no token left: its text ends, unless another sample has it."""
        if not sequence.request.must_differ:
            return "stop"
        sequence.detokenize()
        text = sequence.detokenizer.text
        if sequence.is_taken or not self._is_settled(slot, sequence) or text in sequence.request.texts:
            return MISSING
        sequence.request.texts.add(text)
        return "stop"

    def _logprobs(
        self, num_alternatives: Sequence[int], tokens: Sequence[int], logits: Tensor
    ) -> list[tuple[float, dict[str, float]]]:
        """For each row of logits, the logprob of its token and those of the likeliest tokens and of this one."""
        results = []
        for count, token, scores in zip(num_alternatives, tokens, logits, strict=True):
            scores = torch.log_softmax(scores.double(), dim=-1)
            best = scores.topk(min(count, len(self.tokenizer)))
            top = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if count else {}
            top.setdefault(token, float(scores[token]))
            names = {self.tokenizer.vocabulary[id_]: score for id_, score in top.items() if id_ < len(self.tokenizer)}
            results.append((top[token], names))
        return results

    def _release(self, slot: int, finish_reason: str, *, begins_again: bool = False) -> None:
        """End the sequence of a slot; the last sequence moves there, so that the batch stays dense.

        With `begins_again` its sample has found no text of its own, and may begin again when the others have ended.
        """
        sequence = self._sequences[slot]
        last = len(self._sequences) - 1
        if slot != last:
            moved = self._sequences[slot] = self._sequences[last]
            self.decoder.copy_slot(last, slot, moved.cache_length)
            self.sampler.move(last, slot)
        self._sequences.pop()
        if begins_again:
            self._set_aside(sequence)
        else:
            self._finish(sequence, finish_reason)

    def _set_aside(self, sequence: _Sequence) -> None:
        """Keep the sample of a sequence that is stuck for another round, and note where it should not go again."""
        request = sequence.request
        request.stuck.append(sequence.sample)
        if (place := sequence.dead_end()) is not None:
            dead = request.dead_ends.setdefault(tuple(sequence.ids[:place]), set())
            request.has_new_dead_end |= sequence.ids[place] not in dead
            dead.add(sequence.ids[place])
        self._end_round(request)

    def _end_round(self, request: _EngineRequest) -> None:
        """If all other samples of a request have ended: let those that are stuck begin again, or end without a text."""
        if not request.stuck or request.num_finished + len(request.stuck) < request.samples:
            return
        stuck, request.stuck = sorted(request.stuck), []
        if request.has_new_dead_end and request.round < MAX_ROUNDS and not request.cancelled:
            request.round, request.num_in_round, request.has_new_dead_end = request.round + 1, len(stuck), False
            request.order += stuck
            with self._changed:
                self._waiting.appendleft(request)
        else:
            for sample in stuck:
                self._finish(self._new_sequence(request, sample), MISSING)

    def _finish(self, sequence: _Sequence, finish_reason: str) -> None:
        """Complete a sequence, and its request if it was the last one."""
        request = sequence.request
        sequence.detokenize()
        detokenizer = sequence.detokenizer
        sequence.unsent += detokenizer.flush()
        if detokenizer.stopped:
            # The tokens of the stop string are among the ids, but not in the text.
            sequence.logprobs = [one for one in sequence.logprobs if one.offset < len(detokenizer.text)]
        if finish_reason == MISSING:
            sequence.unsent = ""
        else:
            request.completions[sequence.sample] = Completion(
                text=request.prompt.context + detokenizer.text,
                ids=tuple(sequence.ids),
                finish_reason=finish_reason,
                logprobs=tuple(sequence.logprobs),
                score=sequence.score,
            )
        sequence.send_delta(finish_reason)
        request.num_finished += 1
        if request.num_finished == request.samples:
            request.future.set_result([request.completions[sample] for sample in sorted(request.completions)])
        else:
            self._end_round(request)


def _gather_rows(logits: Tensor, rows: list[int]) -> Tensor:
    """Rows of the logits, also repeatedly, as a copy."""
    if logits.is_cpu:
        # By NumPy: PyTorch would divide the copy among its threads, which then spin and take time from others.
        return torch.from_numpy(logits.numpy()[rows])
    return logits.index_select(0, to_device(torch.tensor(rows), logits.device))


def _in_background(function: Callable[[], Any]) -> Future[Any]:
    """Call a function in a daemon thread, which the end of the process does not wait for."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised again in the model thread
            future.set_exception(error)

    threading.Thread(target=run, name="decoder-builder", daemon=True).start()
    return future


def choose_device(name: str) -> torch.device:
    """The device that `--device` names: "auto", "cpu", "cuda", or numbers of GPUs, of which the first is used.

    Raises:
        ValueError: this machine has no such device.
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
