"""Pieces: read, checked against manifest and vocabulary, and cut into windows that leave no token out."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from book_order import MARKS
from hypothesis import given
from hypothesis import strategies as st

from gpt2_chinese.artifacts import sha256_of, write_lines
from gpt2_chinese.text import pieces
from gpt2_chinese.text.pieces import check_vocabulary, read_manifest, text_of_tokens
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS, Marks
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, WordTokenizer
from gpt2_chinese.training import hold_out, token_cache
from gpt2_chinese.training.hold_out import HoldOut
from gpt2_chinese.training.token_cache import read_pieces
from gpt2_chinese.training.windows import (
    document_positions,
    epoch_order,
    joined_pieces,
    shifted_starts,
    window_starts,
)


def write_pieces(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"tokenized_train_{number}.txt").write_text(text, encoding="utf-8")
    return folder


def write_manifest(folder: Path, vocab_file: Path) -> Path:
    files = sorted(folder.glob("tokenized_train_*.txt"))
    manifest = {
        "format": 1,
        "vocabulary": {"path": str(vocab_file), "sha256": sha256_of(vocab_file), "size": 9},
        "options": {"num_pieces": len(files), "min_length": 0, "compat": False},
        "pieces": [{"file": file.name, "sha256": sha256_of(file), "tokens": 1, "documents": 1} for file in files],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder / "manifest.json"


def vocabulary(path: Path, *words: str) -> Path:
    write_lines(path, [*SPECIAL_TOKENS, *words])
    return path


def test_pieces_are_read_in_numeric_order_not_in_that_of_their_names(tmp_path):
    folder = write_pieces(tmp_path / "tokenized", [f"2 {number + 5} 1 " for number in range(12)])
    corpus = read_pieces(folder, marks=MARKS, vocab_size=100)
    assert corpus.tokens.reshape(12, 3)[:, 1].tolist() == list(range(5, 17))
    assert corpus.piece_lengths == (3,) * 12


def test_empty_pieces_line_breaks_and_a_missing_trailing_space_are_read(tmp_path):
    folder = write_pieces(tmp_path / "tokenized", ["", "2 5 1\r\n2 6\n1", " \n", "7 "])
    corpus = read_pieces(folder, marks=MARKS, vocab_size=8)
    assert corpus.tokens.tolist() == [2, 5, 1, 2, 6, 1, 7]
    assert corpus.piece_lengths == (0, 6, 0, 1)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_numbers_are_whole_where_they_cross_the_border_of_a_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(pieces, "_BLOCK", block)
    numbers = [2, 12345, 6, 65535, 10, 1]
    text = " ".join(map(str, numbers)) + " "
    folder = write_pieces(tmp_path / "tokenized", [text])
    assert read_pieces(folder, marks=MARKS, vocab_size=1 << 16).tokens.tolist() == numbers
    write_manifest(folder, vocabulary(tmp_path / "vocab.txt", "a"))
    read_pieces(folder, marks=MARKS, vocab_size=1 << 16, manifest=read_manifest(folder))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_large_vocabularies_do_not_wrap_round_at_16_bits(tmp_path, vocab_size, dtype):
    folder = write_pieces(tmp_path / "tokenized", [f"2 {vocab_size - 1} 1 "])
    tokens = read_pieces(folder, marks=MARKS, vocab_size=vocab_size).tokens
    assert tokens.dtype == dtype
    assert tokens.tolist() == [2, vocab_size - 1, 1]


def test_the_reference_s_pieces_and_windows_are_those_of_its_training(reference, tmp_path):
    trace = json.loads((reference / "training_trace.json").read_text(encoding="utf-8"))
    shutil.copytree(reference / "tokenized_full", tmp_path / "tokenized")
    corpus = read_pieces(tmp_path / "tokenized", marks=MARKS, vocab_size=4425)
    assert len(corpus.tokens) == 45_181
    starts = window_starts(corpus.piece_lengths[:1], trace["n_ctx"], trace["stride"])
    assert len(starts) == trace["n_windows"] == 227
    assert corpus.tokens[starts[0] : starts[0] + trace["n_ctx"]].tolist() == trace["first_window"]
    assert corpus.tokens[starts[-1] : starts[-1] + trace["n_ctx"]].tolist() == trace["last_window"]


def reference_windows(tokens: list[int], n_ctx: int, stride: int) -> list[list[int]]:
    """The reference's rule for one piece, as its behaviour is described, for pieces of at least a window."""
    begins = [begin for begin in range(0, len(tokens), stride) if begin < len(tokens) - n_ctx]
    return [tokens[begin : begin + n_ctx] for begin in begins] + [tokens[-n_ctx:]]


