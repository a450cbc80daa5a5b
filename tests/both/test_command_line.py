"""How scripts end: errors are sentences."""

from __future__ import annotations

import errno

import pytest

from gpt2_chinese.command_line import run_script


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
