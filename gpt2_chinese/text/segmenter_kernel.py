"""The compiled part of segmenter.py: cleaning a line, labelling its characters, joining by dictionaries.

Importing this module imports Numba; segmenter.py does so only where the machine code is not on disk yet. Other
functions that Numba compiles may call `segment_text` with a segmenter's model.
"""

# mypy: allow-untyped-defs
# Numba finds the types of the compiled functions from their calls.

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from gpt2_chinese.text.segmenter import (
    CLOSED,
    CODE_POINTS,
    FIRST_OF_ENTRY,
    FOLDED,
    LINE_BREAK,
    MAX_LENGTH,
    NUMBER_BITS,
    NUMBER_MASK,
    OTHER,
    PUNCTUATION,
    SENTENCE_ENDS,
    SLOT_BITS,
    SPACE,
    TITLE_CLOSES,
    TITLE_OPENS,
    Model,
)

# Sets of allowed labels are masks of these bits, as THULAC numbers them. The labels themselves are numbered in the
# order of the model's label file: 0 begins a word, 1 ends it, 2 is a word of one character, 3 is inside a word.
BEGIN, MIDDLE, END, SINGLE = 1, 2, 4, 8
ANY_LABEL = BEGIN | MIDDLE | END | SINGLE
STARTS_WORD = BEGIN | SINGLE
ENDS_WORD = END | SINGLE
TITLE_LENGTH = 10
UNREACHABLE = -(1 << 60)
TABLES = len(Model._fields)
BOUNDARY = 0xFF03  # "＃" stands before and after a line

# A slot's tag: the pair plus 1, and above it a bit for each dictionary that has an entry beginning with the pair.
TAG_BITS = 28
TAG_MASK = (1 << TAG_BITS) - 1
ENTRY_BIT = FIRST_OF_ENTRY.bit_length() - 1
ENTRY_MASK = 0b1111 << ENTRY_BIT

AHEAD = 12  # characters between the one whose weights are added and the one whose weights are fetched

compiled = njit(error_model="numpy")


@compiled
def segment_text(text, cleaned, ends, model):
    """Segment `text`, any number of lines.

    Writes the text as THULAC cleans it to `cleaned` and where each word ends there to `ends`; together the words are
    the whole of `cleaned`, and a line break is a word of its own.

    Args:
        text: uint32 code points.
        cleaned: uint32, as long as `text`.
        ends: int32, as long as `text`.
        model: Segmenter.model.

    Returns:
        How many characters of `cleaned` and how many words were written.
    """
    length = text.shape[0]
    characters = words = start = 0
    while start < length:
        end = start
        while end < length and text[end] != LINE_BREAK:
            end += 1
        if end - start < MAX_LENGTH:
            characters, words = segment_piece(text, start, end, cleaned, characters, ends, words, model)
        else:
            characters, words = segment_long_line(text, start, end, cleaned, characters, ends, words, model)
        if end < length:
            cleaned[characters] = LINE_BREAK
            characters += 1
            ends[words] = characters
            words += 1
        start = end + 1
    return characters, words


@compiled
def segment_long_line(text, start, end, cleaned, characters, ends, words, model):
    """Segment a line of MAX_LENGTH characters and more as runs of sentences that are shorter together."""
    piece = sentence = start
    for position in range(start, end):
        if model.characters[min(text[position], CODE_POINTS - 1)] & SENTENCE_ENDS:
            if position + 1 - piece >= MAX_LENGTH:
                characters, words = segment_piece(text, piece, sentence, cleaned, characters, ends, words, model)
                piece = sentence
            sentence = position + 1
    if end - piece >= MAX_LENGTH:
        characters, words = segment_piece(text, piece, sentence, cleaned, characters, ends, words, model)
        piece = sentence
    return segment_piece(text, piece, end, cleaned, characters, ends, words, model)


