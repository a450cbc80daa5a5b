"""The time of a draw: whole characters beside none, and all sampling settings beside a decode step without them.

    python benchmarks/sampling.py --vocab_size 50005
    python benchmarks/sampling.py --model_path demo/model/final_model

The sides take turns; the ratios are those of the least times. "as before" is the draw of a sampler that only leaves out
the special tokens: NumPy's assignment of -inf, and the compiled sampling.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_chinese.decoding.batch_sampler import BatchSampler
from gpt2_chinese.decoding.completion import SamplingParams
from gpt2_chinese.decoding.sampling import CompiledSampler, sample_tokens, uniform_random
from gpt2_chinese.decoding.whole_characters import CharacterMasks

ROWS = 32
NEVER = [2, 3, 4]
ALL_SETTINGS = SamplingParams(
    top_k=30,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.2,
    no_repeat_ngram_size=3,
    logit_bias=tuple((id_, 0.5) for id_ in range(300, 350)),
    min_tokens=10,
    stop_token_ids=(3, 4),  # never drawn, so that all samples have the same length
)
BAD_WORDS = tuple((id_, id_ + 1) for id_ in range(400, 410))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The time of a draw.")
    parser.add_argument("--vocab_size", type=int, default=50_005, help="of random logits (%(default)s)")
    parser.add_argument("--rounds", type=int, default=300, help="(%(default)s)")
    parser.add_argument("--context", type=int, default=200, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--model_path", help="also measure whole decode steps of this model")
    return parser.parse_args(argv)


def least_times(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The least seconds that each side reports; they take turns."""
    least = dict.fromkeys(sides, np.inf)
    for _ in range(rounds):
        for name, side in sides.items():
            least[name] = min(least[name], side())
    return least


def sampler_of(vocab_size: int, params: SamplingParams, context: int, *, bytes_known: bool) -> BatchSampler:
    """A full batch of sequences with these parameters, in a vocabulary with 256 byte tokens from id 5 on."""
    data = [bytes([id_ - 5]) if bytes_known and 5 <= id_ < 261 else None for id_ in range(vocab_size)]
    sampler = BatchSampler(ROWS, CharacterMasks(data, vocab_size, NEVER), end_id=1, device=torch.device("cpu"))
    ids = np.random.default_rng(0).integers(261, vocab_size, context).tolist()
    bad_words = BAD_WORDS if params is ALL_SETTINGS else ()
    for slot in range(ROWS):
        sampler.assign(slot, params, slot, ids, length=10_000_000, bad_words=bad_words)
    return sampler


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    size = args.vocab_size
    compiled = CompiledSampler(size)
    logits = 3 * torch.randn(ROWS, size, generator=torch.Generator().manual_seed(0))
    seeds = np.arange(ROWS, dtype=np.uint64)
    temperature, top_k, top_p = torch.ones(ROWS), torch.full((ROWS,), 30), torch.zeros(ROWS)
    suppressed, penalty, sampled = torch.tensor(NEVER), np.ones(ROWS, np.float32), np.zeros(ROWS, np.uint64)
    parameters = temperature.numpy(), top_k.numpy(), top_p.numpy()

    def as_before() -> float:
        rows, slots = logits.clone(), slice(0, ROWS)
        begin = time.perf_counter()
        assert not (penalty[slots] != 1).any()
        rows.numpy()[:, suppressed.numpy()] = -np.inf
        numbers = uniform_random(seeds[slots], sampled[slots])
        sample_tokens(rows, numbers, *(torch.from_numpy(part[slots]) for part in parameters), compiled=compiled)
        sampled[slots] += np.uint64(1)
        return time.perf_counter() - begin

    def draw_of(sampler: BatchSampler) -> Callable[[], float]:
        slots = slice(0, ROWS)

        def draw() -> float:
            rows = logits.clone()
            begin = time.perf_counter()
            sampler.commit(slots, sampler.sample(slots, rows, compiled).numpy())
            return time.perf_counter() - begin

        return draw

    sides = {
        "as before": as_before,
        "without whole characters": draw_of(sampler_of(size, SamplingParams(), args.context, bytes_known=False)),
        "whole characters": draw_of(sampler_of(size, SamplingParams(), args.context, bytes_known=True)),
        "all settings": draw_of(sampler_of(size, ALL_SETTINGS, args.context, bytes_known=True)),
    }
    least = least_times(sides, args.rounds)
    print(f"a draw for {ROWS} sequences, {size:,} tokens, top-k 30")
    for name, seconds in least.items():
        print(f"  {name:28}{1e6 * seconds:9.0f} µs{seconds / least['as before']:8.3f} times as before")
    if args.model_path:
        measure_steps(args)
    return 0


def measure_steps(args: argparse.Namespace) -> None:
    """Whole decode steps of a model, plain and with all settings."""
    from gpt2_chinese.decoding.engine import Engine
    from gpt2_chinese.model_folder import load_weights

    model, tokenizer = load_weights(args.model_path, device=torch.device("cpu"))
    context, tokens = "孩子发烧了怎么办", 60
    plain = SamplingParams(ignore_eos=True)
    settings = {
        "plain": plain,
        "all settings": SamplingParams(
            **{**vars(ALL_SETTINGS), "ignore_eos": True, "bad_words": ("头痛", "感冒药", "很好", "医院")}
        ),
    }
    with Engine(model, tokenizer, max_num_seqs=ROWS, precision="bf16") as engine:
        prompt = engine.prompt(context, tokens)

        def side(params: SamplingParams) -> Callable[[], float]:
            def steps() -> float:
                begin = time.perf_counter()
                request = engine.submit(prompt, samples=ROWS, length=tokens, sampling_params=params, seed=1)
                assert all(len(completion.ids) == tokens for completion in request.future.result())
                return (time.perf_counter() - begin) / tokens

            return steps

        least = least_times({name: side(params) for name, params in settings.items()}, max(3, args.rounds // 10))
    print(f"a decode step of {args.model_path} with {ROWS} sequences")
    for name, seconds in least.items():
        print(f"  {name:28}{1e6 * seconds:9.0f} µs{seconds / least['plain']:8.3f} times plain")


if __name__ == "__main__":
    raise SystemExit(main())
