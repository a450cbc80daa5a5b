"""The compiled part of word_table.py: cleaning, numbering and counting words, looking them up, writing ids.

Importing this module imports Numba; word_table.py does so only where the machine code is not on disk yet.
"""

# mypy: allow-untyped-defs
# Numba finds the types of the compiled functions from their calls.

from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, types

from gpt2_chinese.text.segmenter_kernel import table
from gpt2_chinese.text.word_table import (
    CLEAN,
    COPY_WORDS,
    COUNT,
    DOCUMENT_END,
    DROPPED,
    FILL_SLOTS,
    FORMAT,
    LINE_BREAK_WORD,
    MAX_TABLES,
    MAX_VALUES,
    NUMBER,
    SPACE,
    SPACED,
    SPELL,
    VANISHES,
)

LINE_BREAK_CODE = np.uint32(10)
SPACE_CODE = np.uint32(32)

# The block of CJK Unified Ideographs: no case, no accents, no spaces between.
FIRST_IDEOGRAPH = np.uint32(0x4E00)
LAST_IDEOGRAPH = np.uint32(0x9FFF)

# What stands for a word in the table, 64 bits. One of at most three characters is its code points plus one, 21 bits
# each, which tells it from all others; a longer one is a hash, told from those by bits that no code point has.
CODE_BITS = np.uint64(21)
SHORT = 3
LONG = np.uint64(3) << np.uint64(61)
TOUCHES = np.uint64(1) << np.uint64(63)
FNV_OFFSET = np.uint64(14695981039346656037)
FNV_PRIME = np.uint64(1099511628211)
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)

compiled = njit(error_model="numpy")


@compiled
def key_of(text, start, end, touching):
    """What stands for the word text[start:end]; two long words may have the same."""
    if end - start <= SHORT:
        key = np.uint64(0)
        for index in range(start, end):
            key = (key << CODE_BITS) | (np.uint64(text[index]) + np.uint64(1))
    else:
        key = FNV_OFFSET
        for index in range(start, end):
            key = (key ^ np.uint64(text[index])) * FNV_PRIME
        key = (key & ~TOUCHES) | LONG
    return key | TOUCHES if touching else key


@compiled
def hash_of(key):
    """Where the search for a word begins, all bits of its key mixed into the low ones."""
    value = key * GOLDEN_RATIO
    return value ^ (value >> np.uint64(32))


@compiled
def ends_spaced(cleaned, start, end, classes):
    """Whether the last character of a text that folding leaves is a spaced one."""
    for index in range(end - 1, start - 1, -1):
        class_ = classes[cleaned[index]]
        if class_ != VANISHES:
            return class_ == SPACED
    return False


@compiled
def clean_documents(code_points, ends, classes, cleaned, cleaned_ends, dropped_at, spaces_at):
    """Drop and fold characters as `clean` and `str.split` do line by line.

    White space stays as it is where a single run of it, with a U+0020 among it, has spaced characters on both sides:
    one character of the run then, and no other white space.

    Args:
        dropped_at, spaces_at: where the first characters that are dropped and the first runs of white space that do not
            stay as they are begin; -1 where there are fewer.

    Returns:
        The length of what is left, the number of characters dropped, and of those of white space that do not stay as
        they are; -1 for the length if a character's class is not known.
    """
    length = 0
    dropped = 0
    spaces = 0
    document = 0
    dropped_places = 0
    space_places = 0
    run = 0  # white space since the last other character of the line
    run_start = 0
    run_has_space = False
    line_start = 0  # of what is written
    index = 0
    while index < len(code_points):
        code = code_points[index]
        class_ = classes[code]
        if class_ <= VANISHES:  # WIDE, SPACED or VANISHES
            if run:
                kept = 0
                if length > line_start:
                    kept = int(run_has_space and class_ == SPACED and ends_spaced(cleaned, line_start, length, classes))
                    cleaned[length] = SPACE_CODE
                    length += 1
                if run > kept:
                    spaces += run - kept
                    if space_places < len(spaces_at):
                        spaces_at[space_places] = run_start
                        space_places += 1
                run = 0
                run_has_space = False
            # The characters up to the next white space or control character: nearly all.
            while class_ <= VANISHES:
                cleaned[length] = code
                length += 1
                index += 1
                if index == len(code_points):
                    break
                code = code_points[index]
                class_ = classes[code]
            continue
        if code == LINE_BREAK_CODE:
            if run:
                spaces += run
                if space_places < len(spaces_at):
                    spaces_at[space_places] = run_start
                    space_places += 1
                run = 0
                run_has_space = False
            cleaned[length] = code
            length += 1
            line_start = length
            if document < len(ends) and index == ends[document]:
                cleaned_ends[document] = length - 1
                document += 1
        elif class_ == SPACE:
            if run == 0:
                run_start = index
            run += 1
            run_has_space = run_has_space or code == SPACE_CODE
        elif class_ == DROPPED:
            dropped += 1
            if dropped_places < len(dropped_at):
                dropped_at[dropped_places] = index
                dropped_places += 1
        else:
            return -1, 0, 0
        index += 1
    return length, dropped, spaces


