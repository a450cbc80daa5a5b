"""build_trainfile.py --doctor on folders that are each wrong in their own way: it names what is wrong first."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_chinese.messages import language_of
from gpt2_chinese.text.doctor import _FINDINGS, _LABELS, examine, screen
from gpt2_chinese.text.formats import list_files

ROOT = Path(__file__).resolve().parents[2]
SUBJECTS = "老人 孩子 医生 先生 邻居 少年 木匠 船夫 老师 母亲".split()
PLACES = "河边 山上 图书馆 医院 街头 院子里 渡口 车站 学校 城里".split()
DEEDS = "钓鱼 读书 看病 散步 等车 种花 下棋 讲故事 修船 听雨".split()
CHARACTERS = bytes(code for lead in range(0xB0, 0xD0) for trail in range(0xA1, 0xFF) for code in (lead, trail)).decode(
    "gbk"
)
WORDS = [subject + "在" + place + deed for subject in SUBJECTS for place in PLACES for deed in DEEDS]


def story(number: int, sentences: int = 14) -> str:
    """A document of about 180 characters, different from the others."""
    chooser = random.Random(number)
    parts = [chooser.choice(WORDS) + "".join(chooser.choices(CHARACTERS, k=6)) for _ in range(sentences)]
    return "，".join(parts) + f"，第{number}天。"


STORIES = [story(number) for number in range(700)]
GOOD = "\n".join(STORIES)
BOOK = "".join(f"第{number}章 题目\n　　{STORIES[number]}\n　　{STORIES[number + 300]}\n" for number in range(1, 300))
BROKEN = "\n".join(("".join(STORIES))[start : start + 33] for start in range(0, 120_000, 33))
ENGLISH = "\n".join(f"On day {number} the old man went down to the river to fish, and nobody saw him come back." * 3
                    for number in range(600))  # fmt: skip

FOLDERS = {
    "nothing": {"book.pdf": b"%PDF", "old.doc": b"x"},
    "unreadable": {"a.txt": GOOD.encode(), "b.jsonl": '{"标题": "甲", "作者": "乙"}\n'.encode()},
    "encoding": {"a.txt": GOOD.encode("gb18030"), "b.txt": STORIES[0].encode()},
    "bad_bytes": {"a.txt": GOOD.encode() + b"\xff\xfe\xff" + STORIES[1].encode()},
    "bad_records": {
        "a.jsonl": "\n".join(json.dumps({"text": text}) for text in STORIES).encode() + b'\n{"text": 5}\n{"x"'
    },
    "mojibake": {"a.txt": (GOOD + "\n" + STORIES[2].encode().decode("latin-1") + "\n").encode()},
    "replaced": {"a.txt": GOOD.replace("老人", "老\ufffd").encode()},
    "language": {"a.txt": ENGLISH.encode()},
    "broken": {"a.txt": BROKEN.encode()},
    "chapters": {"novel.txt": BOOK.encode()},
    "short": {
        "a.txt": "\n".join(
            "，".join(text.split("，")[start : start + 3]) + "。" for text in STORIES for start in (0, 4, 8)
        ).encode()
    },
    "duplicates": {"a.txt": "\n".join(STORIES + STORIES[:100]).encode()},
    "html": {"a.txt": GOOD.replace("，", "&nbsp;", 30).encode()},
    "ads": {"a.txt": "\n".join(text + "\n请到www.example.com阅读" for text in STORIES).encode()},
    "invisible": {"a.txt": GOOD.replace("老人", "老\u200b人").encode()},
    "empty": {"a.txt": GOOD.encode(), "b.txt": b"\n \n"},
    "little": {"a.txt": "\n".join(STORIES[:20]).encode()},
}


@pytest.fixture
def folder(tmp_path):
    def make(files: dict[str, bytes]):
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        return tmp_path

    return make


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_is_wrong_is_named_first_in_both_languages_on_one_screen(folder, kind):
    path = folder(FOLDERS[kind])
    found = examine(list_files(path, may_be_empty=True))
    if kind in ("short", "ads"):  # short lines are among the advertisements, too
        assert kind in found.kinds()[:2]
    else:
        assert found.kinds()[0] == kind
    for language, column in (("en", 0), ("zh", 1)):
        lines = screen(found, "data/", language)
        assert len(lines) <= 24
        beginning = _FINDINGS[found.kinds()[0]][column].split("{")
        assert lines[2].startswith("  1. ") and all(part.split("}")[-1] in lines[2] for part in beginning)
        assert "{" not in "".join(lines)


def test_a_good_folder_has_nothing_wrong(folder):
    found = examine(list_files(folder({"a.txt": GOOD.encode(), "b.txt.gz": gzip.compress(story(9999).encode())})))
    assert found.kinds() == []
    lines = screen(found, "data/", "en")
    assert lines[1] == "nothing is wrong"
    text = "\n".join(lines)
    assert "files        .txt 2; utf-8 2; passed over 0" in text
    assert "documents    701 (--document line)" in text
    assert "make-tokenized.py keeps 701 documents" in text


def test_the_advice_mends_the_folder(folder, script, tmp_path_factory):
    """The flags of the last line are those that build_trainfile.py takes, and then little is wrong."""
    path = folder({"a.txt": "\n".join(STORIES[640:]).encode("gb18030"), "novel.txt": BOOK.encode("utf-16")})
    found = examine(list_files(path))
    flags = " ".join(found.flags()).split()
    assert flags == ["--encoding", "auto", "--document", "auto"]
    output = tmp_path_factory.mktemp("out") / "train.json"
    script("build_trainfile").main(["--data_path", str(path), "--output_path", str(output), *flags])
    documents = json.loads(output.read_text(encoding="utf-8"))
    assert STORIES[650] in documents and any(document.startswith("第7章 题目\n") for document in documents)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_screen_that_cannot_be_written_is_an_error(folder):
    command = [
        sys.executable,
        str(ROOT / "build_trainfile.py"),
        "--doctor",
        "--data_path",
        str(folder(FOLDERS["little"])),
    ]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    assert done.returncode == 2 and done.stderr.endswith("error: stdout: No space left on device\n")


def test_the_script_writes_nothing_and_speaks_the_users_language(folder, script, capsys, monkeypatch):
    path = folder(FOLDERS["little"])
    before = sorted(path.iterdir())
    for variable in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(variable, raising=False)
    for locale, said in (("zh_CN.UTF-8", "问题（最严重的在前）："), ("en_US.UTF-8", "what is wrong, the worst first:")):
        monkeypatch.setenv("LANG", locale)
        script("build_trainfile").main(
            ["--data_path", str(path), "--output_path", str(path / "x" / "train.json"), "--doctor"]
        )
        assert said in capsys.readouterr().out.split("\n")
    assert sorted(path.iterdir()) == before


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_TW.Big5"}, "zh"),
        ({"LC_ALL": "C", "LANG": "zh_CN"}, "en"),
        ({"LC_ALL": "", "LC_MESSAGES": "zh_CN.GBK", "LANG": "de_DE"}, "zh"),
    ],
)
def test_the_language_is_the_locales(environment, language):
    assert language_of(environment) == language


def test_both_languages_have_the_same_fields():
    def fields(text: str) -> set[str]:
        return {part.split("}")[0] for part in text.split("{")[1:]}

    for english, chinese in [*_FINDINGS.values(), *_LABELS.values()]:
        assert fields(english) == fields(chinese)


def test_large_folders_are_read_in_part(folder, monkeypatch):
    monkeypatch.setattr("gpt2_chinese.text.doctor.MAX_BYTES", 1 << 20)
    path = folder({f"{number}.txt": (GOOD * 3).encode() for number in range(6)})
    found = examine(list_files(path))
    assert found.read_bytes < found.file_bytes
    assert any("only the first" in line for line in screen(found, "data/", "en"))
