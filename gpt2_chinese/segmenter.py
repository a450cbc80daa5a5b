"""THULAC's word segmentation, compiled: the words of `thulac.thulac(seg_only=True).cut(text)` (thulac 0.2.2).

The model files are those of the installed thulac package, mapped into memory and read where they lie; the package
itself is never imported. The algorithm is compiled by Numba on the first run on a machine, which takes some seconds,
and read from Numba's cache ever after. The cache is `__pycache__` beside this file, or the user's cache folder where
that one cannot be written; NUMBA_CACHE_DIR puts it elsewhere.

How THULAC cuts, as its package behaves: the text is cut at line breaks, a line of 50,000 characters and more also
after its sentence ends. Runs of spaces shrink to their first one. Spaces, punctuation and short titles in 《》
restrict the labels (begin, end, single, middle of a word) that a character may have; weights of characters and pairs
of characters score the labels; the best sequence of labels makes the words; and neighbours that together are an entry
of a dictionary are joined: the user's words, place names, idioms, punctuation marks, in this order. (The package's
pass over numbers and times compares characters with code points, so it never joins anything.)

Where the package raises IndexError, on more than 50,000 characters in a line without a sentence end, the words here
are those of the same line cut every 49,999 characters.

Example:
    >>> Segmenter().cut("我爱北京天安门")
    ['我', '爱', '北京', '天安门']
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

# Sets of allowed labels are masks of these bits, as THULAC numbers them. The labels themselves are numbered in the
# order of the model's label file: 0 begins a word, 1 ends it, 2 is a word of one character, 3 is inside a word.
BEGIN, MIDDLE, END, SINGLE = 1, 2, 4, 8
ANY_LABEL = BEGIN | MIDDLE | END | SINGLE
STARTS_WORD = BEGIN | SINGLE
ENDS_WORD = END | SINGLE
LABEL_FILE = b"0\n2\n3\n1\n"

# What the passes ask of a character, in one table: its number in the model (0: it has no weights), then flags.
NUMBER_BITS = 13
NUMBER_MASK = (1 << NUMBER_BITS) - 1
OTHER, PUNCTUATION, CLOSED, SPACE, TITLE_OPENS, TITLE_CLOSES, SENTENCE_ENDS = (1 << bit for bit in range(13, 20))
FIRST_OF_ENTRY = 1 << 20  # one bit for each dictionary: the user's words, place names, idioms, punctuation marks

# The characters that THULAC's cleaning tells from all others; a closed one is never part of a longer word.
PARTICLES = "不么也了价兮则吗否吧呀呃呐呕呗呢呦呵咧咯哇哈哉哟哩哪唻啊啦啰啵喽嘛嘞嘢噢噻嚜家来欤欸的给罗罢耶般连阿"
CLOSED_PARTICLES = "么吧呢啊"
SINGLE_MARKS = "!\"#'()*+,/:;=>?@[]~‘’“”…◤★☆、。《》【】！（），：；？"
OTHER_MARKS = "$%&-.<\\^_{|}·—￥"
SPACES = " \u3000"
SENTENCE_ENDINGS = "。？！；;!?"

CODE_POINTS = 0x110000
LINE_BREAK = 0x0A
MAX_LENGTH = 50_000
TITLE_LENGTH = 10
UNREACHABLE = -(1 << 60)

# The weights of character pairs met before, 64 bytes a slot; the slot of a pair is found by its hash.
SLOT_BITS = 16


class Model(NamedTuple):
    """All that the compiled functions read, and the memory they work in (one caller at a time)."""

    characters: np.ndarray  # uint32 [CODE_POINTS], see NUMBER_MASK and the flags
    code_points: np.ndarray  # int32, the code point of each number
    features: np.ndarray  # int32, double-array trie of the features: base and check in turn
    weights: np.ndarray  # int32 [features × 4 labels]
    character_weights: np.ndarray  # int64 [numbers × 8], what a character alone adds to the weights of a pair
    transitions: np.ndarray  # int32 [4 × 4], weight of label b after label a at 4a + b
    user_words: np.ndarray  # int32, tries of the dictionaries
    place_names: np.ndarray
    idioms: np.ndarray
    punctuation: np.ndarray
    slot_pairs: np.ndarray  # uint32 [slots], the pair whose weights the slot holds, plus 1
    slot_weights: np.ndarray  # int64 [slots × 8]
    flags: np.ndarray  # uint32 [MAX_LENGTH], of the characters of one line
    labels: np.ndarray  # uint8 [MAX_LENGTH], allowed labels, then 1 where a word starts
    choices: np.ndarray  # uint8 [MAX_LENGTH], a bit for each label: which of its two predecessors is better
    line_scores: np.ndarray  # int64 [2 × (MAX_LENGTH + 4)]
    missing: np.ndarray  # int64 [MAX_LENGTH + 3, 8], the pairs of a line that are not in the slots


def compiled(function: Callable[..., Any]) -> Any:
    """Compile with Numba on the first call, and keep the code on disk where there is any folder to keep it in."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        return njit(function)


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
    characters = 0
    words = 0
    start = 0
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
    piece = start
    sentence = start
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
    """Segment text[start:end], which has no line break; an empty piece has no words."""
    if start == end:
        return characters, words
    length = clean(text, start, end, cleaned, characters, model)
    if length < 0:
        for begin in range(start, end, MAX_LENGTH - 1):
            stop = min(begin + MAX_LENGTH - 1, end)
            characters, words = segment_piece(text, begin, stop, cleaned, characters, ends, words, model)
        return characters, words
    label(length, model)
    first = words
    flags = np.uint32(0)
    for position in range(length):
        if model.labels[position]:
            flags |= model.flags[position]
            if position:
                ends[words] = characters + position
                words += 1
    ends[words] = characters + length
    words += 1
    if flags & FIRST_OF_ENTRY:
        words = join(model.user_words, FIRST_OF_ENTRY, cleaned, characters, ends, first, words, model)
    if flags & (FIRST_OF_ENTRY << 1):
        words = join(model.place_names, FIRST_OF_ENTRY << 1, cleaned, characters, ends, first, words, model)
    if flags & (FIRST_OF_ENTRY << 2):
        words = join(model.idioms, FIRST_OF_ENTRY << 2, cleaned, characters, ends, first, words, model)
    if flags & (FIRST_OF_ENTRY << 3):
        words = join(model.punctuation, FIRST_OF_ENTRY << 3, cleaned, characters, ends, first, words, model)
    return characters + length, words


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
            if flag & CLOSED:
                if after_space or after_other:
                    allowed = SINGLE
                    if after_other and not after_space:
                        labels[length - 1] &= ENDS_WORD
                    after_punctuation = after_punctuation or flag & PUNCTUATION != 0
                else:
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
    labels[0] &= STARTS_WORD
    labels[length - 1] &= ENDS_WORD
    if labels[0] == 0:
        labels[0] = STARTS_WORD
    if labels[length - 1] == 0:
        labels[length - 1] = ENDS_WORD
    return length


