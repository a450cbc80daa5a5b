"""An input box: a context that grows by a token with every keystroke, with and without the prefix cache.

GPT-2 small with a vocabulary of 50,005 and random weights; a context of 400 tokens is typed, and after each keystroke 5
samples of 20 tokens are asked for. Two engines in one process answer in turns, and must give the same texts. Typing
several tokens at a time (`--every`) makes a run shorter, and leaves as many to compute:

    .venv-train/bin/python benchmarks/keystrokes.py --every 10
    .venv-train/bin/python benchmarks/keystrokes.py --every 1 --precision int8
    .venv-train/bin/python benchmarks/keystrokes.py --every 20 --context 60 --layers 2
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from benchmarks.generation import MASK_ID, VOCABULARY, random_model  # noqa: E402
from gpt2_chinese.decoding.completion import Prompt, SamplingParams  # noqa: E402
from gpt2_chinese.decoding.engine import Engine  # noqa: E402
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS  # noqa: E402
from gpt2_chinese.text.word_tokenizer import WordTokenizer  # noqa: E402

PARTS = 4  # of the context, each with a line of the table
BATCH_SIZE = 32  # as server.py's default


class Latency(NamedTuple):
    """Of a request, in milliseconds from its submission."""

    first: float
    last: float


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=400, help="tokens that are typed (%(default)s)")
    parser.add_argument("--every", type=int, default=1, help="tokens of a keystroke (%(default)s)")
    parser.add_argument("--samples", type=int, default=5, help="completions after each keystroke (%(default)s)")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a completion (%(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model; GPT-2 small has 12 (%(default)s)")
    parser.add_argument("--precision", default="bf16", help="fp32, bf16 or int8 (%(default)s)")
    parser.add_argument("--prefix_cache", type=int, default=256, help="megabytes, as of server.py (%(default)s)")
    return parser.parse_args(argv)


def typed_prompts(length: int, every: int) -> Iterator[Prompt]:
    """Prompts of random tokens, each `every` tokens longer than the one before; [MASK] is one more."""
    source = random.Random(1)
    ids = [source.randrange(len(SPECIAL_TOKENS), len(VOCABULARY)) for _ in range(length)]
    for end in range(every, length + 1, every):
        yield Prompt("", (MASK_ID, *ids[:end]), 0)


def ask(engine: Engine, prompt: Prompt, samples: int, tokens: int) -> tuple[Latency, list[tuple[int, ...]]]:
    """The latency of a request, and the tokens of its completions."""
    begin = time.monotonic()
    params = SamplingParams(ignore_eos=True)  # so that every completion has the same length
    request = engine.submit(prompt, samples=samples, length=tokens, sampling_params=params, seed=len(prompt.ids))
    completions = request.future.result()
    end = time.monotonic()
    assert request.first_token_at is not None
    latency = Latency(1000 * (request.first_token_at - begin), 1000 * (end - begin))
    return latency, [completion.ids for completion in completions]


def print_row(name: str, without: Sequence[Latency], reusing: Sequence[Latency]) -> None:
    """The medians of both, and their ratio, for the first and the last token."""
    cells = []
    for field in range(2):
        before, after = (statistics.median(one[field] for one in side) for side in (without, reusing))
        cells += [f"{before:.0f}", f"{after:.0f}", f"{before / after:.1f}"]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    model, tokenizer = random_model(args.layers), WordTokenizer(VOCABULARY)
    sides: list[list[Latency]] = [[], []]
    lengths = []
    with (
        Engine(model, tokenizer, max_num_seqs=BATCH_SIZE, precision=args.precision) as without,
        Engine(
            model,
            tokenizer,
            max_num_seqs=BATCH_SIZE,
            precision=args.precision,
            prefix_cache_bytes=args.prefix_cache * 1_000_000,
        ) as reusing,
    ):
        del model
        for engine in (without, reusing):  # a text of its own warms it up
            ask(engine, Prompt("", (MASK_ID, *range(100, 140)), 0), args.samples, args.tokens)
        for prompt in typed_prompts(args.context, args.every):
            texts = []
            for engine, latencies in zip((without, reusing), sides, strict=True):
                latency, ids = ask(engine, prompt, args.samples, args.tokens)
                latencies.append(latency)
                texts.append(ids)
            assert texts[0] == texts[1], "reuse has changed a completion"
            lengths.append(len(prompt.ids) - 1)
        state = reusing.prefix_cache
    print(f"{args.samples} × {args.tokens} tokens, {args.precision}, medians in ms")
    print("| tokens of the context | first token, off | on | ratio | last token, off | on | ratio |")
    print("|---|---|---|---|---|---|---|")
    for part in range(PARTS):
        first, last = part * args.context // PARTS, (part + 1) * args.context // PARTS
        rows = [row for row, length in enumerate(lengths) if first < length <= last]
        if rows:
            print_row(f"{first + 1}–{last}", *([side[row] for row in rows] for side in sides))
    print_row("all", *sides)
    print(
        f"{len(lengths)} keystrokes, {state.reused_tokens} of {reusing.prompt_tokens} tokens reused, "
        f"{state.used_bytes / 1e6:.0f} MB in the cache"
    )


if __name__ == "__main__":
    main()