@compiled
def segment_piece(text, start, end, cleaned, characters, ends, words, model):
    """Segment text[start:end], in parts where it is longer than the package can take."""
    stop = end
    while start < end:
        length = clean(text, start, stop, cleaned, characters, model)
        if length < 0:
            stop = min(start + MAX_LENGTH - 1, end)
            continue
        label(length, model)
        first = words
        words, flags = collect(length, characters, ends, words, model.flags, model.labels)
        for dictionary in range(4):
            flag = FIRST_OF_ENTRY << dictionary
            if flags & flag:
                trie = (model.user_words, model.place_names, model.idioms, model.punctuation)[dictionary]
                words = join(trie, flag, cleaned, characters, ends, first, words, model.flags)
        characters += length
        start = stop
        stop = min(start + MAX_LENGTH - 1, end)
    return characters, words


@compiled
def clean(text, start, end, cleaned, offset, model):
    """Copy text[start:end] to cleaned[offset:] without repeated spaces, and find each character's allowed labels.

    Returns:
        The number of characters copied; -1 if there are more than MAX_LENGTH.
    """
    flags, labels = model.flags, model.labels
    length = 0
    after_space = after_other = after_punctuation = False
    in_title = short_title = False
    title_start = title_length = 0
    for position in range(start, end):
        code_point = text[position]
        flag = model.characters[min(code_point, CODE_POINTS - 1)]
        if flag & SPACE and after_space:
            continue
        if length == MAX_LENGTH:
            return -1
        allowed = ANY_LABEL
        if flag & (SPACE | OTHER) == 0:
            if after_space:
                allowed = STARTS_WORD
            elif after_other:
                labels[length - 1] &= ENDS_WORD
                if after_punctuation:
                    allowed = STARTS_WORD
                    after_punctuation = False
            after_space = after_other = False
        elif flag & SPACE:
            if length:
                labels[length - 1] &= ENDS_WORD
            allowed = STARTS_WORD
            after_space = True
            after_other = False
        else:
            if flag & CLOSED and (after_space or after_other):
                allowed = SINGLE
                if not after_space:
                    labels[length - 1] &= ENDS_WORD
                after_punctuation = after_punctuation or flag & PUNCTUATION != 0
            elif flag & CLOSED:
                allowed = STARTS_WORD
                after_punctuation = flag & PUNCTUATION != 0
            else:
                allowed = STARTS_WORD
                if after_other and not after_space and not after_punctuation:
                    allowed = MIDDLE
                    if labels[length - 1] == 0:
                        labels[length - 1] = BEGIN | MIDDLE | END
                after_punctuation = False
            after_space = False
            after_other = True
        cleaned[offset + length] = code_point
        flags[length] = flag
        labels[length] = allowed
        length += 1
        # A title's characters are counted without its spaces, while its labels are laid with them, from its start.
        if flag & TITLE_OPENS:
            in_title = short_title = True
            title_start = length
            title_length = 0
        elif in_title and flag & TITLE_CLOSES:
            in_title = False
            if title_length == 1 and short_title:
                labels[title_start] = STARTS_WORD
            elif title_length > 1 and short_title:
                labels[title_start] = BEGIN
                for inside in range(title_start + 1, title_start + title_length - 1):
                    labels[inside] = MIDDLE
                labels[title_start + title_length - 1] = END
        elif in_title and flag & SPACE == 0:
            title_length += 1
            if flag & OTHER or title_length > TITLE_LENGTH:
                short_title = False
    if length:
        labels[0] &= STARTS_WORD
        labels[length - 1] &= ENDS_WORD
        if labels[0] == 0:
            labels[0] = STARTS_WORD
        if labels[length - 1] == 0:
            labels[length - 1] = ENDS_WORD
    return length