@compiled
def label(length, model):
    """Find the best labels of a cleaned line, and set labels[i] to 1 where a word starts, to 0 elsewhere."""
    score_line(
        length,
        model.flags,
        np.int64(model.characters[ord("＃")] & NUMBER_MASK),
        model.slot_pairs,
        model.slot_weights,
        model.line_scores,
        model.missing,
        model.code_points,
        model.features,
        model.weights,
        model.character_weights,
    )
    if length == MAX_LENGTH:
        model.line_scores[:] = 0  # the package gives a line of exactly this length no scores
    find_best(length, model.line_scores, model.transitions, model.labels, model.choices)


@compiled
def score_line(
    length, flags, boundary, slot_pairs, slots, scores, missing, code_points, features, weights, character_weights
):
    """Sum what the weights of characters and pairs give to the four labels of each character of a line.

    The scores of character i are at scores[2 * (i + 2)] (labels 0 and 1) and the place after it (2 and 3). A number
    holds two labels, one in its low 32 bits and one above; as sums of ints they never mix.

    A pair acts on the character before it, on its two, and on the one after it. The pairs that are not in the slots
    are looked up together, step by step, so that the processor waits for many places of memory at a time.
    """
    # 1) Add the pairs that are in the slots, in a window that moves; note the others.
    one_0 = one_1 = one_2 = two_0 = two_1 = two_2 = np.int64(0)
    misses = 0
    left = boundary
    for position in range(-2, length + 1):
        right = boundary
        if 0 <= position + 1 < length:
            right = np.int64(flags[position + 1] & NUMBER_MASK)
        pair = (left << NUMBER_BITS) | right
        slot = ((pair * 0x9E3779B1) & 0xFFFFFFFF) >> (32 - SLOT_BITS)
        left = right
        if slot_pairs[slot] == pair + 1:
            slot <<= 3
            one_0 += slots[slot]
            two_0 += slots[slot + 1]
            one_1 += slots[slot + 2]
            two_1 += slots[slot + 3]
            one_2 += slots[slot + 4]
            two_2 += slots[slot + 5]
            one_3 = slots[slot + 6]
            two_3 = slots[slot + 7]
        else:
            missing[misses, 0] = position
            missing[misses, 1] = pair
            misses += 1
            one_3 = two_3 = np.int64(0)
        if position >= 1:
            scores[2 * position + 2] = one_0
            scores[2 * position + 3] = two_0
        one_0, one_1, one_2 = one_1, one_2, one_3
        two_0, two_1, two_2 = two_1, two_2, two_3
    # 2) The features of a string are the children of its child " ", under "1", "2" and so on by the place they act on.
    cells = features.shape[0] >> 1
    for miss in range(misses):
        pair = missing[miss, 1]
        left_code, right_code = np.int64(code_points[pair >> NUMBER_BITS]), np.int64(code_points[pair & NUMBER_MASK])
        missing[miss, 2] = -1
        if left_code >= 0 and right_code >= 0:
            cell = np.int64(features[2 * left_code]) + right_code
            if cell < cells and features[2 * cell + 1] == left_code:
                missing[miss, 2] = features[2 * cell] + 32
    for miss in range(misses):
        parent = missing[miss, 2]
        if parent >= 0:
            missing[miss, 3] = features[2 * parent]
    for miss in range(misses):
        parent = missing[miss, 2]
        if parent >= 0:
            for place in range(4):
                cell = missing[miss, 3] + 49 + place
                missing[miss, 4 + place] = -1
                if 0 <= cell < cells and features[2 * cell + 1] == parent:
                    missing[miss, 4 + place] = 4 * features[2 * cell]
    for miss in range(misses):
        pair = missing[miss, 1]
        slot = ((pair * 0x9E3779B1) & 0xFFFFFFFF) >> (32 - SLOT_BITS)
        slot_pairs[slot] = pair + 1
        slot <<= 3
        character = 8 * (pair >> NUMBER_BITS)
        for part in range(8):
            slots[slot + part] = character_weights[character + part]
        if missing[miss, 2] >= 0:
            for place in range(4):
                feature = missing[miss, 4 + place]
                if feature >= 0:
                    # "3" acts on the character after the pair, "1" on its second, "2" on its first, "4" before it.
                    part = slot + (4, 2, 6, 0)[place]
                    slots[part] += np.int64(weights[feature]) + (np.int64(weights[feature + 1]) << 32)
                    slots[part + 1] += np.int64(weights[feature + 2]) + (np.int64(weights[feature + 3]) << 32)
        # 3) Add them to the scores of the line.
        place = missing[miss, 0]
        for part in range(8):
            target = 2 * place + 2 + part
            if 4 <= target < 2 * length + 4:
                scores[target] += slots[slot + part]


