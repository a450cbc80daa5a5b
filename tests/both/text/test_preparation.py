"""The compiled words of stages 2 and 3 are those of the tokenizer, whatever the batches and the workers."""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np
import pytest
from book_order import CLS_ID, MASK_ID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_chinese.parallel import default_workers, open_workers
from gpt2_chinese.text import preparation, word_table
from gpt2_chinese.text.char_tokenizer import CharTokenizer
from gpt2_chinese.text.preparation import (
    Tokenizing,
    batches,
    count_batch,
    count_batch_of_reference,
    fold_counts,
    shared_segmenter,
    tokenize_batch,
)
from gpt2_chinese.text.tokenizers import TokenizerSpec
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_table import DOCUMENT_END, LINE_BREAK_WORD, WordTable, class_by_rules
from gpt2_chinese.text.word_tokenizer import (
    BYTE_TOKENS,
    KEEP_CASE,
    LINE_BREAK,
    RULES,
    WordSplitter,
    WordTokenizer,
    fold_word,
)

TEXT = st.text(
    st.one_of(
        st.sampled_from("的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工"),
        st.sampled_from("abcXYZéÉßΣσİﬁ0123456789#[]<>.,!?-_/'\"，。！？：；“”《》（）…—￥％ＡＢ１２"),
        st.sampled_from(" \t\u3000\u00a0\n\r\u2028\x1c\x85\u200b\u0000\ufffd\u0301\u0300"),
        st.sampled_from("😀👍🏻👨‍👩‍👧♀️ℙ①Ⅳ½한국어ひらがなカタカナРусскийภาษาไทยعربية"),
        st.characters(),
    ),
    max_size=40,
)
VOCABULARY = (*SPECIAL_TOKENS, "的", "中", "大", "a", "##b", "中国", "1", "##2", *BYTE_TOKENS)


def word_table_of(rules: int = 2) -> WordTable:
    return WordTable(shared_segmenter(), lambda character: class_by_rules(character, RULES[rules]))


def numbered_words(table: WordTable, documents: list[str], rules: int = 2) -> list[list[str]]:
    """The folded words of each document, from the table's numbers."""
    result: list[list[str]] = [[]]
    sequence = table.number(documents)
    words = table.words.read(0)
    for number in sequence.tolist():
        if number == DOCUMENT_END:
            result.append([])
        elif number == LINE_BREAK_WORD:
            result[-1].append(LINE_BREAK)
        else:
            result[-1] += fold_word(*words[number], RULES[rules])[0]
    assert result.pop() == []
    return result


@settings(max_examples=300)
@given(documents=st.lists(TEXT, min_size=1, max_size=5), rules=st.sampled_from([1, 2, 2 + KEEP_CASE]))
def test_numbered_words_are_those_of_the_splitter(documents, rules):
    splitter = WordSplitter(shared_segmenter(), RULES[rules])
    table = word_table_of(rules)
    expected = [splitter(document) for document in documents]
    assert numbered_words(table, documents, rules) == expected
    assert numbered_words(table, documents[::-1], rules) == expected[::-1], "a second batch, with words known already"


def test_the_table_grows_and_forgets(monkeypatch):
    table = word_table_of()
    documents = [f"{number} 和{number * 7}" for number in range(40_000)]
    splitter = WordSplitter(shared_segmenter())
    assert numbered_words(table, documents) == [splitter(document) for document in documents]
    assert table.words.count > 1 << 15, "more words than the table has places at first"
    monkeypatch.setattr(word_table, "MAX_WORDS", 10)
    assert numbered_words(table, ["中国"]) == [["中国"]]
    assert table.words.count == 1


@settings(max_examples=200)
@given(documents=st.lists(TEXT, max_size=5), min_length=st.integers(0, 3), rules=st.sampled_from(sorted(RULES)))
def test_formatted_ids_are_those_of_the_tokenizer(documents, min_length, rules):
    tokenizer = WordTokenizer(VOCABULARY, segmenter=shared_segmenter(), rules=rules)
    spec = TokenizerSpec("word", VOCABULARY, rules=rules)
    text, report = tokenize_batch(Tokenizing(spec, min_length), documents)
    kept = [ids for d in documents if len(d) > min_length and (ids := tokenizer.encode(d))]
    expected = [id_ for ids in kept for id_ in (MASK_ID, *ids, CLS_ID)]
    assert text.decode() == "".join(f"{id_} " for id_ in expected)
    assert (report.documents, report.tokens) == (len(kept), len(expected))
    assert report.documents + report.too_short + report.empty == len(documents)


