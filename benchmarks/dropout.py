"""What dropout costs in training on this CPU: ours beside PyTorch's, and an update with it beside one without.

    .venv-train/bin/python benchmarks/dropout.py
    .venv-train/bin/python benchmarks/dropout.py --model_config config/plan/3x192.json --vocab_size 5000

The two sides take turns; the figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_chinese.model_folder import read_config  # noqa: E402
from gpt2_chinese.precision import Precision, is_bf16_fast  # noqa: E402
from gpt2_chinese.training.allocator import keep_freed_memory  # noqa: E402
from gpt2_chinese.training.dropout import CpuDropout  # noqa: E402
from gpt2_chinese.training.loss import WindowLoss  # noqa: E402
from gpt2_chinese.training.optimizers import make_optimizer  # noqa: E402

CPU = torch.device("cpu")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default="config/plan/4x256.json", help="(default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=5000, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="windows of an update (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="of each side (default: %(default)s)")
    return parser.parse_args()


def compare(sides: dict[str, Callable[[], object]], rounds: int) -> list[float]:
    """The median seconds of each side."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 3):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - began)
    found = [statistics.median(times) for times in seconds.values()]
    for name, median in zip(sides, found, strict=True):
        print(f"  {name}: {1e3 * median:.2f} ms")
    return found


def updating(args: argparse.Namespace, dropout: float) -> Callable[[], None]:
    """An update of a new model on random tokens."""
    config = read_config(args.model_config, vocab_size=args.vocab_size)
    config.embd_pdrop = config.attn_pdrop = config.resid_pdrop = dropout
    model = GPT2LMHeadModel(config).train()
    loss_of, optimizer = WindowLoss(model), make_optimizer(model, 1e-3, optimizer="muon")
    precision = Precision("bf16" if is_bf16_fast(CPU) else "fp32", CPU)
    windows = torch.randint(args.vocab_size, (args.batch_size, config.n_ctx))

    def update() -> None:
        with precision.autocast():
            loss = loss_of(windows) / windows.numel()
        precision.backward(loss, optimizer)
        precision.step(optimizer, 1.0)
        optimizer.zero_grad(set_to_none=True)

    return update


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    config = read_config(args.model_config)
    weights = torch.rand(args.batch_size * config.n_head, config.n_ctx, config.n_ctx).to(torch.bfloat16)
    ours = CpuDropout(args.dropout).train()
    print(f"dropout {args.dropout:g} of {weights.numel():,} attention weights in bfloat16")
    theirs, mine = compare(
        {
            "torch.native_dropout": lambda: torch.native_dropout(weights, args.dropout, True),
            "ours": lambda: ours(weights),
        },
        args.rounds,
    )
    print(f"  {theirs / mine:.1f} times as fast")
    print(f"an update of {args.batch_size} windows, {args.model_config}")
    without, with_it = compare(
        {"without dropout": updating(args, 0.0), "with dropout": updating(args, args.dropout)}, args.rounds
    )
    print(f"  {with_it / without:.3f} times as long")


if __name__ == "__main__":
    main()
