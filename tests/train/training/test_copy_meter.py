"""The copy meter, held to a search for every substring; repetition and variety."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_chinese.training import copy_meter
from gpt2_chinese.training.copy_meter import CopiedRun, copied_from, distinct_n, repetition, window_hashes
from gpt2_chinese.training.corpus_text import as_code_points

Texts = st.lists(st.text("ab𠮷", max_size=14), max_size=6)


def copied_by_search(documents: list[str], completion: str, min_run: int) -> set[int]:
    """The characters of a completion in substrings of `min_run` that stand in some document."""
    return {
        place
        for begin in range(len(completion) - min_run + 1)
        if any(completion[begin : begin + min_run] in one for one in documents)
        for place in range(begin, begin + min_run)
    }


def longest_by_search(documents: list[str], completions: list[str], min_run: int) -> list[int]:
    """The lengths of all runs of different texts that cannot be longer on either side."""
    found = set()
    for text in completions:
        ends = []
        for end in range(1, len(text) + 1):
            begins = (begin for begin in range(end) if any(text[begin:end] in one for one in documents))
            ends.append(next(begins, end))
        for end, begin in enumerate(ends, start=1):
            if end - begin >= min_run and (end == len(text) or ends[end] > begin):
                found.add(text[begin:end])
    return sorted(map(len, found), reverse=True)


@given(Texts, Texts, st.integers(1, 5))
def test_what_is_copied_is_what_a_search_finds(documents, completions, min_run):
    found = copied_from(enumerate(documents), completions, min_run=min_run)
    assert list(found.copied) == [len(copied_by_search(documents, one, min_run)) for one in completions]
    assert list(found.characters) == [len(one) for one in completions]
    assert found.searched_characters == sum(map(len, documents))
    for count in (3, 1000):
        lengths = [len(run.text) for run in found.longest(count)]
        assert lengths == longest_by_search(documents, completions, min_run)[:count]
    for run in found.runs:
        assert documents[run.document][run.offset :].startswith(run.text)
        assert run.text in completions[run.completion]


@given(Texts, Texts, st.integers(1, 4), st.integers(1, 12))
def test_blocks_of_documents_change_nothing(documents, completions, min_run, block):
    whole = copied_from(enumerate(documents), completions, min_run=min_run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy_meter, "_BLOCK", block)
        assert copied_from(enumerate(documents), completions, min_run=min_run) == whole


@given(st.text("abc", max_size=30), st.integers(1, 25))
def test_windows_have_the_same_hash_where_they_are_the_same(text, length):
    hashes = window_hashes(as_code_points(text), length)
    windows = [text[begin : begin + length] for begin in range(len(text) - length + 1)]
    assert len(hashes) == len(windows)
    assert len(set(hashes.tolist())) == len(set(windows))
    assert len({(window, hash_) for window, hash_ in zip(windows, hashes.tolist(), strict=True)}) == len(set(windows))


def test_hashes_that_collide_are_no_copies(monkeypatch):
    monkeypatch.setattr(
        copy_meter, "window_hashes", lambda code_points, length: np.zeros(max(0, len(code_points) - length + 1), "u8")
    )
    found = copied_from([(7, "xxabcdyy"), (9, "abxcd")], ["zabcdz", "dcba"], min_run=3)
    assert [(run.text, run.document, run.offset) for run in found.runs] == [("abcd", 7, 2)]
    assert found.copied == (4, 0)


def test_a_run_of_nineteen_is_not_counted_and_one_of_twenty_is():
    phrase = "孩子发烧到三十九度先物理降温再看精神好不好"[:20]
    document = f"问：{phrase}。答：多喝水。"
    found = copied_from([(3, document)], [f"我家{phrase}，怎么办", f"她家{phrase[:19]}呢"])
    assert (found.copied, found.characters) == ((20, 0), (26, 22))
    assert found.runs == (CopiedRun(phrase, completion=0, document=3, offset=2),)


def test_the_longest_runs_are_of_different_texts_and_may_be_of_the_first_completions():
    found = copied_from([(0, "abcdefgh"), (1, "vwxyz")], ["abc", "abc-cdef", "vwxyz"], min_run=3)
    assert [run.text for run in found.longest(2)] == ["vwxyz", "cdef"]
    assert [run.text for run in found.longest(completions=2)] == ["cdef", "abc"]


def test_a_run_does_not_go_from_one_document_into_the_next():
    assert copied_from([(0, "abc"), (1, "def")], ["abcdef"], min_run=4).copied == (0,)


def test_nothing_of_nothing_is_nothing():
    assert copied_from([], ["abc"], min_run=2).copied == (0,)
    assert copied_from([(0, "abc")], [], min_run=2).copied == ()
    assert copied_from([(0, "abc")], ["", "ab"], min_run=3).longest() == []


def test_repetition_is_the_share_of_four_grams_that_were_there_before():
    assert repetition(["abcdefg"]) == 0
    assert repetition(["abababab"]) == pytest.approx(3 / 5)  # abab, baba, abab, baba, abab
    assert repetition(["abababab", "abcdefgh"]) == pytest.approx(3 / 10)
    assert repetition(["abc", ""]) is None


def test_distinct_2_counts_pairs_over_all_texts():
    assert distinct_n(["abab", "ab"]) == pytest.approx(2 / 4)
    assert distinct_n(["a", ""]) is None
