"""Text to ids and back: the reference's rules with compat, and nothing lost without."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_chinese.text.segmenter import Segmenter
from gpt2_chinese.text.tokenizer import (
    BYTE_TOKENS,
    TextJoiner,
    Tokenizer,
    WordSplitter,
    clean,
    dropped_characters,
    fold,
    is_spaced,
    join_tokens,
    spelling,
    split_punctuation,
)
from gpt2_chinese.text.vocabulary import SEP_ID, SPECIAL_TOKENS, UNK_ID


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter()


def spelling_vocabulary(texts: list[str], *more: str) -> list[str]:
    """A vocabulary that can spell the texts in single characters, and has these tokens besides."""
    parts = {c for text in texts for c in fold(clean(text)) if not c.isspace()}
    parts |= {"##" + c for c in parts if is_spaced(c)}
    return [*SPECIAL_TOKENS, *sorted(parts | set(more))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("体温38.5℃, OK?", ["体温", "38", "##.", "##5", "℃", ",", "ok", "##?"]),
        ("hello,  world", ["hello", "##,", "world"]),
        ("don't", ["don", "##'", "##t"]),
        ("C++/C#", ["c", "##+", "##+", "##/", "##c", "###"]),
        ("多喝 水\n休息", ["多", "喝", "水", "\n", "休息"]),
        ("Café", ["cafe"]),
        ("", []),
        (" \t\u3000", []),
        ("\n\n", ["\n", "\n"]),
        ("你\u200b好\x00吗", ["你好", "吗"]),
        ("[CLS]", ["[", "##cls", "##]"]),
    ],
)
def test_words_carry_the_spaces_that_matter(segmenter, text, words):
    assert WordSplitter(segmenter)(text) == words


@pytest.mark.parametrize(
    ("word", "tokens"),
    [
        ("##38度", ["##3", "##8", "度"]),
        ("维生素c", ["维", "生", "素", "c"]),
        ("170cm", ["1", "##7", "##0", "##c", "##m"]),
        ("###", ["###"]),
        ("#", ["#"]),
    ],
)
def test_spelling_marks_what_touches(word, tokens):
    assert spelling(word) == tokens
    assert join_tokens(tokens) == join_tokens([word])


def test_spelled_words_come_before_unknown_ones(segmenter):
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "高血压", "患", "者", "1", "##2", "##23"], segmenter=segmenter)
    assert tokenizer.tokenize("高血压患者") == ["高血压", "患", "者"]
    assert tokenizer.tokenize("123") == ["1", "##23"]
    assert tokenizer.encode("龘") == [UNK_ID], "only what cannot be spelled is unknown"
    assert tokenizer.tokenize("患龘者")[1] == "[UNK]"


def test_bytes_spell_what_the_vocabulary_has_not(segmenter):
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "好", *BYTE_TOKENS], segmenter=segmenter)
    ids = tokenizer.encode("好😀")
    assert tokenizer.tokenize("好😀") == ["好", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert tokenizer.decode(ids) == "好😀"
    assert [tokenizer.decode(ids[:n]) for n in range(len(ids))] == ["", "好", "好", "好", "好"]
    assert tokenizer.decode([*ids[:2], *tokenizer.encode("好")]) == "好\ufffd好", "a broken character is shown as one"


def test_user_text_cannot_write_control_tokens(segmenter):
    tokenizer = Tokenizer(spelling_vocabulary(["[CLS]x"]), segmenter=segmenter)
    assert not set(tokenizer.encode("[CLS]x")) & set(range(len(SPECIAL_TOKENS)))
    assert tokenizer.decode(tokenizer.encode("[CLS]x")) == "[cls]x"


def test_line_breaks_are_sep_and_come_back(segmenter):
    tokenizer = Tokenizer(spelling_vocabulary(["一二"]), segmenter=segmenter)
    assert tokenizer.encode("一\n二")[1] == SEP_ID
    assert tokenizer.decode(tokenizer.encode("一\n\n二")) == "一\n\n二"


def test_id_outside_the_vocabulary_is_named(segmenter):
    with pytest.raises(ValueError, match="id 99 is not in the vocabulary of 6 tokens"):
        Tokenizer([*SPECIAL_TOKENS, "a"], segmenter=segmenter).decode([99])


def test_vocabulary_without_special_tokens_is_refused():
    with pytest.raises(ValueError, match="first tokens"):
        Tokenizer(["a", "b"])


ALPHABET = st.one_of(
    st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
    st.sampled_from("的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工"),
    st.sampled_from("abcXYZéÉßΣσİﬁ0123456789#[]<>.,!?-_/'\"，。！？：；“”《》（）…—￥％ＡＢ１２"),
    st.sampled_from(" \t\u3000\u00a0\n\r\u2028\u200b\u0000\ufffd"),
    st.sampled_from("😀👍🏻👨‍👩‍👧♀️ℙ①Ⅳ½한국어ひらがなカタカナРусскийภาษาไทยعربية"),
    st.characters(exclude_categories=["Cs"]),
)


@settings(max_examples=300, deadline=None)
@given(text=st.text(ALPHABET, max_size=60))
def test_decode_of_encode_is_normalize(segmenter, text):
    tokenizer = Tokenizer(spelling_vocabulary([text], "的", "大学", "ab", "##bc"), segmenter=segmenter)
    ids = tokenizer.encode(text)
    assert UNK_ID not in ids
    normal = tokenizer.normalize(text)
    assert tokenizer.decode(ids) == normal
    assert tokenizer.normalize(normal) == normal, "normal text stays as it is"
    kept = [c for c in fold(clean(text).replace("\n", "")) if not c.isspace()]
    assert sorted(c for c in normal if not c.isspace()) == sorted(kept), "no character is lost or made up"


@settings(max_examples=200, deadline=None)
@given(text=st.text(ALPHABET, max_size=40))
def test_more_ids_only_append_to_the_text(segmenter, text):
    tokenizer = Tokenizer(spelling_vocabulary([text]), segmenter=segmenter)
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    for end in range(len(ids)):
        assert whole.startswith(tokenizer.decode(ids[:end]))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["好", "a", "##b", "1", "##2", "，", ",", "[SEP]", "[UNK]", *BYTE_TOKENS[0x80:0xF5:7]]))
)
def test_joining_one_by_one_equals_joining_all(tokens):
    joiner = TextJoiner()
    assert "".join(map(joiner.push, tokens)) == join_tokens(tokens)


@given(st.characters())
def test_punctuation_splits_and_is_whole(character):
    word = f"a{character}b"
    assert "".join(split_punctuation(word)) == word
    if unicodedata.category(character).startswith("P"):
        assert split_punctuation(word) == ["a", character, "b"]


def test_dropped_characters_are_counted():
    assert dropped_characters("a\x00\x00b\u200b c\n") == 3
    assert clean("a\x00\x00b\u200b c\u3000") == "ab c "


def test_reference_ids_line_by_line(reference):
    tokenizer = Tokenizer.from_file(reference / "vocab_user.txt", compat=True)
    cases = json.loads((reference / "tokenize_lines.json").read_text(encoding="utf-8"))
    assert len(cases) == 18
    for case in cases:
        assert tokenizer.tokenize(case["text"]) == case["tokens"], case["text"]
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


def test_reference_joining(reference):
    cases = json.loads((reference / "join_text.json").read_text(encoding="utf-8"))
    assert cases
    for case in cases:
        assert join_tokens(case["tokens"], compat=True).strip() == case["text"]


def test_joining_departs_from_the_reference_only_where_docs_say(reference):
    """docs/differences.md: without compat, two spaced tokens without ## have a space between them."""
    cases = json.loads((reference / "join_text.json").read_text(encoding="utf-8"))
    departures = {case["text"]: text for case in cases if (text := join_tokens(case["tokens"]).strip()) != case["text"]}
    assert departures == {"gpt-2is a model": "gpt - 2 is a model"}
