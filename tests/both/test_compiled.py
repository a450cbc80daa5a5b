"""Machine code on disk: made once, loaded whole or not at all, and never for other sources."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gpt2_chinese import compiled

SOURCE = """
import numpy as np
from numba import carray, cfunc, njit, types

@njit
def triangle(number):
    total = 0
    for summand in range(number + 1):
        total += summand * FACTOR
    return total

FACTOR = 1

def into(result, number):
    carray(result, 1)[0] = triangle(number)

def compile_entry():
    return cfunc(types.void(types.CPointer(types.int64), types.int64))(into)
"""


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "triangle_kernel.py"
    path.write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(compiled.sys.modules, "triangle_kernel", raising=False)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    return path


def triangle(kernel: Path, number: int) -> int:
    result = np.zeros(1, dtype=np.int64)
    compiled.load_function("triangle_kernel", [kernel], arguments=2)(result.ctypes.data, number)
    return int(result[0])


def test_only_the_first_run_compiles(kernel, tmp_path, monkeypatch, capsys):
    assert triangle(kernel, 10) == 55
    assert "compiling triangle_kernel" in capsys.readouterr().err
    monkeypatch.setattr(compiled, "compile_module", pytest.fail)
    assert triangle(kernel, 4) == 10
    assert capsys.readouterr().err == ""
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_changed_source_and_damaged_code_are_compiled_anew(kernel, tmp_path, monkeypatch):
    assert triangle(kernel, 10) == 55
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert triangle(kernel, 10) == 55
    assert len(file.read_bytes()) == len(whole)

    kernel.write_text(SOURCE.replace("FACTOR = 1", "FACTOR = 100"), encoding="utf-8")
    monkeypatch.delitem(compiled.sys.modules, "triangle_kernel")
    compiled.importlib.invalidate_caches()
    assert triangle(kernel, 10) == 5500


def test_folder_that_cannot_be_written_is_passed_over(kernel, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("not a folder")
    folders = [tmp_path / "file" / "__pycache__", tmp_path / "home"]
    monkeypatch.setattr(compiled, "cache_folders", lambda: folders)
    assert triangle(kernel, 3) == 6
    assert len(list((tmp_path / "home").iterdir())) == 1

    monkeypatch.setattr(compiled, "cache_folders", lambda: folders[:1])
    assert triangle(kernel, 3) == 6
    assert "set NUMBA_CACHE_DIR to a folder that can be written" in capsys.readouterr().err


def test_code_that_needs_numba_at_run_time_is_not_accepted(kernel, monkeypatch):
    raising = SOURCE.replace("    total = 0\n", "    total = 0\n    if number < 0:\n        raise ValueError\n")
    kernel.write_text(raising, encoding="utf-8")
    with pytest.raises(AssertionError, match="only Numba's runtime"):
        triangle(kernel, 3)


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_a_folder_for_code_is_one_that_nobody_else_can_write_or_exchange(tmp_path):
    folder = compiled.make_trusted_folder(tmp_path / "cache/code")
    assert folder == (tmp_path / "cache/code").resolve() and folder.stat().st_mode & 0o777 == 0o700
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert compiled.make_trusted_folder(link) == folder  # so that nobody exchanges the link later
    for place in (folder, folder.parent):
        place.chmod(0o777)
        with pytest.raises(PermissionError, match=str(place)):
            compiled.make_trusted_folder(folder)
        place.chmod(0o700)
    assert compiled.make_trusted_folder(folder) == folder
    with pytest.raises(FileNotFoundError):
        compiled.make_trusted_folder(Path("~/.cache"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_of_another_user_is_not_taken_for_code(tmp_path):
    (tmp_path / "code").mkdir(mode=0o700)
    os.chown(tmp_path / "code", 12345, 12345)
    with pytest.raises(PermissionError):
        compiled.make_trusted_folder(tmp_path / "code")