@compiled
def find_best(length, scores, transitions, labels, choices):
    """The sequence of allowed labels with the highest score, by Viterbi's algorithm with THULAC's ties.

    A label that no allowed label can precede is unreachable. At the last character THULAC compares such labels by
    their own weights with the scores of whole sequences; if one of them wins, every character before it is a word.
    """
    from_end_to_begin, from_single_to_begin = np.int64(transitions[4]), np.int64(transitions[8])
    from_begin_to_end, from_middle_to_end = np.int64(transitions[1]), np.int64(transitions[13])
    from_end_to_single, from_single_to_single = np.int64(transitions[6]), np.int64(transitions[10])
    from_begin_to_middle, from_middle_to_middle = np.int64(transitions[3]), np.int64(transitions[15])
    begin = end = single = middle = np.int64(0)
    own_begin = own_end = own_single = own_middle = np.int64(0)
    # 1) Extend the best sequences by one character after the other.
    for position in range(length):
        one, two = scores[2 * position + 4], scores[2 * position + 5]
        own_begin = np.int64(np.int32(one))
        own_end = (one - own_begin) >> 32
        own_single = np.int64(np.int32(two))
        own_middle = (two - own_single) >> 32
        if position == 0:
            begin, end, single, middle = own_begin, own_end, own_single, own_middle
        else:
            end_to_begin, single_to_begin = end + from_end_to_begin, single + from_single_to_begin
            begin_to_end, middle_to_end = begin + from_begin_to_end, middle + from_middle_to_end
            end_to_single, single_to_single = end + from_end_to_single, single + from_single_to_single
            begin_to_middle, middle_to_middle = begin + from_begin_to_middle, middle + from_middle_to_middle
            begin = max(end_to_begin, single_to_begin) + own_begin
            end = max(begin_to_end, middle_to_end) + own_end
            single = max(end_to_single, single_to_single) + own_single
            middle = max(begin_to_middle, middle_to_middle) + own_middle
            choices[position] = (
                np.int64(single_to_begin > end_to_begin)
                | np.int64(middle_to_end > begin_to_end) << 1
                | np.int64(single_to_single > end_to_single) << 2
                | np.int64(middle_to_middle > begin_to_middle) << 3
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
            is_reached = score > UNREACHABLE >> 1
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
        labels[position] = best == 0 or best == 2
        chosen = (choices[position] >> best) & 1
        if best == 0 or best == 2:
            best = 1 + chosen
        else:
            best = 3 * chosen
    labels[0] = 1


@compiled
def join(trie, first_flag, cleaned, start, ends, first, words, model):
    """Join neighbouring words that together are an entry of a dictionary, the longest entry at every word.

    The words are those that end at ends[first:words], and the first of them starts at `start`.

    Returns:
        The new number of words.
    """
    joined = first
    word = first
    word_start = start
    while word < words:
        last = word
        if model.flags[word_start - start] & first_flag:
            state = walk(trie, 0, cleaned, word_start, ends[word])
            following = word + 1
            # State 0 is where NUL characters lead: like a dead end, it is not the start of an entry.
            while state > 0 and following < words:
                state = walk(trie, state, cleaned, ends[following - 1], ends[following])
                if state > 0:
                    value = trie[2 * state]
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
        cell = np.int64(trie[2 * state]) + np.int64(cleaned[position])
        if cell >= trie.shape[0] >> 1 or trie[2 * cell + 1] != state:
            return np.int64(-1)
        state = cell
    return np.int64(state)


class Segmenter:
    """Cuts text into words exactly as THULAC does.

    One segmenter is for one thread at a time or for threads under the interpreter's lock; a forked process may go on
    using its parent's, and a pickled one is made anew from its user words where it arrives, in some milliseconds.

    Args:
        user_words: the entries of THULAC's user dictionary; words that the model takes apart are joined to them.

    Raises:
        FileNotFoundError: thulac or a file of its model is not installed.
        ValueError: a user word is empty or has white space or U+0000 in it, or the model is not that of thulac 0.2.2.
    """

    def __init__(self, user_words: Sequence[str] = ()) -> None:
        self.user_words = tuple(user_words)
        self.model = load_model(self.user_words)

    def __reduce__(self) -> tuple[type[Segmenter], tuple[tuple[str, ...]]]:
        return type(self), (self.user_words,)

    def cut(self, text: str) -> list[str]:
        """The words of `text`, any Python string; a line break is a word of its own."""
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        cleaned, ends = self.segment(code_points)
        if len(cleaned) != len(text):
            text = cleaned.tobytes().decode("utf-32-le", "surrogatepass")
        stops = ends.tolist()
        return [text[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]

    def segment(self, code_points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The words of a text as arrays.

        Args:
            code_points: uint32, contiguous; documents joined by line breaks are cut as they are one by one.

        Returns:
            The text as THULAC cleans it (uint32; runs of spaces shrink to one), and where each word ends in it
            (int32); a word starts where the one before ends.
        """
        cleaned = np.empty(len(code_points), dtype=np.uint32)
        ends = np.empty(len(code_points), dtype=np.int32)
        characters, words = segment_text(code_points, cleaned, ends, self.model)
        return cleaned[:characters], ends[:words]


def model_folder() -> Path:
    """The folder of the installed thulac package's model files; the package is not imported."""
    spec = importlib.util.find_spec("thulac")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the thulac package is not installed: pip install thulac==0.2.2")
    return Path(spec.origin).parent / "models"


def load_model(user_words: Sequence[str]) -> Model:
    """Map the model files and make the character table."""
    folder = model_folder()
    labels = (folder / "cws_label.txt").read_bytes().replace(b"\r\n", b"\n")
    weights = map_integers(folder / "cws_model.bin")
    if labels != LABEL_FILE or weights[0] != 4 or len(weights) != 2 + 16 + 4 * int(weights[1]):
        raise ValueError(f"{folder} is not the model of thulac 0.2.2: pip install --force-reinstall thulac==0.2.2")
    features = map_integers(folder / "cws_dat.bin")
    dictionaries = (
        make_trie(user_words),
        map_integers(folder / "ns.dat"),
        map_integers(folder / "idiom.dat"),
        map_integers(folder / "singlepun.dat"),
    )
    code_points = np.concatenate(([-1], children_of_root(features))).astype(np.int32)
    assert len(code_points) <= NUMBER_MASK
    return Model(
        characters=character_table(code_points, dictionaries),
        code_points=code_points,
        features=features,
        weights=weights[18:],
        character_weights=weights_of_characters(code_points, features, weights[18:]),
        transitions=weights[2:18],
        user_words=dictionaries[0],
        place_names=dictionaries[1],
        idioms=dictionaries[2],
        punctuation=dictionaries[3],
        slot_pairs=np.zeros(1 << SLOT_BITS, dtype=np.uint32),
        slot_weights=np.zeros(8 << SLOT_BITS, dtype=np.int64),
        flags=np.zeros(MAX_LENGTH, dtype=np.uint32),
        labels=np.zeros(MAX_LENGTH, dtype=np.uint8),
        choices=np.zeros(MAX_LENGTH, dtype=np.uint8),
        line_scores=np.zeros(2 * (MAX_LENGTH + 4), dtype=np.int64),
        missing=np.zeros((MAX_LENGTH + 3, 8), dtype=np.int64),
    )


def map_integers(path: Path) -> np.ndarray:
    """A file of little-endian 32-bit integers as an array; its pages are read when they are touched."""
    return np.memmap(path, dtype="<i4", mode="r").view(np.ndarray)


def children_of_root(trie: np.ndarray) -> np.ndarray:
    """The code points that begin an entry of a trie, in ascending order; 0 is among them, for the root is its own."""
    return np.flatnonzero(trie[1 : 2 * CODE_POINTS : 2] == 0)


def weights_of_characters(code_points: np.ndarray, features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What the left character of a pair gives to the labels around; see score_line for the features."""
    sums = np.zeros((len(code_points), 4, 2), dtype=np.int64)
    cells = features.reshape(-1, 2)
    parents = cells[code_points[1:], 0].astype(np.int64) + ord(" ")
    bases = cells[parents, 0].astype(np.int64)
    for column, place in ((0, "3"), (1, "1"), (2, "2")):
        leaves = bases + ord(place)
        (found,) = np.nonzero((leaves >= 0) & (leaves < len(cells)))
        found = found[cells[leaves[found], 1] == parents[found]]
        rows = weights.reshape(-1, 4)[cells[leaves[found], 0]].astype(np.int64)
        sums[found + 1, column] = rows[:, ::2] + (rows[:, 1::2] << 32)
    return sums.reshape(-1)


def character_table(code_points: np.ndarray, dictionaries: Sequence[np.ndarray]) -> np.ndarray:
    """Number and flags of every character."""
    table = np.zeros(CODE_POINTS, dtype=np.uint32)
    table[code_points[1:]] = np.arange(1, len(code_points), dtype=np.uint32)
    # The model knows the printable ASCII characters, and U+007F, by their full-width forms.
    table[33:128] = table[33 + 0xFEE0 : 128 + 0xFEE0]
    for characters, flags in (
        (PARTICLES, OTHER),
        (CLOSED_PARTICLES, CLOSED),
        (SINGLE_MARKS, OTHER | PUNCTUATION | CLOSED),
        (OTHER_MARKS, OTHER),
        (SPACES, SPACE),
        ("《", TITLE_OPENS),
        ("》", TITLE_CLOSES),
        (SENTENCE_ENDINGS, SENTENCE_ENDS),
    ):
        table[[ord(character) for character in characters]] |= np.uint32(flags)
    for number, trie in enumerate(dictionaries):
        table[children_of_root(trie)] |= np.uint32(FIRST_OF_ENTRY << number)
    return table


def make_trie(words: Sequence[str]) -> np.ndarray:
    """A double-array trie of `words`, in the form of the model's.

    The cells are couples (base, check). The child of state s by a character is at base[s] + code point and has s for
    its check; a state that ends a word has a child by U+0000. The root is state 0, with base 0.
    """
    for word in words:
        if not word or "\0" in word or any(character.isspace() for character in word):
            raise ValueError(f"user word {word!r}: a word is not empty and has no white space and no U+0000 in it")
    children: list[dict[int, int]] = [{}]
    for word in words:
        node = 0
        for character in word:
            children.append({})
            node = children[node].setdefault(ord(character), len(children) - 1)
        children[node][0] = -1
    cells = np.full((1, 2), -1, dtype=np.int32)
    cells[0] = 0
    states = {0: 0}
    free = 1
    for node, branches in enumerate(children):
        if node not in states:
            continue
        base = 0 if node == 0 else max(free - min(branches), 1)
        while node and any(base + code < len(cells) and cells[base + code, 1] >= 0 for code in branches):
            base += 1
        needed = base + max(branches, default=0) + 1
        if needed > len(cells):
            cells = np.concatenate((cells, np.full((2 * needed - len(cells), 2), -1, dtype=np.int32)))
        cells[states[node], 0] = base
        for code, child in branches.items():
            cells[base + code] = 0, states[node]
            states[child] = base + code
        while free < len(cells) and cells[free, 1] >= 0:
            free += 1
    return cells.reshape(-1)
