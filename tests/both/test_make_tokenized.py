"""Stage 3 in process: train.json and vocabulary to pieces of ids and their manifest."""

from __future__ import annotations

import json

import pytest
from book_order import CLS_ID, MASK_ID, UNK_ID

from gpt2_chinese.artifacts import sha256_of, write_lines
from gpt2_chinese.text.pieces import PROGRESS
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, WordTokenizer

DOCUMENTS = ["多喝水，多休息。", "好", "少吃盐\n多运动", "水水水水水", "盐盐盐盐"]
VOCABULARY = [*SPECIAL_TOKENS, "多", "水", "喝", "，", "休息", "。", "少", "吃", "盐", "运", "动", "好", "##a"]


@pytest.fixture
def tokenize(script, tmp_path):
    def run(*flags: str, documents=DOCUMENTS, vocabulary=VOCABULARY) -> list[str]:
        (tmp_path / "train.json").write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
        write_lines(tmp_path / "vocab.txt", vocabulary)
        paths = ["--raw_data_path", f"{tmp_path}/train.json", "--vocab_filename", f"{tmp_path}/vocab.txt"]
        script("make-tokenized").main([*paths, "--tokenized_data_path", f"{tmp_path}/tokenized", *flags])
        files = sorted((tmp_path / "tokenized").glob("tokenized_train_*.txt"), key=lambda p: int(p.stem.split("_")[-1]))
        return [file.read_text(encoding="ascii") for file in files]

    return run


def test_documents_are_marked_and_split_as_the_reference_splits_them(tokenize, tmp_path):
    pieces = tokenize("--num_pieces", "2", "--min_length", "0")
    assert len(pieces) == 2
    first, second = ([int(id_) for id_ in piece.split(" ")[:-1]] for piece in pieces)
    assert all(piece.endswith(" ") for piece in pieces)
    assert [ids.count(MASK_ID) for ids in (first, second)] == [2, 3], "5 // 2 documents, and the rest in the last"
    assert first[0] == MASK_ID and first[-1] == CLS_ID
    tokenizer = WordTokenizer(VOCABULARY)
    assert second == [i for d in DOCUMENTS[2:] for i in (MASK_ID, *tokenizer.encode(d), CLS_ID)]