@compiled
def label(length, model):
    """Find the best labels of a cleaned line: labels[i] becomes 1 where a word starts and 0 elsewhere."""
    misses = score_pairs(
        length, model.characters, model.flags, model.slot_tags, model.slot_weights, model.scores, model.missing
    )
    if misses:
        score_missing(misses, length, model)
    if length == MAX_LENGTH:
        model.scores[:] = 0  # the package gives a line of exactly this length no scores
    find_best(length, model.scores, model.transitions, model.labels, model.choices)


@compiled
def slot_of(pair):
    """The first of the two slots where the weights of a pair of characters may be."""
    return (((pair * 0x9E3779B1) & 0xFFFFFFFF) >> (33 - SLOT_BITS)) << 1


@compiled
def prefetch_slots(flags, position, slot_tags, slots):
    """Have the processor fetch the slots of the pair that begins at a position."""
    left, right = np.int64(flags[position] & NUMBER_MASK), np.int64(flags[position + 1] & NUMBER_MASK)
    slot = slot_of((left << NUMBER_BITS) | right)
    prefetch(slot_tags, slot)  # type: ignore[call-arg]
    prefetch(slots, slot << 3)
    prefetch(slots, (slot + 1) << 3)


@compiled
def score_pairs(length, characters, flags, slot_tags, slots, scores, missing):
    """Sum what the pairs of a line that are in the slots give to the four labels of each character.

    A pair acts on the character before it, on its two, and on the one after it. The scores of character i are at
    scores[2 * i] (labels 0 and 1) and the place after it (2 and 3). A number holds two labels, one in its low 32 bits
    and one above; as sums of ints they never mix.

    Also turns the flags that say which dictionaries have an entry beginning with the character into flags for the
    character and the next one.

    Returns:
        How many pairs are not in the slots; `missing` has 8 numbers for each, its place and the pair.
    """
    one_0 = one_1 = one_2 = two_0 = two_1 = two_2 = np.int64(0)
    misses = 0
    left = boundary = np.int64(characters[BOUNDARY] & NUMBER_MASK)
    right_flags = np.uint32(0)
    for position in range(min(AHEAD, length) - 1):
        prefetch_slots(flags, position, slot_tags, slots)
    for position in range(-2, length + 1):
        if position + AHEAD < length - 1:
            prefetch_slots(flags, position + AHEAD, slot_tags, slots)
        left_flags = right_flags
        if 0 <= position + 1 < length:
            right_flags = flags[position + 1]
            right = np.int64(right_flags & NUMBER_MASK)
        else:
            right_flags = np.uint32(0)
            right = boundary
        pair = (left << NUMBER_BITS) | right
        left = right
        slot = slot_of(pair)
        tag = slot_tags[slot]
        if np.int64(tag & TAG_MASK) != pair + 1:
            slot += 1
            tag = slot_tags[slot]
        if np.int64(tag & TAG_MASK) == pair + 1:
            slot <<= 3
            one_0 += slots[slot]
            two_0 += slots[slot + 1]
            one_1 += slots[slot + 2]
            two_1 += slots[slot + 3]
            one_2 += slots[slot + 4]
            two_2 += slots[slot + 5]
            one_3 = slots[slot + 6]
            two_3 = slots[slot + 7]
            if left_flags & ENTRY_MASK and (left_flags | right_flags) & FOLDED == 0:
                flags[position] = left_flags & (np.int64(tag) >> TAG_BITS << ENTRY_BIT | ~ENTRY_MASK)
        else:
            missing[8 * misses] = position
            missing[8 * misses + 1] = pair
            misses += 1
            one_3 = two_3 = np.int64(0)
        if position >= 1:
            scores[2 * position - 2] = one_0
            scores[2 * position - 1] = two_0
        one_0, one_1, one_2 = one_1, one_2, one_3
        two_0, two_1, two_2 = two_1, two_2, two_3
    if length:
        flags[length - 1] &= ~ENTRY_MASK
    return misses


