"""The text of sampled tokens: spaces, characters in byte tokens, stop strings across tokens."""

from __future__ import annotations

import pytest
from book_order import MASK_ID
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_tokenizer

from gpt2_chinese.decoding.completion import Prompt
from gpt2_chinese.decoding.detokenizer import IncrementalDetokenizer


@pytest.mark.parametrize(
    ("context", "words", "expected"),
    [
        ("hello", ["world"], " world"),
        ("hello ", ["world"], "world"),
        ("hello\n", ["world"], "world"),
        ("hello", ["##ing", "world"], "ing world"),
        ("hello", [","], " ,"),
        ("hello", ["一", "丁"], "一丁"),
        ("一", ["hello"], "hello"),
        ("一", ["[SEP]", "丁"], "\n丁"),
        ("", ["hello", "world"], "hello world"),
    ],
)
def test_tokens_are_separated_by_a_space_only_where_the_tokenizer_joins_with_one(context, words, expected):
    tokenizer = tiny_tokenizer()
    prompt = Prompt(context, (MASK_ID, *tokenizer.encode(context)), 0)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    detokenizer.push(*(tokenizer.vocabulary.index(word) for word in words))
    assert detokenizer.text == expected


BYTES = [f"<0x{byte:02X}>" for byte in "龘".encode()]


@pytest.mark.parametrize(
    ("words", "stop", "pushed", "text", "stopped"),
    [
        (["一", "丁", "七"], ["丁"], ["一", "", ""], "一", True),
        (["一", "丁", "七"], ["一"], ["", "", ""], "", True),
        (["一", "丁", "七"], ["丁万"], ["一", "", "丁七"], "一丁七", False),
        (["一", "丁", "丁", "万"], ["丁万"], ["一", "", "丁", ""], "一丁", True),
        # the stop string that is completed first ends the text; of two that end together, the longer one
        (["一丁七万"], ["丁七万", "七"], ["一丁"], "一丁", True),
        (["一丁七万"], ["七", "丁七"], ["一"], "一", True),
        (["一", "丁七", "万"], ["一丁七上", "丁七"], ["", "一", ""], "一", True),
        (["hello", "world"], ["lo wo"], ["hel", ""], "hel", True),
        (["hello", "##ing"], ["oi"], ["hell", ""], "hell", True),
        # a character in byte tokens appears when it is complete, and may be a stop string
        (["一", *BYTES, "丁"], [], ["一", "", "", "龘", "丁"], "一龘丁", False),
        (["一", *BYTES, "丁"], ["龘"], ["一", "", "", "", ""], "一", True),
        (["一", *BYTES[:2]], [], ["一", "", ""], "一", False),
        (["一", "[SEP]", "丁"], ["\n"], ["一", "", ""], "一", True),
    ],
)
def test_text_is_emitted_as_soon_as_it_is_settled_and_ends_before_the_stop_string(words, stop, pushed, text, stopped):
    tokenizer = tiny_tokenizer(words=[*dict.fromkeys(words)])
    detokenizer = IncrementalDetokenizer(tokenizer, Prompt("", (MASK_ID,), 0), stop)
    assert [detokenizer.push(tokenizer.vocabulary.index(word)) for word in words] == pushed
    assert detokenizer.flush() == text.removeprefix("".join(pushed))
    assert detokenizer.text == text
    assert detokenizer.stopped == stopped


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.data())
def test_a_stop_string_is_found_wherever_the_tokens_begin_and_end(text, stop, data):
    ends = [next((end for end in range(len(text) + 1) if text[:end].endswith(one)), len(text) + 1) for one in stop]
    end, length = min(((end, -len(one)) for end, one in zip(ends, stop, strict=True)), default=(len(text) + 1, 0))
    expected = text if end > len(text) else text[: end + length]
    words = []
    rest = text
    while rest:
        size = data.draw(st.integers(1, min(5, len(rest))))
        words.append(rest[:size] if not words else "##" + rest[:size])
        rest = rest[size:]
    tokenizer = tiny_tokenizer(words=[*dict.fromkeys(words)] or ["一"])
    detokenizer = IncrementalDetokenizer(tokenizer, Prompt("", (MASK_ID,), 0), stop)
    emitted = ""
    for word in words:
        emitted += detokenizer.push(tokenizer.vocabulary.index(word))
        assert expected.startswith(emitted), "a part of the stop string was emitted"
    assert emitted + detokenizer.flush() == detokenizer.text == expected
    assert detokenizer.stopped == (end <= len(text))
