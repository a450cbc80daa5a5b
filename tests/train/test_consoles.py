"""train.py, generate.py and server.py where the console lacks characters, and in Chinese."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import write_corpus, write_shape
from tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
CONSOLES = {
    "gbk": {"PYTHONIOENCODING": "gbk", "LANG": "C"},
    "ascii": {"PYTHONIOENCODING": "ascii", "LANG": "C"},
    "C": {"PYTHONIOENCODING": "", "LC_ALL": "C"},  # Python writes UTF-8 then
    "chinese": {"PYTHONIOENCODING": "gbk", "LC_ALL": "zh_CN.GBK"},
}
TRAIN_FLAGS = [
    "--device",
    "cpu",
    "--model_config",
    "shape.json",
    "--epochs",
    "1",
    "--val_fraction",
    "0.2",
    "--lr",
    "1e-2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with pieces, a shape and a model."""
    folder = tmp_path_factory.mktemp("consoles")
    before = Path.cwd()
    os.chdir(folder)
    write_corpus([60] * 8)
    write_shape()
    os.chdir(before)
    save_tiny_model(folder / "tiny")
    return folder


def run(folder: Path, console: str, script: str, *flags: str, to_file: bool, status: int = 0) -> tuple[str, str]:
    """Run a script in a console of that encoding, through pipes or into files; gives its stdout and stderr."""
    command = [sys.executable, str(ROOT / script), *flags]
    environment = {**os.environ, "LC_MESSAGES": "", **CONSOLES[console]}
    if to_file:
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            returncode = subprocess.run(command, cwd=folder, env=environment, stdout=out, stderr=err).returncode
        printed, said = (folder / "out").read_bytes(), (folder / "err").read_bytes()
    else:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
        returncode, printed, said = done.returncode, done.stdout, done.stderr
    encoding = CONSOLES[console]["PYTHONIOENCODING"] or "utf-8"
    assert returncode == status, said
    assert b"Traceback" not in said and b"\x1b" not in printed + said
    return printed.decode(encoding), said.decode(encoding)


@pytest.mark.parametrize(("console", "to_file"), [("gbk", True), ("ascii", False), ("C", True), ("chinese", False)])
def test_generate_writes_a_replacement_for_what_a_console_lacks(folder, console, to_file):
    flags = ["--model_path", "tiny", "--device", "cpu", "--nsamples", "2", "--length", "3", "--prefix", "一😀한"]
    printed, said = run(folder, console, "generate.py", *flags, to_file=to_file)
    assert printed.count("SAMPLE") == 2 and "�" not in printed
    assert {"gbk": "一??", "ascii": "???", "C": "一😀한", "chinese": "一??"}[console] in printed
    assert "--nsamples=2" in said and "--nsamples" not in printed
    assert said.startswith("设置：" if console == "chinese" else "settings: ")


def test_generate_translates_messages_and_no_texts(folder):
    flags = ["--model_path", "tiny", "--device", "cpu", "--nsamples", "1", "--length", "1", "--quiet"]
    printed, said = run(folder, "chinese", "generate.py", *flags, "--prefix", "interrupted", to_file=False)
    assert "interrupted" in printed and said == ""
    _, said = run(folder, "chinese", "generate.py", *flags, "--topp", "3", to_file=False, status=2)
    assert said == "error: --topp 必须在 0 到 1 之间，现在是 3.0\n"


@pytest.mark.parametrize("console", CONSOLES)
def test_train_says_everything_on_any_console(folder, console):
    flags = [*TRAIN_FLAGS, "--output_dir", f"model_{console}", "--writer_dir", f"events_{console}"]
    printed, said = run(folder, console, "train.py", *flags, "--sample_prompts", "一,😀", to_file=console != "gbk")
    if console != "chinese":
        assert printed.startswith("settings: ") and "\ncorpus     tokenized/: " in printed
        assert "epoch 1 of 1: loss " in printed and "bits per character" in printed
        assert "updates" in said and "corpus" not in said
    else:
        assert printed.startswith("设置：") and "\n语料       tokenized/：" in printed
        assert "第 1 轮（共 1 轮）：损失 " in printed and "最好的模型" in printed
    with_model = [line for line in printed.splitlines() if line.startswith("python generate.py --model_path model_")]
    assert len(with_model) == 1


def test_a_quiet_run_says_its_figures_and_where_the_model_is(folder):
    flags = [*TRAIN_FLAGS, "--output_dir", "model_quiet", "--writer_dir", "events_quiet", "--quiet"]
    printed, said = run(folder, "ascii", "train.py", *flags, to_file=False)
    assert said == ""
    beginnings = ["epoch 1 of 1", "update ", "trained ", "the best model", "python generate.py"]
    assert len(printed.splitlines()) == len(beginnings)
    assert all(line.startswith(begin) for line, begin in zip(printed.splitlines(), beginnings, strict=True))


def test_two_ranks_speak_the_language_of_their_run(folder):
    flags = [*TRAIN_FLAGS, "--output_dir", "model_two", "--writer_dir", "events_two", "--device", "cpu,cpu"]
    printed, _ = run(folder, "ascii", "train.py", *flags, "--lang", "en", "--sample_prompts", "😀", to_file=False)
    assert "epoch 1 of 1: loss " in printed
    printed, said = run(folder, "chinese", "train.py", *flags, "--overwrite", "--quiet", to_file=False)
    assert "第 1 轮（共 1 轮）：损失 " in printed and said == ""


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--epochs", "0"], "train.py: error: 参数 --epochs：0 不大于 0"),
        (["--tokenized_data_path", "nowhere"], "error: 没有文件夹 nowhere：请先运行 make-tokenized.py"),
        (["--sample_prompts", "\udcff"], "error: --sample_prompts 不是这个终端的编码，请改为给出一个文件"),
    ],
)
def test_errors_of_flags_and_files_keep_their_english_word(folder, flags, sentence):
    _, said = run(folder, "chinese", "train.py", *TRAIN_FLAGS, *flags, to_file=False, status=2)
    assert sentence in said


@pytest.mark.parametrize(
    ("console", "flags", "first", "serving"),
    [
        ("ascii", [], "settings: ", "serving on http://"),
        ("chinese", [], "设置：", "服务地址 http://"),
        ("gbk", ["--quiet"], "serving on http://", "serving on http://"),
    ],
)
def test_the_server_says_where_it_is(folder, console, flags, first, serving):
    command = [
        sys.executable,
        str(ROOT / "server.py"),
        "--model_path",
        "tiny",
        "--port",
        "0",
        "--device",
        "cpu",
        *flags,
    ]
    environment = {**os.environ, "LC_MESSAGES": "", **CONSOLES[console]}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.decode(CONSOLES[console]["PYTHONIOENCODING"]))
            if lines[-1].startswith(serving):
                process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 0 and b"Traceback" not in said
    assert lines[0].startswith(first) and any(line.startswith(serving) for line in lines)