CHARACTERS = ("[PAD]", "[UNK]", "[CLS]", "的", "中", "[MASK]", "的", "a", "##b", "1", "##2", ",", "", " ", "[SEP]")


@settings(max_examples=200)
@given(
    documents=st.lists(st.one_of(TEXT, st.sampled_from(["[SEP]", "中[CLS]a", "\n"])), max_size=5),
    compat=st.booleans(),
    bert=st.booleans(),
)
@example(documents=["0\n"], compat=True, bert=True)
def test_formatted_ids_of_characters_are_those_of_the_tokenizer(documents, compat, bert):
    marks = {"begin": "[CLS]", "end": "[SEP]", "line_break": None} if bert else {}
    tokenizer = CharTokenizer(CHARACTERS, compat=compat, lowercase=not bert, **marks)
    spec = TokenizerSpec("char", CHARACTERS, compat=compat, lowercase=not bert, **marks)
    text, report = tokenize_batch(Tokenizing(spec, 0), documents)
    kept = [ids for d in documents if d and ((ids := tokenizer.encode(d)) or compat)]
    expected = [id_ for ids in kept for id_ in (tokenizer.marks.begin, *ids, tokenizer.marks.end)]
    assert text.decode() == "".join(f"{id_} " for id_ in expected)
    assert (report.documents, report.tokens) == (len(kept), len(expected))
    assert report.unknown_tokens == sum(ids.count(tokenizer.marks.unknown) for ids in kept)


@settings(max_examples=100)
@given(documents=st.lists(TEXT, min_size=1, max_size=5))
def test_counts_are_those_of_the_splitter_in_order_of_appearance(documents):
    splitter = WordSplitter(shared_segmenter())
    expected: dict[str, int] = {}
    for document in [*documents, documents[0]]:
        for word in splitter(document):
            if word != LINE_BREAK:
                expected[word] = expected.get(word, 0) + 1
    counts = fold_counts([count_batch(documents), count_batch(documents[:1])])
    assert list(counts.items()) == list(expected.items())


@settings(max_examples=100)
@given(documents=st.lists(TEXT, min_size=1, max_size=5))
def test_counts_of_the_reference_are_those_of_the_segmenter(documents):
    expected: dict[str, int] = {}
    for document in documents:
        for word in shared_segmenter().cut(document):
            if word != "\n":
                expected[word] = expected.get(word, 0) + 1
    assert list(count_batch_of_reference(documents).items()) == list(expected.items())


SPACED_TEXT = st.text(st.sampled_from("中大的。，abCD12é ßΣ한가ア𠮷  \n\x00\u200b\x07\u0301"), max_size=40)


@settings(max_examples=60)
@given(documents=st.lists(SPACED_TEXT, max_size=4))
@example(documents=["中 a b", " a  b ", "a\nb "])
def test_what_is_changed_is_counted_by_kind(documents):
    tokenizer = WordTokenizer(VOCABULARY)
    _, report = tokenize_batch(Tokenizing(TokenizerSpec("word", VOCABULARY), 0), documents)
    kept = [document for document in documents if document]
    assert report.white_space == sum(d.count(" ") - tokenizer.normalize(d).count(" ") for d in kept)
    assert report.dropped_characters == sum(d.count("\x00") + d.count("\x07") for d in kept)
    assert report.case == sum(c != c.lower() for d in kept for c in d)
    assert report.accents == 0
    changes = report.changes()
    for kind, change in changes.items():
        assert bool(change["examples"]) == bool(change["count"]), kind
        assert len(change["examples"]) <= 3


def test_white_space_of_other_kinds_counts_as_changed_where_it_becomes_a_space():
    tokenizing = Tokenizing(TokenizerSpec("word", VOCABULARY), 0)
    for text, changed in (("a\tb", 1), ("a \tb", 1), ("a\u3000b", 1), ("a b", 0), ("中\tb", 1), ("a \u00a0 b", 2)):
        assert tokenize_batch(tokenizing, [text])[1].white_space == changed, repr(text)


