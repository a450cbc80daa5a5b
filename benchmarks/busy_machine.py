#!/usr/bin/env python3
"""What another busy program costs training on a CPU, by how long OpenMP's threads spin before they sleep.

    .venv-train/bin/python benchmarks/busy_machine.py --neighbours 0 1 2

An update has thousands of places where a thread waits for the others. GNU's OpenMP lets it spin there for some
milliseconds; where another program has taken the processor of the thread that is waited for, that is time which this
thread does not get. For each number of neighbours (endless loops), updates of a new model on random tokens are timed
with each of the settings of GOMP_SPINCOUNT in turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def child(args: argparse.Namespace) -> None:
    """Print the tokens a second of updates in this process."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import GPT2LMHeadModel

    from gpt2_chinese.model_folder import read_config
    from gpt2_chinese.training.allocator import keep_freed_memory
    from gpt2_chinese.training.loss import WindowLoss
    from gpt2_chinese.training.optimizers import make_optimizer

    keep_freed_memory()
    config = read_config(args.model_config, vocab_size=5005)
    model = GPT2LMHeadModel(config).train()
    loss_of, optimizer = WindowLoss(model), make_optimizer(model, 1e-3, optimizer="muon")
    windows = torch.randint(config.vocab_size, (16, config.n_ctx))
    began, updates = 0.0, -2
    while updates < 1 or time.perf_counter() - began < args.seconds:
        if updates == 0:
            began = time.perf_counter()
        (loss_of(windows) / windows.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        updates += 1
    print(updates * windows.numel() / (time.perf_counter() - began))


def measure(args: argparse.Namespace, spins: str) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {} if spins == "default" else {"GOMP_SPINCOUNT": spins}
    command = [sys.executable, __file__, "--child", "--seconds", str(args.seconds), "--model_config", args.model_config]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbours", nargs="+", type=int, default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--spins", nargs="+", default=["default", "0", "1000", "10000"], help="(default: %(default)s)")
    parser.add_argument("--model_config", default=str(ROOT / "config" / "model_config_mini.json"))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    for number in args.neighbours:
        neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
        try:
            rates: dict[str, list[float]] = {spins: [] for spins in args.spins}
            for _ in range(args.rounds):
                for spins in args.spins:
                    rates[spins].append(measure(args, spins))
        finally:
            for neighbour in neighbours:
                neighbour.kill()
        first = statistics.median(rates[args.spins[0]])
        print(f"{number} neighbours, tokens a second, median (each), beside the first:")
        for spins, found in rates.items():
            median = statistics.median(found)
            each = ", ".join(f"{rate:,.0f}" for rate in found)
            print(f"  GOMP_SPINCOUNT {spins}: {median:,.0f} ({each}), {median / first:.2f} times")


if __name__ == "__main__":
    main()
