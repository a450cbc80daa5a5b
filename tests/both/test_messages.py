"""Messages in Chinese: a table of two columns whose left one is what the code says."""

from __future__ import annotations

import argparse
import ast
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from gpt2_chinese.messages import TABLE, TranslatedStream, language_of, translated

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *ROOT.glob("*.py"),
    *(path for path in (ROOT / "gpt2_chinese").rglob("*.py") if path.name != "messages_zh.py"),
]


def printed_texts(paths: list[Path]) -> list[str]:
    """The strings of the code, with {} for values."""
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{\w*:[^{}]*\}", "{}", node.value))  # for str.format
    return [line for text in found for line in text.split("\n")]


def sentences_of_argparse() -> set[str]:
    return {re.sub(r"%(\(\w+\))?[sr]", "{}", text) for text in printed_texts([Path(argparse.__file__)])}


def test_every_sentence_of_the_table_is_one_of_the_code():
    texts = set(printed_texts(SOURCES))
    texts |= {re.sub(r"^(error|warning|note|report): ", "", text) for text in texts}
    # A few are put together from two strings when they are printed.
    texts |= {f"{text} {{}}" for text in texts} | {f"{{}}: {text}" for text in texts}
    texts |= sentences_of_argparse()
    missing = [english for english, _ in TABLE if english not in texts]
    assert not missing


TELLING = {"say", "remark", "print", "warn", "_say", "_remark"}
ARGUMENTS_OF_PROGRAMS = (
    "samples and length",
    "score_prompt",
    "a stop string",
    "logprobs must",
    "a prompt must",
    "token id",
)


def template(node: ast.expr) -> str | None:
    """A string with {} for values, if that is what an expression is."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def told_texts(path: Path) -> list[str]:
    """What a module says or raises, with {} for values."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        if name == "append" and isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "reasons":
            name = "say"  # a plan says why
        if isinstance(node, ast.Raise) or name in TELLING:
            found += [text for argument in call.args if (text := template(argument)) is not None]
    return found


def test_what_a_script_tells_its_user_is_in_the_table():
    """Answers of the server and lines of its log are for programs; so are commands, and arguments of functions."""
    missing = []
    for path in SOURCES:
        if path.name == "server.py" or path.parent.name == "serving":
            continue
        for text in told_texts(path):
            words = re.findall("[A-Za-z]{2,}", re.sub(r"^(note|warning|error): ", "", text).replace("{}", " "))
            if len(words) < 3 or text.startswith(("python ", *ARGUMENTS_OF_PROGRAMS)) or "pip install gguf" in text:
                continue
            line = text.replace("{}", "X1")
            if translated(line) == line:
                missing.append(f"{path.name}: {text}")
    assert not missing


def test_both_columns_have_the_same_values():
    for english, chinese in TABLE:
        assert sorted(map(int, re.findall(r"\{(\d+)\}", chinese))) == list(range(english.count("{}"))), english
        assert re.search("[一-鿿（]", chinese)


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("data/train.json: 2 files, 1,003 documents, 9 characters", "data/train.json：2 个文件，1,003 篇文档，9 字"),
        ("warning: a b.txt has no document: it is empty or blank", "warning: a b.txt 没有文档：文件是空的或只有空白"),
        ("error: there is no x: run build_trainfile.py first, or name the file with --raw_data_path",
         "error: 没有 x：请先运行 build_trainfile.py，或用 --raw_data_path 指定文件"),
        ("cleaned:\n  html: 3 lines changed, 0 left out", "清洗：\n  html：修改 3 行，去掉 0 行"),
        ("corpus     tokenized/: 1,013 tokens; 70 of 6,560 documents held out, 975 tokens",
         "语料       tokenized/：1,013 个 token；6,560 篇文档中的 70 篇留作验证集，975 个 token"),
        ("corpus     tokenized/: 1,013 tokens", "语料       tokenized/：1,013 个 token"),
        ("update 1,234: validation loss 4.2, perplexity 66.69, 3.6482 ± 0.0123 bits per character",
         "第 1,234 步：验证集损失 4.2，困惑度 66.69，每字符 3.6482 ± 0.0123 比特"),
        ("update 9: validation loss 4.2, perplexity 66.69, 3.65 bits per character, with its logits times 0.92",
         "第 9 步：验证集损失 4.2，困惑度 66.69，每字符 3.65 比特，logits 乘以 0.92"),
        ("precision  fp32 on cpu, cpu (this CPU has no bf16 instructions)",
         "精度       fp32，在 cpu, cpu 上（这个 CPU 没有 bf16 指令）"),
        ("train.py: error: argument --lr: 0 is not a number above 0", "train.py: error: 参数 --lr：0 不是大于 0 的数"),
        ("error: port 80 on ::1 is not allowed; choose a --port from 1024 on",
         "error: ::1 的端口 80 不允许使用；请选 1024 以上的 --port"),
        ("listening on http://[::1]:80, loading interrupted", "正在监听 http://[::1]:80，加载 interrupted"),
        ("something else", "something else"),
        ("  1. ", "  1. "),
        ("", ""),
    ],
)  # fmt: skip
def test_a_line_is_translated_with_its_values(english, chinese):
    assert translated(english) == chinese


def test_a_stream_translates_what_is_printed_and_is_otherwise_itself():
    stream = io.StringIO()
    print("chapters: 3", "chapters: 4", sep="\n", file=TranslatedStream(stream))
    assert stream.getvalue() == "章节：3\n章节：4\n"
    assert not TranslatedStream(stream).isatty()


def test_a_bar_on_a_terminal_is_cleared_before_a_translated_line(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", TranslatedStream(terminal))
    monkeypatch.setattr(sys, "stderr", TranslatedStream(terminal))
    with tqdm(total=2, mininterval=0) as bar:
        bar.update()
        bar.write("chapters: 3")
        bar.write("chapters: 4", file=terminal)
    assert re.search(r"\r +\r章节：3\n", terminal.getvalue())
    assert re.search(r"\r +\rchapters: 4\n", terminal.getvalue())


@pytest.mark.parametrize(
    ("arguments", "environment", "language"),
    [
        ([], {"LANG": "zh_CN.UTF-8"}, "zh"),
        (["--lang", "en"], {"LANG": "zh_CN.UTF-8"}, "en"),
        (["--quiet", "--lang=zh"], {}, "zh"),
        ([], {"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
    ],
)
def test_the_flag_goes_before_the_locale(arguments, environment, language):
    assert language_of(environment, arguments) == language


def test_a_script_speaks_chinese_and_its_errors_keep_their_english_word(tmp_path):
    command = [sys.executable, str(ROOT / "make-tokenized.py"), "--raw_data_path", "nowhere.json"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "LC_ALL": "zh_CN.UTF-8"}
    (tmp_path / "vocab.txt").write_text("[SEP]\n[CLS]\n[MASK]\n[PAD]\n[UNK]\n一\n", encoding="utf-8")
    command += ["--vocab_filename", "vocab.txt", "--tokenizer", "char", "--tokenized_data_path", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert "error: 没有 nowhere.json：请先运行 build_trainfile.py" in done.stderr
    assert "分词器：" in done.stdout
