"""The commands and Python examples of README.md and docs/, run as they stand on tiny files of the same names.

The Chinese pages have the same blocks (tests/both/test_docs.py), so only the English ones are run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from layouts import write_layout

ROOT = Path(__file__).resolve().parents[2]
VOCAB_PYTHON = ROOT / ".venv-vocab" / "bin" / "python"
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SENTENCES = [  # of the characters that the tiny published folders have, too
    "高血压病人要少吃盐，多喝水。我们用的水不少，他们要和我们来分，大家和他们在一中国。",
    "多喝水好，少喝水不好。中国人多，我国有的人要少吃盐，我们和他们可以作主。",
    "他一年来中国，一年来我们国家，要和工人们一同生出大水。好 good, 好 night!",
]
DOCUMENTS = [sentence * 4 + SENTENCES[number % 3] * (number % 2) for number in range(12) for sentence in SENTENCES]

NOT_RUN = {
    "make ": "it builds environments; CI's demo and the tests of the stages run what it calls",
    "conda ": "it builds environments",
    "python3 -m venv": "it builds environments",
    "pip install": "it installs",
    "tensorboard ": "a server of somebody else's",
    "vllm ": "a server of somebody else's; `make check-vllm` installs it and compares texts",
    "torchrun ": "it needs two machines; training/test_ranks.py runs two ranks on one",
    "python train.py --device 0,1": "it needs two GPUs; training/test_ranks.py runs two ranks on a CPU",
    "python train.py --minutes": "it trains for minutes; training/test_plan.py runs a short plan",
    "python make-tokenized.py --scheduler": "it needs a cluster; both/test_dask.py has one",
    "ct2-transformers-converter": "it belongs to the Python example below it, which runs it",
}
"""How commands begin that are not run here, and why."""


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and the text of each block of commands or Python."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    commands = re.compile(r"(python|make|curl|conda|pip|torchrun|tensorboard|ct2)\S* ")
    return [(language, text) for language, text in found if language == "python" or commands.match(text)]


def lines_of(block: str) -> list[str]:
    return [re.sub(r"\s+# .*", "", line) for line in block.splitlines() if line.strip()]


BLOCKS = [
    pytest.param(page, text, id=f"{page}-{number}")
    for page in PAGES
    for number, (language, text) in enumerate(blocks(page))
    if language != "python" and not all(line.startswith(tuple(NOT_RUN)) for line in lines_of(text))
]


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """A working folder with everything that the pages name, all of it tiny."""
    if not VOCAB_PYTHON.exists():
        pytest.skip("no .venv-vocab; `make envs` builds it")
    folder = tmp_path_factory.mktemp("stages")
    for name in ("data", "novels", "config"):
        (folder / name).mkdir()
    (folder / "data" / "a.txt").write_text("\n".join(DOCUMENTS) + "\n", encoding="utf-8")
    (folder / "novels" / "b.txt").write_text("\n".join(DOCUMENTS) + "\n", encoding="gb18030")
    tiny_shape = json.loads((ROOT / "config" / "model_config_test.json").read_text(encoding="utf-8"))
    tiny_shape |= {"n_ctx": 64, "n_positions": 64}
    for config in (ROOT / "config").glob("*.json"):
        (folder / "config" / config.name).write_text(json.dumps(tiny_shape), encoding="utf-8")
    run_script("build_trainfile.py", [], folder)
    run_script("make-vocab.py", ["--vocab_size", "2000"], folder)
    run_script("make-tokenized.py", [], folder)
    shutil.copytree(folder / "tokenized", folder / "other")
    run_script(
        "train.py", ["--model_config", "config/model_config_mini.json", "--epochs", "1", "--device", "cpu"], folder
    )
    shutil.copytree(folder / "model" / "final_model", folder / "old_model")
    for name in ("old_model/vocab.txt", "old_model/tokenization_gpt2_chinese.py", "old_model/tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoint", "uer_folder"):
        write_layout(folder / name, "uer", n_ctx=64)
    (folder / "keys.txt").write_text("secret-of-the-test\n", encoding="utf-8")
    return folder


@pytest.fixture
def workspace(stages, tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(stages, folder)
    monkeypatch.chdir(folder)
    return folder


def run_script(script: str, flags: list[str], folder: Path) -> str:
    """Run a script of the project by the Python of its environment; it must succeed. What it printed."""
    of_vocab = script in ("build_trainfile.py", "make-vocab.py")
    command = [str(VOCAB_PYTHON if of_vocab else sys.executable), str(ROOT / script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        input="高血压\n\n",  # for generate.py without --prefix
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, f"{script} {' '.join(flags)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def run_python(command: list[str], folder: Path) -> None:
    script, *flags = command
    if script == "-m":
        done = subprocess.run([sys.executable, *command], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0
        return
    if script == "train.py":
        if "--resume" in flags:  # of the run that the same command without it began
            run_script(script, [flag for flag in flags if flag != "--resume"] + ["--overwrite"], folder)
        elif not {"--eval_only", "--report_only"} & set(flags):
            flags = [*flags, "--overwrite"]
        if "--report_only" in flags:
            run_script(script, ["--report", "--epochs", "1", "--overwrite", "--device", "cpu"], folder)
        flags += [] if "--device" in flags or "--report_only" in flags else ["--device", "cpu"]
    elif script == "build_trainfile.py" and value_after("--encoding", flags) not in (None, "auto"):
        for path in (folder / "data").glob("*.txt"):
            path.write_text(path.read_text(encoding="utf-8"), encoding=value_after("--encoding", flags))
    elif script in ("make-vocab.py", "make-tokenized.py"):
        flags = [*flags, "--overwrite"]
    elif script == "generate.py":
        flags = [*flags, "--device", "cpu"]
    printed = run_script(script, flags, folder)
    if script == "generate.py":
        assert "SAMPLE" in printed or "高血压" in printed


def value_after(name: str, flags: list[str]) -> str | None:
    return flags[flags.index(name) + 1] if name in flags else None


class Server:
    """A server.py of its own, started as a page says; the requests of a page go to its port."""

    def __init__(self, flags: list[str], folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        where = flags.index("--port") if "--port" in flags else None
        if where is not None:
            del flags[where : where + 2]
        command = [sys.executable, str(ROOT / "server.py"), *flags, "--port", str(self.port), "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        self._log = (folder / "server.log").open("w", encoding="utf-8")
        self._process = subprocess.Popen(command, cwd=folder, env=environment, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + 120
        while "serving on" not in self.printed():
            assert self._process.poll() is None and time.monotonic() < deadline, self.printed()
            time.sleep(0.1)

    def printed(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8")

    def ask(self, command: str, environment: dict[str, str]) -> str:
        """Run a curl command of a page; the response must be a success. Its body."""
        command = command.replace("127.0.0.1:5005", f"127.0.0.1:{self.port}")
        asked = ["sh", "-c", command.replace("curl ", "curl -sS --fail-with-body ", 1)]
        done = subprocess.run(
            asked, env={**os.environ, **environment}, capture_output=True, text=True, encoding="utf-8", timeout=120
        )
        assert done.returncode == 0, command + done.stdout + done.stderr + self.printed()
        return done.stdout

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(60) == 0, self.printed()
        self._log.close()


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_the_commands_of_a_page_run(page, block, workspace):
    server: Server | None = None
    ran = 0
    try:
        for line in lines_of(block):
            if line.startswith(tuple(NOT_RUN)):
                continue
            ran += 1
            if line.startswith("curl "):
                if shutil.which("curl") is None:
                    pytest.skip("no curl")
                admin = ["--admin_key", "secret-of-the-admin"] if "/admin/" in line else []
                server = server or Server(admin, workspace)
                answered = server.ask(line, {"ADMIN_KEY": "secret-of-the-admin"})
                events = re.findall(r"^data: (.*)", answered, re.MULTILINE) if "stream" in line else [answered]
                assert events and all(json.loads(event) is not None for event in events)
                continue
            program, *command = shlex.split(line)
            assert program == "python", f"{page}: {line!r} is neither run nor in NOT_RUN"
            if command[0] == "server.py":
                server = Server(command[1:], workspace)
            else:
                run_python(command, workspace)
    finally:
        if server is not None:
            server.stop()
    assert ran


@pytest.fixture(scope="module")
def openai_server(stages):
    server = Server([], stages)
    yield server
    server.stop()


def test_the_python_examples_of_using_the_model_elsewhere_run(workspace, capsys):
    """In order: the first two belong together; the third is of a model of characters, the fourth of CTranslate2."""
    first, second, characters, ctranslate2 = (
        text for language, text in blocks("docs/using-the-model-elsewhere.md") if language == "python"
    )
    names: dict[str, object] = {}
    exec(first, names)
    exec(second, names)
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("孩子发烧") for line in printed) == 2 and any("高血压患者" in line for line in printed)

    from ctranslate2.converters import TransformersConverter

    TransformersConverter("model/final_model", trust_remote_code=True).convert("converted")
    exec(ctranslate2, {})
    assert capsys.readouterr().out.startswith("孩子发烧")

    shutil.rmtree("model/final_model")
    run_script("make-tokenized.py", ["--vocab_filename", "checkpoint", "--overwrite"], workspace)
    flags = ["--pretrained_model", "checkpoint", "--epochs", "1", "--device", "cpu", "--overwrite"]
    run_script("train.py", flags, workspace)
    exec(characters, {})
    assert capsys.readouterr().out.strip()


def test_the_openai_example_runs(openai_server, capsys):
    (example,) = (text for language, text in blocks("docs/completions-and-server.md") if language == "python")
    exec(example.replace("127.0.0.1:5005", f"127.0.0.1:{openai_server.port}"), {})
    assert capsys.readouterr().out.count("孩子发烧") == 0, "the echo is off: completions only"


def test_every_python_example_is_run():
    of_python = {page: sum(language == "python" for language, _ in blocks(page)) for page in PAGES}
    expected = {"docs/using-the-model-elsewhere.md": 4, "docs/completions-and-server.md": 1}
    assert {page: count for page, count in of_python.items() if count} == expected
