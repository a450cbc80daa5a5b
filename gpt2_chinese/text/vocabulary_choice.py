"""Which tokens a vocabulary gets, what they cover, and which size is worth its place in the model."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, IDEOGRAPHS, PART_PREFIX, fold, is_spaced, spelling

REPORT_SIZES = (1000, 2000, 5000, 10000, 20000, 50000)
MIN_COUNT = 5  # a token that is seen less often is hardly learnt
MAX_WORD = 100  # characters; longer "words" (links, encoded data) are spelled, as the reference gives them up
LETTERS = string.digits + string.ascii_letters + string.punctuation


def size_for_a_small_model(corpus_bytes: int, smallest: int = 2_000) -> int:
    """How many tokens suit a model that is trained on so much text for minutes or hours: 4 times the square root of its
    characters, of three bytes each, from `smallest` to 30,000.

    A larger vocabulary has tokens that are seen too seldom to be learnt, and a larger head, which costs time.
    """
    return min(30_000, max(smallest, int(round(4 * math.sqrt(corpus_bytes / 3), -2))))


@dataclass(frozen=True)
class Candidates:
    """What a vocabulary may have, of words or of characters.

    Attributes:
        counts: of each word.
        words: ranked.
        parts: ranked, what spells a word that is left out; each has one character, some behind `##`.
        bytes: whether characters that have no place are spelled in bytes, where the vocabulary has room for these.
    """

    counts: Mapping[str, int]
    words: Sequence[str]
    parts: Sequence[str]
    bytes: bool


@dataclass
class Choice:
    """The tokens behind the special ones: ranked words, then what spells the others.

    Attributes:
        spells_all: whether every character of the corpus has its place or its bytes.
    """

    words: list[str]
    parts: list[str] = field(default_factory=list)
    spells_all: bool = True


def word_part_counts(counts: Mapping[str, int], fold: Callable[[str], str] = fold) -> dict[str, int]:
    """Count the one-character tokens that spell words, in the order of first appearance.

    A character that may touch its neighbour is there with and without `##`, even if the corpus has only one of them,
    and so are all of ASCII: a number or a Latin word of a user need not have stood in the corpus.
    """
    parts: dict[str, int] = {}
    for word, count in counts.items():
        for part in word if IDEOGRAPHS.fullmatch(word) else spelling(word):
            parts[part] = parts.get(part, 0) + count
    spaced = dict.fromkeys(part[-1] for part in parts if is_spaced(part[-1]))
    for character in [*spaced, *sorted(set(map(fold, LETTERS)))]:
        parts.setdefault(character, 0)
        parts.setdefault(PART_PREFIX + character, 0)
    return parts


def character_part_counts(counts: Mapping[str, int], fold: Callable[[str], str] = fold) -> dict[str, int]:
    """The same for WordPiece, where the first character of a run stands as it is and the others behind `##`."""
    parts: dict[str, int] = {}
    for word, count in counts.items():
        for part in (word[0], *(PART_PREFIX + character for character in word[1:])):
            parts[part] = parts.get(part, 0) + count
    for character in sorted(set(map(fold, LETTERS))):
        parts.setdefault(character, 0)
        if character.isalnum():
            parts.setdefault(PART_PREFIX + character, 0)
    return parts


def choose_tokens(candidates: Candidates, vocab_size: int) -> Choice:
    """Share `vocab_size` places between words and the parts that spell the words left out.

    Every part has its place if all of them fit into half of the vocabulary, otherwise the most frequent ones; a part
    that is among the words anyway takes none. The words get the rest, in their order.
    """
    more = BYTE_TOKENS if candidates.bytes and vocab_size > len(BYTE_TOKENS) else ()
    parts = [*candidates.parts[: max(0, vocab_size // 2 - len(more))], *more]
    not_words = set(parts)
    kept = 0
    while kept < len(candidates.words):
        missing = len(not_words) - (candidates.words[kept] in not_words)
        if kept + 1 + missing > vocab_size:
            break
        not_words.discard(candidates.words[kept])
        kept += 1
    spells_all = bool(more) or len(parts) == len(candidates.parts)
    return Choice(list(candidates.words[:kept]), [part for part in parts if part in not_words], spells_all)


def parameters(config: Mapping[str, int], vocab_size: int) -> tuple[int, int]:
    """The parameters of the token embedding and of the whole GPT-2 (the output layer is the embedding)."""
    width, layers = config["n_embd"], config["n_layer"]
    embedding = vocab_size * width
    block = 12 * width * width + 13 * width  # attention, the 4-fold wide layer, biases and two layer norms
    return embedding, embedding + config["n_positions"] * width + layers * block + 2 * width


def coverage_rows(candidates: Candidates, config: Mapping[str, int]) -> list[dict[str, float]]:
    """What vocabularies of several sizes would cover, as rows of the report."""
    seen = sum(candidates.counts.values())
    rows = []
    for size in REPORT_SIZES:
        chosen = choose_tokens(candidates, size)
        covered = sum(candidates.counts[word] for word in chosen.words)
        lines = len(SPECIAL_TOKENS) + len(chosen.words) + len(chosen.parts)
        embedding, total = parameters(config, lines)
        rows.append(
            {
                "vocab_size": size,
                "words": len(chosen.words),
                "coverage": covered / seen,
                "spelled": 1 - covered / seen,
                "spells_all": chosen.spells_all,
                "rarest_word_count": candidates.counts[chosen.words[-1]] if chosen.words else 0,
                "embedding_share": embedding / total,
            }
        )
    return rows


def bpe_rows(
    counts: Sequence[int], tokens_per_character: Callable[[int], float], config: Mapping[str, int]
) -> list[dict[str, float]]:
    """The same for BPE, whose smaller vocabularies are the beginnings of the larger ones; larger ones are not known.

    Args:
        counts: how often each token stands in a sample of the corpus.
        tokens_per_character: of that sample, with a vocabulary of so many tokens.
    """
    rows = []
    for lines in [*(size for size in REPORT_SIZES if size < len(counts)), len(counts)]:
        embedding, total = parameters(config, lines)
        rows.append(
            {
                "vocab_size": lines,
                "words": lines,
                "tokens_per_character": tokens_per_character(lines),
                "spells_all": True,
                "rarest_word_count": min(counts[lines - 10 : lines], default=0),
                "embedding_share": embedding / total,
            }
        )
    return rows


def recommend(rows: Sequence[Mapping[str, float]]) -> int:
    """The size with the most words whose rarest is seen often enough to be learnt, but one that spells every character.

    Of sizes that get the same words the smallest.
    """
    spelling_all = [row for row in rows if row["spells_all"]] or rows[-1:]
    learnt = [row for row in spelling_all if row["rarest_word_count"] >= MIN_COUNT] or spelling_all[:1]
    return int(max(learnt, key=lambda row: (row["words"], -row["vocab_size"]))["vocab_size"])