@compiled
def score_missing(misses, length, model):
    """Look the missing pairs of a line up, put them into the slots, and add them to the line's scores.

    They are looked up together, step by step, so that the processor waits for many places of memory at a time. The
    features of a string are the children of its child " ", under "1", "2" and so on by the place they act on.
    """
    features, weights, slots, missing, scores = (
        model.features,
        model.weights,
        model.slot_weights,
        model.missing,
        model.scores,
    )
    cells = features.shape[0] >> 1
    for miss in range(misses):
        pair = missing[8 * miss + 1]
        left, right = code_points_of(pair, model.code_points)
        missing[8 * miss + 2] = -1
        if left >= 0 and right >= 0:
            cell = np.int64(features[2 * left]) + right
            if cell < cells and features[2 * cell + 1] == left:
                missing[8 * miss + 2] = np.int64(features[2 * cell]) + 32
    for miss in range(misses):
        parent = missing[8 * miss + 2]
        if parent >= 0:
            missing[8 * miss + 3] = features[2 * parent]
    for miss in range(misses):
        parent = missing[8 * miss + 2]
        if parent >= 0:
            for place in range(4):
                cell = missing[8 * miss + 3] + 49 + place
                missing[8 * miss + 4 + place] = -1
                if 0 <= cell < cells and features[2 * cell + 1] == parent:
                    missing[8 * miss + 4 + place] = 4 * np.int64(features[2 * cell])
    for miss in range(misses):
        pair = missing[8 * miss + 1]
        start = slot_of(pair) << 3
        character = (pair >> NUMBER_BITS) << 3
        for part in range(8):  # the older pair of the two is forgotten
            slots[start + 8 + part] = slots[start + part]
            slots[start + part] = model.character_weights[character + part]
        if missing[8 * miss + 2] >= 0:
            for place in range(4):
                feature = missing[8 * miss + 4 + place]
                if feature >= 0:
                    # "1" acts on the second of the pair, "2" on its first, "3" after it, "4" before it.
                    part = start + (4, 2, 6, 0)[place]
                    slots[part] += np.int64(weights[feature]) + (np.int64(weights[feature + 1]) << 32)
                    slots[part + 1] += np.int64(weights[feature + 2]) + (np.int64(weights[feature + 3]) << 32)
        position = missing[8 * miss]
        for part in range(8):
            target = 2 * position - 2 + part
            if 0 <= target < 2 * length:
                scores[target] += slots[start + part]
    for miss in range(misses):
        pair = missing[8 * miss + 1]
        left, right = code_points_of(pair, model.code_points)
        entries = 0b1111  # of characters without a number nothing is known: all dictionaries may have them
        if left >= 0 and right >= 0:
            entries = (
                begins_entry(model.user_words, left, right)
                | begins_entry(model.place_names, left, right) << 1
                | begins_entry(model.idioms, left, right) << 2
                | begins_entry(model.punctuation, left, right) << 3
            )
        slot = slot_of(pair)
        model.slot_tags[slot + 1] = model.slot_tags[slot]
        model.slot_tags[slot] = (pair + 1) | (entries << TAG_BITS)


@compiled
def code_points_of(pair, code_points):
    """The two characters of a pair, -1 for one without a number."""
    return np.int64(code_points[pair >> NUMBER_BITS]), np.int64(code_points[pair & NUMBER_MASK])


@compiled
def begins_entry(trie, left, right):
    """1 if a dictionary has an entry that begins with two characters, else 0."""
    state = step(trie, np.int64(0), left)
    return np.int64(state >= 0 and step(trie, state, right) >= 0)


