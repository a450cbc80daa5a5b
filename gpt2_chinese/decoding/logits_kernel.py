"""The compiled part of batch_sampler.py: what changes the logits of a batch before a token is drawn, in place.

It also writes what the draw and the scores need: a random number for each sequence, and the logarithms of sums.

Importing this module imports Numba; batch_sampler.py does so only where the machine code is not cached yet. The numbers
are those of logits_processing.py, whose operations take longer than a small model: here only the tokens that a setting
concerns are touched.
"""

# mypy: allow-untyped-defs
# Numba infers the types of the compiled functions from their calls.

from __future__ import annotations

import math

import numpy as np
from numba import carray, cfunc, njit, types

from gpt2_chinese.decoding.batch_sampler import LogitsArgs, RowFloats, RowInts
from gpt2_chinese.decoding.decoder_kernel import compiled_reassociating, exp, float32_at, float64_at, int64_at
from gpt2_chinese.decoding.sampling import GOLDEN_GAMMA

compiled = njit(error_model="numpy")

NUM_INTS, NUM_FLOATS, NUM_ARGS = len(RowInts._fields), len(RowFloats._fields), len(LogitsArgs._fields)
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
) = range(NUM_INTS)
REPETITION, PRESENCE, FREQUENCY = range(NUM_FLOATS)
(
    LOGITS,
    VOCAB_SIZE,
    BATCH,
    FIRST_SLOT,
    INTS,
    FLOATS,
    SEEDS,
    NUM_SAMPLED,
    STATES,
    REMAINING,
    UNIFORM,
    LOG_SUMS,
    MAX_DISTANCE,
    MASK_ALLOWS,
    MASK_BEGINS,
    MASK_IDS,
    COUNTS,
    KEPT,
) = range(NUM_ARGS)
SUM_BLOCK = 1024  # exponentials that are added in float32, so that many are added at once; their sums in float64


@compiled
def splitmix64(seed, index):
    """As sampling.splitmix64, for one number: uint64."""
    z = seed + index * np.uint64(GOLDEN_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled_reassociating
def greatest_of(values, size):
    greatest = values[0]
    for index in range(size):
        greatest = max(greatest, values[index])
    return greatest


@compiled_reassociating
def sum_of_exp(values, begin, end, greatest):
    total = np.float32(0)
    for index in range(begin, end):
        total += exp(values[index] - greatest)
    return total


@compiled
def log_sum_exp(logits, size):
    greatest = greatest_of(logits, size)
    total = 0.0
    for begin in range(0, size, SUM_BLOCK):
        total += sum_of_exp(logits, begin, min(begin + SUM_BLOCK, size), greatest)
    return np.float32(greatest + math.log(total))


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
    vocab_size, batch, first = table[VOCAB_SIZE], table[BATCH], table[FIRST_SLOT]
    end = first + batch
    all_logits = carray(float32_at(table[LOGITS]), batch * vocab_size)
    all_ints = carray(int64_at(table[INTS]), end * NUM_INTS)
    all_floats = carray(float32_at(table[FLOATS]), end * NUM_FLOATS)
    seeds, num_sampled = carray(int64_at(table[SEEDS]), end), carray(int64_at(table[NUM_SAMPLED]), end)
    states, remaining = carray(int64_at(table[STATES]), end), carray(int64_at(table[REMAINING]), end)
    uniform, log_sums = carray(float64_at(table[UNIFORM]), end), carray(float32_at(table[LOG_SUMS]), end)
    max_distance = table[MAX_DISTANCE]
    counts = carray(int64_at(table[COUNTS]), vocab_size)
    kept = carray(float32_at(table[KEPT]), vocab_size)
    for row in range(batch):
        logits = all_logits[row * vocab_size : (row + 1) * vocab_size]
        slot = first + row
        ints = all_ints[slot * NUM_INTS : (slot + 1) * NUM_INTS]
        floats = all_floats[slot * NUM_FLOATS : (slot + 1) * NUM_FLOATS]
        bits = splitmix64(np.uint64(seeds[slot]), np.uint64(num_sampled[slot])) >> np.uint64(16)
        uniform[slot] = (np.float64(bits) + 0.5) / 2.0**48  # as sampling.uniform_random
        if ints[IS_SCORED]:
            log_sums[slot] = log_sum_exp(logits, vocab_size)
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
        mask = states[slot] * (max_distance + 1) + max(0, min(remaining[slot] - 1, max_distance))
        begins = carray(int64_at(table[MASK_BEGINS]), mask + 2)
        count = begins[mask + 1] - begins[mask]
        ids = carray(int64_at(table[MASK_IDS]), begins[mask + 1])[begins[mask] :]
        apply_mask(logits, vocab_size, carray(int64_at(table[MASK_ALLOWS]), mask + 1)[mask], ids, count, kept)


def compile_entry():
    """Compile process_batch; compiled.py caches the machine code."""
    return cfunc(types.void(types.CPointer(types.int64)), error_model="numpy")(process_batch)
