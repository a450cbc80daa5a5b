"""Near duplicates beside datasketch: the same documents, in alternating rounds; then a large corpus, with its memory.

Documents are made of the sentences of a corpus, drawn again and again, so that they share phrases as those of one
subject do; every twentieth is a copy of an earlier one with 5 % of its characters altered. datasketch has MinHash with
as many hashes and bands (`pip install datasketch==2.0.0`):

    .venv-vocab/bin/python benchmarks/duplicates.py
    .venv-vocab/bin/python benchmarks/duplicates.py --megabytes 1000 --rounds 0
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from gpt2_chinese.text.duplicates import BANDS, HASHES, ROWS, SHINGLE, Duplicates, normalized, similarity  # noqa: E402


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", default=ROOT / "data" / "daily_health_qa.txt", help="where the sentences are from")
    parser.add_argument("--megabytes", type=int, default=50, help="of the large corpus (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="beside datasketch, on 2 MB (%(default)s)")
    return parser.parse_args(argv)


def documents(corpus: Path, size: int, seed: int = 0) -> Iterator[tuple[str, str | None]]:
    """Documents of `size` bytes together, each with the one that it is a copy of, or None."""
    chooser = random.Random(seed)
    text = Path(corpus).read_text(encoding="utf-8")
    sentences = sorted(set(re.findall("[^。！？\n]{5,}[。！？]", text)))
    characters = sorted(set(text) - set("\n"))
    recent: list[str] = []
    written = number = 0
    while written < size:
        original = None
        if number % 20 == 19:
            original = chooser.choice(recent)
            document = "".join(chooser.choice(characters) if chooser.random() < 0.05 else c for c in original)
        else:
            # A word of a sentence is exchanged for another's, so that there are more phrases than sentences.
            parts = chooser.choices(sentences, k=chooser.randrange(4, 12))
            document = "".join(part[: chooser.randrange(3, len(part) + 1)] for part in parts)
            if len(recent) < 10_000:
                recent.append(document)
            else:
                recent[chooser.randrange(len(recent))] = document
        yield document, original
        written += len(document.encode())
        number += 1


def ours(texts: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as folder, Duplicates("near", Path(folder), 1 << 22) as duplicates:
        return sum(duplicates(text) is not None for text in texts)


def by_datasketch(texts: Sequence[str]) -> int:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(params=(BANDS, ROWS), num_perm=HASHES)
    found = 0
    for number, text in enumerate(texts):
        text = normalized(text)
        signature = MinHash(num_perm=HASHES)
        signature.update_batch([text[at : at + SHINGLE].encode() for at in range(len(text) - SHINGLE + 1)])
        if any(similarity(text, normalized(texts[known])) >= 0.7 for known in index.query(signature)):
            found += 1
        else:
            index.insert(number, signature)
    return found


def timed(function: Callable[[Sequence[str]], int], texts: Sequence[str]) -> tuple[float, int]:
    begin = time.perf_counter()
    found = function(texts)
    return time.perf_counter() - begin, found


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.rounds:
        texts = [document for document, _ in documents(args.corpus, 2_000_000)]
        size = sum(len(text.encode()) for text in texts) / 1e6
        ours(texts[:10])
        rounds = [(timed(ours, texts), timed(by_datasketch, texts)) for _ in range(args.rounds)]
        own, other = (min(pair[side][0] for pair in rounds) for side in (0, 1))
        print(f"{len(texts):,} documents, {size:.1f} MB, minima of {args.rounds} rounds")
        print(f"ours {size / own:.2f} MB/s, {rounds[0][0][1]:,} found; datasketch {size / other:.2f} MB/s, "
              f"{rounds[0][1][1]:,} found; ratio {other / own:.1f}")  # fmt: skip
    size = args.megabytes * 1_000_000
    seconds = processor = 0.0
    count = copies = found = similar = of_similar = others = 0
    with tempfile.TemporaryDirectory() as folder, Duplicates("near", Path(folder), size) as duplicates:
        for document, original in documents(args.corpus, size, seed=1):
            begin, processor_begin = time.perf_counter(), time.process_time()
            result = duplicates(document)
            seconds += time.perf_counter() - begin
            processor += time.process_time() - processor_begin
            count += 1
            if original is None:
                others += result is not None
                continue
            copies += 1
            found += result is not None
            if similarity(normalized(document), normalized(original)) >= 0.8:
                similar += 1
                of_similar += result is not None
        print(
            f"{count:,} documents, {size / 1e6:,.0f} MB in {seconds:.1f} s: {size / 1e6 / seconds:.1f} MB/s, "
            f"{size / 1e6 / processor:.1f} MB a second of the processor; "
            f"memory of the table and the documents {duplicates.memory_bytes / 1e6:,.0f} MB, of the process "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB; forgotten {duplicates.forgotten:,}"
        )
    print(
        f"copies, 5 % altered: {found:,} of {copies:,} found ({found / max(1, copies):.2%}), of those at a similarity "
        f"of 0.8 or more {of_similar:,} of {similar:,} ({of_similar / max(1, similar):.2%}); others found: {others:,}"
    )


if __name__ == "__main__":
    main()
