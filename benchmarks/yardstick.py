#!/usr/bin/env python3
"""What counting alone can do: bits per character of n-grams of characters, on text files of one document a line.

    .venv-train/bin/python benchmarks/yardstick.py medical_qa.txt songci.txt --hold_out tenth

For each file and order: the figure, the seconds that counting and measuring take on one core, and the memory at most.
And how long the copy meter takes to look for as much text as 200 completions have in all of the file.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt2_chinese.training.copy_meter import copied_from  # noqa: E402
from gpt2_chinese.training.corpus_text import as_code_points  # noqa: E402
from gpt2_chinese.training.ngram import ngram_bits  # noqa: E402


def as_arrays(documents: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return as_code_points("".join(documents)), np.array([len(one) for one in documents], np.int64)


def split(documents: list[str], hold_out: str) -> tuple[list[str], list[str]]:
    """Documents to be counted and to be measured on: every tenth, or so many chosen at random (seed 0)."""
    if hold_out == "tenth":
        return [one for n, one in enumerate(documents, 1) if n % 10], documents[9::10]
    chosen = set(np.random.default_rng(0).permutation(len(documents))[: int(hold_out)].tolist())
    kept = [one for n, one in enumerate(documents) if n not in chosen]
    return kept, [documents[n] for n in sorted(chosen)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--orders", default="5,7", help="the n of the n-grams (%(default)s)")
    parser.add_argument("--hold_out", default="tenth", help="tenth, or a number of documents (%(default)s)")
    args = parser.parse_args()
    for name in args.files:
        documents = [line for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
        training, held_out = split(documents, args.hold_out)
        characters = sum(map(len, held_out))
        print(f"{name}: {len(training):,} documents counted, {len(held_out):,} measured on, {characters:,} characters")
        for order in map(int, args.orders.split(",")):
            began = time.process_time()
            bits = ngram_bits(as_arrays(training), as_arrays(held_out), order=order)
            seconds = time.process_time() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"  {order}-gram: {bits / characters:.4f} bits per character, {seconds:.1f} s, {peak:,.0f} MiB at most"
            )
        texts = [one[:140] for one in held_out[:200]]
        began = time.process_time()
        found = copied_from(enumerate(training), texts)
        seconds = time.process_time() - began
        share = sum(found.copied) / sum(found.characters)
        speed = found.searched_characters / seconds / 1e6
        print(f"  copy meter, {len(texts)} texts: {share:.1%} copied; {seconds:.2f} s, {speed:.1f} M characters/s")


if __name__ == "__main__":
    main()
