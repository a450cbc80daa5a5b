"""What rounding costs: fp32, bf16 and int8 of the compiled decoder on the same windows of a text.

    .venv-train/bin/python benchmarks/rounding.py demo/model/best_model data/daily_health_qa.txt

The loss in nats and the perplexity of the true next tokens; beside fp32, the Kullback-Leibler divergence of the
distributions and the share of places with the same likeliest token. `--random` adds GPT-2 small with random weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.generation import random_model  # noqa: E402
from gpt2_chinese.decoding.compiled_decoder import CompiledDecoder  # noqa: E402
from gpt2_chinese.model_folder import load_model  # noqa: E402

PRECISIONS = ("fp32", "bf16", "int8")
RANDOM_WINDOWS, RANDOM_TOKENS = 32, 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the model folder")
    parser.add_argument("text", type=Path, help="a TXT file, a document a line")
    parser.add_argument("--windows", type=int, default=256, help="evenly from the text (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of a window (default: %(default)s)")
    parser.add_argument("--random", action="store_true", help="also a random GPT-2 small, on random tokens")
    return parser.parse_args()


def log_probabilities(model: Any, precision: str, windows: list[list[int]]) -> Tensor:
    """Of all next tokens after every token of the windows: float64 [tokens, V]."""
    decoder = CompiledDecoder(model, 1, precision)
    logits = torch.cat([part for window in windows for part in decoder.prompt_logits(window)])
    decoder.close()
    return F.log_softmax(logits.double(), dim=-1)


def compare(name: str, model: Any, windows: list[list[int]], *, targets: Tensor | None) -> None:
    exact = log_probabilities(model, "fp32", windows)
    for precision in PRECISIONS:
        found = exact if precision == "fp32" else log_probabilities(model, precision, windows)
        line = f"{name}, {precision}:"
        if targets is not None:
            loss = float(-found.gather(1, targets[:, None]).mean())
            line += f" loss {loss:.5f}, perplexity {torch.tensor(loss).exp():.3f},"
        divergence = float((exact.exp() * (exact - found)).sum(dim=1).mean())
        same = float((exact.argmax(dim=1) == found.argmax(dim=1)).double().mean())
        print(f"{line} divergence {divergence:.6f}, the same likeliest token {same:.2%}", flush=True)


def main() -> None:
    args = parse_args()
    model, tokenizer = load_model(args.model)
    if args.tokens > model.config.n_positions:
        raise SystemExit(f"--tokens {args.tokens}: the model has {model.config.n_positions} positions")
    ids: list[int] = []
    for document in args.text.read_text(encoding="utf-8").splitlines():
        if document.strip():
            ids += [tokenizer.marks.begin, *tokenizer.encode(document)]
    size = args.tokens + 1
    places = range(0, len(ids) - size + 1, max(1, (len(ids) - size) // args.windows))
    windows = [ids[place : place + size] for place in places][: args.windows]
    targets = torch.tensor([window[1:] for window in windows]).flatten()
    compare(str(args.model), model, [window[:-1] for window in windows], targets=targets)
    if args.random:
        model = random_model(12)
        shape = (RANDOM_WINDOWS, RANDOM_TOKENS)
        tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
        compare("random GPT-2 small", model, tokens.tolist(), targets=None)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
