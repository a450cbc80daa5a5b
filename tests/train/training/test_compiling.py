"""torch.compile in a folder of hostile modules, on a machine with hostile users."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import write_corpus, write_shape

from gpt2_chinese.training import loss

ROOT = Path(__file__).resolve().parents[3]
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_takes_nothing_from_its_folder_and_keeps_its_code_where_only_its_user_writes(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_corpus([60] * 4)
    write_shape()
    for name in ("ctypes", "warnings", "signal", "re", "torch", "triton", "sympy", "sitecustomize"):
        Path(f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n", encoding="utf-8")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    (tmp_path / "tmp").mkdir()
    flags = "--device cpu --model_config shape.json --epochs 1 --max_steps 2 --val_fraction 0 --compile on --lang en"
    command = [sys.executable, str(ROOT / "train.py"), *flags.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "compiling:" in done.stdout, done.stderr
    assert not Path("ran").exists()
    (folder,) = (tmp_path / "cache/gpt2_chinese").glob("inductor-*")
    assert list(folder.rglob("*.so")) and not list(Path("tmp").rglob("*.so"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
@pytest.mark.parametrize("given", [False, True])
def test_code_is_kept_in_a_temporary_folder_where_others_may_write_the_user_s_one(tmp_path, monkeypatch, given):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine") if given else "")
    monkeypatch.setattr(loss.atexit, "register", lambda *_, **__: None)
    monkeypatch.setattr(loss.tempfile, "mkdtemp", lambda **_: str(tmp_path / "fresh"))
    folder = tmp_path / f"gpt2_chinese/inductor-{loss._operations_digest()}"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    loss.keep_compiled_code_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ("mine" if given else "fresh"))
    if not given:
        loss.keep_compiled_code_private()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "fresh")


def test_no_script_has_the_name_of_a_module_of_python():
    """torch.compile starts Python with a script's folder first in its path; if that fails it uses no vectors."""
    scripts = [path for folder in (".", "benchmarks", "examples") for path in (ROOT / folder).glob("*.py")]
    assert len(scripts) > 20
    assert not [path for path in scripts if path.stem in sys.stdlib_module_names]
