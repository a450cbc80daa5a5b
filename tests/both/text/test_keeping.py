"""White space and case that are kept on request, for words and characters, in every path that makes IDs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_chinese.text.preparation import (
    Tokenizing,
    count_batch,
    count_batch_of_characters,
    fold_character_counts,
    fold_counts,
    shared_segmenter,
    tokenize_batch,
)
from gpt2_chinese.text.tokenizers import TokenizerSpec
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import (
    BYTE_TOKENS,
    KEEP_CASE,
    KEEP_SPACES,
    RULES,
    RULES_VERSION,
    SPACE_TOKEN,
    WordSplitter,
)

VERSES = "明月几时有 把酒问青天\n不知　天上宫阙  今夕 iPhone是\n  首 末 \nHello World, 3.5 元"
KEPT = {
    0: "明月几时有把酒问青天\n不知天上宫阙今夕iphone是\n首末\nhello world, 3.5元",
    KEEP_CASE: "明月几时有把酒问青天\n不知天上宫阙今夕iPhone是\n首末\nHello World, 3.5元",
    KEEP_SPACES: "明月几时有 把酒问青天\n不知 天上宫阙 今夕 iphone是\n首 末\nhello world, 3.5 元",
    KEEP_CASE | KEEP_SPACES: "明月几时有 把酒问青天\n不知 天上宫阙 今夕 iPhone是\n首 末\nHello World, 3.5 元",
}
VOCABULARY = (*SPECIAL_TOKENS, *BYTE_TOKENS, SPACE_TOKEN, "明月", "天上", "Hello", "hello", "是", "末", "##.")
TEXTS = st.text(st.sampled_from(list("明月 　\n\tAbc,.。〿é한3")), max_size=30)


@pytest.fixture(scope="module")
def segmenter():
    return shared_segmenter()


def spec_of(kept: int, vocabulary: tuple[str, ...] = VOCABULARY) -> TokenizerSpec:
    return TokenizerSpec("word", vocabulary, rules=RULES_VERSION + kept)


@pytest.mark.parametrize("kept", KEPT)
def test_what_is_kept_comes_back(segmenter, kept):
    tokenizer = spec_of(kept).build(segmenter=segmenter)
    assert tokenizer.decode(tokenizer.encode(VERSES)) == tokenizer.normalize(VERSES) == KEPT[kept]


def test_the_default_rules_are_those_before():
    assert RULES_VERSION == 2 and RULES[RULES_VERSION].number == 2 and not RULES[RULES_VERSION].keeps_spaces
    assert set(RULES) == {1, 2, 18, 34, 50}
    assert all(number == rules.number for number, rules in RULES.items())


@pytest.mark.parametrize("kept", KEPT)
@settings(max_examples=20)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_batches_have_the_ids_of_the_tokenizer_and_the_words_that_are_counted(kept, texts):
    spec = spec_of(kept)
    tokenizer = spec.build(segmenter=shared_segmenter())
    marks = tokenizer.marks
    text, _ = tokenize_batch(Tokenizing(spec, -1), texts)
    expected = [[marks.begin, *tokenizer.encode(document), marks.end] for document in texts]
    assert [int(id_) for id_ in text.split()] == [id_ for ids in expected if len(ids) > 2 for id_ in ids]
    words = [word for document in texts for word in tokenizer.words(document) if word != "\n"]
    counts = fold_counts([count_batch(texts, rules=spec.rules)], spec.rules)
    assert counts == {word: words.count(word) for word in words}


@pytest.mark.parametrize("kept", [KEEP_SPACES, KEEP_CASE | KEEP_SPACES])
@settings(max_examples=20)
@given(text=TEXTS)
def test_kept_spaces_survive_with_and_without_their_token(kept, text):
    for vocabulary in (VOCABULARY, tuple(token for token in VOCABULARY if token != SPACE_TOKEN)):
        tokenizer = spec_of(kept, vocabulary).build(segmenter=shared_segmenter())
        decoded = tokenizer.decode(tokenizer.encode(text))
        assert decoded == tokenizer.normalize(text)
        lines = [" ".join(line.replace(SPACE_TOKEN, " ").split()) for line in text.split("\n")]
        assert decoded == "\n".join(lines if kept & KEEP_CASE else [line.lower() for line in lines])


def test_streamed_text_is_the_whole_text(segmenter):
    tokenizer = spec_of(KEEP_SPACES).build(segmenter=segmenter)
    joiner = tokenizer.joiner()
    assert "".join(joiner.push(id_) for id_ in tokenizer.encode(VERSES)) == KEPT[KEEP_SPACES]


CHARACTERS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"明月几时有把酒问青天不知上宫阙今夕是首末元,.",
    "Hello",
    "hello",
    "3",
)


@pytest.mark.parametrize("case", [False, True])
def test_characters_keep_spaces_if_the_vocabulary_has_their_token(case):
    text = "明月几时有 把酒问青天\n今夕　Hello"
    kept = TokenizerSpec("char", (*CHARACTERS, SPACE_TOKEN)).keeping(case=case, spaces=True)
    hello = "Hello" if case else "hello"
    tokenizer = kept.build()
    assert (
        tokenizer.decode(tokenizer.encode(text)) == tokenizer.normalize(text) == f"明月几时有 把酒问青天\n今夕 {hello}"
    )
    ids, _ = tokenize_batch(Tokenizing(kept, 0), [text])
    assert [int(id_) for id_ in ids.split()][1:-1] == tokenizer.encode(text)
    without = TokenizerSpec("char", CHARACTERS).build()
    assert without.decode(without.encode(text)) == "明月几时有把酒问青天\n今夕hello"
    counts = fold_character_counts([count_batch_of_characters([text], keep_spaces=True)], tokenizer.fold)
    assert counts[SPACE_TOKEN] == 2 and counts[hello] == 1


def test_the_splitter_marks_no_space_between_words_of_letters(segmenter):
    words = WordSplitter(segmenter, RULES[RULES_VERSION + KEEP_SPACES])("API 返回 JSON data")
    assert words == ["api", SPACE_TOKEN, "返回", SPACE_TOKEN, "json", "data"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TokenizerSpec("bpe", definition="{}"), "--keep_case and --keep_spaces: BPE keeps both anyway"),
        (spec_of(0, SPECIAL_TOKENS), "the vocabulary has no token 〿 .*make-vocab.py --keep_spaces"),
        (TokenizerSpec("word", VOCABULARY, compat=True), "GPT2-Chinese keeps neither"),
        (TokenizerSpec("word", VOCABULARY, rules=1), "older rules"),
    ],
)
def test_what_cannot_keep_says_so(spec, message):
    with pytest.raises(ValueError, match=message):
        spec.keeping(case=True, spaces=True)
    assert spec.keeping(case=False, spaces=False) is spec
