"""Samples the next tokens of a batch, with the sampling parameters and the state of every batch slot.

A draw has three parts: the logits are changed in place (bias, penalties, tokens that are left out; logits_processing.py
and logits_kernel.py), a token is sampled for each sequence (sampling.py), and the caller commits the tokens, or has one
of them drawn again without the one that it does not want.

A model may be so small that its step takes less than some forty operations of NumPy on a few numbers. So the compiled
code reads and writes the arrays of all slots in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2_chinese.compiled import load_function
from gpt2_chinese.decoding import logits_processing
from gpt2_chinese.decoding.completion import SamplingParams
from gpt2_chinese.decoding.distinct import STUCK, UNIT, Codes
from gpt2_chinese.decoding.sampling import (
    MAX_PARTIAL_TOP_K,
    NOT_SAMPLED,
    CompiledSampler,
    SlotArrays,
    apply_temperature,
    sample_rest,
    sample_tokens,
    top_k_top_p_mask,
    uniform_random,
)
from gpt2_chinese.decoding.whole_characters import BOUNDARY, CharacterMasks
from gpt2_chinese.precision import to_device

KERNEL_MODULE = "gpt2_chinese.decoding.logits_kernel"
KERNEL_SOURCES = tuple(
    Path(__file__).with_name(f"{name}.py") for name in ("batch_sampler", "sampling", "logits_kernel", "decoder_kernel")
)
REDRAW_STRIDE = 1 << 40
"""Between the numbers of the random numbers of a token's first and second draw; no completion has so many tokens."""


class RowInts(NamedTuple):
    """What the compiled code knows of a slot, int64; addresses are 0 where there is nothing."""

    is_scored: int
    history: int  # int64 [length], the tokens of prompt and completion
    length: int
    prompt_length: int
    ngram_size: int
    bias_ids: int  # int64
    bias_values: int  # float32
    num_biases: int
    bad_words: int  # int64: length and tokens of each, then 0
    banned_ids: int  # int64
    num_banned: int


class RowFloats(NamedTuple):
    """The same, float32."""

    repetition: float
    presence: float
    frequency: float


class LogitsArgs(NamedTuple):
    """Sizes and addresses for logits_kernel.process_batch; the arrays of slots are those of all."""

    logits: int  # float32 [batch, vocab_size]
    vocab_size: int
    batch: int
    first_slot: int  # of the batch
    ints: int  # int64 [slots, RowInts]
    floats: int  # float32 [slots, RowFloats]
    seeds: int  # uint64 [slots], and int64 [slots] each
    num_sampled: int
    states: int
    remaining: int
    uniform: int  # float64 [slots], written: the random numbers
    log_sums: int  # float32 [slots], written: the logarithm of the sum of exp, of the slots that are scored
    max_distance: int  # CharacterMasks
    mask_allows: int
    mask_begins: int
    mask_ids: int
    counts: int  # int64 [vocab_size], zero
    kept: int  # float32 [vocab_size], scratch


LOGITS, BATCH, FIRST_SLOT = map(LogitsArgs._fields.index, ("logits", "batch", "first_slot"))
(
    IS_SCORED,
    HISTORY,
    LENGTH,
    PROMPT_LENGTH,
    NGRAM_SIZE,
    BIAS_IDS,
    BIAS_VALUES,
    NUM_BIASES,
    BAD_WORDS,
    BANNED_IDS,
    NUM_BANNED,
) = range(len(RowInts._fields))


class SlotSettings(NamedTuple):
    """What a sequence has beside numbers, as arrays, whose addresses the compiled code has.

    Attributes:
        history: int64, room for the prompt and the completion; None where no setting needs it.
        bad_words: the token sequences.
        bad_word_table: the same as the compiled code takes them.
        end_ids: int64, the tokens that end a text, the document's end first.
        end_table: int8 [V], the same, and all others that end a text.
    """

    params: SamplingParams
    history: np.ndarray | None
    bias_ids: np.ndarray
    bias_values: np.ndarray
    bad_words: tuple[tuple[int, ...], ...]
    bad_word_table: np.ndarray | None
    end_ids: np.ndarray
    end_table: np.ndarray | None


