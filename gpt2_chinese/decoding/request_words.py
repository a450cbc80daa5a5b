"""What the texts in a request's settings mean for the tokens of a vocabulary: bad words, and tokens that end a text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from gpt2_chinese.decoding.backend import Request
from gpt2_chinese.decoding.detokenizer import SENTENCE_END, end_of_sentence
from gpt2_chinese.text.tokenizers import HasDefinition, Tokenizer

CACHED_TABLES = 64
LINE_BREAK = "\n"
SEPARATOR = "\ud800"
"""Between the texts of tokens; half of a surrogate pair is in none of them."""


@dataclass(frozen=True)
class RequestWords:
    """
    Attributes:
        bad_words: the token sequences of the bad words, as the tokenizer spells them, also behind a space.
        bad_texts: the bad words as texts, for what is spelled otherwise.
        end_table: int8 [V], which tokens end a text whatever precedes them; None unless the samples must differ.
    """

    bad_words: tuple[tuple[int, ...], ...] = ()
    bad_texts: tuple[str, ...] = ()
    end_table: np.ndarray | None = None

    def has_bad_text(self, context: str, text: str, before: int) -> bool:
        """Whether the text after a context has a bad word that ends behind its first `before` characters."""
        for word in self.bad_texts:
            begin = before - len(word) + 1
            tail = context[begin:] + text if begin < 0 else text[begin:]
            if word in tail:
                return True
        return False


class VocabularyWords:
    """Finds the RequestWords of requests; what several requests share is found once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._texts: _TokenTexts | None = None
        self.end_table = lru_cache(CACHED_TABLES)(self._make_end_table)
        self.spellings = lru_cache(CACHED_TABLES)(self._find_spellings)

    def of_request(self, request: Request) -> RequestWords:
        params = request.sampling_params
        words, texts = self.spellings(params.bad_words) if params.bad_words else ((), ())
        table = None
        if request.distinct and request.samples > 1:
            table = self.end_table(tuple(request.stop), request.until_sentence, params.stop_token_ids)
        return RequestWords(words, texts, table)

    def _find_spellings(self, bad_words: tuple[str, ...]) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
        never = set(self._tokenizer.marks.never_produced)
        words, texts = [], []
        for word in bad_words:
            texts += [word, self._tokenizer.normalize(word)]
            words += [tuple(self._tokenizer.encode(one)) for one in (word, f" {word}")]
        words = [ids for ids in dict.fromkeys(words) if ids and not never & set(ids)]
        return tuple(words), tuple(text for text in dict.fromkeys(texts) if text)

    def _make_end_table(
        self, stop: tuple[str, ...], until_sentence: bool, stop_token_ids: tuple[int, ...]
    ) -> np.ndarray:
        table = np.zeros(self._vocab_size, dtype=np.int8)
        table[[self._tokenizer.marks.end, *stop_token_ids]] = 1
        if stop or until_sentence:
            texts = self._token_texts()
            for one in stop:
                table[texts.with_string(one)] = 1
            if until_sentence:
                table[texts.with_sentence_end] = 1
        return table

    def _token_texts(self) -> _TokenTexts:
        """About what each token adds to a text."""
        if self._texts is None:
            tokenizer = self._tokenizer
            if isinstance(tokenizer, HasDefinition):
                texts = [data.decode("utf-8", errors="ignore") for data in tokenizer.token_bytes]
            else:
                texts = [token.removeprefix("##") or token for token in tokenizer.vocabulary]
                if tokenizer.marks.line_break is not None:
                    texts[tokenizer.marks.line_break] = LINE_BREAK
            self._texts = _TokenTexts(texts)
        return self._texts


class _TokenTexts:
    """The texts of all tokens, joined, so that a string is looked for in all of them at once.

    A new stop string comes with every request of some clients, and the others wait while it is looked for.
    """

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self._joined = SEPARATOR + SEPARATOR.join(texts) + SEPARATOR
        self._starts = np.cumsum([1, *(len(text) + 1 for text in texts)])

    def _tokens_at(self, places: list[int]) -> list[int]:
        """The different tokens in whose texts these places of the joined text are."""
        return np.unique(np.searchsorted(self._starts, places, side="right") - 1).tolist() if places else []

    def with_string(self, string: str) -> list[int]:
        """The tokens that have a string."""
        if SEPARATOR in string:
            return []
        return self._tokens_at([found.start() for found in re.finditer(re.escape(string), self._joined)])

    @cached_property
    def with_sentence_end(self) -> list[int]:
        """The tokens that end a sentence, behind any other text, as which "一" stands."""
        candidates = self._tokens_at([found.start() for found in SENTENCE_END.finditer(self._joined)])
        return [id_ for id_ in candidates if end_of_sentence(f"一{self._texts[id_]}", 1) is not None]
