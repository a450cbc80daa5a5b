"""The compiled part of duplicates.py: MinHash signatures, and the table in which documents with equal bands meet.

Importing this module imports Numba; duplicates.py does so only where the machine code is not on disk yet.
"""

# mypy: allow-untyped-defs
# Numba finds the types of the compiled functions from their calls.

from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, types

from gpt2_chinese.text.duplicates import (
    BANDS,
    FIND,
    HASHES,
    KEYS,
    MAX_CANDIDATES,
    MAX_EQUAL,
    MIN_SKETCH_MATCHES,
    PROBES,
    ROWS,
    SHINGLE,
    SKETCH,
)

compiled = njit(error_model="numpy")


@compiled
def mix(value):
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@compiled
def sign(text, seeds, signature, keys):
    """Compute the signature of a text and its keys: one for each band, and one for the whole text.

    Each of HASHES functions maps the shingles to uint32; its least value is one of the signature (Broder 1997). A band
    is ROWS of these.
    """
    for index in range(HASHES):
        signature[index] = np.uint32(0xFFFFFFFF)
    whole = np.uint64(len(text))
    for position in range(len(text)):
        whole = mix(whole + np.uint64(text[position]) + np.uint64(0x9E3779B97F4A7C15))
    for position in range(len(text) - SHINGLE + 1):
        code = np.uint64(0)
        for offset in range(SHINGLE):
            code = (code << np.uint64(21)) | np.uint64(text[position + offset])
        shingle = np.uint32(mix(code + np.uint64(1)) >> np.uint64(32))
        for index in range(HASHES):
            # Numba makes 64 bits of a product of 32; cut back at once, the loop is vectorised.
            value = np.uint32((shingle ^ seeds[index]) * np.uint32(0x9E3779B1))
            value = np.uint32((value ^ (value >> np.uint32(15))) * np.uint32(0x85EBCA77))
            value = np.uint32(value ^ (value >> np.uint32(13)))
            signature[index] = min(signature[index], value)
    for band in range(BANDS):
        key = np.uint64(band)
        for row in range(ROWS):
            key = mix(key + np.uint64(signature[band * ROWS + row]) + np.uint64(0x9E3779B97F4A7C15))
        keys[band] = key
    keys[BANDS] = mix(whole + np.uint64(BANDS))


@compiled
def matches(sketches, number, signature):
    """How many of the bytes that are kept of document `number` are those of a signature."""
    count = 0
    for index in range(SKETCH):
        count += sketches[number * SKETCH + index] == np.uint8(signature[index * (HASHES // SKETCH)] & np.uint32(0xFF))
    return count


@compiled
def find(signature, keys, table, sketches, first_key, candidates):
    """Look the keys up, and give how many different documents were found; `candidates` has their numbers."""
    found = 0
    mask = np.uint64(len(table) - 1)
    for index in range(first_key, KEYS):
        print_ = keys[index] >> np.uint64(32)
        slot = keys[index] & mask
        for _ in range(PROBES):
            entry = table[slot]
            if entry == np.uint64(0):
                break
            if entry >> np.uint64(32) == print_ and found < MAX_CANDIDATES:
                number = np.int64(entry & np.uint64(0xFFFFFFFF)) - 1
                known = False
                for place in range(found):
                    known = known or candidates[place] == number
                if not known and (index == BANDS or matches(sketches, number, signature) >= MIN_SKETCH_MATCHES):
                    candidates[found] = number
                    found += 1
            slot = (slot + np.uint64(1)) & mask
    return found


@compiled
def insert(signature, keys, table, sketches, first_key, number):
    """Enter a document under its keys, and give how many older entries had to make room."""
    forgotten = 0
    mask = np.uint64(len(table) - 1)
    for index in range(first_key, KEYS):
        value = (keys[index] >> np.uint64(32)) << np.uint64(32) | np.uint64(number + 1)
        slot = keys[index] & mask
        oldest = slot
        equal = 0
        for _ in range(PROBES):
            if table[slot] == np.uint64(0):
                oldest = slot
                break
            equal += table[slot] >> np.uint64(32) == value >> np.uint64(32)
            if table[slot] & np.uint64(0xFFFFFFFF) < table[oldest] & np.uint64(0xFFFFFFFF):
                oldest = slot
            slot = (slot + np.uint64(1)) & mask
        if equal < MAX_EQUAL:  # a band that many documents have says little
            forgotten += table[oldest] != np.uint64(0)
            table[oldest] = value
    for index in range(SKETCH):
        sketches[number * SKETCH + index] = np.uint8(signature[index * (HASHES // SKETCH)] & np.uint32(0xFF))
    return forgotten


def run_addresses(operation, text, length, seeds, signature, keys, table, slots, sketches, number, first_key, result):
    """FIND signs a text and finds candidates; otherwise what was signed last is entered as document `number`.

    `result` gets the count first, then the candidates.
    """
    signature_array = carray(signature, HASHES)
    key_array = carray(keys, KEYS)
    table_array = carray(table, slots)
    sketch_array = carray(sketches, (number + 1) * SKETCH)
    result_array = carray(result, MAX_CANDIDATES + 1)
    if operation == FIND:
        sign(carray(text, length), carray(seeds, HASHES), signature_array, key_array)
        count = find(signature_array, key_array, table_array, sketch_array, first_key, result_array[1:])
    else:
        count = insert(signature_array, key_array, table_array, sketch_array, first_key, number)
    result_array[0] = count


def compile_entry():
    """Compile run_addresses; compiled.py keeps the machine code."""
    numbers32, numbers64 = types.CPointer(types.uint32), types.CPointer(types.uint64)
    int64 = types.int64
    return cfunc(
        types.void(
            int64, numbers32, int64, numbers32, numbers32, numbers64, numbers64, int64, types.CPointer(types.uint8),
            int64, int64, types.CPointer(int64),
        )
    )(run_addresses)  # fmt: skip