NO_IDS: np.ndarray = np.zeros(0, dtype=np.int64)
NO_VALUES: np.ndarray = np.zeros(0, dtype=np.float32)


@cache
def load_logits_kernel() -> Callable[[int], None]:
    """The compiled code; see logits_kernel.process_batch. It keeps Python's global lock."""
    return load_function(KERNEL_MODULE, KERNEL_SOURCES, arguments=1)


class BatchSampler:
    """
    Args:
        max_num_seqs: slots of the batch.
        masks: which tokens may be drawn, and which never.
        end_id: the token that ends a document.
        device: where the logits are.
    """

    def __init__(self, max_num_seqs: int, masks: CharacterMasks, *, end_id: int, device: torch.device) -> None:
        self.masks = masks
        self._end_id, self._end_ids = end_id, np.array([end_id], dtype=np.int64)
        self._vocab_size = masks.vocab_size
        self._device = device
        self._seeds = np.zeros(max_num_seqs, dtype=np.uint64)
        self._num_sampled = np.zeros(max_num_seqs, dtype=np.int64)
        # NumPy keeps Python's global lock; PyTorch releases it, and the busy event loop of a server would take it.
        self._temperature, self._top_p, self._min_p = np.zeros((3, max_num_seqs), dtype=np.float32)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self._states, self._remaining = np.zeros((2, max_num_seqs), dtype=np.int64)
        self._code, self._mass, self._next_code, self._next_mass = np.zeros((4, max_num_seqs), dtype=np.int64)
        self._ends = np.zeros(max_num_seqs, dtype=np.int64)
        self._doubt = np.zeros((max_num_seqs, 2))
        self._next_doubt = np.zeros((max_num_seqs, 2))
        self._ints = np.zeros((max_num_seqs, len(RowInts._fields)), dtype=np.int64)
        self._floats = np.zeros((max_num_seqs, len(RowFloats._fields)), dtype=np.float32)
        self._is_special = np.zeros(max_num_seqs, dtype=bool)  # has settings of SlotSettings
        self._settings: list[SlotSettings | None] = [None] * max_num_seqs
        self._redraws = np.zeros(max_num_seqs, dtype=np.int64)
        self._uniform = np.zeros(max_num_seqs)
        self._has_codes = False  # any sequence of the last batch
        self._is_scored = np.zeros(max_num_seqs, dtype=bool)
        self._log_sums = np.zeros(max_num_seqs, dtype=np.float32)
        self._raw_rows: list[int] = []  # of the last batch, which `logprobs` needs unprocessed
        self._raw_logits = torch.empty(0)  # [raw rows, V]
        self._scratch = np.zeros(masks.vocab_size, dtype=np.int64), np.zeros(masks.vocab_size, dtype=np.float32)
        counts, kept = self._scratch
        fixed = LogitsArgs(
            logits=0,
            vocab_size=masks.vocab_size,
            batch=0,
            first_slot=0,
            ints=self._ints.ctypes.data,
            floats=self._floats.ctypes.data,
            seeds=self._seeds.ctypes.data,
            num_sampled=self._num_sampled.ctypes.data,
            states=self._states.ctypes.data,
            remaining=self._remaining.ctypes.data,
            uniform=self._uniform.ctypes.data,
            log_sums=self._log_sums.ctypes.data,
            max_distance=masks.max_distance,
            mask_allows=masks.allows.ctypes.data,
            mask_begins=masks.begins.ctypes.data,
            mask_ids=masks.ids.ctypes.data,
            counts=counts.ctypes.data,
            kept=kept.ctypes.data,
        )
        self._args = np.array(fixed, dtype=np.int64)
        self._args_address = self._args.ctypes.data
        self._slot_arrays = SlotArrays(
            *(one.ctypes.data for one in (self._uniform, self._temperature, self._top_k, self._top_p, self._min_p)),
            *(one.ctypes.data for one in (self._mass, self._code, self._remaining, self._ends)),
            *(one.ctypes.data for one in (self._next_doubt, self._next_code, self._next_mass)),
        )
        self._banned: Tensor | None = None  # CharacterMasks.as_bool on the device
        self._default_ids = torch.from_numpy(masks.listed(masks.default_mask)).to(device)

    def assign(
        self,
        slot: int,
        params: SamplingParams,
        seed: int,
        prompt_ids: Sequence[int],
        *,
        length: int,
        bad_words: tuple[tuple[int, ...], ...] = (),
        code: tuple[int, int] | None = None,
        end_table: np.ndarray | None = None,
        scores: bool = False,
    ) -> None:
        """Begin a sequence in a slot.

        Args:
            seed: the sequence's own, see `sequence_seed`.
            length: most tokens of the completion.
            bad_words: the token sequences of `params.bad_words`.
            code: place and length of the interval of a sample that shares its request's codes (distinct.py).
            end_table: int8 [V], which tokens end a text, for a sequence with a code.
            scores: `logprobs` is asked for its tokens.
        """
        self._seeds[slot], self._num_sampled[slot], self._redraws[slot] = seed, 0, 0
        self._temperature[slot], self._top_p[slot], self._min_p[slot] = params.temperature, params.top_p, params.min_p
        self._top_k[slot] = min(params.top_k, self._vocab_size)
        self._states[slot] = self.masks.state_after(prompt_ids)
        self._remaining[slot] = length
        self._code[slot], self._mass[slot] = code or (0, 0)
        self._doubt[slot] = 0
        settings = self._make_settings(params, prompt_ids, length, bad_words, end_table)
        self._settings[slot] = settings
        self._ends[slot] = 0 if end_table is None else end_table.ctypes.data
        has_history, has_bias = settings.history is not None, len(settings.bias_ids) > 0
        is_special = has_history or has_bias or params.min_tokens > 0 or params.ignore_eos
        self._is_special[slot], self._is_scored[slot] = is_special, scores
        self._ints[slot], self._floats[slot] = 0, 1
        self._ints[slot, IS_SCORED] = scores
        if is_special:
            self._floats[slot] = RowFloats(params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
            self._ints[slot] = RowInts(
                is_scored=scores,
                history=settings.history.ctypes.data if settings.history is not None else 0,
                length=len(prompt_ids),
                prompt_length=len(prompt_ids),
                ngram_size=params.no_repeat_ngram_size,
                bias_ids=settings.bias_ids.ctypes.data,
                bias_values=settings.bias_values.ctypes.data,
                num_biases=len(settings.bias_ids),
                bad_words=0 if settings.bad_word_table is None else settings.bad_word_table.ctypes.data,
                banned_ids=settings.end_ids.ctypes.data,
                num_banned=0,
            )

    def _make_settings(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        length: int,
        bad_words: tuple[tuple[int, ...], ...],
        end_table: np.ndarray | None,
    ) -> SlotSettings:
        history = None
        has_penalty = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        if has_penalty or params.no_repeat_ngram_size or bad_words:
            history = np.empty(len(prompt_ids) + length, dtype=np.int64)
            history[: len(prompt_ids)] = prompt_ids
        table = [number for word in bad_words for number in (len(word), *word)]
        bias_ids, bias_values, end_ids = NO_IDS, NO_VALUES, self._end_ids
        if params.logit_bias:
            bias_ids = np.array([id_ for id_, _ in params.logit_bias], dtype=np.int64)
            bias_values = np.array([value for _, value in params.logit_bias], dtype=np.float32)
        if params.stop_token_ids:
            end_ids = np.array([self._end_id, *params.stop_token_ids], dtype=np.int64)
        word_table = np.array([*table, 0], dtype=np.int64) if bad_words else None
        return SlotSettings(params, history, bias_ids, bias_values, bad_words, word_table, end_ids, end_table)

    def move(self, source: int, target: int) -> None:
        """Move a sequence to another slot."""
        for values in (
            self._seeds,
            self._num_sampled,
            self._redraws,
            self._temperature,
            self._top_p,
            self._min_p,
            self._top_k,
            self._states,
            self._remaining,
            self._code,
            self._mass,
            self._ends,
            self._doubt,
            self._ints,
            self._floats,
            self._is_special,
            self._is_scored,
        ):
            values[target] = values[source]
        self._settings[target] = self._settings[source]

    def is_settled(self, slot: int) -> bool:
        """Whether no other sample of the request can take the text so far away from this one.

        Of the samples that share all their tokens, it is the first one, which is never STUCK; see distinct.py.
        """
        return bool(self._code[slot] < UNIT)

    def masses(self, slots: slice) -> list[tuple[int, bool]]:
        """The length of the interval of each sample with a code, and `is_settled`."""
        codes, masses = self._code[slots].tolist(), self._mass[slots].tolist()
        return [(mass, code < UNIT) for code, mass in zip(codes, masses, strict=True)]

    def sample(self, slots: slice, logits: Tensor, compiled: CompiledSampler | None = None) -> Tensor:
        """Sample one token for each of these slots; `commit` says which are taken.

        Args:
            slots: B slots that follow each other.
            logits: float32 [B, V], overwritten: a copy of them would take as long as the sampling.
            compiled: processes the logits, and samples the sequences that it can.

        Returns:
            Token ids [B], int64, on the CPU; STUCK where no token is left.
        """
        self._has_codes = False
        has_special = bool(self._is_special[slots].any())
        self._raw_rows = []
        if has_special:
            self._prepare_special(slots)
        if compiled is not None:
            if has_special:
                self._keep_raw_logits(slots, logits, self._is_special[slots])
            self._process_compiled(slots, logits)
            tokens = self._draw_compiled(slots, logits, compiled)
        else:
            if self._is_scored[slots].any():
                self._keep_raw_logits(slots, logits, self._is_scored[slots])
                log_sums = torch.logsumexp(self._raw_logits, dim=-1)
                self._log_sums[slots][self._raw_rows] = log_sums.cpu().numpy()
            if has_special:
                self._process(slots, logits)
            self._apply_masks(slots, logits)
            tokens = self._draw(slots, logits, self._num_sampled[slots].astype(np.uint64), None)
        if has_special:
            self._mark_empty(slots, logits, tokens, compiled)
        return tokens

    def _keep_raw_logits(self, slots: slice, logits: Tensor, is_needed: np.ndarray) -> None:
        """Keep the logits of scored sequences where `logprobs` needs them as they were: bool [B]."""
        self._raw_rows = np.flatnonzero(self._is_scored[slots] & is_needed).tolist()
        if self._raw_rows:
            self._raw_logits = logits[self._raw_rows]  # a copy

    def logprobs(self, slots: slice, logits: Tensor, tokens: Tensor) -> list[tuple[int, float]]:
        """The log-probabilities of tokens by the logits before `sample`, of the sequences that have asked for scores.

        Args:
            slots, logits: those of `sample`.
            tokens: what was drawn, or drawn again, [B] on the CPU.

        Returns:
            Row and log-probability, of the rows that are not STUCK.
        """
        scored = np.flatnonzero(self._is_scored[slots]).tolist()
        ids = tokens.tolist()
        values: dict[int, float] = {}
        if logits.is_cpu:  # what processing leaves in is as it was, but for the kept rows
            array = logits.numpy()
            values = {row: array[row, ids[row]] for row in scored}
        if rows := self._raw_rows:
            indices = to_device(tokens[rows].clamp_min(0), logits.device)[:, None]
            values |= zip(rows, self._raw_logits.gather(1, indices)[:, 0].tolist(), strict=True)
        log_sums = self._log_sums[slots]
        return [(row, float(values[row] - log_sums[row])) for row in scored if ids[row] != STUCK]

    def redraw(
        self,
        slot: int,
        logits: Tensor,
        tokens: Iterable[int],
        compiled: CompiledSampler | None = None,
        *,
        within_filters: bool = False,
    ) -> int:
        """Draw a slot's token again without some tokens, from its logits [1, V] after `sample`; STUCK if none is left.

        Args:
            within_filters: among what top-k, top-p and min-p have kept with these tokens, instead of what they keep
                without them.
        """
        if within_filters:
            row = slice(slot, slot + 1)
            top_k, top_p, min_p = (
                to_device(torch.from_numpy(part[row]), logits.device)
                for part in (self._top_k, self._top_p, self._min_p)
            )
            temperature = to_device(torch.from_numpy(self._temperature[row]), logits.device)
            best, ids = apply_temperature(logits, temperature).sort(dim=-1, descending=True, stable=True)
            keep, _ = top_k_top_p_mask(best, top_k, top_p, min_p)
            logits.index_fill_(1, ids[0, ~keep[0]], -torch.inf)
        logits_processing.ban(logits, 0, [*tokens])
        if not bool(torch.isfinite(logits).any()):
            return STUCK
        self._redraws[slot] += 1
        number = np.array([self._num_sampled[slot] + self._redraws[slot] * REDRAW_STRIDE], dtype=np.uint64)
        return int(self._draw(slice(slot, slot + 1), logits, number, compiled)[0])

    def commit(self, slots: slice, tokens: np.ndarray) -> None:
        """Append the tokens [B], int64, that `sample` has drawn for these slots, or that were drawn again.

        Those of sequences that end need not be tokens.
        """
        self._num_sampled[slots] += 1
        self._remaining[slots] -= 1
        if self.masks.has_partial_characters:
            states = self.masks.next_state[self._states[slots], np.maximum(tokens, 0)]
            self._states[slots] = np.where(states < len(self.masks.distance), states, BOUNDARY)
        if self._has_codes:
            has_code = self._mass[slots] > UNIT
            for now, then in (
                (self._code, self._next_code),
                (self._mass, self._next_mass),
                (self._doubt, self._next_doubt),
            ):
                now[slots][has_code] = then[slots][has_code]
        if self._is_special[slots].any():
            for slot, token in zip(range(slots.start, slots.stop), tokens.tolist(), strict=True):
                settings = self._settings[slot]
                if settings is not None and settings.history is not None:
                    settings.history[self._ints[slot, LENGTH]] = max(token, 0)
                    self._ints[slot, LENGTH] += 1

    def _draw(self, slots: slice, logits: Tensor, numbers: np.ndarray, compiled: CompiledSampler | None) -> Tensor:
        return sample_tokens(
            logits,
            uniform_random(self._seeds[slots], numbers),
            *self._parameters(slots),
            codes=self._codes(slots) if self._begin_codes(slots) else None,
            compiled=compiled,
        )

    def _parameters(self, slots: slice) -> Iterator[Tensor]:
        return (torch.from_numpy(part[slots]) for part in (self._temperature, self._top_k, self._top_p, self._min_p))

    def _begin_codes(self, slots: slice) -> bool:
        """Whether any of these slots has a code; the draw changes copies, which `commit` takes over."""
        has_codes = bool((self._mass[slots] > UNIT).any())
        self._has_codes |= has_codes
        if has_codes:
            self._next_doubt[slots] = self._doubt[slots]
            self._next_code[slots], self._next_mass[slots] = self._code[slots], self._mass[slots]
        return has_codes

    def _codes(self, slots: slice) -> Codes:
        return Codes(
            code=self._code[slots],
            mass=self._mass[slots],
            remaining=self._remaining[slots],
            ends=self._ends[slots],
            end_tables=[None if one is None else one.end_table for one in self._settings[slots]],
            doubt=self._next_doubt[slots],
            next_code=self._next_code[slots],
            next_mass=self._next_mass[slots],
        )

    def _prepare_special(self, slots: slice) -> None:
        """Set what of the settings changes from token to token."""
        for slot in range(slots.start, slots.stop):
            settings = self._settings[slot]
            if settings is None or not self._is_special[slot]:
                continue
            params, ints = settings.params, self._ints[slot]
            num_sampled = self._num_sampled[slot]
            ints[NUM_BANNED] = len(settings.end_ids) if num_sampled < params.min_tokens else int(params.ignore_eos)
            # Within a character few tokens can follow: banning them would leave none.
            at_boundary = self._states[slot] == BOUNDARY
            ints[NGRAM_SIZE] = params.no_repeat_ngram_size if at_boundary else 0
            table = settings.bad_word_table
            ints[BAD_WORDS] = table.ctypes.data if at_boundary and table is not None else 0

    def _process_compiled(self, slots: slice, logits: Tensor) -> None:
        assert logits.is_contiguous() and logits.dtype == torch.float32 and logits.shape[1] == self._vocab_size
        args = self._args
        args[LOGITS], args[BATCH], args[FIRST_SLOT] = logits.data_ptr(), len(logits), slots.start
        load_logits_kernel()(self._args_address)

    def _draw_compiled(self, slots: slice, logits: Tensor, compiled: CompiledSampler) -> Tensor:
        """Draw by the random numbers that `_process_compiled` has written."""
        has_codes = self._begin_codes(slots)
        tokens = compiled.sample_slots(logits, slots.start, self._slot_arrays, has_codes=has_codes)
        if (tokens == NOT_SAMPLED).any():
            uniform, codes = torch.from_numpy(self._uniform[slots]), self._codes(slots) if has_codes else None
            sample_rest(tokens, logits, uniform, *self._parameters(slots), codes=codes)
        return torch.from_numpy(tokens)

    def _process(self, slots: slice, logits: Tensor) -> None:
        """Bias, penalties and banned tokens in PyTorch."""
        for row, slot in enumerate(range(slots.start, slots.stop)):
            settings = self._settings[slot]
            if settings is None or not self._is_special[slot]:
                continue
            ints, params = RowInts(*self._ints[slot].tolist()), settings.params
            if ints.num_biases:
                ids, values = (
                    to_device(torch.from_numpy(part), logits.device)
                    for part in (settings.bias_ids, settings.bias_values)
                )
                logits[row].index_add_(0, ids, values)
            if settings.history is not None:
                history = settings.history[: ints.length]
                if (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0):
                    logits_processing.apply_penalties(
                        logits,
                        row,
                        history,
                        ints.prompt_length,
                        repetition=params.repetition_penalty,
                        presence=params.presence_penalty,
                        frequency=params.frequency_penalty,
                    )
                if ints.ngram_size:
                    ids_ = logits_processing.tokens_ending_repeated_ngrams(history, ints.ngram_size)
                    logits_processing.ban(logits, row, ids_)
                if ints.bad_words:
                    bad = logits_processing.tokens_ending_bad_words(history, settings.bad_words)
                    logits_processing.ban(logits, row, bad)
            logits_processing.ban(logits, row, settings.end_ids[: ints.num_banned])

    def _apply_masks(self, slots: slice, logits: Tensor) -> None:
        """Leave out what the masks say, in NumPy or on a GPU."""
        numbers = self.masks.mask_numbers(self._states[slots], self._remaining[slots] - 1)
        is_default = numbers == self.masks.default_mask
        if not logits.is_cpu:
            if is_default.all():
                logits.index_fill_(1, self._default_ids, -torch.inf)
                return
            if self._banned is None:
                self._banned = torch.from_numpy(self.masks.as_bool()).to(logits.device)
            logits.masked_fill_(self._banned[to_device(torch.from_numpy(numbers), logits.device)], -torch.inf)
            return
        array = logits.numpy()
        default_ids = self.masks.listed(self.masks.default_mask)
        if is_default.all():
            array[:, default_ids] = -np.inf
            return
        for row, number in enumerate(numbers.tolist()):
            ids = self.masks.listed(number)
            kept = array[row, ids]
            if self.masks.allows[number]:
                array[row] = -np.inf
                array[row, ids] = kept
            else:
                array[row, ids] = -np.inf

    def _mark_empty(self, slots: slice, logits: Tensor, tokens: Tensor, compiled: CompiledSampler | None) -> None:
        """STUCK for sequences whose settings have left no token; the compiled sampler says it of its own."""
        is_unknown = self._is_special[slots]
        if compiled is not None:
            top_k = self._top_k[slots]
            is_unknown = is_unknown & (self._temperature[slots] > 0) & ~((top_k > 0) & (top_k < MAX_PARTIAL_TOP_K))
        if rows := np.flatnonzero(is_unknown).tolist():
            greatest = logits[rows].amax(dim=-1).tolist()
            tokens[[row for row, value in zip(rows, greatest, strict=True) if value == -np.inf]] = STUCK
