"""README and docs/ say what is there, in both languages: modules, commands, flags, error codes, log lines."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from gpt2_chinese.messages import translated
from gpt2_chinese.serving.api import Limits, generate_fields, v1_fields

ROOT = Path(__file__).resolve().parents[2]
ENGLISH = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
CHINESE = ["README.zh.md", *sorted(f"docs/zh/{path.name}" for path in (ROOT / "docs" / "zh").glob("*.md"))]
PAGES = ENGLISH + CHINESE
OTHERS = ["CONTRIBUTING.md", "CHANGELOG.md", *(f"benchmarks/{name}.md" for name in ("README", "RESULTS", "TRIED"))]
SCRIPTS = {
    "vocab": ["build_trainfile.py", "make-vocab.py"],
    "train": ["make-tokenized.py", "train.py", "generate.py", "server.py"],
}
PAGE_OF_FLAGS = {
    "build_trainfile.py": "preparing-texts.md",
    "make-vocab.py": "preparing-texts.md",
    "make-tokenized.py": "preparing-texts.md",
    "train.py": "training.md",
    "generate.py": "completions-and-server.md",
    "server.py": "completions-and-server.md",
}
"""The page that has a row for each flag of a script."""

HOME_MADE = (
    r"\bby heart\b",  # memorise, overfit
    r"\bstands? beside\b|\bstands? still\b",  # co-occurs; is blocked
    r"\bat hand\b",  # available
    r"\bgives? (up|way)\b|\bgiven up\b",  # is cancelled, releases; yields
    r"\bwhat mends it\b|\bthe mend\b",  # what to do
    r"\bin a crowd\b",  # in any batch
    r"\bstarts? anew\b|\bis to be seen\b|\bgone on from\b",  # starts over; is visible; resumed
    "背下来|(?<!GPU )编号|逐比特|逐字节相同|精确续训|应答|停止词|停止串|留出文档|按流读写|内存不足（在 GPU 上）",
)
"""Words of our own where the field has a term, and translations that nobody says; docs/glossary.md has the terms."""

Pair = pytest.mark.parametrize(("english", "chinese"), list(zip(ENGLISH, CHINESE, strict=False)))


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str | None = None) -> list[str]:
    """The fenced blocks of a page: all of them, or those of a language ("" is none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text_of(name), re.MULTILINE | re.DOTALL)
    return [block for of, block in found if language in (None, of)]


def commands(name: str) -> list[str]:
    """The command lines of a page, in blocks and in code spans, without comments."""
    lines = [line for block in blocks(name) for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text_of(name), flags=re.MULTILINE | re.DOTALL))
    programs = r"python3?|make|curl|pip|conda|torchrun|tensorboard|ct2-transformers-converter"
    start = re.compile(rf"(?:[\w.-]+/)*(?:{programs}) ")
    return [re.sub(r"\s+#.*", "", line) for line in [*lines, *spans] if start.match(line)]


def is_tree(block: str) -> bool:
    return "gpt2_chinese/\n" in block


def tracked_files() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = (name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())
    return {name for name in names if not name.startswith(".")}


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/zh/architecture.md"])
def test_the_modules_of_architecture_are_those_of_git(page):
    named: set[str] = set()
    folder = ""
    for line in next(block for block in blocks(page) if is_tree(block)).splitlines():
        depth = len(line) - len(line.lstrip())
        names = line.split() if depth == 0 else line.split()[:1]
        if depth == 2 and names[0].endswith("/"):
            folder = names[0]
        inside = {0: "", 2: "gpt2_chinese/", 4: f"gpt2_chinese/{folder}"}[depth]
        named.update(inside + name for name in names)
    there = tracked_files()
    expected = {name.partition("/")[0] + ("/" if "/" in name else "") for name in there}
    for name in there:
        parts = name.split("/")
        if parts[0] == "gpt2_chinese" and not name.endswith("__init__.py"):
            # A folder of the package, and within it its modules or folders of files.
            expected |= {"/".join(parts[:depth]) + "/" for depth in range(2, min(len(parts), 4))}
            expected |= {name} if name.endswith(".py") else set()
    assert named == expected


def test_every_page_is_there_in_both_languages():
    assert [Path(name).name for name in ENGLISH[1:]] == [Path(name).name for name in CHINESE[1:]]
    assert len(ENGLISH) >= 9


@Pair
def test_both_languages_show_the_same_commands_and_output(english, chinese):
    """A Chinese page may show what the same run says with --lang zh."""
    assert commands(english) == commands(chinese)
    shown = []
    for name in (english, chinese):
        without_tree = [block for block in blocks(name) if not is_tree(block)]
        shown.append([re.sub(r"[ \t]+#.*", "", block) for block in without_tree])
    for ours, theirs in zip(*shown, strict=True):
        assert theirs in (ours, translated(ours))