def test_manifest_fits_the_files(tokenize, tmp_path):
    pieces = tokenize("--num_pieces", "3", "--min_length", "0")
    manifest = json.loads((tmp_path / "tokenized" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["vocabulary"]["sha256"] == sha256_of(tmp_path / "vocab.txt")
    assert manifest["vocabulary"]["size"] == len(VOCABULARY)
    assert manifest["corpus"]["sha256"] == sha256_of(tmp_path / "train.json")
    assert manifest["tokens"] == sum(len(piece.split()) for piece in pieces)
    assert [entry["tokens"] for entry in manifest["pieces"]] == [len(piece.split()) for piece in pieces]
    for entry in manifest["pieces"]:
        assert entry["sha256"] == sha256_of(tmp_path / "tokenized" / entry["file"])
    assert manifest["options"] == {"num_pieces": 3, "min_length": 0, "compat": False}


def test_short_documents_are_left_out_and_counted(tokenize, capsys):
    pieces = tokenize("--num_pieces", "1", "--min_length", "4")
    assert pieces[0].split().count(str(MASK_ID)) == 3
    assert "documents: 5, kept 3; dropped 2 that are not longer than 4 characters" in capsys.readouterr().out


def test_document_of_control_characters_is_left_out_and_counted(tokenize, capsys):
    pieces = tokenize("--num_pieces", "1", "--min_length", "1", documents=["\x00\x01\x02", "多喝水"])
    assert pieces[0].split().count(str(MASK_ID)) == 1
    printed = capsys.readouterr()
    assert "1 with nothing left after cleaning" in printed.out
    assert "changed: 3 control characters, dropped, such as U+0000 in '\\x00\\x01\\x02'" in printed.err


def test_unknown_words_are_counted_and_named(tokenize, capsys):
    pieces = tokenize("--num_pieces", "1", "--min_length", "0", "--allow_unk", documents=["茶，茶。", "龘，水"])
    assert pieces[0].split().count(str(UNK_ID)) == 3
    printed = capsys.readouterr().out
    assert "[UNK]: 3 of" in printed
    assert "most frequent unknown words: 茶 2" in printed


def test_what_is_changed_is_printed_and_in_the_manifest(tokenize, tmp_path, capsys):
    documents = ["多 API喝\tB水", "Ok ok\x07", "水" * 300]
    tokenize("--min_length", "0", vocabulary=[*VOCABULARY, *BYTE_TOKENS], documents=documents)
    err = capsys.readouterr().err
    assert "changed: 5 letters to lower case, such as API → api, B → b, Ok → ok" in err
    assert "changed: 2 characters of white space" in err and "changed: 1 control characters, dropped" in err
    changes = json.loads((tmp_path / "tokenized" / "manifest.json").read_text(encoding="utf-8"))["changes"]
    assert {kind: change["count"] for kind, change in changes.items()} == {
        "case": 5, "accents": 0, "white_space": 2, "control": 1, "unknown": 0,
    }  # fmt: skip
    assert changes["control"]["examples"] == ["U+0007 in 'Ok ok\\x07'"]


def test_much_unknown_is_a_warning_from_one_and_an_error_from_twenty_percent(tokenize, tmp_path, capsys):
    tokenize("--min_length", "0", documents=["水" * 99 + "龘"])
    assert "warning: 1.0% of the tokens are [UNK]" in capsys.readouterr().err
    tokenize("--min_length", "0", documents=["水" * 199 + "龘"])
    assert "[UNK]" not in capsys.readouterr().err
    before = {path.name: path.read_bytes() for path in (tmp_path / "tokenized").iterdir()}
    with pytest.raises(ValueError, match=r"50\.0% of the tokens are \[UNK\].*make-vocab\.py.*--allow_unk"):
        tokenize("--min_length", "0", documents=["水龘"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "tokenized").iterdir()} == before, "seen in a sample"
    with pytest.raises(ValueError, match=r"20\.0% of the tokens"):
        tokenize("--min_length", "0", documents=["水" * 4 + "龘"])
    assert (tmp_path / "tokenized" / PROGRESS).exists(), "train.py refuses such a folder"
    tokenize("--min_length", "0", "--allow_unk", documents=["水" * 4 + "龘"])
    out, err = capsys.readouterr()
    assert "resuming an interrupted run" in out and "warning: 20.0% of the tokens are [UNK]" in err


def test_pieces_of_another_corpus_are_replaced_on_request_only(tokenize, script, tmp_path, capsys):
    tokenize("--min_length", "0", "--num_pieces", "2")
    before = {path: path.read_bytes() for path in (tmp_path / "tokenized").iterdir()}
    (tmp_path / "other.json").write_text(json.dumps(["水多"]), encoding="utf-8")
    flags = ["--raw_data_path", f"{tmp_path}/other.json", "--vocab_filename", f"{tmp_path}/vocab.txt"]
    flags += ["--tokenized_data_path", f"{tmp_path}/tokenized", "--min_length", "0"]
    with pytest.raises(ValueError, match=r"are of the corpus .*train\.json, not of .*other\.json; .*--overwrite"):
        script("make-tokenized").main(flags)
    assert {path: path.read_bytes() for path in (tmp_path / "tokenized").iterdir()} == before
    script("make-tokenized").main([*flags, "--overwrite"])
    assert "are of an earlier corpus and are replaced" in capsys.readouterr().err


def test_a_corpus_that_has_changed_is_no_other_corpus(tokenize, capsys):
    tokenize("--min_length", "0")
    tokenize("--min_length", "0", documents=["水多"])
    assert "note: the pieces in" in capsys.readouterr().err


def test_bytes_leave_nothing_unknown(tokenize):
    pieces = tokenize(
        "--num_pieces", "1", "--min_length", "0", vocabulary=[*VOCABULARY, *BYTE_TOKENS], documents=["龘茶😀"]
    )
    assert str(UNK_ID) not in pieces[0].split()


def test_fewer_pieces_than_before_leave_no_stale_ones(tokenize, capsys):
    assert len(tokenize("--num_pieces", "4", "--min_length", "0")) == 4
    assert len(tokenize("--num_pieces", "2", "--min_length", "0")) == 2
    assert "removed 2 pieces" in capsys.readouterr().out


def test_more_pieces_than_documents(tokenize):
    pieces = tokenize("--num_pieces", "9", "--min_length", "0")
    assert len(pieces) == 9
    assert pieces[:8] == [""] * 8
    assert pieces[8].split().count(str(MASK_ID)) == 5


def test_vocabulary_without_parts_is_warned_about(tokenize, capsys):
    tokenize("--min_length", "0", vocabulary=[token for token in VOCABULARY if not token.startswith("##")])
    assert "has no ## parts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "documents", "vocabulary", "message"),
    [
        (["--min_length", "128"], DOCUMENTS, VOCABULARY, "none of the 5 documents .* --min_length 128"),
        ([], [], VOCABULARY, "there is no document"),
        ([], DOCUMENTS, VOCABULARY[3:], r"vocab\.txt has no \[MASK\], which begins a document"),
        ([], DOCUMENTS, [*VOCABULARY, "水"], "stands in line 7 already"),
        ([], ["a", 1], VOCABULARY, "a string is missing"),
    ],
)
def test_a_mistake_is_explained_and_leaves_the_old_pieces(tokenize, tmp_path, flags, documents, vocabulary, message):
    tokenize("--min_length", "0", "--num_pieces", "2")
    before = {path: path.read_bytes() for path in (tmp_path / "tokenized").iterdir()}
    with pytest.raises(ValueError, match=message):
        tokenize(*(flags or ["--min_length", "0"]), documents=documents, vocabulary=vocabulary)
    assert {path: path.read_bytes() for path in (tmp_path / "tokenized").iterdir()} == before


@pytest.mark.parametrize("flags", [["--num_pieces", "0"], ["--min_length", "-1"]])
def test_bad_numbers_are_refused(script, flags, capsys):
    with pytest.raises(SystemExit):
        script("make-tokenized").main(flags)
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "vocabulary"), [("tokenized_full", "vocab_user.txt"), ("tokenized_500", "vocab_500.txt")]
)
def test_compat_equals_the_reference_byte_for_byte(script, reference, tmp_path, folder, vocabulary):
    paths = ["--raw_data_path", str(reference / "data" / "train.json"), "--vocab_filename", str(reference / vocabulary)]
    script("make-tokenized").main([*paths, "--tokenized_data_path", str(tmp_path), "--num_pieces", "4", "--compat"])
    for number in range(4):
        name = f"tokenized_train_{number}.txt"
        assert (tmp_path / name).read_bytes() == (reference / folder / name).read_bytes(), name