@compiled
def number_words(
    text,
    word_ends,
    document_ends,
    given_touching,
    classes,
    slots,
    keys,
    starts,
    touching_of,
    arena,
    sequence,
    done,
    filled,
    document,
    touching,
    count,
):
    """Number words from word `done` on until the end or until the table is full.

    Whether a word touches a spaced character before it is in `given_touching`, or found here where that is empty. (One
    long function: a call for each word would count references to every array.)
    """
    start = word_ends[done - 1] if done else 0
    mask = np.uint64(len(slots) - 1)
    while done < len(word_ends):
        end = word_ends[done]
        if end - start == 1:
            code = text[start]
            if code == LINE_BREAK_CODE:
                if document < len(document_ends) and start == document_ends[document]:
                    document += 1
                    sequence[filled] = DOCUMENT_END
                else:
                    sequence[filled] = LINE_BREAK_WORD
                filled += 1
                touching = False
                start = end
                done += 1
                continue
            if code == SPACE_CODE:
                touching = False
                start = end
                done += 1
                continue
        if count + 1 >= len(keys) or 2 * (count + 1) > len(slots) or starts[count] + end - start > len(arena):
            break
        if len(given_touching):
            touching = given_touching[done] != 0

        key = key_of(text, start, end, touching)
        slot = hash_of(key) & mask
        while True:
            number = slots[slot]
            if number < 0:
                number = count
                slots[slot] = number
                keys[number] = key
                touching_of[number] = touching
                offset = starts[number]
                for index in range(start, end):
                    arena[offset + index - start] = text[index]
                starts[number + 1] = offset + end - start
                count += 1
                break
            if keys[number] == key:
                if end - start <= SHORT:
                    break
                offset = starts[number]
                if starts[number + 1] - offset == end - start:
                    same = True
                    for index in range(start, end):
                        if arena[offset + index - start] != text[index]:
                            same = False
                            break
                    if same:
                        break
            slot = (slot + np.uint64(1)) & mask
        sequence[filled] = number
        filled += 1

        # Whether the next word touches a spaced character: the last character of this one that folding leaves.
        index = end - 1
        while index >= start:
            class_ = classes[text[index]]
            if class_ == VANISHES:
                index -= 1
                continue
            touching = class_ == SPACED
            break
        start = end
        done += 1
    return done, filled, document, touching, count


@compiled
def fill_slots(slots, keys, count):
    """Put the words that a table has into its new, larger slots."""
    mask = np.uint64(len(slots) - 1)
    for number in range(count):
        slot = hash_of(keys[number]) & mask
        while slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = number


@compiled
def count_sequence(sequence, counts, order):
    """Count word numbers into `counts` (zero before); give how many different ones, in `order` as they first come."""
    different = 0
    for number in sequence:
        if number >= 0:
            if counts[number] == 0:
                order[different] = number
                different += 1
            counts[number] += 1
    return different


