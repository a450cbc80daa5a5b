"""Different samples: duplicates within a request, with and without `distinct`, and what it costs.

    python benchmarks/candidates.py --model_path demo/model/final_model --requests 1000

Requests with and without take turns, in groups; the ratio is that of the sums of their times.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_chinese.decoding.completion import SamplingParams
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.model_folder import load_weights

CONTEXTS = ("孩子", "孩子发烧了怎么办", "感冒", "高血压患者", "失眠", "胃疼", "老人在小区摔倒", "我妈")


class Side(NamedTuple):
    """What the requests of one side have given: seconds of each group, and counts."""

    seconds: list[float]
    counts: dict[str, int]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Duplicates within a request, and the time without them.")
    parser.add_argument("--model_path", default="demo/model/final_model", help="(%(default)s)")
    parser.add_argument("--requests", type=int, default=1000, help="for each temperature (%(default)s)")
    parser.add_argument("--group", type=int, default=20, help="requests at once (%(default)s)")
    parser.add_argument("--samples", type=int, default=5, help="of a request (%(default)s)")
    parser.add_argument("--length", type=int, default=50, help="tokens of a sample (%(default)s)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.3, 1.0], help="(%(default)s)")
    parser.add_argument("--top_p", type=float, default=0.0, help="(%(default)s)")
    return parser.parse_args(argv)


def run_group(engine: Engine, first: int, params: SamplingParams, side: Side, args: argparse.Namespace) -> None:
    """Complete a group of requests, with seeds from `first` on."""
    begin = time.perf_counter()
    requests = [
        engine.submit(
            engine.prompt(CONTEXTS[seed % len(CONTEXTS)], args.length),
            samples=args.samples,
            length=args.length,
            sampling_params=params,
            seed=seed,
            distinct="distinct" in side.counts,
        )
        for seed in range(first, first + args.group)
    ]
    groups = [[completion.text for completion in request.future.result()] for request in requests]
    side.seconds.append(time.perf_counter() - begin)
    side.counts["requests with a duplicate"] += sum(len(set(texts)) < len(texts) for texts in groups)
    side.counts["samples missing"] += sum(args.samples - len(texts) for texts in groups)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    model, tokenizer = load_weights(args.model_path, device=torch.device("cpu"))
    print(
        f"{args.requests} requests of {args.samples} samples of {args.length} tokens, {torch.get_num_threads()} threads"
    )
    with Engine(model, tokenizer, max_num_seqs=32, max_waiting=10**6, precision="bf16") as engine:
        for temperature in args.temperatures:
            params = SamplingParams(temperature=temperature, top_p=args.top_p)
            counts = {"requests with a duplicate": 0, "samples missing": 0}
            sides = [Side([], dict(counts)), Side([], counts | {"distinct": 1})]
            for side in sides:
                run_group(engine, 0, params, Side([], dict(side.counts)), args)  # warm-up
            for first in range(0, args.requests, args.group):
                for side in sides if first // args.group % 2 else sides[::-1]:
                    run_group(engine, first, params, side, args)
            for name, side in zip(("independent", "distinct"), sides, strict=True):
                figures = ", ".join(f"{count} {what}" for what, count in side.counts.items() if what != "distinct")
                print(f"temperature {temperature}: {name:12}{sum(side.seconds):8.2f} s, {figures}")
            ratio = sum(sides[1].seconds) / sum(sides[0].seconds)
            least = min(sides[1].seconds) / min(sides[0].seconds)
            print(f"temperature {temperature}: distinct takes {ratio:.3f} times as long; the least times {least:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
