"""The compiled part of batch_sampler.py: what changes the logits of a batch before a token is drawn, in place.

Importing this module imports Numba; batch_sampler.py does so only where the machine code is not cached yet. The numbers
are those of logits_processing.py, whose operations take longer than a small model: here only the tokens that a setting
concerns are touched.
"""

# mypy: allow-untyped-defs
# Numba infers the types of the compiled functions from their calls.

from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, types

from gpt2_chinese.decoding.batch_sampler import LogitsArgs, RowFloats, RowInts
from gpt2_chinese.decoding.decoder_kernel import float32_at, int64_at

compiled = njit(error_model="numpy")

NUM_INTS, NUM_FLOATS, NUM_ARGS = len(RowInts._fields), len(RowFloats._fields), len(LogitsArgs._fields)
(
    MASK,
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
) = range(NUM_INTS)
REPETITION, PRESENCE, FREQUENCY = range(NUM_FLOATS)
LOGITS, VOCAB_SIZE, BATCH, INTS, FLOATS, MASK_ALLOWS, MASK_BEGINS, MASK_IDS, COUNTS, KEPT = range(NUM_ARGS)


@compiled
def apply_penalties(logits, history, length, prompt_length, floats, counts):
    """Repetition over prompt and completion, presence and frequency over the completion.

    `counts` is zero for all tokens, before and after.
    """
    for position in range(prompt_length, length):
        counts[history[position]] += 2
    for position in range(length):
        token = history[position]
        if counts[token] & 1:
            continue
        count = np.float32(counts[token] >> 1)
        counts[token] |= 1
        logit = logits[token]
        if floats[REPETITION] != 1:
            logit = logit / floats[REPETITION] if logit > 0 else logit * floats[REPETITION]
        if count > 0:
            logit -= count * floats[FREQUENCY]
            logit -= floats[PRESENCE]
        logits[token] = logit
    for position in range(length):
        counts[history[position]] = 0


@compiled
def ban_repeated_ngrams(logits, history, length, size):
    """Ban every token that would end an n-gram which is in the history already."""
    for begin in range(length - size + 1):
        is_equal = True
        for offset in range(size - 1):
            if history[begin + offset] != history[length - size + 1 + offset]:
                is_equal = False
                break
        if is_equal:
            logits[history[begin + size - 1]] = -np.inf


@compiled
def ban_bad_words(logits, history, length, words):
    """Ban the last token of every bad word whose other tokens end the history.

    `words` has each word as its length and its tokens, and ends with the length 0.
    """
    place = 0
    while words[place]:
        size = words[place]
        is_equal = size - 1 <= length
        if is_equal:
            for offset in range(size - 1):
                if words[place + 1 + offset] != history[length - size + 1 + offset]:
                    is_equal = False
                    break
        if is_equal:
            logits[words[place + size]] = -np.inf
        place += size + 1


@compiled
def apply_mask(logits, vocab_size, allows, ids, count, kept):
    """Leave out the listed tokens, or all but these."""
    if not allows:
        for index in range(count):
            logits[ids[index]] = -np.inf
        return
    for index in range(count):
        kept[index] = logits[ids[index]]
    for token in range(vocab_size):
        logits[token] = -np.inf
    for index in range(count):
        logits[ids[index]] = kept[index]


def process_batch(args):
    """Change the logits of `BATCH` rows as their settings say; see LogitsArgs, RowInts and RowFloats."""
    table = carray(args, NUM_ARGS)
    vocab_size, batch = table[VOCAB_SIZE], table[BATCH]
    all_logits = carray(float32_at(table[LOGITS]), batch * vocab_size)
    all_ints = carray(int64_at(table[INTS]), batch * NUM_INTS)
    all_floats = carray(float32_at(table[FLOATS]), batch * NUM_FLOATS)
    counts = carray(int64_at(table[COUNTS]), vocab_size)
    kept = carray(float32_at(table[KEPT]), vocab_size)
    for row in range(batch):
        logits = all_logits[row * vocab_size : (row + 1) * vocab_size]
        ints = all_ints[row * NUM_INTS : (row + 1) * NUM_INTS]
        floats = all_floats[row * NUM_FLOATS : (row + 1) * NUM_FLOATS]
        biased = carray(int64_at(ints[BIAS_IDS]), ints[NUM_BIASES])
        biases = carray(float32_at(ints[BIAS_VALUES]), ints[NUM_BIASES])
        for index in range(ints[NUM_BIASES]):
            logits[biased[index]] += biases[index]
        if ints[HISTORY]:
            length = ints[LENGTH]
            history = carray(int64_at(ints[HISTORY]), length)
            if floats[REPETITION] != 1 or floats[PRESENCE] != 0 or floats[FREQUENCY] != 0:
                apply_penalties(logits, history, length, ints[PROMPT_LENGTH], floats, counts)
            if ints[NGRAM_SIZE]:
                ban_repeated_ngrams(logits, history, length, ints[NGRAM_SIZE])
            if ints[BAD_WORDS]:
                ban_bad_words(logits, history, length, carray(int64_at(ints[BAD_WORDS]), np.int64(1) << 40))
        banned = carray(int64_at(ints[BANNED_IDS]), ints[NUM_BANNED])
        for index in range(ints[NUM_BANNED]):
            logits[banned[index]] = -np.inf
        mask = ints[MASK]
        begins = carray(int64_at(table[MASK_BEGINS]), mask + 2)
        count = begins[mask + 1] - begins[mask]
        ids = carray(int64_at(table[MASK_IDS]), begins[mask + 1])[begins[mask] :]
        apply_mask(logits, vocab_size, carray(int64_at(table[MASK_ALLOWS]), mask + 1)[mask], ids, count, kept)


def compile_entry():
    """Compile process_batch; compiled.py caches the machine code."""
    return cfunc(types.void(types.CPointer(types.int64)), error_model="numpy")(process_batch)