def test_examples_of_changes_depend_on_the_documents_alone():
    tokenizing = Tokenizing(TokenizerSpec("word", VOCABULARY), 0)
    documents = ["Abc 中 DEF ghI", "Jkl Abc"]
    expected = tokenize_batch(tokenizing, documents)[1].changes()
    tokenize_batch(tokenizing, ["Zzz 中文 Yyy"] * 3)
    assert tokenize_batch(tokenizing, documents)[1].changes() == expected
    assert expected["case"] == {"count": 7, "examples": ["Abc → abc", "DEF → def", "ghI → ghi"]}


def test_bert_counts_the_accents_that_it_drops():
    _, report = tokenize_batch(Tokenizing(TokenizerSpec("char", CHARACTERS), 0), ["Café 中 Ünï\x00"])
    changes = report.changes()
    assert [changes[kind]["count"] for kind in ("case", "accents", "white_space", "control")] == [2, 3, 2, 1]
    assert changes["accents"]["examples"] == ["Café → cafe", "Ünï → uni"]
    _, report = tokenize_batch(Tokenizing(TokenizerSpec("char", CHARACTERS, lowercase=False), 0), ["Café"])
    assert (report.case, report.accents) == (0, 0)


def test_a_table_that_forgot_its_words_gives_no_stale_ids(monkeypatch):
    tokenizing = Tokenizing(TokenizerSpec("word", VOCABULARY), 0)
    expected = [tokenize_batch(tokenizing, [text])[0] for text in ("中国a", "大的12", "的中大")]
    monkeypatch.setattr(word_table, "MAX_WORDS", 1)
    for _ in range(3):
        assert [tokenize_batch(tokenizing, [text])[0] for text in ("中国a", "大的12", "的中大")] == expected


def test_words_that_a_hash_could_confuse_have_numbers_of_their_own():
    words = [
        "\0",
        "\0\0",
        "\0\0\0",
        "\0\0\0\0",
        "\U0010ffff" * 3,
        "\U0010ffff" * 4,
        "一",
        "一一",
        "一一一",
        "一二",
        "二一",
    ]
    store = word_table.WordStore.of(words)
    assert [store.read_one(number)[0] for number in range(store.count)] == words
    text = np.frombuffer("".join(words).encode("utf-32-le"), np.uint32)
    ends = np.cumsum(list(map(len, words)))
    touching = np.ones(len(words), dtype=np.uint8)
    assert store.number(text, ends, word_table.NO_CLASSES, touching=touching).tolist() == [*range(11, 22)]


def test_batches_keep_every_document_in_order(monkeypatch):
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 5)
    documents = ["abc", "def", "", "ghijklmn", "o"]
    assert [d for batch in batches(documents) for d in batch] == documents
    assert len(list(batches(documents))) == 3


def square(number: int) -> int:
    time.sleep(0.01 * (number % 3))
    return number * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(workers):
    with open_workers(workers) as map_in_order:
        assert list(map_in_order(square, range(20))) == [number * number for number in range(20)]


def add_up(shared: list[int], number: int) -> int:
    shared.append(number)
    return len(shared)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_shared_reaches_a_worker_once(workers):
    with open_workers(workers, shared=[0]) as map_in_order:
        lengths = list(map_in_order(add_up, range(20)))
    # A worker that got it again with an item would have a new list of one number.
    assert max(lengths) >= 20 / workers + 1
    assert len(set(lengths)) >= 20 / workers


def test_items_are_taken_only_as_results_are():
    taken = []

    def items():
        for number in range(1000):
            taken.append(number)
            yield number

    with open_workers(2) as map_in_order:
        results = map_in_order(square, items())
        next(results)
        assert len(taken) <= 7


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_worker_that_dies_is_an_error_that_says_so():
    with pytest.raises(OSError, match="a worker process died"), open_workers(2) as map_in_order:
        list(map_in_order(die, range(4)))


def test_default_workers_are_the_processors_of_this_process():
    assert 1 <= default_workers() <= (os.cpu_count() or 1)


def test_dask_that_is_not_there_is_explained():
    with (
        pytest.raises(ValueError, match="--scheduler .*distributed|no Dask scheduler answers"),
        open_workers(2, "tcp://127.0.0.1:1"),
    ):
        pass