@compiled
def copy_words(order, starts, arena, text):
    """Write the text of the words with these numbers one behind the other."""
    length = 0
    for number in order:
        for place in range(starts[number], starts[number + 1]):
            text[length] = arena[place]
            length += 1


@compiled
def find_word(
    text,
    start,
    end,
    slots,
    keys,
    starts,
    arena,
):
    """The number of the word text[start:end] in a store of words that touch nothing, or -1."""
    key = key_of(text, start, end, False)
    mask = np.uint64(len(slots) - 1)
    slot = hash_of(key) & mask
    while slots[slot] >= 0:
        number = slots[slot]
        if keys[number] == key:
            offset = starts[number]
            same = starts[number + 1] - offset == end - start
            if same and end - start > SHORT:
                for index in range(start, end):
                    if arena[offset + index - start] != text[index]:
                        same = False
                        break
            if same:
                return int(number)
        slot = (slot + np.uint64(1)) & mask
    return -1


@compiled
def spell_ideographs(
    text,
    word_starts,
    first,
    count,
    longest,
    slots,
    keys,
    starts,
    arena,
    ids,
    id_starts,
    id_ends,
):
    """Look up the words from `first` to `count` - 1 that are of CJK Unified Ideographs alone, as `Tokenizer` does.

    A word that is not in the vocabulary becomes its longest parts from the left. Of other words, and of those with a
    character that the vocabulary has not, `id_ends` is set to -1.

    Args:
        slots, keys, starts, arena: the vocabulary's `WordStore`, where a number is an id.
        ids: as long as the words together.

    Returns:
        How many ids were written.
    """
    filled = 0
    for number in range(first, count):
        begin = word_starts[number]
        end = word_starts[number + 1]
        id_starts[number - first] = filled
        id_ends[number - first] = -1
        plain = True
        for index in range(begin, end):
            if text[index] < FIRST_IDEOGRAPH or text[index] > LAST_IDEOGRAPH:
                plain = False
                break
        if not plain:
            continue
        position = begin
        written = filled
        while position < end:
            stop = end if position == begin else min(end, position + longest)
            id_ = -1
            while stop > position:
                id_ = find_word(text, position, stop, slots, keys, starts, arena)
                if id_ >= 0:
                    break
                stop -= 1
            if id_ < 0:
                break
            ids[written] = id_
            written += 1
            position = stop
        if position == end:
            filled = written
            id_ends[number - first] = filled
    return filled


@compiled
def format_ids(
    sequence,
    id_starts,
    id_ends,
    ids,
    decimal,
    decimal_lengths,
    first_id,
    last_id,
    line_break_id,
    keep_empty,
    output,
):
    """Write documents of word numbers as ids in decimal, each `first_id` ids `last_id`, a space behind every id.

    Args:
        line_break_id: -1 where a line break has no id.
        keep_empty: whether a document without any id is written, as its first and last id, or left out.
        id_starts, id_ends, ids: word n has ids[id_starts[n] : id_ends[n]].
        decimal, decimal_lengths: the digits and the space of every id, in eight bytes, and how many they are.
        output: uint8, as long as the text can become and eight bytes more.

    Returns:
        The length of the text, its number of ids, its documents, and the documents left out.
    """
    length = 0
    total = 0
    documents = 0
    empty = 0
    begin = 0
    for index in range(len(sequence)):
        if sequence[index] != DOCUMENT_END:
            continue
        document_start = length
        length = append_id(first_id, decimal, decimal_lengths, output, length)
        inner = 0
        for position in range(begin, index):
            number = sequence[position]
            if number == LINE_BREAK_WORD:
                if line_break_id >= 0:
                    length = append_id(line_break_id, decimal, decimal_lengths, output, length)
                    inner += 1
                continue
            first, last = id_starts[number], id_ends[number]
            for place in range(first, last):
                length = append_id(ids[place], decimal, decimal_lengths, output, length)
            inner += last - first
        begin = index + 1
        if inner == 0 and not keep_empty:
            length = document_start
            empty += 1
            continue
        length = append_id(last_id, decimal, decimal_lengths, output, length)
        total += inner + 2
        documents += 1
    return length, total, documents, empty


