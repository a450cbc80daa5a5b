"""The table of docs/what-happens-to-your-text.md is what the three tokenizers do."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpt2_chinese.text.bpe_tokenizer import BpeTokenizer
from gpt2_chinese.text.char_tokenizer import CharTokenizer
from gpt2_chinese.text.segmenter import Segmenter
from gpt2_chinese.text.vocabulary import BERT_SPECIAL_TOKENS, SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, WordTokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs"


def rows(page: str) -> list[list[str]]:
    text = (DOCS / page).read_text(encoding="utf-8")
    table = text[text.index("| BPE |") :]
    found = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \|", table, re.MULTILINE)
    return [list(row) for row in found]


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def byte_level_bpe() -> BpeTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: id_ for id_, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return BpeTokenizer(tokenizer.to_str())


@pytest.mark.parametrize("page", ["what-happens-to-your-text.md", "zh/what-happens-to-your-text.md"])
def test_each_row_of_the_table_is_what_the_tokenizers_keep_and_give_back(page):
    found = rows(page)
    assert len(found) >= 12
    word = WordTokenizer([*SPECIAL_TOKENS, *BYTE_TOKENS], segmenter=Segmenter())
    kept_by_bert = {c for row in found for c in unicodedata.normalize("NFD", row[2]) if c != " "}
    char = CharTokenizer([*BERT_SPECIAL_TOKENS, *sorted(kept_by_bert), *sorted("##" + c for c in kept_by_bert)])
    for text, *expected in found:
        for tokenizer, kept in zip((word, char, byte_level_bpe()), expected, strict=True):
            # BERT takes syllables of Hangul apart; composed they are what a person sees.
            assert composed(tokenizer.normalize(text)) == composed(kept), (tokenizer.kind, text)
            ids = tokenizer.encode(text)
            assert tokenizer.marks.unknown is None or tokenizer.marks.unknown not in ids
            assert composed(tokenizer.decode(ids)) == composed(kept), (tokenizer.kind, text)


def test_both_languages_have_the_same_table():
    assert rows("what-happens-to-your-text.md") == rows("zh/what-happens-to-your-text.md")
