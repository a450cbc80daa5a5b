"""--help in both languages: each flag has its Chinese, each Chinese its flag, and lines are as wide as the terminal."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import unicodedata
from functools import lru_cache
from pathlib import Path

import pytest

from gpt2_chinese.help_formatter import display_width, wrapped
from gpt2_chinese.help_zh import DESCRIPTIONS, FLAGS

ROOT = Path(__file__).resolve().parents[2]
OF_TEXTS = [("build_trainfile.py",), ("make-vocab.py",), ("make-tokenized.py",)]
OF_TORCH = [("train.py",), ("generate.py",), ("server.py",), ("-m", "gpt2_chinese.gguf")]
COLUMNS = 90


@lru_cache
def help_of(script: tuple[str, ...], *flags: str) -> str:
    if script in OF_TORCH and importlib.util.find_spec("torch") is None:
        pytest.skip("needs the training environment")
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, *script, "--help", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return done.stdout


def without_space(text: str) -> str:
    return "".join(text.split())


def flags_of(text: str) -> dict[str, str]:
    """What a help says of each flag, without white space."""
    parts = text.partition("\n  -h, --help")[2].split("\n  --")[1:]
    return {part.split()[0].rstrip(","): without_space(part) for part in parts}


@pytest.mark.parametrize("script", OF_TEXTS + OF_TORCH, ids=lambda script: script[-1])
def test_each_flag_is_explained_in_both_languages(script):
    english = help_of(script)
    assert "usage: " in english and not re.search("[一-鿿]", english.replace("token 〿", ""))
    if script[0] == "-m":  # for those who go on with llama.cpp: it has no --lang, but follows LANG
        return
    chinese = help_of(script, "--lang", "zh")
    assert "用法：" in chinese and "选项" in chinese
    ours, theirs = flags_of(english), flags_of(chinese)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    without = [flag for flag, text in theirs.items() if not re.search("[一-鿿]", text)]
    assert not without
    # A default that is a value is the same in both; others are words.
    for flag, text in ours.items():
        default = re.search(r"\(default:([\w./:*-]*[\d./*])\)$", text)
        assert default is None or f"（默认：{default[1]}）" in theirs[flag], flag
    for line in chinese.partition("选项")[2].splitlines():
        assert display_width(line) <= COLUMNS or " " not in line.strip(), line


def test_each_chinese_sentence_is_of_a_flag():
    said = without_space("".join(help_of(script) for script in OF_TORCH + OF_TEXTS))
    assert not [text for text in FLAGS if without_space(text) not in said]


def test_the_commands_of_a_description_are_the_same_in_both_languages():
    def commands(text: str) -> list[str]:
        return re.findall("^    python .*", text, re.MULTILINE)

    source = (ROOT / "train.py").read_text(encoding="utf-8")
    assert commands(DESCRIPTIONS["train.py"]) == commands(source.split('"""')[1])


def test_lines_are_as_wide_as_they_look():
    text = "用 --resume 从检查点继续（默认：model/checkpoints/step_{n}/），结果与没有中断过完全一样；none 从头开始。"
    for width in range(24, 80):
        lines = wrapped(text, width)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(display_width(line) <= width for line in lines if not re.search(r"\S{24}", line))
        assert all(line[0] not in "，。；）" and line[-1] not in "（" for line in lines)
    assert display_width("中a") == 3 and unicodedata.east_asian_width("：") == "F"
    assert wrapped("", 10) == [""]
