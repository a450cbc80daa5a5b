"""Our segmenter beside the thulac package on one core: same words, speed, start, memory.

Run in either environment, with texts of a document a line; --verify compares the words of every document, without
and with the special tokens as user dictionary, which takes thulac some minutes:

    .venv-train/bin/python benchmarks/segmenter.py medical_qa.txt songci.txt
    .venv-train/bin/python benchmarks/segmenter.py medical_qa.txt songci.txt --verify

Where rjieba is installed, the fastest segmenter that we know of, it takes turns with ours; its words are others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt2_chinese.text.segmenter import Segmenter  # noqa: E402
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS  # noqa: E402

# In a process of its own: seconds from before the imports to the first words, resident megabytes then and at the end.
START = """
import sys, time
begin = time.perf_counter()
from gpt2_chinese.text.segmenter import Segmenter
segmenter = Segmenter()
segmenter.cut("我爱北京天安门")
ready = time.perf_counter() - begin
def megabytes():  # not ru_maxrss, which a process inherits from the one that started it
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
print(ready, megabytes())
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            segmenter.cut(line)
print(megabytes())
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="+", help="UTF-8, one document a line")
    parser.add_argument("--verify", action="store_true", help="compare the words of every document")
    parser.add_argument("--sample_documents", type=int, default=1000, help="documents for thulac's speed; default 1000")
    parser.add_argument("--repeats", type=int, default=5, help="the best time of so many counts; default 5")
    return parser.parse_args(argv)


def megabytes(documents: Sequence[str]) -> float:
    return sum(len(document.encode("utf-8")) for document in documents) / 1e6


def seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def load_thulac(user_words: Sequence[str] = ()) -> Any:
    import thulac

    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file, redirect_stdout(StringIO()):
        file.writelines(word + "\n" for word in user_words)
        file.flush()
        return thulac.thulac(user_dict=file.name if user_words else None, seg_only=True)


def show_start(texts: Sequence[Path], repeats: int) -> None:
    command = [sys.executable, "-c", START, *(str(path.resolve()) for path in texts)]
    runs = []
    for _ in range(repeats):
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        runs.append([float(number) for number in output.split()])
    ready, at_start, at_end = sorted(runs)[len(runs) // 2]
    fastest, slowest = min(runs)[0], max(runs)[0]
    print(f"ready after {ready:.2f} s with imports (median of {repeats} processes, {fastest:.2f} to {slowest:.2f} s)")
    print(f"resident: {at_start:.0f} MB when ready, {at_end:.0f} MB at most after all documents")


def show_speed(documents: Sequence[str], sample_documents: int, repeats: int) -> None:
    segmenter = Segmenter()
    text = np.frombuffer("\n".join(documents).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sample = documents[:: max(1, len(documents) // sample_documents)]
    thulac = load_thulac()
    theirs = megabytes(sample) / seconds(lambda: [thulac.cut(document) for document in sample])
    print(f"thulac.cut: {theirs:.3f} MB/s on {len(sample)} documents")

    def one_by_one(cut: Callable[[str], list[str]]) -> Callable[[], None]:
        def cut_all() -> None:
            for document in documents:
                cut(document)

        return cut_all

    sides = {
        "Segmenter.cut, a document at a time": one_by_one(segmenter.cut),
        "Segmenter.segment, all documents in one array": lambda: segmenter.segment(text),
    }
    with suppress(ImportError):  # nothing else needs it: pip install rjieba
        import rjieba  # type: ignore[import-not-found]

        sides["rjieba.cut (jieba-rs, other words), a document at a time"] = one_by_one(rjieba.cut)
    rounds = [[seconds(side) for side in sides.values()] for _ in range(repeats)]  # the sides take turns
    for name, took in zip(sides, map(min, zip(*rounds, strict=True)), strict=True):
        speed = megabytes(documents) / took
        print(f"{name}: {speed:.1f} MB/s, {speed / theirs:.0f} times thulac")


def verify(documents: Sequence[str], user_words: Sequence[str]) -> int:
    """Print and count the documents whose words are not thulac's."""
    segmenter, thulac = Segmenter(user_words), load_thulac(user_words)
    different = [text for text in documents if segmenter.cut(text) != [word for word, _ in thulac.cut(text)]]
    for document in different[:10]:
        print(f"different: {document[:200]!r}")
    with_words = f" with {len(user_words)} user words" if user_words else ""
    print(f"{len(documents)} documents{with_words}: {len(different)} differ from thulac")
    return len(different)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    documents = [line for path in args.texts for line in path.read_text(encoding="utf-8").split("\n") if line]
    print(f"{len(documents)} documents, {megabytes(documents):.1f} MB")
    Segmenter()  # a first run on this machine compiles here, not below
    show_start(args.texts, args.repeats)
    show_speed(documents, args.sample_documents, args.repeats)
    if args.verify:
        return min(1, verify(documents, ()) + verify(documents, SPECIAL_TOKENS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
