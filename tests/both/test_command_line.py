"""How scripts end: errors are sentences."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_chinese.command_line import run_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, sys
from tqdm import tqdm
from gpt2_chinese.command_line import check_stdout, run_script

def main():
    with open("kept", "w") as file:
        for number in tqdm(range(5), mininterval=0):
            print("a result", flush=True)
            print("a message", file=sys.stderr)
        os.write(2, b"a library's message")
        file.write("all")
    {}

run_script(main, texts_on_stdout={})
"""
needs_posix = pytest.mark.skipif(os.name != "posix", reason="POSIX shells and devices")


def ending(folder: Path, redirections: str, *, then: str = "", texts: bool = False) -> tuple[int, str]:
    """Run SCRIPT with redirections of a shell; gives its status and what it wrote to a file."""
    (folder / "script.py").write_text(SCRIPT.format(then, texts), encoding="utf-8")
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "script.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LANG": "C"}
    gone, stdout = os.pipe()
    os.close(gone)
    try:
        status = subprocess.run(command, cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE).returncode
    finally:
        os.close(stdout)
    return status, (folder / "kept").read_text(encoding="utf-8")


@needs_posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("redirections", ["", "2>&1", ">/dev/null 2>/dev/full", ">/dev/full 2>&1", "2>&- <&-", ">&-"])
def test_messages_that_nobody_takes_end_no_run(tmp_path, monkeypatch, redirections, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    assert ending(tmp_path, redirections) == (0, "all")


@needs_posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_results_that_cannot_be_written_are_an_error(tmp_path, monkeypatch, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    assert ending(tmp_path, ">/dev/full", texts=True) == (2, "")
    assert ending(tmp_path, ">/dev/full", then="check_stdout()") == (2, "all")
    assert ending(tmp_path, "", then="check_stdout()") == (0, "all")  # whose reader has read enough


def test_memory_that_does_not_suffice_is_a_sentence(capsys):
    with pytest.raises(SystemExit) as end:
        run_script(lambda: [0] * (1 << 60))
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: memory ran out; ")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("--lr 0 is not above 0"), "--lr 0 is not above 0"),
        (FileNotFoundError("there is no folder x"), "there is no folder x"),
        (BlockingIOError(errno.EAGAIN, "another run is writing", "model"), "model: another run is writing"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "a and b: Invalid cross-device link"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ],
)
def test_an_error_is_a_sentence_without_the_system_s_number(error, sentence, capsys):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