@given(st.integers(2, 40), st.integers(0, 200), st.integers(1, 39))
def test_windows_of_a_piece_are_the_reference_s(n_ctx, extra, stride):
    tokens = list(range(n_ctx + extra))
    stride = min(stride, n_ctx)
    starts = window_starts([len(tokens)], n_ctx, stride)
    assert [tokens[start : start + n_ctx] for start in starts] == reference_windows(tokens, n_ctx, stride)


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(2, 20), st.data())
def test_no_token_is_left_out_of_the_windows(lengths, n_ctx, data):
    stride = data.draw(st.integers(1, n_ctx - 1))
    starts = window_starts(lengths, n_ctx, stride)
    total = sum(lengths)
    if total < n_ctx:
        assert len(starts) == 0
        return
    predicted = {start + offset for start in starts.tolist() for offset in range(1, n_ctx)}
    first_tokens = set(starts.tolist())
    assert predicted | first_tokens == set(range(total))
    assert len(first_tokens) == len(starts), "a window is there twice"
    # What is never predicted begins a piece, or pieces that were joined.
    assert set(range(total)) - predicted <= {sum(lengths[:number]) for number in range(len(lengths))}


@pytest.mark.parametrize("marks", [(1, 1), (1, 2)])
@given(st.lists(st.lists(st.integers(5, 9), max_size=4), max_size=12), st.data())
def test_pieces_are_joined_at_documents_and_not_where_one_was_cut(marks, documents, data):
    begin, end = marks
    named = Marks(begin=begin, end=end, line_break=None, padding=None, unknown=None, never_produced=())
    tokens: list[int] = []
    cuts, inside = set(), set()
    for document in documents:
        cuts.add(len(tokens))
        tokens += [begin, *document, end]
        # what was held out of a long document leaves a break between two of its tokens
        if len(document) >= 2 and data.draw(st.booleans()):
            inside.add(len(tokens) - 2)
    bounds = sorted({0, *data.draw(st.sets(st.sampled_from(sorted(cuts or {0})))), *inside, len(tokens)})
    lengths = np.diff(bounds).tolist()
    for _ in range(data.draw(st.integers(0, 3))):  # what is held out may be all of a piece
        lengths.insert(data.draw(st.integers(0, len(lengths))), 0)
    joined = joined_pieces(np.array(tokens), lengths, named)
    assert sum(joined) == len(tokens)
    assert set(np.cumsum([0, *joined]).tolist()) == {0, *inside, len(tokens)}


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(2, 20), st.integers(0, 5), st.data())
def test_windows_that_move_are_as_many_and_leave_out_less_than_a_window_at_a_piece_s_beginning(
    lengths, n_ctx, epoch, data
):
    stride = data.draw(st.integers(1, n_ctx - 1))
    fixed = window_starts(lengths, n_ctx, stride)
    moved = shifted_starts(lengths, n_ctx, stride, seed=1, epoch=epoch)
    assert moved.tolist() == shifted_starts(lengths, n_ctx, stride, seed=1, epoch=epoch).tolist()
    assert len(moved) == len(fixed)
    if not len(fixed):
        return
    covered = {start + offset for start in moved.tolist() for offset in range(n_ctx)}
    left_out = set(range(sum(lengths))) - covered
    begins = [start for start in fixed.tolist() if start == 0 or start in np.cumsum(lengths).tolist()]
    assert all(any(begin <= token < begin + stride for begin in begins) for token in left_out)
    # No window crosses a border that the fixed ones do not cross.
    inside = [range(start, start + n_ctx) for start in fixed.tolist()]
    ends = {window[-1] for window in inside} - {window[-2] for window in inside if len(window) > 1}
    last_tokens = {end for end in ends if all(end + 1 not in window for window in inside)}
    assert all(not (start <= end < start + n_ctx - 1) for start in moved.tolist() for end in last_tokens)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(2, 20), st.randoms())
def test_positions_are_counted_from_where_a_document_or_the_window_begins(lengths, n_ctx, random):
    begins = np.cumsum([0, *lengths[:-1]])
    starts = np.array([random.randrange(sum(lengths)) for _ in range(5)])
    expected = [
        [place - max(start, max(begin for begin in begins if begin <= place)) for place in range(start, start + n_ctx)]
        for start in starts
    ]
    assert document_positions(begins, starts, n_ctx).tolist() == expected


