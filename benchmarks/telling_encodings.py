"""The encoding of a text told by this project, by charset-normalizer and, where it is installed, by chardet.

Run in either environment; the table is that of tests/both/text/test_encodings.py, 26 encodings by 12 texts of 40 to
4,000 bytes. With texts in UTF-8, a document a line, 300 runs of lines of each are told in the encodings of simplified
Chinese too:

    .venv-train/bin/python benchmarks/telling_encodings.py
    .venv-train/bin/python benchmarks/telling_encodings.py medical_qa.txt songci.txt
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from passages import CHINESE, ENCODINGS, SIZES, texts_in  # noqa: E402

from gpt2_chinese.text.encodings import EncodingNotTold  # noqa: E402
from gpt2_chinese.text.file_encoding import Sample, tell  # noqa: E402


def ours(data: bytes) -> str | None:
    sample = Sample()
    sample.add(data)
    sample.add(b"", final=True)
    try:
        return tell(sample).encoding
    except EncodingNotTold:
        return None


def charset_normalizer(data: bytes) -> str | None:
    import charset_normalizer

    best = charset_normalizer.from_bytes(data).best()
    return None if best is None else best.encoding


def chardet(data: bytes) -> str | None:
    import chardet

    found = chardet.detect(data)["encoding"]
    return None if found is None else str(found)


def outcome(tell_it: Callable[[bytes], str | None], data: bytes, truth: str) -> str:
    """right, refused, or wrong; from 200 bytes on "WRONG"."""
    found = tell_it(data)
    if found is None:
        return "refused"
    try:
        # A point in the middle is one character in GB 2312's table and another in everybody's practice.
        same = data.decode(found).lstrip("\ufeff").replace("·", "・") == truth.lstrip("\ufeff").replace("·", "・")
    except (UnicodeError, LookupError):
        same = False
    return "right" if same else "WRONG" if len(data) >= 200 else "wrong"


def row(name: str, tellers: dict[str, Callable[[bytes], str | None]], texts: list[tuple[bytes, str]]) -> None:
    cells = []
    for teller, tell_it in tellers.items():
        begin = time.perf_counter()
        results = Counter(outcome(tell_it, data, truth) for data, truth in texts)
        TOTALS.setdefault(teller, Counter()).update(results)
        SECONDS[teller] = SECONDS.get(teller, 0.0) + time.perf_counter() - begin
        cells.append(" ".join(f"{results[kind]:4}" for kind in ("right", "refused", "wrong", "WRONG")))
    print(f"{name:24} {' | '.join(cells)}")


TOTALS: dict[str, Counter[str]] = {}
SECONDS: dict[str, float] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of telling encodings.")
    parser.add_argument("texts", nargs="*", type=Path, help="TXT files in UTF-8 of simplified Chinese")
    args = parser.parse_args()
    tellers: dict[str, Callable[[bytes], str | None]] = {"ours": ours, "charset-normalizer": charset_normalizer}
    if importlib.util.find_spec("chardet") is not None:
        tellers["chardet"] = chardet
    print(f"{'right refused wrong WRONG (200 bytes and more) of':24} {' | '.join(tellers)}")
    for name in ENCODINGS:
        encoding = name.partition(",")[0]
        row(name, tellers, [(data, data.decode(encoding)) for data in texts_in(name)])
    for path in args.texts:
        lines = path.read_text(encoding="utf-8").splitlines()
        for encoding in [name for name in CHINESE if name in ("gb2312", "gbk", "gb18030", "hz", "utf-8", "utf-16-le")]:
            texts = []
            for number in range(300):
                first = random.Random(number).randrange(len(lines))
                size = SIZES[number % len(SIZES)]
                text = "\n".join(lines[first : first + 60])[:size]
                while len(text.encode(encoding, "ignore")) > size:
                    text = text[: -max(1, len(text) // 20)]
                data = text.encode(encoding, "ignore")
                texts.append((data, data.decode(encoding)))
            row(f"{path.name[:12]}, {encoding}", tellers, texts)
    for teller, results in TOTALS.items():
        share = results["right"] / results.total()
        print(f"{teller}: {share:.2%} right, {dict(results)}; {SECONDS[teller]:.1f} s")


if __name__ == "__main__":
    main()