@Pair
def test_both_languages_have_the_same_sections_and_tables(english, chinese):
    def outline(name: str) -> list[str]:
        text = re.sub(r"^```.*?^```", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
        return re.findall(r"^(#+ |\|)", text, re.MULTILINE)

    assert outline(english) == outline(chinese)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_flags_of_the_commands_exist(page, help_of):
    checked = 0
    for command in commands(page):
        found = re.match(r"\S*(?:python3?|torchrun .*?) ?([\w-]+\.py)\b(.*)", command)
        if found and (help_ := help_of(found[1])):
            checked += 1
            for flag in re.findall(r"(?<!\S)--\w+", found[2]):
                assert re.search(rf"{flag}\b", help_), f"{page}: {found[1]} has no {flag}"
    assert checked or "README" not in page


@pytest.mark.parametrize("script_name", PAGE_OF_FLAGS)
def test_every_flag_has_its_row(script_name, help_of):
    help_ = help_of(script_name)
    if not help_:
        pytest.skip("a script of the other environment")
    flags = set(re.findall(r"(?<![\w-])--[a-z]\w*", help_.partition("options:")[2])) - {"--help"}
    assert flags
    for folder in ("docs", "docs/zh"):
        rows = re.findall(r"^\| (`--.*?) \|", text_of(f"{folder}/{PAGE_OF_FLAGS[script_name]}"), re.MULTILINE)
        described = {flag for row in rows for flag in re.findall(r"--\w+", row)}
        assert not flags - described, f"{folder}/{PAGE_OF_FLAGS[script_name]}"


@pytest.fixture(scope="session")
def help_of():
    """The --help of a script of this environment, "" for one of the other."""

    @cache
    def ask(script_name: str) -> str:
        own = [names for environment, names in SCRIPTS.items() if f".venv-{environment}" in sys.prefix]
        if not any(script_name in names for names in own):
            return ""
        command = [sys.executable, str(ROOT / script_name), "--help"]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout

    return ask


@pytest.mark.parametrize("folder", ["docs", "docs/zh"])
def test_every_error_code_and_field_of_the_server_has_its_row(folder):
    page = text_of(f"{folder}/completions-and-server.md")
    sources = [ROOT / "server.py", *(ROOT / "gpt2_chinese" / "serving").glob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    raised = set(re.findall(r'ApiError\(\s*(\d{3}), "([a-z_0-9]+)"', source))
    assert len(raised) > 10
    for status, code in raised:
        assert f"| {status} | `{code}` |" in page
    generate, v1 = (page.partition("POST /v1/completions ")[number] for number in (0, 2))
    for section, fields in ((generate, generate_fields(Limits())), (v1, v1_fields(Limits()))):
        described = {name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in row.split("`")}
        assert not fields.keys() - described


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES + OTHERS)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = unquote(target).partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target}"


@cache
def printed_strings() -> tuple[tuple[str, str], ...]:
    """Every string of the scripts and the package that is no docstring: its file, and its text with \\0 for values."""
    found = []
    for path in [*ROOT.glob("*.py"), *sorted((ROOT / "gpt2_chinese").rglob("*.py")), *(ROOT / "examples").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append((path.name, "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
                found.append((path.name, node.value))
    return tuple(found)


def test_no_home_made_term_is_left():
    places = [(page, text_of(page)) for page in PAGES + OTHERS if page != "CHANGELOG.md"] + list(printed_strings())
    for place, text in places:
        for term in HOME_MADE:
            found = re.search(term, text, re.IGNORECASE)
            assert not found, f"{place}: {text[max(0, found.start() - 40) : found.end() + 40]!r}"


def quoted_output(name: str) -> list[str]:
    """What scripts have printed, of the plain blocks of a page: no picture, command, row of numbers or sample."""
    plain = [block for block in blocks(name, "") if not is_tree(block) and "──▶" not in block]
    lines = [line for block in plain for line in block.splitlines()]
    is_other = re.compile(r"curl |event: |data: |\s+[\d,]+ |[^\x00-\x7f]{5}")
    return [line for line in lines if line.strip() and not is_other.match(line)]


@pytest.mark.parametrize("page", [page for page in ENGLISH if quoted_output(page)])
def test_quoted_log_lines_are_those_of_the_code(page):
    """Each contains a string of the code, with values in its places: who rewords a message finds its pages."""
    templates = []
    for printed in {line.strip() for _, text in printed_strings() for line in text.splitlines()}:
        literals = printed.split("\0")
        if sum(len(literal.strip()) for literal in literals) >= 15:
            templates.append(re.compile(".*?".join(map(re.escape, literals))))
    for line in quoted_output(page):
        assert any(template.search(line) for template in templates), f"{page}: no script prints {line!r}"


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_are_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES + OTHERS)
def test_no_placeholder_is_left(page):
    assert not re.findall(r"\b(TODO|TBD|FIXME|XXX)\b|@[A-Z]+@", text_of(page))


def test_requirements_are_exact_and_without_apex():
    for name in ("requirements-vocab.txt", "requirements-train.txt", "requirements-dev.txt"):
        lines = [line for line in text_of(name).splitlines() if line and not line.startswith("#")]
        pin = r'[A-Za-z0-9_-]+==[\d.]+(; python_version (<|>=) "3\.\d+")?'
        assert all(re.fullmatch(pin, line) for line in lines), name
        assert not any(line.lower().startswith("apex") for line in lines)


def test_benchmarks_run_from_any_folder():
    for path in (ROOT / "benchmarks").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        before, imports, _ = text.partition("\nfrom gpt2_chinese")
        assert not imports or "sys.path" in before, path.name


def test_make_help_lists_every_target():
    makefile = text_of("Makefile")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    assert targets == re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    for page in PAGES + OTHERS:
        for target in re.findall(r"`make ([a-z-]+)", text_of(page)):
            assert target in targets, f"{page}: make {target}"


def test_the_fast_tests_are_there():
    names = re.findall(r"(?:both|vocab|train|text|decoding|serving|training)/[\w/]*test_\w+\.py", text_of("Makefile"))
    there = {name.removeprefix("tests/") for name in tracked_files()}
    assert len(names) >= 10
    assert not [name for name in names if name not in there and f"train/{name}" not in there]
