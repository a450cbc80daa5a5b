"""THULAC's word segmentation, compiled: the words of `thulac.thulac(seg_only=True).cut(text)` (thulac 0.2.2).

The model files are those of the installed thulac package, mapped into memory and read where they lie; the package
itself is never imported. What is compiled is in segmenter_kernel.py. The first run on a machine compiles it; the
machine code is kept in `__pycache__` beside this file, or in the user's cache folder where that one cannot be
written, or in NUMBA_CACHE_DIR where that is set.

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
from codecs import utf_32_le_decode, utf_32_le_encode
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_chinese.compiled import load_function

LABEL_FILE = b"0\n2\n3\n1\n"  # the order of the labels that the compiled code counts on: begin, end, single, middle

# What the compiled code asks of a character, in one table: its number in the model (0: it has no weights), then flags.
NUMBER_BITS = 13
NUMBER_MASK = (1 << NUMBER_BITS) - 1
OTHER, PUNCTUATION, CLOSED, SPACE, TITLE_OPENS, TITLE_CLOSES, SENTENCE_ENDS = (1 << bit for bit in range(13, 20))
FIRST_OF_ENTRY = 1 << 20  # and the three bits above: the user's words, place names, idioms, punctuation marks
FOLDED = 1 << 24  # the model knows the character by the number of its full-width form

# The characters that THULAC's cleaning tells from all others. A closed one beside others of them is a word by itself.
PARTICLES = "不么也了价兮则吗否吧呀呃呐呕呗呢呦呵咧咯哇哈哉哟哩哪唻啊啦啰啵喽嘛嘞嘢噢噻嚜家来欤欸的给罗罢耶般连阿"
CLOSED_PARTICLES = "么吧呢啊"
SINGLE_MARKS = "!\"#'()*+,/:;=>?@[]~‘’“”…◤★☆、。《》【】！（），：；？"
OTHER_MARKS = "$%&-.<\\^_{|}·—￥"
SPACES = " \u3000"
SENTENCE_ENDINGS = "。？！；;!?"

CODE_POINTS = 0x110000
LINE_BREAK = 0x0A
MAX_LENGTH = 50_000  # of the lines that the package takes whole
SLOT_BITS = 19  # 64 bytes a slot, and 4 for its tag
CUT_BUFFER_LENGTH = 4096  # characters of a text whose words `cut` separates in memory that is kept


class Model(NamedTuple):
    """All that the compiled code reads, and the memory it works in (for one caller at a time)."""

    characters: np.ndarray  # uint32 [CODE_POINTS], see NUMBER_MASK and the flags
    code_points: np.ndarray  # int32 [numbers], the code point of each number; -1 for number 0
    character_weights: np.ndarray  # int64 [numbers × 8], what the first character of a pair adds to its slot
    features: np.ndarray  # int32, the features' trie: its cells are couples (base, check)
    weights: np.ndarray  # int32 [features × 4], by label
    transitions: np.ndarray  # int32 [4 × 4], weight of label b after label a at 4a + b
    user_words: np.ndarray  # int32, the dictionaries' tries
    place_names: np.ndarray
    idioms: np.ndarray
    punctuation: np.ndarray
    slot_tags: np.ndarray  # uint32 [slots], which pair of characters is in a slot, and its dictionaries
    slot_weights: np.ndarray  # int64 [slots × 8], the weights of pairs that were met before
    flags: np.ndarray  # uint32 [MAX_LENGTH], from here on: of the characters of one line
    labels: np.ndarray  # uint8 [MAX_LENGTH], allowed labels, then 1 where a word starts
    choices: np.ndarray  # uint8 [MAX_LENGTH], a bit for each label: which of its two predecessors is better
    scores: np.ndarray  # int64 [MAX_LENGTH × 2], two labels in a number
    missing: np.ndarray  # int64 [(MAX_LENGTH + 3) × 8], the pairs of a line that are not in the slots


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
        self._tables = np.array([(table.ctypes.data, table.size) for table in self.model], dtype=np.int64)
        self._tables_address = self._tables.ctypes.data
        self._segment_addresses = segment_addresses()
        self._buffers: list[_CutBuffer] = []  # not in use; a thread takes one and puts it back

    def __reduce__(self) -> tuple[type[Segmenter], tuple[tuple[str, ...]]]:
        return type(self), (self.user_words,)

    def cut(self, text: str) -> list[str]:
        """The words of `text`, any Python string; a line break is a word of its own."""
        if len(text) > CUT_BUFFER_LENGTH or "\0" in text:
            return self._cut_at_ends(text)
        # The words are split off by one call: to slice them one by one would take longer than to find them.
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = _CutBuffer()
        self._segment_addresses(
            utf_32_le_encode(text, "surrogatepass")[0],  # without the way through Python's registry of encodings
            len(text),
            buffer.cleaned,
            buffer.ends,
            buffer.counts,
            self._tables_address,
            buffer.separated,
        )
        count = buffer.memory[0]
        words = utf_32_le_decode(buffer.view[: 4 * count], "surrogatepass")[0].split("\0") if count else []
        self._buffers.append(buffer)
        return words

    def _cut_at_ends(self, text: str) -> list[str]:
        cleaned, ends = self._segment(text.encode("utf-32-le", "surrogatepass"), len(text))
        if len(cleaned) != len(text):
            text = cleaned.tobytes().decode("utf-32-le", "surrogatepass")
        return [text[start:end] for start, end in pairwise([0, *ends.tolist()])]

    def segment(self, code_points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The words of a text as arrays.

        Args:
            code_points: uint32, contiguous; documents joined by line breaks are cut as they are one by one.

        Returns:
            The text as THULAC cleans it (uint32; runs of spaces shrink to one), and where each word ends in it
            (int32); a word starts where the one before ends.
        """
        assert code_points.dtype == np.uint32 and code_points.flags.c_contiguous
        return self._segment(code_points.ctypes.data, len(code_points))

    def _segment(self, text: bytes | int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `segment`; the text is UTF-32 or its address."""
        # One piece of memory for three results: two counts of 64 bits, the cleaned text, the ends.
        results = np.empty(4 + 2 * length, dtype=np.uint32)
        counts = results.ctypes.data
        cleaned = counts + 16
        ends = cleaned + 4 * length
        self._segment_addresses(text, length, cleaned, ends, counts, self._tables_address, 0)
        characters, words = results[:4].view(np.int64).tolist()
        return results[4 : 4 + characters], results[4 + length : 4 + length + words].view(np.int32)


class _CutBuffer:
    """Memory for one call of the compiled code with a text of at most CUT_BUFFER_LENGTH characters."""

    def __init__(self) -> None:
        results = np.empty(4 + 4 * CUT_BUFFER_LENGTH, dtype=np.uint32)
        self.counts = results.ctypes.data
        self.cleaned = self.counts + 16
        self.ends = self.cleaned + 4 * CUT_BUFFER_LENGTH
        self.separated = self.ends + 4 * CUT_BUFFER_LENGTH
        self.memory = results.data
        self.view = self.memory.cast("B")[16 + 8 * CUT_BUFFER_LENGTH :]


@lru_cache(maxsize=1)
def segment_addresses() -> Callable[..., None]:
    """The compiled code; see segmenter_kernel.segment_addresses for its arguments."""
    kernel = Path(__file__).with_name("segmenter_kernel.py")
    return load_function("gpt2_chinese.text.segmenter_kernel", [Path(__file__), kernel], arguments=7)


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
        character_weights=weights_of_characters(code_points, features, weights[18:]),
        features=features,
        weights=weights[18:],
        transitions=weights[2:18],
        user_words=dictionaries[0],
        place_names=dictionaries[1],
        idioms=dictionaries[2],
        punctuation=dictionaries[3],
        slot_tags=np.zeros(1 << SLOT_BITS, dtype=np.uint32),
        slot_weights=zeros_in_cache_lines(8 << SLOT_BITS),
        flags=np.zeros(MAX_LENGTH, dtype=np.uint32),
        labels=np.zeros(MAX_LENGTH, dtype=np.uint8),
        choices=np.zeros(MAX_LENGTH, dtype=np.uint8),
        scores=np.zeros(2 * MAX_LENGTH, dtype=np.int64),
        missing=np.zeros(8 * (MAX_LENGTH + 3), dtype=np.int64),
    )


def zeros_in_cache_lines(size: int) -> np.ndarray:
    """Int64 [size], so that each eight of them are in one cache line of 64 bytes."""
    zeros = np.zeros(size + 7, dtype=np.int64)
    first = -(zeros.ctypes.data // 8) % 8
    return zeros[first : first + size]


def map_integers(path: Path) -> np.ndarray:
    """A file of little-endian 32-bit integers as an array; its pages are read when they are touched.

    Nothing writes to it, but an array that says it is read-only would be another type to compiled code.
    """
    return np.memmap(path, dtype="<i4", mode="c").view(np.ndarray)


def children_of_root(trie: np.ndarray) -> np.ndarray:
    """The code points that begin an entry of a trie, in ascending order; 0 is among them, for the root is its own."""
    return np.flatnonzero(trie[1 : 2 * CODE_POINTS : 2] == 0)


def weights_of_characters(code_points: np.ndarray, features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What the left character of a pair gives to the labels around; see the kernel's score_missing for the features."""
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
    table[33:128] = table[33 + 0xFEE0 : 128 + 0xFEE0] | FOLDED
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
    cells: np.ndarray = np.full((1, 2), -1, dtype=np.int32)
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
