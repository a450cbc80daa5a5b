"""The yardstick: an n-gram model of characters, held to one that is written straight from the formula."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from book_order import CLS_ID, MASK_ID, SEP_ID, UNK_ID
from hypothesis import given
from hypothesis import strategies as st
from kneser_ney import END, BruteForce
from layouts import END_OF_TEXT, bpe_definition, vocabulary_of
from tiny_model import Characters, tiny_tokenizer

from gpt2_chinese.text.tokenizers import TokenizerSpec
from gpt2_chinese.training import corpus_text, ngram
from gpt2_chinese.training.corpus_text import CorpusText, as_code_points
from gpt2_chinese.training.ngram import discounts, measure_yardstick, ngram_bits

Documents = st.lists(st.text("abc\n", min_size=0, max_size=12), min_size=1, max_size=8)


def arrays(documents: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return as_code_points("".join(documents)), np.array([len(one) for one in documents], np.int64)


@given(Documents, Documents, st.integers(1, 5))
def test_the_bits_are_those_of_the_formula(training, held_out, order):
    expected = BruteForce(training, order).bits(held_out, order)
    if "".join(training):
        assert ngram_bits(arrays(training), arrays(held_out), order=order) == pytest.approx(expected, rel=1e-9)


def test_the_bits_are_those_of_the_formula_with_estimated_discounts_and_unseen_characters():
    generator = np.random.default_rng(1)
    letters = np.array(list("的一是不了人我在有他这中大来上\n"))
    weights = 1 / np.arange(1, 17)

    def documents(count: int) -> list[str]:
        lengths = generator.integers(0, 60, count)
        return ["".join(generator.choice(letters, length, p=weights / weights.sum())) for length in lengths]

    training, held_out = documents(60), [*documents(5), "在龘有", ""]
    for order in (1, 3, 7):
        model = BruteForce(training, order)
        assert order == 1 or any(model.discounts[n] != [0.0, 0.5, 1.0, 1.5] for n in model.discounts)
        measured = ngram_bits(arrays(training), arrays(held_out), order=order)
        assert measured == pytest.approx(model.bits(held_out, order), rel=1e-9)


def test_the_probabilities_of_all_code_points_and_the_end_add_up_to_one():
    """A document of one character costs its bits and those of an end that is the same for all of them unseen."""
    training = ["ab", "abb", "ba", "a"]
    alone = [2.0 ** -ngram_bits(arrays(training), arrays([one]), order=2) for one in ("", "a", "b", "c")]
    model = BruteForce(training, 2)
    end_of = {one: model.probability((one,), END) for one in "abc"}
    seen = alone[0] + alone[1] / end_of["a"] + alone[2] / end_of["b"]
    assert seen + (0x110000 - 2) * alone[3] / end_of["c"] == pytest.approx(1)


def test_discounts_are_those_of_chen_and_goodman():
    counts = np.repeat([1, 2, 3, 4, 9], [100, 40, 20, 10, 5])
    y = 100 / 180
    assert discounts(counts) == pytest.approx((1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.5))
    assert discounts(np.array([1, 1, 2])) == (0.5, 1.0, 1.5)


def test_a_corpus_with_more_characters_than_there_are_symbols_is_measured(monkeypatch):
    monkeypatch.setattr(ngram, "_MAX_SYMBOLS", 6)
    rare_is_unseen = ngram_bits(arrays(["aaabbbccd"]), arrays(["d"]), order=1)
    monkeypatch.setattr(ngram, "_MAX_SYMBOLS", 1 << 16)
    assert rare_is_unseen > 15 > ngram_bits(arrays(["aaabbbccd"]), arrays(["d"]), order=1)


def ids(*documents: list[int]) -> np.ndarray:
    return np.array([id_ for one in documents for id_ in (MASK_ID, *one, CLS_ID)], np.uint16)


def test_the_yardstick_is_measured_on_the_text_of_the_tokens():
    tokenizer = tiny_tokenizer()
    training = ids([10, 11, SEP_ID, 12], [10, 11], [13])
    held_out = ids([10, 11, 12], [SEP_ID, 13])
    measured = measure_yardstick(training, held_out, tokenizer, order=3)

    def texts(*documents: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return arrays([tokenizer.decode(one) for one in documents])

    bits = ngram_bits(texts([10, 11, SEP_ID, 12], [10, 11], [13]), texts([10, 11, 12], [SEP_ID, 13]), order=3)
    assert measured.bits_per_character == pytest.approx(bits / 5)
    assert (measured.characters, measured.counted_characters, measured.training_documents) == (5, 7, 3)
    assert not measured.is_sample


def test_an_unknown_token_is_charged_as_for_a_model():
    tokenizer = tiny_tokenizer()
    training = ids([10, UNK_ID, 12])
    one, other = ids([10, 11, 12]), ids([10, UNK_ID, 12])
    replaced = ngram_bits(arrays(["三\ufffd五"]), arrays(["三\ufffd五"]), order=2)
    expected = (replaced + math.log2(0x110000)) / 3
    texts = tokenizer.decode([10]) + "\ufffd" + tokenizer.decode([12])
    assert CorpusText(training, tokenizer).text(0) == texts
    assert measure_yardstick(training, other, tokenizer, order=2).bits_per_character == pytest.approx(expected)
    assert measure_yardstick(training, one, tokenizer, order=2).bits_per_character > replaced / 3


def test_without_text_there_is_no_yardstick():
    tokenizer = tiny_tokenizer()
    assert measure_yardstick(ids([10, 11]), np.empty(0, np.uint16), tokenizer) is None
    assert measure_yardstick(ids([]), ids([10]), tokenizer) is None


def test_a_large_corpus_is_sampled_by_whole_documents_and_it_is_said():
    tokenizer = tiny_tokenizer()
    generator = np.random.default_rng(0)
    documents = [generator.integers(10, 190, length).tolist() for length in generator.integers(1, 90, 600)]
    text = CorpusText(ids(*documents), tokenizer, max_characters=2000, seed=1)
    chosen = dict(text)
    assert text.is_sample and text.documents == 600
    assert sum(map(len, chosen.values())) <= 2000
    assert sum(map(len, chosen.values())) > 1500
    cut = [number for number, one in chosen.items() if one != tokenizer.decode(documents[number])]
    assert len(cut) <= 1
    assert dict(CorpusText(ids(*documents), tokenizer, max_characters=2000, seed=1)) == chosen
    measured = measure_yardstick(ids(*documents), ids(*documents[:20]), tokenizer, max_characters=2000)
    assert measured.is_sample and measured.counted_characters <= 2000 and measured.training_documents == 600


@pytest.mark.parametrize("layout", ["book", "uer", "bpe"])
def test_the_text_is_what_the_tokenizer_decodes_whatever_its_kind(layout, monkeypatch):
    if layout == "bpe":
        spec = TokenizerSpec("bpe", definition=bpe_definition(), begin=END_OF_TEXT, end=END_OF_TEXT, line_break=None)
    elif layout == "uer":
        spec = TokenizerSpec("char", tuple(vocabulary_of(layout)), begin="[CLS]", end="[SEP]", line_break=None)
    else:
        spec = TokenizerSpec("word", tuple(vocabulary_of(layout)))
    tokenizer = spec.build(segmenter=Characters())
    texts = ["高血压，吃盐 hello world 3.5", "我们", "的\n多喝水kk 龘 ok"]
    encoded = [tokenizer.encode(text) for text in texts]
    marked = [[tokenizer.marks.begin, *one, tokenizer.marks.end] for one in encoded]
    for block in (1, 3, 1000):
        monkeypatch.setattr(corpus_text, "_TOKENS_AT_ONCE", block)
        found = dict(CorpusText(np.array(sum(marked, [])), tokenizer))
        unknown = [one.count(tokenizer.marks.unknown) for one in encoded]
        decoded = [tokenizer.decode(one) for one in encoded]
        assert [text.replace("\ufffd", "") for text in found.values()] == decoded
        assert [text.count("\ufffd") for text in found.values()] == unknown


def test_a_sample_of_one_long_document_is_its_beginning():
    tokenizer = tiny_tokenizer()
    long = np.random.default_rng(0).integers(10, 190, 5000).tolist()
    text = CorpusText(ids(long), tokenizer, max_characters=300)
    assert [(0, tokenizer.decode(long)[:300])] == list(text)
    assert text.is_sample


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
def test_documents_are_found_whatever_the_block(block, monkeypatch):
    monkeypatch.setattr(corpus_text, "_TOKENS_AT_ONCE", block)
    tokenizer = tiny_tokenizer()
    tokens = ids([10, 11], [], [12, SEP_ID, 13])
    expected = [(0, tokenizer.decode([10, 11])), (2, tokenizer.decode([12, SEP_ID, 13]))]
    assert list(CorpusText(tokens, tokenizer)) == expected
    slices = CorpusText(tokens, tokenizer, lengths=(2, len(tokens) - 2))
    assert [text for _, text in slices] == [tokenizer.decode([10]), tokenizer.decode([11]), expected[1][1]]


def test_memory_is_that_of_some_dozen_bytes_a_character():
    """The limit's docstring has a figure: what grows with the text is measured at a twentieth of the limit."""
    generator = np.random.default_rng(0)
    code_points = (0x4E00 + generator.zipf(1.2, 600_000) % 3000).astype(np.uint32)
    held_out = code_points[:5000], np.array([5000])

    def peak(characters: int) -> int:
        tracemalloc.start()
        ngram_bits((code_points[:characters], np.full(characters // 1000, 1000)), held_out)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert (peak(600_000) - peak(200_000)) / 400_000 < ngram.BYTES_A_CHARACTER
