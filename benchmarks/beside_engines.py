"""Decoding beside OpenVINO GenAI and llama.cpp on a CPU, in turns.

    python3 -m venv openvino
    openvino/bin/pip install torch==2.13.0
    openvino/bin/pip install --no-deps -r benchmarks/requirements-openvino.txt
    .venv-train/bin/python benchmarks/beside_engines.py --openvino_python openvino/bin/python

GPT-2 small with a vocabulary of 50,005 and random weights, a prompt of 8 tokens, top-k 30, as in generation.py. Each
contender is a process of its own; only one at a time has work. None has a prefix cache, since all prompts are the same.
OpenVINO's model is exported by optimum-intel, whole and with weights of 8 bits; llama.cpp's files are written by
gpt2_chinese/gguf.py, and its server (xllamacpp, of requirements-dev.txt) takes the samples of a request as requests.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORK = {"5 x 50": (1, 5, 50), "1 x 20": (1, 1, 20), "32 x 50": (32, 1, 50), "128 x 50": (128, 1, 50)}
"""Requests, samples of each, tokens of each sample."""
OURS = ("bf16", "int8", "fp32")
OPENVINO = ("bf16", "int8", "f32")
LLAMA = ("bf16", "q8_0", "f32")
RIVALS = {
    "bf16": ("OpenVINO, bf16", "OpenVINO, f32", "llama.cpp, bf16", "llama.cpp, f32"),
    "int8": ("OpenVINO, int8", "llama.cpp, q8_0"),
}
"""Of ours in a precision, the fastest counts."""
MAX_SEQUENCES = 128
PROMPT = [2, *range(1000, 1007)]  # begins with [MASK], as generation.py's
TOP_K = 30
Decode = Callable[[int, int, int], Any]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openvino_python", help="the Python of an environment with OpenVINO, else it is left out")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up (%(default)s)")
    parser.add_argument("--work", default=",".join(WORK), help="(default: %(default)s)")
    parser.add_argument("--contend", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    return args


def export(folder: Path) -> None:
    """With OpenVINO's Python: its two forms of the model in `folder`/model, in `folder`/f32 and `folder`/int8."""
    from optimum.intel import OVModelForCausalLM

    for name in ("f32", "int8"):
        model = OVModelForCausalLM.from_pretrained(
            folder / "model", export=True, compile=False, load_in_8bit=name == "int8"
        )
        model.save_pretrained(folder / name)


def write_gguf(folder: Path) -> None:
    """With our Python: llama.cpp's forms of the model in `folder`/model."""
    from benchmarks.generation import VOCABULARY
    from gpt2_chinese import gguf

    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    for name in LLAMA:
        gguf.write_gguf(folder / "model", folder / f"{name}.gguf", vocab_file=str(vocabulary), type_=name)


def llama_decoder(name: str, folder: Path) -> Decode:
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / f"{name}.gguf")
    params.n_parallel, params.n_ctx = MAX_SEQUENCES, 64 * MAX_SEQUENCES
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads()
    server = xllamacpp.Server(params)
    clients = ThreadPoolExecutor(MAX_SEQUENCES)

    def decode(requests: int, samples: int, tokens: int) -> None:
        request = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "cache_prompt": False}
        request |= {"temperature": 1.0, "top_k": TOP_K, "top_p": 1.0, "min_p": 0.0}
        results = [clients.submit(server.handle_completions, request) for _ in range(requests * samples)]
        assert [one.result()["usage"]["completion_tokens"] for one in results] == [tokens] * len(results)

    return decode


def openvino_decoder(name: str, folder: Path) -> Decode:
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB
    scheduler.max_num_seqs = MAX_SEQUENCES
    scheduler.enable_prefix_caching = False
    properties = {
        "INFERENCE_PRECISION_HINT": "bf16" if name == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": threads(),
    }
    pipeline = genai.ContinuousBatchingPipeline(
        str(folder / ("int8" if name == "int8" else "f32")), scheduler, "CPU", properties
    )

    def decode(requests: int, samples: int, tokens: int) -> None:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos = config.do_sample = True
        config.top_k, config.num_return_sequences = TOP_K, samples
        results = pipeline.generate([openvino.Tensor(np.array([PROMPT]))] * requests, [config] * requests)
        ids = [ids for result in results for ids in result.m_generation_ids]
        assert [len(each) for each in ids] == [tokens] * (requests * samples)

    return decode


def our_decoder(name: str) -> Decode:
    import torch

    from benchmarks.generation import VOCABULARY, engine_contender, random_model
    from gpt2_chinese.decoding.engine import Engine
    from gpt2_chinese.text.word_tokenizer import WordTokenizer

    torch.set_num_threads(threads())
    engine = Engine(random_model(12), WordTokenizer(VOCABULARY), max_num_seqs=MAX_SEQUENCES, precision=name)
    return engine_contender(engine.__enter__())


def threads() -> int:
    return len(os.sched_getaffinity(0))


def contend(kind: str, folder: Path) -> None:
    """A contender: requests, samples and tokens come in, the seconds that they took go out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    whose, name = kind.split(",")
    if whose == "ours":
        decode = our_decoder(name)
    else:
        decode = {"OpenVINO": openvino_decoder, "llama.cpp": llama_decoder}[whose](name, folder)
    for line in sys.stdin:
        began = time.perf_counter()
        decode(*map(int, line.split()))
        print(time.perf_counter() - began, file=answers, flush=True)


def ask(process: subprocess.Popen[str], work: tuple[int, int, int]) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(" ".join(map(str, work)) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"{process.args} has ended")
    return float(answer)


def main() -> None:
    args = parse_args()
    if args.export:
        export(args.export)
        return
    if args.contend:
        contend(args.contend[0], Path(args.contend[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model = importlib.import_module("benchmarks.generation").random_model
        random_model(12).save_pretrained(folder / "model")
        write_gguf(folder)
        contenders = [("ours", sys.executable, OURS), ("llama.cpp", sys.executable, LLAMA)]
        if args.openvino_python:
            subprocess.run([args.openvino_python, __file__, "--export", str(folder)], check=True, stdout=2)
            contenders.append(("OpenVINO", args.openvino_python, OPENVINO))
        processes = {
            f"{whose}, {kind}": subprocess.Popen(
                [python, __file__, "--contend", f"{whose},{kind}", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for whose, python, kinds in contenders
            for kind in kinds
        }
        try:
            for work in args.work.split(","):
                compare(processes, work, args.rounds)
        finally:
            for process in processes.values():
                process.kill()
                process.wait()


def compare(processes: dict[str, subprocess.Popen[str]], work: str, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for number in range(rounds + 1):
        for name, process in processes.items():
            took = ask(process, WORK[work])
            if number:
                seconds[name].append(took)
    print(f"{work}, {threads()} threads, {rounds} rounds in turns")
    for name, taken in seconds.items():
        print(f"  {name:16} {statistics.median(taken):7.3f} s ({min(taken):.3f} to {max(taken):.3f})")
    for kind, rivals in RIVALS.items():
        fastest = min((name for name in rivals if name in seconds), key=lambda name: statistics.median(seconds[name]))
        pairs = zip(seconds[f"ours, {kind}"], seconds[fastest], strict=True)
        times = statistics.median(theirs / mine for mine, theirs in pairs)
        print(f"  ours in {kind} is {times:.2f} times as fast as {fastest}, the fastest of the others")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
