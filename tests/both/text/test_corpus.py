"""TXT files and train.json as streams: encodings, places of errors, documents cut across blocks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_chinese.text import corpus
from gpt2_chinese.text.corpus import (
    DecodeReport,
    check_encoding,
    detect_encoding,
    read_text,
    read_train_json,
    split_documents,
    train_json_writer,
    txt_files,
)

SIMPLIFIED = "多喝热水，注意休息。感冒通常一周左右会好，如果高烧不退要去医院看医生。\n孩子咳嗽怎么办？\n" * 3
TRADITIONAL = "多喝熱水，注意休息。感冒通常一週左右會好，如果高燒不退要去醫院看醫生。\n孩子咳嗽怎麼辦？\n" * 3


def read(path: Path, encoding: str = "utf-8", on_error: str = "stop") -> tuple[str, DecodeReport]:
    report = DecodeReport()
    text = "".join(read_text(path, encoding=encoding, on_error=on_error, report=report, progress=lambda n: None))
    return text, report


@pytest.mark.parametrize(
    ("data", "encoding", "found"),
    [
        (SIMPLIFIED.encode("utf-8"), "utf-8", "utf-8"),
        (SIMPLIFIED.encode("utf-8-sig"), "utf-8", "utf-8"),
        (SIMPLIFIED.encode("utf-8-sig"), "auto", "utf-8"),
        (SIMPLIFIED.encode("gbk"), "auto", "gb18030"),
        (SIMPLIFIED.encode("gbk"), "gbk", "gbk"),
        ((SIMPLIFIED + "𠮷㐂").encode("gb18030"), "auto", "gb18030"),
        (TRADITIONAL.encode("big5"), "auto", "big5"),
        (SIMPLIFIED.encode("utf-16"), "auto", "utf-16"),
        (SIMPLIFIED.encode("utf-16"), "utf-16", "utf-16"),
        (SIMPLIFIED.encode("utf-16-le"), "auto", "utf-16-le"),
        (SIMPLIFIED.encode("utf-16-be"), "auto", "utf-16-be"),
        (b"plain ASCII\n", "auto", "utf-8"),
        (b"", "auto", "utf-8"),
    ],
)
def test_every_encoding_gives_the_same_text(tmp_path, data, encoding, found):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    text, report = read(path, encoding)
    expected = data.decode(found if not data.startswith(b"\xef\xbb\xbf") else "utf-8-sig")
    assert text == expected
    assert report.encoding == found


def test_encoding_that_cannot_be_told_is_refused(tmp_path):
    path = tmp_path / "noise.txt"
    path.write_bytes(bytes(range(0x80, 0x100)) * 4)
    with pytest.raises(ValueError, match=r"noise\.txt.*cannot be told.*gb18030"):
        detect_encoding(path)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_bad_byte_is_named_with_line_and_offset_wherever_blocks_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(corpus, "_BLOCK", block)
    path = tmp_path / "a.txt"
    good = "第一行\r\n第二行\r第三".encode()
    path.write_bytes(good + b"\xff" + "行\n".encode())
    with pytest.raises(ValueError, match=rf"a\.txt, line 3, byte {len(good)}: not utf-8"):
        read(path)


@pytest.mark.parametrize(("on_error", "middle"), [("skip", ""), ("replace", "\ufffd")])
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "big5"])
@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_bad_bytes_are_skipped_or_replaced_and_counted(tmp_path, monkeypatch, on_error, middle, encoding, block):
    monkeypatch.setattr(corpus, "_BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_bytes("中文".encode(encoding) + b"\xff" + "好".encode(encoding))
    text, report = read(path, encoding, on_error)
    assert (text, report.bad_bytes) == (f"中文{middle}好", 1)


def test_gbk_file_error_tells_the_encoding_to_give(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(SIMPLIFIED.encode("gbk"))
    with pytest.raises(ValueError, match="line 1, byte 0: not utf-8; it looks like gb18030: --encoding gb18030"):
        read(path)


def test_truncated_file_is_an_error_not_a_lost_character(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("好好".encode()[:-1])
    with pytest.raises(ValueError, match="line 1, byte 3"):
        read(path)


def test_a_file_of_two_encodings_is_refused_at_the_place_where_it_changes(tmp_path):
    path = tmp_path / "mixed.txt"
    first = "这一行是UTF-8。\r\n".encode()
    path.write_bytes(first + "这一行是国标码。\n".encode("gbk"))
    with pytest.raises(ValueError, match=rf"mixed\.txt, line 2, byte {len(first)}: not utf-8"):
        read(path)
    with pytest.raises(ValueError, match="cannot be told"):
        read(path, "auto")


def test_a_line_of_100_megabytes_is_one_document(tmp_path):
    path = tmp_path / "long.txt"
    line = "长" * 1_000_000
    with open(path, "w", encoding="utf-8") as file:
        file.writelines([line] * 34)
        file.write("\n短\n")
    assert path.stat().st_size > 100_000_000
    blocks = read_text(path, encoding="utf-8", on_error="stop", report=DecodeReport(), progress=lambda n: None)
    assert [len(document) for document in split_documents(blocks, "line")] == [34_000_000, 1]


def test_gzip_is_read_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "a.txt.gz"
    data = gzip.compress(SIMPLIFIED.encode())
    path.write_bytes(data)
    assert read(path)[0] == SIMPLIFIED
    path.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"a\.txt\.gz is not a whole gzip file"):
        read(path)


def test_nul_characters_are_kept_and_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\0b\0\n")
    text, report = read(path)
    assert (text, report.nul_characters) == ("a\0b\0\n", 2)


@pytest.mark.parametrize("name", ["utf8x", "rot13", "hex", ""])
def test_unknown_encoding_is_refused(name):
    with pytest.raises(ValueError, match="--encoding"):
        check_encoding(name)


def test_files_come_in_name_order_and_others_are_left_alone(tmp_path):
    for name in ("b.txt", "a.txt", "c.TXT", "d.txt.gz", "e.md", "train.json"):
        (tmp_path / name).touch()
    (tmp_path / "folder.txt").mkdir()
    assert [path.name for path in txt_files(tmp_path)] == ["a.txt", "b.txt", "c.TXT", "d.txt.gz"]


@pytest.mark.parametrize(
    ("unit", "documents"),
    [
        ("line", ["一", "二  三", "四\u2028五"]),
        ("paragraph", ["一\n二  三", "四\u2028五"]),
        ("file", ["一\n  二  三\n\n \n四\u2028五"]),
    ],
)
def test_documents_of_each_unit(unit, documents):
    text = "\n一\n  二  三\n\n \n四\u2028五\n\n"
    assert list(split_documents([text], unit)) == documents
    assert list(split_documents(list(text), unit)) == documents, "cut into blocks of one character"


@pytest.mark.parametrize("layout", ["ours", "one line", "indented", "escaped", "spaces"])
@pytest.mark.parametrize("block", [1, 2, 5, 1 << 20])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_train_json_of_any_layout_reads_as_json_does(tmp_path_factory, layout, block, documents):
    path = tmp_path_factory.mktemp("json") / "train.json"
    if layout == "ours":
        with train_json_writer(path) as write:
            for document in documents:
                write(document)
        assert json.loads(path.read_text(encoding="utf-8")) == documents
    else:
        text = json.dumps(documents, ensure_ascii=layout == "escaped", indent=2 if layout == "indented" else None)
        path.write_text(f"\ufeff \n{text}\t\n" if layout == "spaces" else text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_BLOCK", block)
        assert list(read_train_json(path)) == documents


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"character 0.*does not begin with \["),
        ('{"a": 1}', "does not begin with"),
        ('["a", 1]', "character 6, after document 1: a string is missing"),
        ('["a" "b"]', "character 5, after document 1: a comma or ] is missing"),
        ('["a",]', "after document 1: a string is missing"),
        ('["a', "the file ends inside a string"),
        ('["a"', "a comma or ] is missing"),
        (r'["\x"]', "no JSON string"),
        ('["a\nb"]', "no JSON string"),
        ('["a"] x', "something behind the closing"),
        ("[1]", "a string is missing"),
    ],
)
def test_malformed_train_json_is_named_with_the_place(tmp_path, text, message):
    path = tmp_path / "train.json"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(ValueError, match=message) as error:
        list(read_train_json(path))
    assert str(path) in str(error.value)


def test_missing_train_json_names_the_stage_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"build_trainfile\.py first"):
        list(read_train_json(tmp_path / "train.json"))


def test_train_json_progress_adds_up_to_the_file(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(["好" * 1000] * 2000, ensure_ascii=False), encoding="utf-8")
    steps: list[int] = []
    assert sum(1 for _ in read_train_json(path, progress=steps.append)) == 2000
    assert sum(steps) == path.stat().st_size
