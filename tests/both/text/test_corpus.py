"""TXT files and train.json as streams: encodings, places of errors, documents cut across blocks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_chinese.text import compressed, corpus
from gpt2_chinese.text.corpus import (
    DecodeReport,
    check_encoding,
    detect_encoding,
    read_text,
    read_train_json,
    read_train_json_blocks,
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
        (TRADITIONAL.encode("big5"), "auto", "cp950"),
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
    monkeypatch.setattr(compressed, "_TEXT_BLOCK", block)
    path = tmp_path / "a.txt"
    good = "第一行\r\n第二行\r第三".encode()
    path.write_bytes(good + b"\xff" + "行\n".encode())
    with pytest.raises(ValueError, match=rf"a\.txt, line 3, byte {len(good)}: not utf-8"):
        read(path)


@pytest.mark.parametrize(("on_error", "middle"), [("skip", ""), ("replace", "\ufffd")])
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "big5"])
@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_bad_bytes_are_skipped_or_replaced_and_counted(tmp_path, monkeypatch, on_error, middle, encoding, block):
    monkeypatch.setattr(compressed, "_TEXT_BLOCK", block)
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
    with pytest.raises(ValueError, match=r"mixed\.txt, line 2: the encoding changes here; some lines are .*--on_error"):
        read(path, "auto")


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_lines_of_two_encodings_are_read_each_as_what_it_is_on_request(tmp_path, monkeypatch, block, on_error):
    monkeypatch.setattr(compressed, "_TEXT_BLOCK", block)
    path = tmp_path / "mixed.txt"
    path.write_bytes(SIMPLIFIED.encode() + SIMPLIFIED.encode("gbk"))
    text, report = read(path, "auto", on_error)
    assert text == 2 * SIMPLIFIED
    assert report.other_lines == {"gb18030": SIMPLIFIED.count("\n")} and report.bad_bytes == 0
    assert "lines are not" in report.warnings(path, on_error)[0]


def test_the_place_where_a_long_file_changes_its_encoding_is_named(tmp_path):
    path = tmp_path / "long.txt"
    first = (SIMPLIFIED * 1000).encode()
    path.write_bytes(first + SIMPLIFIED.encode("gbk") * 3)
    with pytest.raises(ValueError, match=rf"line {first.count(10) + 1}, byte {len(first)}.*from here on.* gb18030"):
        read(path, "auto")
    text, report = read(path, "auto", "skip")
    assert text == SIMPLIFIED * 1003
    assert report.other_lines == {"gb18030": 3 * SIMPLIFIED.count("\n")}


def test_a_line_of_utf8_in_a_gbk_file_is_not_read_as_gbk_though_it_is_valid(tmp_path):
    path = tmp_path / "a.txt"
    line = "孩子咳嗽怎么办？\n"
    assert line.encode().decode("gb18030"), "valid as mojibake"
    path.write_bytes(SIMPLIFIED.encode("gbk") * 20 + line.encode() + SIMPLIFIED.encode("gbk"))
    with pytest.raises(ValueError, match=f"a.txt, line {20 * SIMPLIFIED.count(chr(10)) + 1}, byte .*: not gb18030"):
        read(path, "auto")
    text, report = read(path, "auto", "skip")
    assert text == SIMPLIFIED * 20 + line + SIMPLIFIED
    assert report.other_lines == {"utf-8": 1}


def test_one_bad_byte_is_named_and_counted_and_spoils_nothing(tmp_path):
    path = tmp_path / "a.txt"
    data = SIMPLIFIED.encode()
    path.write_bytes(data[:60] + b"\xff" + data[60:])
    with pytest.raises(ValueError, match="line 1, byte 60: not utf-8; the rest of the file is utf-8; --on_error skip"):
        read(path, "auto")
    text, report = read(path, "auto", "replace")
    assert (text.replace("\ufffd", ""), text.count("\ufffd"), report.bad_bytes) == (SIMPLIFIED, 1, 1)


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "cp949"])
def test_utf8_read_as_another_encoding_on_request_is_warned_about(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(SIMPLIFIED.encode())
    _, report = read(path, encoding, "skip")
    assert any("it is valid UTF-8 and was read as" in line for line in report.warnings(path, "skip"))
    path.write_bytes(SIMPLIFIED.encode("gb18030") + b"ascii")
    assert not read(path, "gb18030")[1].is_utf8_too
    path.write_bytes(b"ascii alone")
    assert not read(path, "gb18030")[1].is_utf8_too


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
    for encoding in ("utf-8", "auto"):
        with pytest.raises(ValueError, match=r"a\.txt\.gz is cut off at byte"):
            read(path, encoding)
        text, report = read(path, encoding, "skip")
        assert SIMPLIFIED.startswith(text.removesuffix("\n")) and text
        assert "read in part only: it is cut off" in "".join(report.warnings(path, "skip"))


def test_nul_characters_are_kept_and_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\0b\0\n")
    text, report = read(path)
    assert (text, report.nul_characters) == ("a\0b\0\n", 2)


@pytest.mark.parametrize("name", ["utf8x", "rot13", "hex", ""])
def test_unknown_encoding_is_refused(name):
    with pytest.raises(ValueError, match="--encoding"):
        check_encoding(name)


def test_files_come_in_natural_order_and_others_are_left_alone(tmp_path):
    for name in ("b.txt", "a10.txt", "a9.txt", "c.TXT", "d.txt.gz", "e.md", "train.json", "~$a9.txt", "._b.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.txt").mkdir()
    passed_over: list[Path] = []
    files = txt_files(tmp_path, passed_over=passed_over)
    assert [path.name for path in files] == ["a9.txt", "a10.txt", "b.txt", "c.TXT", "d.txt.gz"]
    assert [path.name for path in passed_over] == ["._b.txt", "~$a9.txt"]


@pytest.mark.parametrize(
    "line", ["\u200b", " \u3000\xa0", "\ufeff", "\u3164", "\u2800\u2060", "\x00\x1b", "\u202a\u202c", "\ufe0f\u00ad"]
)
def test_a_line_that_shows_nothing_is_blank(line):
    text = f"一\n{line}\n二\n"
    assert list(split_documents([text], "line")) == list(split_documents([text], "paragraph")) == ["一", "二"]
    assert list(split_documents([line], "file")) == []


@pytest.mark.parametrize("document", ["❤\ufe0f", "a\u200bb", "क्\u200d", "👨\u200d👩", "ㄱ\u3164ㄴ"])
def test_invisible_characters_within_a_text_stay(document):
    assert list(split_documents([f"\ufeff{document}\u200b\n"], "line")) == [document]


def test_page_breaks_and_vertical_tabs_are_spaces(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("一页\x0c二页\x0b三\u0085四\t五\u2028六\n".encode())
    text, report = read(path)
    assert (text, report.odd_spaces) == ("一页 二页 三 四\t五\u2028六\n", 3)
    assert "3 page breaks" in report.warnings(path, "stop")[0]


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


@pytest.mark.parametrize("layout", ["ours", "one line", "compact", "indented", "escaped", "spaces"])
@pytest.mark.parametrize("block", [1, 2, 5, 1 << 20])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from('",\\ \n一'))))
def test_train_json_of_any_layout_reads_as_json_does(tmp_path_factory, layout, block, documents):
    path = tmp_path_factory.mktemp("json") / "train.json"
    if layout == "ours":
        with train_json_writer(path) as write:
            for document in documents:
                write(document)
        assert json.loads(path.read_text(encoding="utf-8")) == documents
    else:
        text = json.dumps(
            documents,
            ensure_ascii=layout == "escaped",
            indent=2 if layout == "indented" else None,
            separators=(",", ":") if layout == "compact" else None,
        )
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


def test_documents_on_one_line_are_read_many_at_a_time(tmp_path):
    """The layout of GPT2-Chinese; looked for one at a time they took a hundred times as long."""
    path = tmp_path / "train.json"
    documents = [f'第{number}个文档，"引文", 完' for number in range(5000)]
    path.write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
    blocks = list(read_train_json_blocks(path))
    assert [document for block in blocks for document in block] == documents
    assert len(blocks) < 5


def test_missing_train_json_names_the_stage_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"build_trainfile\.py first"):
        list(read_train_json(tmp_path / "train.json"))


def test_train_json_progress_adds_up_to_the_file(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(["好" * 1000] * 2000, ensure_ascii=False), encoding="utf-8")
    steps: list[int] = []
    assert sum(1 for _ in read_train_json(path, progress=steps.append)) == 2000
    parts: list[bytes] = []
    assert sum(map(len, read_train_json_blocks(path, read=parts.append))) == 2000
    assert b"".join(parts) == path.read_bytes()
    assert sum(steps) == path.stat().st_size
