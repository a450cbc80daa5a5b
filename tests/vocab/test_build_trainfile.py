"""Stage 1 in process: data/*.txt to train.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def build(script, tmp_path):
    """Run the stage on files given by name and content, and give the documents of train.json."""

    def run(files: dict[str, bytes], *flags: str) -> list[str]:
        (tmp_path / "data").mkdir(exist_ok=True)
        for name, data in files.items():
            (tmp_path / "data" / name).write_bytes(data)
        output = tmp_path / "train.json"
        script("build_trainfile").main(["--data_path", f"{tmp_path}/data", "--output_path", str(output), *flags])
        return json.loads(output.read_text(encoding="utf-8"))

    return run


def test_lines_of_all_files_in_name_order(build, capsys):
    assert build({"b.txt": "三\n".encode(), "a.txt": "\ufeff一 \r\n\r\n\u3000二".encode()}) == ["一", "二", "三"]
    printed = capsys.readouterr().out
    assert "2 files, 3 documents, 3 characters" in printed
    assert "3 documents (100.0%) are not longer than 128 characters" in printed


def test_paragraphs_and_files(build):
    text = {"a.txt": "一\n二\n\n\n三\n".encode()}
    assert build(text, "--document", "paragraph") == ["一\n二", "三"]
    assert build(text, "--document", "file") == ["一\n二\n\n\n三"]


def test_auto_encoding_says_what_it_took(build, capsys):
    files = {"a.txt": "感冒了要多喝水，注意休息。".encode("gbk"), "b.txt": "你好".encode("utf-16")}
    assert build(files, "--encoding", "auto") == ["感冒了要多喝水，注意休息。", "你好"]
    printed = capsys.readouterr()
    assert "a.txt: gb18030" in printed.out + printed.err
    assert "b.txt: utf-16" in printed.out + printed.err


def test_skipped_bytes_are_reported(build, capsys):
    assert build({"a.txt": "一\n".encode() + b"\xff\xfe" + "二".encode()}, "--on_error", "skip") == ["一", "二"]
    printed = capsys.readouterr()
    assert "a.txt: 2 bytes are not utf-8 and were skipped" in printed.out + printed.err


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ({}, [], r"no \.txt or \.txt\.gz file"),
        ({"a.txt": b"", "b.txt": b" \n\n"}, [], "there is no text in 2 files; nothing was written"),
        ({"a.txt": "你好，世界".encode("gbk")}, [], "line 1, byte 0: not utf-8"),
        ({"a.txt": b"a"}, ["--encoding", "utf9"], "--encoding utf9: there is no such encoding"),
    ],
)
def test_a_mistake_is_explained_and_leaves_the_old_file(build, tmp_path, files, flags, message):
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises((ValueError, OSError), match=message):
        build(files, *flags)
    assert (tmp_path / "train.json").read_text() == "[]"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "train.json"]


def test_missing_folder_is_named(script, tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_path .*nowhere: there is no such folder"):
        script("build_trainfile").main(["--data_path", str(tmp_path / "nowhere"), "--output_path", str(tmp_path / "t")])


def test_reference_train_json(script, reference, tmp_path):
    output = tmp_path / "train.json"
    script("build_trainfile").main(["--data_path", str(reference / "data"), "--output_path", str(output)])
    expected = json.loads((reference / "data" / "train.json").read_text(encoding="utf-8"))
    assert json.loads(output.read_text(encoding="utf-8")) == expected


def test_chapters_of_novels_in_several_encodings_and_auto_by_file(build, capsys):
    novel = "《山雨》\n作者：佚名\n\n第一章 山雨欲来\n\n　　天色将晚。\n（本章完）\n"
    novel += "第二章　客栈\n　　“请进！”&nbsp;小二喊道。\n"
    files = {"a.txt": novel.encode("gb18030"), "b.txt": "春天的早晨，老人在河边钓鱼。\n孩子们去图书馆。\n".encode()}
    chapters = [
        "《山雨》\n作者：佚名",
        "第一章 山雨欲来\n天色将晚。\n（本章完）",
        "第二章　客栈\n“请进！”&nbsp;小二喊道。",
    ]
    assert build(files, "--encoding", "auto", "--document", "auto")[:3] == chapters
    printed = capsys.readouterr()
    assert "a.txt: --document chapter (2 chapter headings)" in printed.err
    assert "b.txt: --document file (2 lines, 100% of them of at most 40 characters)" in printed.err
    assert "chapters: 2" in printed.out
    assert build(files, "--encoding", "auto", "--document", "chapter")[3:] == [
        "春天的早晨，老人在河边钓鱼。\n孩子们去图书馆。"
    ]
    assert "b.txt has no chapter headings: it is one document" in capsys.readouterr().err


def test_joined_lines_are_counted(build, capsys):
    text = "　　天色将晚，山道上走来一个\n少年，背着一只旧竹篓，脚步很\n急。\n　　雨下了一夜。\n　　他醒了。\n".encode()
    assert build({"a.txt": text}, "--join_lines") == [
        "天色将晚，山道上走来一个少年，背着一只旧竹篓，脚步很急。",
        "雨下了一夜。",
        "他醒了。",
    ]
    assert "line breaks taken out: 2" in capsys.readouterr().out


def test_the_shared_corpora_are_what_their_lines_are(build, corpora):
    """Nothing is cleaned, joined or left out unasked."""
    for name in ("medical_qa.txt", "songci.txt"):
        data = (corpora / name).read_bytes()
        assert build({"a.txt": data}) == [line.strip() for line in data.decode().split("\n") if line.strip()]


def test_duplicates_are_left_out_on_request_and_counted(build, capsys, tmp_path):
    article = "春天的早晨，老人在河边钓鱼，孩子们放学以后去图书馆读书，医生说这种药一天吃三次。"
    files = {"a.txt": f"{article}\n短\n{article}\n".encode(), "b.txt": f"{article[:-1]}！\n短\n别的一篇。\n".encode()}
    assert len(build(files)) == 6
    assert build(files, "--deduplicate", "exact") == [article, "短", article[:-1] + "！", "别的一篇。"]
    assert "duplicates left out: 2 exact, 0 near" in capsys.readouterr().out
    report = tmp_path / "report.txt"
    assert build(files, "--deduplicate", "--clean_report", str(report)) == [article, "短", "别的一篇。"]
    printed = capsys.readouterr()
    assert "duplicates left out: 2 exact, 1 near" in printed.out
    assert "no document" not in printed.err
    assert "duplicates: 2 exact, 1 near" in report.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "report.txt", "train.json"]


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "utf-8"])
def test_no_console_stops_the_stage_and_messages_are_apart_from_results(tmp_path, encoding):
    """A console that lacks a character gets another one; progress and messages go to stderr, results to stdout."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "한국😀.txt").write_text("😀 오늘 날씨\n第二行\n", encoding="utf-8")
    (tmp_path / "data" / "😀.pdf").touch()
    command = [sys.executable, str(ROOT / "build_trainfile.py"), "--data_path", "data", "--output_path", "train.json"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "1"}
    for flags in ([], ["--quiet"], ["--clean", "--deduplicate", "--document", "auto"], ["--doctor"]):
        done = subprocess.run([*command, *flags], cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        printed, said = done.stdout.decode(encoding), done.stderr.decode(encoding)
        assert "settings:" not in printed and "\r" not in said and "\x1b" not in said
        if not flags:
            assert "settings:" in said and "passed over: 1" in said and "train.json: 1 files, 2 documents" in printed
        if flags == ["--quiet"]:
            assert said == "" and "train.json: 1 files" in printed