@compiled
def find_best(length, scores, transitions, labels, choices):
    """The sequence of allowed labels with the highest score, by Viterbi's algorithm with THULAC's ties.

    A label that no allowed label can precede is unreachable. At the last character THULAC compares such labels by
    their own weights with the scores of whole sequences; if one of them wins, every character before it is a word.
    """
    end_begin, single_begin = np.int64(transitions[4]), np.int64(transitions[8])
    begin_end, middle_end = np.int64(transitions[1]), np.int64(transitions[13])
    end_single, single_single = np.int64(transitions[6]), np.int64(transitions[10])
    begin_middle, middle_middle = np.int64(transitions[3]), np.int64(transitions[15])
    begin = end = single = middle = np.int64(0)
    own_begin = own_end = own_single = own_middle = np.int64(0)
    # 1) Extend the best sequences by one character after the other.
    for position in range(length):
        one, two = scores[2 * position], scores[2 * position + 1]
        own_begin = np.int64(np.int32(one))
        own_end = (one - own_begin) >> 32
        own_single = np.int64(np.int32(two))
        own_middle = (two - own_single) >> 32
        if position == 0:
            begin, end, single, middle = own_begin, own_end, own_single, own_middle
        else:
            to_begin, other_to_begin = end + end_begin, single + single_begin
            to_end, other_to_end = begin + begin_end, middle + middle_end
            to_single, other_to_single = end + end_single, single + single_single
            to_middle, other_to_middle = begin + begin_middle, middle + middle_middle
            begin = max(to_begin, other_to_begin) + own_begin
            end = max(to_end, other_to_end) + own_end
            single = max(to_single, other_to_single) + own_single
            middle = max(to_middle, other_to_middle) + own_middle
            choices[position] = (
                np.int64(other_to_begin > to_begin)
                | np.int64(other_to_end > to_end) << 1
                | np.int64(other_to_single > to_single) << 2
                | np.int64(other_to_middle > to_middle) << 3
            )
        allowed = labels[position]
        if allowed != ANY_LABEL and allowed != 0:
            if not allowed & BEGIN:
                begin = np.int64(UNREACHABLE)
            if not allowed & END:
                end = np.int64(UNREACHABLE)
            if not allowed & SINGLE:
                single = np.int64(UNREACHABLE)
            if not allowed & MIDDLE:
                middle = np.int64(UNREACHABLE)
    # 2) Choose the last label.
    allowed = labels[length - 1]
    best = -1
    best_score = np.int64(0)
    reached = False
    for candidate in range(4):
        if candidate == 0:
            bit, score, own = BEGIN, begin, own_begin
        elif candidate == 1:
            bit, score, own = END, end, own_end
        elif candidate == 2:
            bit, score, own = SINGLE, single, own_single
        else:
            bit, score, own = MIDDLE, middle, own_middle
        if allowed & bit:
            is_reached = bool(score > UNREACHABLE >> 1)
            if not is_reached:
                score = own
            if best < 0 or score > best_score:
                best, best_score, reached = candidate, score, is_reached
    # 3) Follow the choices back.
    if not reached:
        for position in range(length - 1):
            labels[position] = 1
        labels[length - 1] = best == 0 or best == 2
        return
    for position in range(length - 1, 0, -1):
        starts_word = best == 0 or best == 2
        labels[position] = starts_word
        chosen = (choices[position] >> best) & 1
        best = 1 + chosen if starts_word else 3 * chosen
    labels[0] = 1


@compiled
def collect(length, start, ends, words, flags, labels):
    """Append where the words of a line end.

    Returns:
        The new number of words, and the flags of all their first characters together.
    """
    first_flags = flags[0]
    for position in range(1, length):
        if labels[position]:
            first_flags |= flags[position]
            ends[words] = start + position
            words += 1
    ends[words] = start + length
    return words + 1, first_flags


@compiled
def join(trie, flag, cleaned, start, ends, first, words, flags):
    """Join neighbouring words that together are an entry of a dictionary, the longest entry at every word.

    The words are those that end at ends[first:words], and the first of them starts at `start`. Only where the flag of
    the dictionary is set can one begin an entry.

    Returns:
        The new number of words.
    """
    joined = first
    word = first
    word_start = start
    while word < words:
        last = word
        if flags[word_start - start] & flag:
            state = walk(trie, np.int64(0), cleaned, word_start, ends[word])
            following = word + 1
            # State 0 is where NUL characters lead: like a dead end, it is not the start of an entry.
            while state > 0 and following < words:
                state = walk(trie, state, cleaned, ends[following - 1], ends[following])
                if state > 0:
                    value = np.int64(trie[2 * state])
                    if value < trie.shape[0] >> 1 and trie[2 * value + 1] == state:
                        last = following
                following += 1
        word_start = ends[last]
        ends[joined] = word_start
        joined += 1
        word = last + 1
    return joined


