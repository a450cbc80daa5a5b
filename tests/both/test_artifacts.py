"""Files are whole or not there, vocabulary files are checked line by line, and the house keeps its rules."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_chinese import artifacts
from gpt2_chinese.artifacts import atomic_write, exclusive_lock, read_json, sha256_of, write_json, write_lines
from gpt2_chinese.command_line import run_script
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS, read_vocabulary

needs_locks = pytest.mark.skipif(artifacts.fcntl is None, reason="no locks of files on Windows")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_with_the_file(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match="a.txt") as error, atomic_write(path) as file:
        file.write("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@needs_locks
def test_two_writers_of_one_file_are_told_apart(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as first:
        first.write("first")
        with pytest.raises(BlockingIOError, match="another run is writing it.*a.txt"), atomic_write(path):
            pass
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_has_left_is_written_over(tmp_path):
    path = tmp_path / "a.txt"
    (tmp_path / ".a.txt.tmp").write_text("half of a longer text")
    with atomic_write(path) as file:
        file.write("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@needs_locks
def test_a_folder_is_held_by_one_run(tmp_path):
    with exclusive_lock(tmp_path / "folder"):
        with (
            pytest.raises(BlockingIOError, match="another run is writing into this folder"),
            exclusive_lock(tmp_path / "folder"),
        ):
            pass
    with exclusive_lock(tmp_path / "folder"):
        pass


def test_replacing_makes_the_folder_and_keeps_line_ends(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as file:
        file.write("一\n二\n")
    assert path.read_bytes() == "一\n二\n".encode()


def test_hash_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_round_trip_and_place_of_an_error(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"中": [1]})
    assert read_json(path) == {"中": [1]}
    path.write_text('{\n "a": }')
    with pytest.raises(ValueError, match=r"a\.json is not JSON: line 2, column 7"):
        read_json(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.json is not UTF-8"):
        read_json(path)


def test_vocabulary_round_trip_with_odd_tokens(tmp_path):
    tokens = [*SPECIAL_TOKENS, "你好", "\u2028", "##a", "\x85"]
    write_lines(tmp_path / "v.txt", tokens)
    assert read_vocabulary(tmp_path / "v.txt") == tokens


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "v.txt is empty"),
        ([*SPECIAL_TOKENS, "a", "b", "a"], "line 8: 'a' stands in line 6 already"),
        ([*SPECIAL_TOKENS, "a", "", "b"], "line 7 is empty"),
    ],
)
def test_bad_vocabulary_is_named_with_the_line(tmp_path, lines, message):
    path = tmp_path / "v.txt"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_vocabulary(path)


def test_missing_and_misencoded_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make-vocab\.py first"):
        read_vocabulary(tmp_path / "v.txt")
    (tmp_path / "v.txt").write_bytes(("\n".join(SPECIAL_TOKENS) + "\n你好\n").encode("gbk"))
    with pytest.raises(ValueError, match="line 6: byte .* is not UTF-8"):
        read_vocabulary(tmp_path / "v.txt")


@pytest.mark.parametrize(
    ("raised", "status"),
    [(ValueError("bad"), 2), (FileNotFoundError("gone"), 2), (KeyboardInterrupt(), 130), (None, 0)],
)
def test_scripts_end_with_a_line_and_a_status(capsys, raised, status):
    def main() -> None:
        if raised is not None:
            raise raised

    with pytest.raises(SystemExit) as exit_:
        run_script(main)
    assert (exit_.value.code or 0) == status
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    if status == 2:
        assert printed == f"error: {raised}\n"


def test_the_text_wing_imports_neither_torch_nor_tensorflow():
    """It runs in both environments; its compiled parts import Numba and nothing else."""
    root = Path(__file__).parents[2]
    files = [*(root / "gpt2_chinese").glob("*.py"), *(root / "gpt2_chinese" / "text").glob("*.py")]
    needs_torch = {"model_folder", "precision", "gguf", "weights_file", "tokenization_gpt2_chinese"}
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in files if path.stem not in needs_torch]
    assert len(names) >= 12
    code = "import sys, importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in sorted(names))
    code += "print(sorted({'torch', 'tensorflow', 'keras', 'transformers', 'thulac'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
