"""The end of a text has the ids that it has in the whole, for every tokenizer; and caches stay small."""

from __future__ import annotations

import os
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_chinese.text.bpe_tokenizer import BpeTokenizer
from gpt2_chinese.text.char_tokenizer import CharTokenizer
from gpt2_chinese.text.segmenter import Segmenter
from gpt2_chinese.text.tail import encode_tail, find_cut
from gpt2_chinese.text.vocabulary import BERT_SPECIAL_TOKENS, SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, WordTokenizer

EXAMPLES = int(os.environ.get("GPT2_CHINESE_EXAMPLES", "300"))
PARTS = [
    *"0123abcx你好的了吧我孩子发烧医院很高兴天安门，。。！；？：、《》（“”…%#- \n\t\u3000é\u0301ガ\x00",
    *("孩子发烧", "。医院", "##b"),
]
WORDS = [
    "孩子",
    "发烧",
    "医院",
    "abc",
    "##bc",
    "##12",
    "天安门",
    "##b",
    "##",
    "###",
    *"#你好的了吧我很高兴，。！；？：",
    "##a",
    "##1",
]


@pytest.fixture(scope="module")
def tokenizers_by_name():
    segmenter = Segmenter()
    import test_bpe_tokenizer

    words = [*SPECIAL_TOKENS, *BYTE_TOKENS, *WORDS]
    characters = [
        *BERT_SPECIAL_TOKENS,
        *"你好的了吧我孩子发烧医院很高兴天安门，。！；？：、abcx0123#",
        "##b",
        "##1",
        "##bc",
    ]
    return {
        "words": WordTokenizer(words, segmenter=segmenter),
        "words, old rules": WordTokenizer(words, segmenter=segmenter, rules=1),
        "words, compat": WordTokenizer(words, compat=True),
        "characters": CharTokenizer(characters, begin="[CLS]", end="[SEP]", line_break=None),
        "characters, compat": CharTokenizer(characters, compat=True),
        "bpe": BpeTokenizer(test_bpe_tokenizer.definition("<|endoftext|>")),
    }


def pieces_of(source: random.Random, count: int) -> str:
    return "".join(source.choices(PARTS, k=count))


@settings(max_examples=EXAMPLES)
@given(st.integers(0, 2**32), st.integers(4, 400), st.sampled_from(["", "\n《", "的了吧呢啊", "。！"]))
def test_a_text_cut_where_it_may_be_cut_has_the_ids_of_the_whole(tokenizers_by_name, seed, count, more):
    source = random.Random(seed)
    parts = PARTS if source.random() < 0.5 else ["孩", "子", "好", "我", "高", "。", "！", "，"]
    text = "".join(source.choices([*parts, *more], k=count))
    for name, tokenizer in tokenizers_by_name.items():
        whole = tokenizer.encode(text)
        tail, left_out = encode_tail(tokenizer, text, 1 + source.randrange(20))
        assert whole[len(whole) - len(tail) :] == tail, (name, text)
        assert tail == whole or left_out > 0, name


def test_a_long_text_of_sentences_is_cut_near_its_end(tokenizers_by_name):
    text = "孩子发烧，要去医院吗。孩子很好！我很高兴" * 2000
    for name, tokenizer in tokenizers_by_name.items():
        ids, left_out = encode_tail(tokenizer, text, 100)
        if name == "words, compat":  # where the reference cuts a line, only the whole line says
            assert left_out == 0 and find_cut(tokenizer, text, 30_000) is None
            text = text.replace("吗。", "吗。\n")
            ids, left_out = encode_tail(tokenizer, text, 100)
        assert len(ids) >= 100 and len(text) - left_out < 4000, name


@pytest.mark.parametrize("kind", ["words", "words, compat", "characters"])
def test_words_that_nobody_will_send_again_are_not_kept(tokenizers_by_name, kind):
    """As 1,200 requests of 65,000 digits; the caches of words held all of them."""
    source = random.Random(1)
    tokenizer = tokenizers_by_name[kind]
    for length in (16, 60_000):
        for _ in range(4 if length > 100 else 40_000):
            tokenizer.encode("".join(source.choices("0123456789", k=length)))
    kept = [tokenizer._word_ids]
    if kind == "words":
        kept.append(tokenizer._splitter._folded)
    for cache in kept:
        assert sum(map(_size, cache.items())) < 45 << 20
        assert len(cache) <= 1 << 15


def _size(value: object) -> int:
    inside = sum(map(_size, value)) if isinstance(value, (tuple, list)) else 0
    return sys.getsizeof(value) + inside


def test_a_long_word_is_spelled_as_before_and_faster(tokenizers_by_name):
    """Every part of it was looked up at the length of the vocabulary's longest token."""
    tokenizer = WordTokenizer([*SPECIAL_TOKENS, *BYTE_TOKENS, *WORDS, "一个特别长的词" * 9], segmenter=Segmenter())
    longest = max(map(len, tokenizer.vocabulary))
    text = "".join(random.Random(2).choices(["a", "b", "c", "#", "1", "2", "##b"], k=3000))
    found = [tokenizer.word_ids(word) for word in tokenizer.words(text)]
    tokenizer._word_ids.clear()
    tokenizer._longest_from = dict.fromkeys(map("##{}".format, "abc#12"), longest) | dict.fromkeys("abc#12", longest)
    assert [tokenizer.word_ids(word) for word in tokenizer.words(text)] == found