def test_windows_move_from_epoch_to_epoch_and_with_the_seed():
    starts = {
        tuple(shifted_starts([500, 300], 16, 15, seed=seed, epoch=epoch).tolist())
        for seed in range(3)
        for epoch in range(8)
    }
    assert len(starts) > 15


def test_short_pieces_are_joined_with_the_next_and_the_last_with_the_one_before():
    assert window_starts([2, 3, 9, 1], n_ctx=4, stride=3).tolist() == [0, 1, 5, 8, 11]
    assert window_starts([1, 1, 1], n_ctx=4, stride=3).tolist() == []


def test_the_order_depends_on_seed_and_epoch_only_and_loses_no_window():
    order = epoch_order(1000, seed=1, epoch=0)
    assert sorted(order.tolist()) == list(range(1000))
    np.random.seed(3)
    assert epoch_order(1000, seed=1, epoch=0).tolist() == order.tolist()
    assert epoch_order(1000, seed=1, epoch=1).tolist() != order.tolist()
    assert epoch_order(1000, seed=2, epoch=0).tolist() != order.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 5 9 1 ", r"tokenized_train_1\.txt, number 3: id 9 is outside the vocabulary of 9 tokens.*make-tokenized"),
        ("2 99999999999999999999 1 ", r"number 2: id 99999999999999999999 is outside"),
        ("2 5 -6 1", r"tokenized_train_1\.txt, byte 4: b'-' is no part of an id"),
        ("2 5 x 1", r"byte 4: b'x'"),
        ("2 ５ 1", r"byte 2: b'\\xef'"),
    ],
)
def test_what_is_no_id_is_named_with_file_and_position_before_training(tmp_path, text, message):
    folder = write_pieces(tmp_path / "tokenized", ["2 1 ", text])
    with pytest.raises(ValueError, match=message):
        read_pieces(folder, marks=MARKS, vocab_size=9)


def test_an_id_outside_the_vocabulary_far_into_a_piece_is_counted_over_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_BLOCK", 16)
    folder = write_pieces(tmp_path / "tokenized", ["5 " * 100 + "70 "])
    with pytest.raises(ValueError, match="number 101: id 70"):
        read_pieces(folder, marks=MARKS, vocab_size=50)
    folder = write_pieces(tmp_path / "tokenized", ["5 " * 100 + "? "])
    with pytest.raises(ValueError, match=r"byte 200: b'\?'"):
        read_pieces(folder, marks=MARKS, vocab_size=50)


def test_a_missing_folder_or_piece_is_said_with_the_stage_that_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent: run make-tokenized\.py first"):
        read_pieces(tmp_path / "absent", marks=MARKS, vocab_size=9)
    folder = tmp_path / "tokenized"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tokenized_train_0\.txt in .*make-tokenized\.py first"):
        read_pieces(folder, marks=MARKS, vocab_size=9)
    write_pieces(folder, ["2 1 "] * 12)
    for number in (3, 5, 7, 8):
        (folder / f"tokenized_train_{number}.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"tokenized_train_11\.txt, but not tokenized_train_3.*7\.txt and 1 more"
    ):
        read_pieces(folder, marks=MARKS, vocab_size=9)


