"""Duplicates: all that a brute-force comparison finds, nothing that it does not, in bounded memory."""

from __future__ import annotations

import random

import pytest

from gpt2_chinese.text import duplicates as module
from gpt2_chinese.text.duplicates import Duplicates, normalized, similarity

ALPHABET = [chr(code) for code in range(0x4E00, 0x4E00 + 800)]


def made_documents(count: int, seed: int = 0) -> list[str]:
    """Documents that share many characters and some phrases, as those of one subject do."""
    chooser = random.Random(seed)
    phrases = ["".join(chooser.choices(ALPHABET, k=chooser.randrange(2, 9))) for _ in range(3000)]
    return ["".join(chooser.choices(phrases, k=chooser.randrange(10, 60))) for _ in range(count)]


def altered(document: str, share: float, chooser: random.Random) -> str:
    return "".join(chooser.choice(ALPHABET) if chooser.random() < share else character for character in document)


def brute_force(document: str, kept: list[str]) -> float:
    return max((similarity(normalized(document), normalized(other)) for other in kept), default=0.0)


def test_near_duplicates_at_0_8_are_found_and_no_others(tmp_path):
    """Recall on copies with 1 to 10 % of their characters altered, against a comparison with every document."""
    chooser = random.Random(1)
    originals = made_documents(300)
    copies = [altered(document, chooser.uniform(0.01, 0.1), chooser) for document in originals]
    with Duplicates("near", tmp_path, 10**6) as duplicates:
        assert not [document for document in originals if duplicates(document)]
        similar = found = 0
        for copy, original in zip(copies, originals, strict=True):
            share = similarity(copy, original)
            result = duplicates(copy)
            if result is not None:
                assert result.kept == original and result.similarity == share >= 0.7
            similar += share >= 0.8
            found += share >= 0.8 and result is not None
    assert similar > 100
    assert found / similar >= 0.95


def test_no_pair_of_the_shared_corpora_is_false_and_altered_copies_are_found(tmp_path, corpora):
    chooser = random.Random(2)
    for name in ("medical_qa.txt", "songci.txt"):
        lines = [line.strip() for line in (corpora / name).read_text(encoding="utf-8").split("\n") if line.strip()]
        documents = lines[:: len(lines) // 1500]
        with Duplicates("near", tmp_path, 10**7) as duplicates:
            kept = [document for document in documents if duplicates(document) is None]
            found = similar = 0
            for document in kept[::3]:
                copy = altered(document, 0.05, chooser)
                result = duplicates(copy)
                if similarity(normalized(copy), normalized(document)) >= 0.8:
                    similar += 1
                    found += result is not None
        for example in duplicates.examples:
            assert similarity(normalized(example.document), normalized(example.kept)) >= 0.7
        assert similar > 200 and found / similar >= 0.95, name


def test_exact_ignores_white_space_and_case_only(tmp_path):
    documents = ["你好 World", "你好world\n", "你好，world", "短", "短", " 短 ", "", " "]
    with Duplicates("exact", tmp_path, 100) as duplicates:
        assert [bool(duplicates(document)) for document in documents] == [0, 1, 0, 0, 1, 1, 0, 1]
        assert (duplicates.exact, duplicates.near) == (4, 0)


def test_exact_leaves_near_duplicates(tmp_path):
    document = made_documents(1)[0]
    near = document[:-1] + "啊"
    with Duplicates("exact", tmp_path, 100) as duplicates:
        assert [bool(duplicates(text)) for text in (document, near, document)] == [False, False, True]
    with Duplicates("near", tmp_path, 100) as duplicates:
        assert [bool(duplicates(text)) for text in (document, near, document)] == [False, True, True]


def test_the_first_of_forty_copies_is_kept_and_examples_are_bounded(tmp_path):
    documents = made_documents(40, seed=5)
    with Duplicates("near", tmp_path, 10**6) as duplicates:
        kept = [document for document in documents * 40 if duplicates(document) is None]
        assert kept == documents
        assert duplicates.exact == 39 * 40 and len(duplicates.examples) == 20
        assert "duplicates left out: 1,560 exact, 0 near" in duplicates.summary()[0]


def test_long_books_with_the_same_common_pairs_are_no_duplicates(tmp_path):
    chooser = random.Random(4)
    common = ALPHABET[:60]  # 3,600 pairs, all of them in each book
    books = ["".join(chooser.choices(common, k=50_000)) for _ in range(2)]
    with Duplicates("near", tmp_path, 10**6) as duplicates:
        assert duplicates(books[0]) is None
        assert duplicates(books[0][:20_000]) is None  # less than half of it


def test_a_full_table_forgets_the_oldest_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LEAST_SLOTS", 1024)
    monkeypatch.setattr(module, "_MOST_SLOTS", 1024)
    documents = made_documents(400, seed=6)
    with Duplicates("near", tmp_path, 10**9) as duplicates:
        assert duplicates._table.nbytes == 8192
        assert not [document for document in documents if duplicates(document)]
        assert duplicates.forgotten > 3000
        assert all(duplicates(document) for document in documents[-20:])
        assert "made room for later documents" in duplicates.summary()[-1]


def test_memory_is_what_is_said(tmp_path):
    documents = made_documents(3000, seed=7)
    with Duplicates("near", tmp_path, 10**6) as duplicates:
        for document in documents:
            duplicates(document)
        assert duplicates.memory_bytes <= duplicates._table.nbytes + 88 * len(documents) + 100_000


@pytest.mark.parametrize("value", [0.2, 1.5])
def test_a_similarity_out_of_range_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=f"--similarity {value}: it is a share from 0.5 to 1"):
        Duplicates("near", tmp_path, 1, value)