@compiled
def append_id(id_, decimal, lengths, output, length):
    """Write an id's eight bytes, of which those behind its digits and space are written over by the next."""
    place = 8 * id_
    # All are read before the first is written, so that the compiler makes one load and one store of them.
    a, b, c, d = decimal[place], decimal[place + 1], decimal[place + 2], decimal[place + 3]
    e, f, g, h = decimal[place + 4], decimal[place + 5], decimal[place + 6], decimal[place + 7]
    output[length], output[length + 1], output[length + 2], output[length + 3] = a, b, c, d
    output[length + 4], output[length + 5], output[length + 6], output[length + 7] = e, f, g, h
    return length + np.int64(lengths[id_])


def run_addresses(operation, values, tables):
    """One operation for a caller that has addresses: numbers go in and out by `values`, arrays are in `tables`."""
    values = carray(values, MAX_VALUES)
    tables = carray(tables, 2 * MAX_TABLES)
    if operation == CLEAN:
        values[0], values[1], values[2] = clean_documents(
            table(tables, 0, np.uint32), table(tables, 1, np.int64), table(tables, 2, np.uint8),
            table(tables, 3, np.uint32), table(tables, 4, np.int64), table(tables, 5, np.int64),
            table(tables, 6, np.int64),
        )  # fmt: skip
    elif operation == NUMBER:
        done, filled, document, touching, count = number_words(
            table(tables, 0, np.uint32), table(tables, 1, np.int64), table(tables, 2, np.int64),
            table(tables, 3, np.uint8), table(tables, 4, np.uint8), table(tables, 5, np.int32),
            table(tables, 6, np.uint64), table(tables, 7, np.int64), table(tables, 8, np.uint8),
            table(tables, 9, np.uint32), table(tables, 10, np.int32), values[0], values[1], values[2], values[3] != 0,
            values[4],
        )  # fmt: skip
        values[0], values[1], values[2], values[3], values[4] = done, filled, document, np.int64(touching), count
    elif operation == FILL_SLOTS:
        fill_slots(table(tables, 0, np.int32), table(tables, 1, np.uint64), values[0])
    elif operation == COUNT:
        values[0] = count_sequence(
            table(tables, 0, np.int32), table(tables, 1, np.int64), table(tables, 2, np.int32)
        )  # fmt: skip
    elif operation == COPY_WORDS:
        copy_words(
            table(tables, 0, np.int32), table(tables, 1, np.int64), table(tables, 2, np.uint32),
            table(tables, 3, np.uint32),
        )  # fmt: skip
    elif operation == SPELL:
        values[0] = spell_ideographs(
            table(tables, 0, np.uint32), table(tables, 1, np.int64), values[0], values[1], values[2],
            table(tables, 2, np.int32), table(tables, 3, np.uint64), table(tables, 4, np.int64),
            table(tables, 5, np.uint32), table(tables, 6, np.int32), table(tables, 7, np.int64),
            table(tables, 8, np.int64),
        )  # fmt: skip
    elif operation == FORMAT:
        values[0], values[1], values[2], values[3] = format_ids(
            table(tables, 0, np.int32), table(tables, 1, np.int64), table(tables, 2, np.int64),
            table(tables, 3, np.int32), table(tables, 4, np.uint8), table(tables, 5, np.uint8), values[0], values[1],
            values[2], values[3] != 0, table(tables, 6, np.uint8),
        )  # fmt: skip


def compile_entry():
    """Compile run_addresses; compiled.py keeps the machine code."""
    int64 = types.CPointer(types.int64)
    return cfunc(types.void(types.int64, int64, int64))(run_addresses)