def test_a_manifest_that_does_not_fit_names_both_files_and_the_command(tmp_path):
    vocab_file = vocabulary(tmp_path / "vocab.txt", "a", "b", "c", "d")
    folder = write_pieces(tmp_path / "tokenized", ["2 5 1 ", "2 6 1 "])
    assert read_manifest(folder) is None
    write_manifest(folder, vocab_file)
    manifest = read_manifest(folder)
    assert manifest is not None
    check_vocabulary(folder, manifest, vocab_file)
    assert read_pieces(folder, marks=MARKS, vocab_size=9, manifest=manifest).tokens.tolist() == [2, 5, 1, 2, 6, 1]

    other = vocabulary(tmp_path / "other.txt", "b", "a", "c", "d")
    with pytest.raises(ValueError, match=r"other\.txt is not the vocabulary that .*manifest\.json.*make-tokenized\.py"):
        check_vocabulary(folder, manifest, other)
    (folder / "tokenized_train_1.txt").write_text("2 7 1 ", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenized_train_1\.txt is not the file that .*manifest\.json describes"):
        read_pieces(folder, marks=MARKS, vocab_size=9, manifest=manifest)
    (folder / "tokenized_train_1.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json lists tokenized_train_1\.txt, which is not there"):
        read_pieces(folder, marks=MARKS, vocab_size=9, manifest=manifest)
    write_pieces(folder, ["2 5 1 ", "2 6 1 ", "2 5 1 "])
    with pytest.raises(ValueError, match=r"manifest\.json does not know .*tokenized_train_2\.txt"):
        read_pieces(folder, marks=MARKS, vocab_size=9, manifest=manifest)


@pytest.mark.parametrize("text", ["{}", "[]", '{"pieces": [{"file": 3}], "vocabulary": {}}', "{"])
def test_a_damaged_manifest_is_not_taken_for_none(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.json is not"):
        read_manifest(tmp_path)


def test_the_sha256_is_that_of_the_bytes_on_the_disk(tmp_path):
    folder = write_pieces(tmp_path / "tokenized", ["2 5 1 "])
    write_manifest(folder, vocabulary(tmp_path / "vocab.txt", "a"))
    assert read_manifest(folder)["pieces"][0]["sha256"] == hashlib.sha256(b"2 5 1 ").hexdigest()


# --- the ids that are kept beside the pieces


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(".tokens*")}


def test_ids_are_read_once_and_again_when_a_piece_changes(tmp_path, monkeypatch):
    folder = write_pieces(tmp_path / "tokenized", ["2 5 1 ", "2 6 1 "])
    first = read_pieces(folder, marks=MARKS, vocab_size=9)
    kept = modified(folder)
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "read_piece", None)
        assert read_pieces(folder, marks=MARKS, vocab_size=9) == first
    assert modified(folder) == kept
    assert isinstance(first.tokens, np.memmap), "its memory is the disk's"
    for change in (lambda: write_pieces(folder, ["2 5 1 ", "2 7 1 "]), lambda: write_pieces(folder, ["2 1 "] * 3)):
        change()
        assert read_pieces(folder, marks=MARKS, vocab_size=9).tokens.tolist() == sum(
            (list(map(int, path.read_text().split())) for path in sorted(folder.glob("*.txt"))), []
        )
    with pytest.raises(ValueError, match="id 7|id 5"):
        write_pieces(folder, ["2 5 7 "])
        read_pieces(folder, marks=MARKS, vocab_size=5)
    assert read_pieces(folder, marks=MARKS, vocab_size=1 << 17).tokens.dtype == np.uint32, (
        "another vocabulary, other ids"
    )


@pytest.mark.parametrize("spoil", ["tokens.bin", "tokens.json", "training-*.bin", "training-*.json", "held_out-*.bin"])
def test_kept_ids_that_are_damaged_are_made_again(tmp_path, spoil):
    folder = write_pieces(tmp_path / "tokenized", ["2 5 1 ", "2 6 1 "])

    def read() -> list[list[int]]:
        corpus = read_pieces(folder, marks=MARKS, vocab_size=9, hold_out=HoldOut(0.3))
        return [corpus.tokens.tolist(), corpus.held_out.tolist()]

    first = read()
    assert sorted(first) == [[2, 5, 1], [2, 6, 1]]
    (path,) = folder.glob(f".{spoil}")
    path.write_bytes(b"x")
    assert read() == first
    path.unlink()
    assert read() == first


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path, monkeypatch):
    folder = write_pieces(tmp_path / "tokenized", ["2 5 1 "])
    original = token_cache.exclusive_lock

    def refused(path):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(token_cache, "exclusive_lock", refused)
    corpus = read_pieces(folder, marks=MARKS, vocab_size=9)
    assert corpus.tokens.tolist() == [2, 5, 1]
    assert "cannot be written (Permission denied)" in corpus.note
    assert list(folder.glob(".*")) == []


def test_processes_that_come_at_once_wait_for_the_first(tmp_path):
    folder = write_pieces(tmp_path / "tokenized", ["2 5 1 "])
    with ThreadPoolExecutor(2) as threads:
        with token_cache.exclusive_lock(folder):
            waiting = threads.submit(read_pieces, folder, marks=MARKS, vocab_size=9)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        assert waiting.result(timeout=10).tokens.tolist() == [2, 5, 1]