@compiled
def walk(trie, state, cleaned, start, end):
    """The state of a trie after the characters cleaned[start:end], -1 if no entry goes on with them."""
    for position in range(start, end):
        state = step(trie, state, np.int64(cleaned[position]))
        if state < 0:
            break
    return state


@compiled
def step(trie, state, character):
    """The state of a trie after one more character, -1 if no entry goes on with it."""
    cell = np.int64(trie[2 * state]) + character
    if cell < trie.shape[0] >> 1 and trie[2 * cell + 1] == state:
        return np.int64(cell)
    return np.int64(-1)


@intrinsic
def prefetch(_, array, index):
    """Have the processor fetch the element of an array into its caches, without waiting for it."""

    def generate(context, builder, signature, arguments):
        kind = signature.args[0]
        view = context.make_array(kind)(context, builder, arguments[0])
        place = builder.gep(view.data, [arguments[1]])
        byte = builder.bitcast(place, ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        builder.call(function, [byte, flag(0), flag(3), flag(1)])  # for reading, into all caches, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@intrinsic
def pointer(_, address, kind):
    """An address as a pointer to numbers of some kind."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(address, kind), generate


@compiled
def table(tables, index, kind):
    """A table of the model from the list of the tables' addresses and lengths."""
    return carray(pointer(tables[2 * index], kind), tables[2 * index + 1])  # type: ignore[call-arg]


@compiled
def separate(cleaned, ends, words, separated):
    """Copy a text with U+0000 between its words; returns how many characters that are."""
    start = length = 0
    for word in range(words):
        if word:
            separated[length] = 0
            length += 1
        for position in range(start, ends[word]):
            separated[length] = cleaned[position]
            length += 1
        start = ends[word]
    return length


def segment_addresses(text, length, cleaned, ends, counts, tables, separated):
    """segment_text for a caller that has addresses; its result goes to `counts`, the model comes in `tables`.

    The caller may have the words separated, too, in memory for twice as many characters: then `separated` is not 0, and
    the first of `counts` is how many were written there.
    """
    tables = carray(tables, 2 * TABLES)
    model = Model(
        table(tables, 0, np.uint32),
        table(tables, 1, np.int32),
        table(tables, 2, np.int64),
        table(tables, 3, np.int32),
        table(tables, 4, np.int32),
        table(tables, 5, np.int32),
        table(tables, 6, np.int32),
        table(tables, 7, np.int32),
        table(tables, 8, np.int32),
        table(tables, 9, np.int32),
        table(tables, 10, np.uint32),
        table(tables, 11, np.int64),
        table(tables, 12, np.uint32),
        table(tables, 13, np.uint8),
        table(tables, 14, np.uint8),
        table(tables, 15, np.int64),
        table(tables, 16, np.int64),
    )
    counts, all_ends = carray(counts, 2), carray(ends, length)
    counts[0], counts[1] = segment_text(carray(text, length), carray(cleaned, length), all_ends, model)
    if separated:
        target = carray(pointer(separated, np.uint32), 2 * length)  # type: ignore[call-arg]
        counts[0] = separate(carray(cleaned, length), all_ends, counts[1], target)


def compile_entry():
    """Compile segment_addresses; compiled.py keeps the machine code."""
    uint32, int32, int64 = types.CPointer(types.uint32), types.CPointer(types.int32), types.CPointer(types.int64)
    return cfunc(types.void(uint32, types.int64, uint32, int32, int64, int64, types.int64))(segment_addresses)
