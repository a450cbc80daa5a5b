"""The README says what is there: its file tree, its commands and their flags, in both languages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README.zh.md"]
SCRIPTS = {
    "vocab": ["build_trainfile.py", "make-vocab.py"],
    "train": ["make-tokenized.py", "train.py", "generate.py", "server.py"],
}


def blocks(name: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def tracked_files() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


@pytest.mark.parametrize("readme", READMES)
def test_file_tree_is_the_tree(readme):
    tree = next(block for block in blocks(readme) if "gpt2_chinese/  " in block)
    named: set[str] = set()
    package: set[str] = set()
    for line in tree.splitlines():
        names = re.findall(r"[\w-]+/|[\w.-]+\.(?:py|txt|md|toml)|Makefile", re.sub(r"\(.*?\)", "", line))
        if line.startswith("  "):
            package.add(names[0])
        else:
            named.update(names)
    there = tracked_files()
    top = {name.split("/")[0] + ("/" if "/" in name else "") for name in there}
    assert named == {name for name in top if not name.startswith(".")}
    modules = {name.split("/")[1] for name in there if name.startswith("gpt2_chinese/") and name.endswith(".py")}
    assert package == modules - {"__init__.py"} | {"web/"}


@pytest.mark.parametrize("readme", READMES)
def test_no_placeholder_is_left(readme):
    assert not re.findall(r"\b[A-Z]+_[A-Z_]+\b(?<!CUDA_VISIBLE_DEVICES)", (ROOT / readme).read_text(encoding="utf-8"))


def test_both_languages_show_the_same_commands():
    commands = [
        [line for block in blocks(name) for line in block.splitlines() if line.startswith("python ")]
        for name in READMES
    ]
    assert commands[0] == commands[1]
    assert len(commands[0]) >= 6


@pytest.mark.parametrize("environment", SCRIPTS)
def test_flags_in_the_readme_are_flags_of_the_scripts(environment, script):
    """Each script is asked for its help in the environment that it runs in."""
    if f".venv-{environment}" not in sys.executable and environment not in sys.prefix:
        pytest.skip("another environment's scripts")
    for name in SCRIPTS[environment]:
        help_ = subprocess.run(
            [sys.executable, str(ROOT / name), "--help"], capture_output=True, text=True, check=True
        ).stdout
        for readme in READMES:
            text = (ROOT / readme).read_text(encoding="utf-8")
            for line in re.findall(rf"python {re.escape(name)}(.*)", text):
                for flag in re.findall(r"--\w+", line):
                    assert flag in help_, f"{readme}: {name} has no {flag}"


def test_requirements_are_exact_and_without_apex():
    for name in ("requirements-vocab.txt", "requirements-train.txt", "requirements-dev.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[A-Za-z0-9_-]+==[\d.]+", line) for line in lines), name
        assert not any(line.lower().startswith("apex") for line in lines)
