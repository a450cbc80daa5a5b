"""A trigram of the training text's tokens, with a cache, whose predictions a model learns beside the text.

A small text shows most contexts once. A model that learns from it alone memorises the one token that followed; mixed
into the target, the distribution of an n-gram with interpolated Kneser-Ney smoothing (ngram.py has the formulas, for
characters) is a label smoothing that depends on the context. Neural models were regularized so by noise in their input
(Xie et al. 2017, Data noising as smoothing in neural network language models); here the smoothed target is exact.

A document repeats its words, which a model of a small text is slow to learn. So a part of each distribution is a cache
(Kuhn and De Mori 1990, A cache-based natural language model for speech recognition) of the tokens that stand before in
the document, as far as the window shows them: with n of them and the last one m times among the earlier ones,

    cache(w) = (how often w followed the last one there + (how often w stands there) / n) / (m + 1),

with the weight n / (n + 10) times its share; the trigram has the rest. The marks of documents are not in the cache.

To the trigram documents are sequences of tokens, marks included. The first token of a document is context only, and no
n-gram goes from one document into the next; what stands behind a document's end is left to the text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gpt2_chinese.text.vocabulary import Marks
from gpt2_chinese.training.fused import DTYPES, write_ngrams
from gpt2_chinese.training.ngram import discounts

MAX_TOKENS = 8_000_000
"""Of the training text that are counted, some 100 bytes each; of more, documents at equal distances."""
CACHE_ROWS = 512  # whose caches are written out at a time on a GPU
CACHE_TRUST = 10
"""Tokens before which make a cache half as weighty as it can be: n of them have n / (n + 10) of its share."""


class _Level(NamedTuple):
    """The n-grams of one order by context.

    Attributes:
        offsets: where each context's n-grams begin in the two below, int64 [contexts + 1].
        tokens: the last token of each n-gram, int64.
        shares: (a - D(a)) / T of it, float32.
        backoff: the weight of the shorter context, g(h), float32 [contexts].
    """

    offsets: torch.Tensor
    tokens: torch.Tensor
    shares: torch.Tensor
    backoff: torch.Tensor

    @classmethod
    def of_counts(
        cls, contexts: npt.NDArray[np.int64], number: int, tokens: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> _Level:
        """Take the context of each n-gram as a number below `number`, ascending, its last token, and its count."""
        discount = np.array([0.0, *discounts(counts)])[np.minimum(counts, 3)]
        totals = np.bincount(contexts, counts, number)
        backoff = np.bincount(contexts, discount, number) / np.maximum(totals, 1)
        backoff[totals == 0] = 1.0
        offsets = np.concatenate([[0], np.cumsum(np.bincount(contexts, minlength=number))])
        shares = (counts - discount) / totals[contexts]
        return cls(
            torch.from_numpy(offsets),
            torch.from_numpy(tokens),
            torch.from_numpy(shares.astype(np.float32)),
            torch.from_numpy(backoff.astype(np.float32)),
        )

    def to(self, device: torch.device) -> _Level:
        return _Level(*(tensor.to(device) for tensor in self))


class NgramTeacher:
    """A trigram of tokens, on a device.

    Args:
        tokens: of the training text, ids below `vocab_size`.
        document_starts: where documents begin there, the first at 0, in ascending order.
        marks: that begin and end documents.

    Attributes:
        counted_tokens: how many were counted.
        unigram: float32 [V].
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        document_starts: npt.NDArray[np.int64],
        *,
        vocab_size: int,
        marks: Marks,
        device: torch.device | None = None,
    ) -> None:
        self._vocab_size, self._marks = vocab_size, marks
        ids, to_end = _sample(tokens, document_starts)
        self.counted_tokens = len(ids)
        pairs = ids[:-1] * vocab_size + ids[1:]
        trigrams, trigram_counts = np.unique(
            (pairs[:-1] * vocab_size + ids[2:])[to_end[:-2] >= 3] if len(ids) > 2 else pairs[:0], return_counts=True
        )
        # What stands before a bigram counts as often as it differs; a document's beginning each time.
        at_begin = np.concatenate([[True], to_end[:-1] == 1])[:-1] & (to_end[:-1] >= 2)
        before = np.concatenate([trigrams % vocab_size**2, pairs[at_begin]])
        bigrams, bigram_counts = np.unique(before, return_counts=True)
        singles = np.bincount(bigrams % vocab_size, minlength=vocab_size)
        discount = np.array([0.0, *discounts(singles[singles > 0])])[np.minimum(singles, 3)]
        total = max(1, int(singles.sum()))
        unigram = (singles - discount + discount.sum() / vocab_size) / total if len(bigrams) else 1.0 / vocab_size
        keys, contexts = np.unique(trigrams // vocab_size, return_inverse=True)
        device = device or torch.device("cpu")
        self.unigram = torch.from_numpy(np.broadcast_to(unigram, vocab_size).astype(np.float32)).to(device)
        self._bigrams = _Level.of_counts(bigrams // vocab_size, vocab_size, bigrams % vocab_size, bigram_counts).to(
            device
        )
        self._keys = torch.from_numpy(keys).to(device)
        self._trigrams = _Level.of_counts(contexts, len(keys), trigrams % vocab_size, trigram_counts).to(device)

    @property
    def levels(self) -> tuple[torch.Tensor, ...]:
        """Of bigrams, then of trigrams: where each context's n-grams begin, their last tokens and their shares."""
        return (*self._bigrams[:3], *self._trigrams[:3])

    @torch.compiler.disable
    def predictions(self, input_ids: torch.Tensor, cache_share: float = 0.0) -> Predictions:
        """What follows each token but the last of int64 windows [windows, n_ctx], one row after the other.

        Args:
            cache_share: of the cache in a distribution, at most, from 0 to 1.
        """
        here, target = input_ids[:, :-1], input_ids[:, 1:].flatten()
        key = torch.full_like(here, -1)
        key[:, 1:] = here[:, :-1] * self._vocab_size + here[:, 1:]
        bigram, key = here.flatten(), key.flatten()
        trigram, of_bigrams = torch.full_like(bigram, -1), torch.ones(len(bigram), device=bigram.device)
        if len(self._keys):
            place = torch.searchsorted(self._keys, key).clamp_(max=len(self._keys) - 1)
            is_known = self._keys[place] == key
            trigram = torch.where(is_known, place, -1)
            of_bigrams = torch.where(is_known, self._trigrams.backoff[place], 1.0)
        # Behind the end of a document comes another, of which counting says nothing.
        is_end = (bigram == self._marks.end) & (target == self._marks.begin)
        certain = torch.where(is_end, target, -1)
        seen = _tokens_before(here, self._marks).flatten()
        of_cache = torch.where(is_end, 0.0, cache_share * seen / (seen + CACHE_TRUST))
        of_bigrams = of_bigrams * (1 - of_cache)
        of_unigram = torch.where(is_end, 0.0, of_bigrams * self._bigrams.backoff[bigram])
        return Predictions(self, bigram, trigram, certain, seen, of_unigram, of_bigrams, of_cache)


class Predictions(NamedTuple):
    """Distributions over the vocabulary, N rows that are not written out.

    Attributes:
        bigram: the context of bigrams, which is the token before; int64 [N], as the next two.
        trigram: the context of trigrams, -1 where the text does not have it.
        certain: the one token that can follow, or -1.
        seen: how many tokens of the document the cache has: that of this row and those of the `seen - 1` rows before;
            int64 [N].
        of_unigram: the weight of the unigram, float32 [N].
        of_bigrams: the weight of bigrams and unigram together, float32 [N].
        of_cache: the weight of the cache, float32 [N]; the trigram has the rest.
    """

    teacher: NgramTeacher
    bigram: torch.Tensor
    trigram: torch.Tensor
    certain: torch.Tensor
    seen: torch.Tensor
    of_unigram: torch.Tensor
    of_bigrams: torch.Tensor
    of_cache: torch.Tensor

    @torch.compiler.disable
    def dense(self, part: slice, weight: float, dtype: torch.dtype) -> torch.Tensor:
        """Some of the rows, one after the other, times a weight, [rows, V]."""
        rows = [tensor[part].contiguous() for tensor in self[1:]]
        first = part.indices(len(self.bigram))[0]
        if self.of_unigram.device.type == "cpu" and dtype in DTYPES:
            dense = torch.empty(len(rows[0]), len(self.teacher.unigram), dtype=dtype)
            write_ngrams(dense, weight, self.teacher.unigram, rows, self.teacher.levels, self.bigram, first)
            return dense
        dense = _dense_by_torch(self.teacher, *rows[:3], *rows[4:])
        _add_cache_by_torch(dense, self.bigram, first, rows[3], rows[6])
        return dense.mul_(weight).to(dtype)


def _dense_by_torch(
    teacher: NgramTeacher,
    bigram: torch.Tensor,
    trigram: torch.Tensor,
    certain: torch.Tensor,
    of_unigram: torch.Tensor,
    of_bigrams: torch.Tensor,
    of_cache: torch.Tensor,
) -> torch.Tensor:
    """The trigram's part in PyTorch's operations, for a GPU; float32 [rows, V]."""
    dense = torch.outer(of_unigram, teacher.unigram)
    is_open = certain < 0
    ended = (~is_open).nonzero()[:, 0]
    dense[ended, certain[ended]] += 1.0
    bigrams, trigrams = teacher.levels[:3], teacher.levels[3:]
    for (begins, followers, of_followers), context, factor in (
        (bigrams, bigram, of_bigrams),
        (trigrams, trigram, 1 - of_cache),
    ):
        row = (is_open & (context >= 0)).nonzero()[:, 0]
        first = begins[context[row]]
        counts = begins[context[row] + 1] - first
        entries = torch.arange(int(counts.sum()), device=row.device)
        entries += torch.repeat_interleave(first - (counts.cumsum(0) - counts), counts)
        row = torch.repeat_interleave(row, counts)
        places = row * dense.shape[1] + followers[entries]
        dense.view(-1).index_add_(0, places, of_followers[entries] * factor[row])
    return dense


def _tokens_before(here: torch.Tensor, marks: Marks) -> torch.Tensor:
    """How many tokens of the same document a window shows up to each of its tokens [windows, n], itself included."""
    is_mark = (here == marks.begin) | (here == marks.end)
    places = torch.arange(here.shape[1], device=here.device)
    last_mark = torch.where(is_mark, places, -1).cummax(1).values
    return places - last_mark


def _add_cache_by_torch(
    dense: torch.Tensor, tokens: torch.Tensor, first: int, seen: torch.Tensor, of_cache: torch.Tensor
) -> None:
    """Add the cache's part to rows of distributions, of which `first` is the first one; for a GPU.

    What is added up are whole numbers, exact in float32, so that a GPU, which adds in any order, gives the same bits.

    Args:
        tokens: of all rows, one after the other.
    """
    for begin in range(0, len(seen), CACHE_ROWS):
        part = slice(begin, begin + CACHE_ROWS)
        counts = torch.zeros_like(dense[part])
        number, own_first = seen[part], first + begin
        row = torch.repeat_interleave(torch.arange(len(number), device=seen.device), number)
        back = torch.arange(len(row), device=row.device) - torch.repeat_interleave(number.cumsum(0) - number, number)
        place = own_first + row - back
        followed = (tokens[place - 1] == tokens[own_first + row]) & (back < number[row] - 1)
        times = torch.zeros_like(of_cache[part]).index_add_(0, row, followed.float())
        of_token = (followed * number[row] + 1).float()  # times n (m + 1)
        counts.view(-1).index_add_(0, row * dense.shape[1] + tokens[place], of_token)
        dense[part] += counts * (of_cache[part] / (number.clamp(min=1) * (times + 1)))[:, None]


def _sample(
    tokens: npt.NDArray[Any], document_starts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The tokens that are counted, and for each how many there are to the end of its document, itself included."""
    bounds = np.append(document_starts, len(tokens))
    lengths = np.diff(bounds)
    if len(tokens) <= MAX_TOKENS:
        ids = np.asarray(tokens).astype(np.int64)
    else:
        chosen = np.arange(0, len(lengths), -(-len(tokens) // MAX_TOKENS))
        before = np.cumsum(lengths[chosen]) - lengths[chosen]
        parts = [
            np.asarray(tokens[bounds[one] : bounds[one + 1]][: MAX_TOKENS - counted])
            for one, counted in zip(chosen.tolist(), before.tolist(), strict=True)
            if counted < MAX_TOKENS
        ]
        ids, lengths = np.concatenate(parts).astype(np.int64), np.array([len(part) for part in parts])
    ends = np.cumsum(lengths)
    return ids, np.repeat(ends, lengths) - np.arange(len(ids))
