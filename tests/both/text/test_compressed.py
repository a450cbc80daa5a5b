"""Compressed files that are cut, altered, mislabelled or followed by rubbish."""

from __future__ import annotations

import gzip
import random
import zlib
from pathlib import Path

import pytest

from gpt2_chinese.text import compressed
from gpt2_chinese.text.compressed import DamagedFile, byte_blocks

TEXT = "".join(f"第{number}行：{random.Random(number).random()}。\n" for number in range(3000)).encode()


def whole(path: Path) -> bytes:
    return b"".join(block for block, _ in byte_blocks(path))


def salvaged(path: Path) -> tuple[bytes, list[str]]:
    problems: list[str] = []
    return b"".join(block for block, _ in byte_blocks(path, on_damage=problems.append)), problems


@pytest.mark.parametrize("block", [1, 13, 1000, 1 << 16])
def test_members_and_padding_are_read_as_gzip_reads_them(tmp_path, monkeypatch, block):
    monkeypatch.setattr(compressed, "_DISK_BLOCK", block)
    path = tmp_path / "a.txt.gz"
    text = TEXT[:20_000]
    data = gzip.compress(text) + gzip.compress(b"") + gzip.compress("尾".encode()) + bytes(700)
    path.write_bytes(data)
    assert whole(path) == gzip.decompress(data) == text + "尾".encode()
    assert sum(taken for _, taken in byte_blocks(path)) == len(data)


@pytest.mark.parametrize("cut", [2, 5, 11, 300, 20_000, -1, -4, -9])
def test_a_cut_file_is_named_and_what_it_holds_is_given_on_request(tmp_path, cut):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(data := gzip.compress(TEXT)[:cut])
    with pytest.raises(DamagedFile, match=rf"a\.txt\.gz is cut off at byte {len(data):,}"):
        whole(path)
    text, problems = salvaged(path)
    assert text == zlib.decompressobj(wbits=31).decompress(data)
    assert TEXT.startswith(text) and len(problems) == 1


def test_an_altered_byte_is_named_and_the_text_before_it_is_given_on_request(tmp_path):
    path = tmp_path / "a.txt.gz"
    data = gzip.compress(TEXT)
    for place in range(30, len(data), len(data) // 15):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(DamagedFile, match=r"a\.txt\.gz, byte [\d,]+: the compressed text is altered|is cut off"):
            whole(path)
        text, problems = salvaged(path)
        assert len(problems) == 1
        assert text[: place // 2] == TEXT[: min(place // 2, len(text))]


@pytest.mark.parametrize("rubbish", [b"\n", b"plain text behind it", bytes(9) + b"\x1fx", bytes(range(1, 200))])
def test_rubbish_behind_the_end_is_named_with_its_place(tmp_path, rubbish):
    path = tmp_path / "a.txt.gz"
    data = gzip.compress(TEXT)
    path.write_bytes(data + rubbish)
    left = rubbish.lstrip(b"\0")
    place = len(data) + len(rubbish) - len(left)
    with pytest.raises(DamagedFile, match=f"byte {place:,}: {len(left):,} bytes that are not gzip follow"):
        whole(path)
    assert salvaged(path) == (
        TEXT,
        [f"byte {place:,}: {len(left):,} bytes that are not gzip follow the compressed text"],
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt.gz", TEXT, r"a\.txt\.gz is not compressed, though its name ends in \.gz; name it a\.txt"),
        ("a.txt.gz", b"", r"a\.txt\.gz is cut off at byte 0"),
        ("a.txt", gzip.compress(TEXT), r"a\.txt is compressed with gzip.*name it a\.txt\.gz"),
        ("a.txt.gz", b"PK\x03\x04abc", r"a\.txt\.gz is not a text but a zip archive"),
        ("a.txt", b"%PDF-1.7\n", r"a\.txt is not a text but a PDF"),
        ("a.txt", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100), "a document of Office"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_also_on_request(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match=message):
        whole(path)
    if data:
        with pytest.raises(DamagedFile, match=message):
            salvaged(path)