@pytest.mark.parametrize("val_fraction", [0.0, 0.01])
def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch, val_fraction):
    monkeypatch.setattr(pieces, "_BLOCK", 1 << 16)
    monkeypatch.setattr(hold_out, "_BLOCK", 1 << 16)
    documents = (f"2 {5 + number} {'12345 ' * 97}1 " for number in range(10_000))
    folder = write_pieces(tmp_path / "tokenized", ["".join(documents)])
    tracemalloc.start()
    corpus = read_pieces(folder, marks=MARKS, vocab_size=20_000, hold_out=HoldOut(val_fraction, 10_000, 50_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus.tokens) + corpus.held_out_tokens == 1_000_000
    assert peak < 1_000_000, "bytes, of 6 million of text and 2 million of ids"


@pytest.mark.parametrize("block", [3, 7, 1 << 20])
@given(lengths=st.lists(st.integers(0, 5), min_size=2, max_size=30), fraction=st.sampled_from([0.001, 0.3, 0.7]))
def test_each_document_is_trained_on_or_held_out(tmp_path_factory, block, lengths, fraction):
    documents = [
        [2, *(5 + (number * 7 + place) % 90 for place in range(length)), 1] for number, length in enumerate(lengths)
    ]
    folder = tmp_path_factory.mktemp("pieces")
    middle = len(documents) // 2
    parts = [documents[:middle], documents[middle:]]
    write_pieces(folder, ["".join(f"{id_} " for document in part for id_ in document) for part in parts])
    original, pieces._BLOCK = pieces._BLOCK, block
    try:
        corpus = read_pieces(folder, marks=MARKS, vocab_size=100, hold_out=HoldOut(fraction))
    finally:
        pieces._BLOCK = original
    held_out, trained = split_documents(corpus.held_out.tolist()), split_documents(corpus.tokens.tolist())
    assert sorted(held_out + trained) == sorted(documents)
    assert not {tuple(document) for document in held_out} & {tuple(document) for document in trained}
    if len({tuple(document) for document in documents}) > 1:
        assert trained and held_out
    assert (corpus.documents, corpus.held_out_documents) == (len(documents), len(held_out))
    assert list(corpus.held_out_lengths) == [len(document) for document in held_out]
    assert sum(corpus.piece_lengths) == len(corpus.tokens) and corpus.gap_tokens == corpus.held_out_slices == 0
    assert corpus.piece_lengths == tuple(
        sum(len(document) for document in part if document in trained) for part in parts
    ), "windows cross the place where a document was held out, but no piece's end"


def split_documents(ids: list[int]) -> list[list[int]]:
    places = [*(place for place, id_ in enumerate(ids) if id_ == 2), len(ids)]
    return [ids[begin:end] for begin, end in zip(places, places[1:], strict=False)]


def test_the_same_documents_are_held_out_whatever_the_vocabulary(tmp_path):
    """Whole words in one vocabulary, characters and bytes in the other."""
    texts = [f"病人{number}号 ok{number}\n吃药{number % 7}天" for number in range(300)]
    words = ["病人", "号", "吃药", "天", "ok"]
    letters = ["病", "人", "号", "吃", "药", "天", "o", "##k", *BYTE_TOKENS]
    digits = [token for digit in "0123456789" for token in (digit, f"##{digit}")]
    held_out = []
    for number, more in enumerate(([*words, *letters], letters)):
        tokenizer = WordTokenizer([*SPECIAL_TOKENS, *digits, *more])
        documents = [[2, *tokenizer.encode(text), 1] for text in texts]
        folder = write_pieces(tmp_path / str(number), ["".join(f"{id_} " for ids in documents for id_ in ids)])
        corpus = read_pieces(
            folder,
            marks=MARKS,
            vocab_size=len(tokenizer),
            hold_out=HoldOut(0.1),
            token_texts=text_of_tokens(tokenizer),
        )
        held_out.append([tokenizer.decode(ids) for ids in split_documents(corpus.held_out.tolist())])
    assert held_out[0] == held_out[1]
    assert all("\ufffd" not in text for text in held_out[0])
    assert 10 < len(held_out[0]) <= 60


def test_a_run_keeps_its_corpus_when_another_one_puts_its_own_into_the_folder(tmp_path):
    folder = write_pieces(tmp_path / "tokenized", ["2 5 1 2 6 1 2 7 1 "])
    corpus = read_pieces(folder, marks=MARKS, vocab_size=9, hold_out=HoldOut(0.3))
    trained, held_out = corpus.tokens.tolist(), corpus.held_out.tolist()
    given = pickle.dumps(corpus)
    assert pickle.loads(given).tokens.tolist() == trained and len(given) < 2000
    write_pieces(folder, ["2 8 1 2 8 8 1 2 7 8 1 "])
    other = read_pieces(folder, marks=MARKS, vocab_size=9, hold_out=HoldOut(0.3))
    assert other.path == corpus.path and 8 in other.tokens
    assert (corpus.tokens.tolist(), corpus.held_out.tolist()) == (trained, held_out)
    for name in ("tokens", "held_out"):  # a rank that comes later
        with pytest.raises(ValueError, match="another run has put other pieces there"):
            getattr(pickle.loads(given), name)
