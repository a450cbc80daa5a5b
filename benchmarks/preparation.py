"""Stages 2 and 3 as whole processes beside thulac and Keras, their memory, and rates on held-out text.

Run in the vocabulary environment, which has thulac, Keras and all that stage 3 needs, with texts of a document a line:

    .venv-vocab/bin/python benchmarks/preparation.py speed medical_qa.txt songci.txt --megabytes 50
    .venv-vocab/bin/python benchmarks/preparation.py speed medical_qa.txt --megabytes 50 --tokenizer char
    .venv-vocab/bin/python benchmarks/preparation.py memory medical_qa.txt songci.txt --megabytes 1000
    .venv-vocab/bin/python benchmarks/preparation.py held-out medical_qa.txt songci.txt
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt2_chinese.text.corpus import train_json_writer  # noqa: E402

BASELINE = """
import sys, time, thulac
from tensorflow.keras.preprocessing.text import Tokenizer
documents = open(sys.argv[1], encoding="utf-8").read().splitlines()
cutter = thulac.thulac(seg_only=True)
begin = time.perf_counter()
lines = [cutter.cut(document, text=True) for document in documents]
cut = time.perf_counter() - begin
Tokenizer(num_words=50000).fit_on_texts(lines)
print("RESULT", cut, time.perf_counter() - begin)
"""

RUST_BASELINE = """
import sys, time, tokenizers
documents = open(sys.argv[1], encoding="utf-8").read().splitlines()
if sys.argv[2].endswith(".json"):
    tokenizer = tokenizers.Tokenizer.from_file(sys.argv[2])
else:
    tokenizer = tokenizers.BertWordPieceTokenizer(sys.argv[2], lowercase=True)
begin = time.perf_counter()
ids = [encoding.ids for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)]
print("RESULT", time.perf_counter() - begin)
"""

SEGMENTER_ALONE = """
import os, sys, time
import numpy as np
from gpt2_chinese.text.corpus import read_train_json
from gpt2_chinese.text.preparation import batches
from gpt2_chinese.text.segmenter import Segmenter
segmenter = Segmenter()
texts = ["\\n".join(batch) for batch in batches(read_train_json(sys.argv[1]))]
arrays = [np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32) for text in texts]
for array in arrays[: len(arrays) // 2]:
    segmenter.segment(array)
begin = time.perf_counter()
child = os.fork()
for array in arrays[child == 0 :: 2]:
    segmenter.segment(array)
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
print("RESULT", time.perf_counter() - begin)
"""


def stage(name: str, *flags: str | Path) -> float:
    """Run a stage as a whole process; give its wall-clock seconds."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], check=True, capture_output=True)
    return time.perf_counter() - begin


def peak_megabytes(name: str, *flags: str | Path) -> float:
    """Run a stage in a child of its own; give the resident megabytes of its largest process, workers included."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, sys.executable, str(ROOT / name), *map(str, flags)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


def write_repeated(texts: list[Path], megabytes: float, path: Path) -> int:
    """Write the documents of the texts to a train.json, over and over until it is so large; give the bytes of text."""
    documents = [line for text in texts for line in text.read_text(encoding="utf-8").splitlines() if line]
    written = 0
    with train_json_writer(path) as write:
        for document in cycle(documents):
            write(document)
            written += len(document.encode("utf-8"))
            if written >= megabytes * 1e6:
                return written


def speed(args: argparse.Namespace, folder: Path) -> None:
    corpus = folder / "train.json"
    size = write_repeated(args.texts, args.megabytes, corpus)
    documents = [line for text in args.texts for line in text.read_text(encoding="utf-8").splitlines() if line]
    sample = folder / "sample.txt"
    sample.write_text("\n".join(documents[:: len(documents) // args.sample_documents]) + "\n", encoding="utf-8")
    sample_size = sample.stat().st_size

    def words_baseline() -> tuple[float, float]:
        """MB/s of THULAC alone, and of THULAC with Keras' Tokenizer."""
        done = subprocess.run([sys.executable, "-c", BASELINE, str(sample)], check=True, capture_output=True, text=True)
        cut, both = map(float, done.stdout.split("RESULT")[1].split())
        return sample_size / cut / 1e6, sample_size / both / 1e6

    def rust_baseline(vocabulary: Path) -> float:
        """MB/s of the tokenizers package in one thread."""
        command = [sys.executable, "-c", RUST_BASELINE, str(sample), str(vocabulary)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return sample_size / float(done.stdout.split("RESULT")[1]) / 1e6

    words = args.tokenizer == "word"
    first_cut, first_both = words_baseline() if words else (0.0, 0.0)
    rows = []
    for workers in (1, 2):
        vocabulary = folder / f"vocab{workers}{'.json' if args.tokenizer == 'bpe' else '.txt'}"
        flags = ["--raw_data_path", corpus, "--workers", str(workers), "--tokenizer", args.tokenizer]
        config = ["--model_config", ROOT / "config" / "model_config_small.json"]
        rows.append(("make-vocab.py", workers, stage("make-vocab.py", *flags, "--vocab_file", vocabulary, *config)))
        output = ["--vocab_filename", vocabulary, "--tokenized_data_path", folder / f"tokenized{workers}"]
        rows.append(("make-tokenized.py", workers, stage("make-tokenized.py", *flags, *output, "--min_length", "0")))
    print(f"input: {size / 1e6:.1f} MB of text; sample of the baseline: {sample_size / 1e6:.2f} MB, before and after")
    if words:
        last_cut, last_both = words_baseline()
        rate_of = {"make-vocab.py": (first_both + last_both) / 2, "make-tokenized.py": (first_cut + last_cut) / 2}
        command = [sys.executable, "-c", SEGMENTER_ALONE, str(corpus)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        print(f"the segmenter alone in two processes, warm: {float(done.stdout.split('RESULT')[1]):.2f} s")
        print(f"one process, thulac.cut: {first_cut:.3f} and {last_cut:.3f} MB/s; "
              f"with fit_on_texts: {first_both:.3f} and {last_both:.3f} MB/s")  # fmt: skip
    else:
        rate_of = {"make-tokenized.py": rust_baseline(vocabulary)}
        print(f"the tokenizers package alone, one thread: {rate_of['make-tokenized.py']:.2f} MB/s")
    for name, workers, seconds in rows:
        rate = size / seconds / 1e6
        ratio = f", {rate / rate_of[name]:.{0 if words else 2}f} times" if name in rate_of else ""
        print(f"{name}, {workers} worker(s): {seconds:.2f} s, {rate:.2f} MB/s{ratio}")


def memory(args: argparse.Namespace, folder: Path) -> None:
    corpus = folder / "train.json"
    size = write_repeated(args.texts, args.megabytes, corpus)
    (folder / "data").mkdir()
    with open(folder / "data" / "a.txt", "w", encoding="utf-8") as file:
        for document in json_documents(corpus):
            file.write(document + "\n")
    print(f"input: {size / 1e6:.0f} MB of text; train.json {corpus.stat().st_size / 1e6:.0f} MB; largest process of:")
    peak = peak_megabytes("build_trainfile.py", "--data_path", folder / "data", "--output_path", folder / "again.json")
    print(f"build_trainfile.py: {peak:.0f} MB")
    vocabulary = folder / "vocab.txt"
    config = ["--model_config", ROOT / "config" / "model_config_small.json"]
    peak = peak_megabytes("make-vocab.py", "--raw_data_path", corpus, "--vocab_file", vocabulary, *config)
    print(f"make-vocab.py: {peak:.0f} MB")
    flags = ["--raw_data_path", corpus, "--vocab_filename", vocabulary, "--tokenized_data_path", folder / "tokenized"]
    for pieces in (100, 1):
        peak = peak_megabytes("make-tokenized.py", *flags, "--num_pieces", str(pieces))
        print(f"make-tokenized.py, {pieces} piece(s): {peak:.0f} MB")


def json_documents(corpus: Path):  # noqa: ANN201
    from gpt2_chinese.text.corpus import read_train_json

    return read_train_json(corpus)


def held_out(args: argparse.Namespace, folder: Path) -> None:
    from gpt2_chinese.text.vocabulary import read_vocabulary
    from gpt2_chinese.text.word_tokenizer import WordTokenizer

    for text in args.texts:
        documents = [line for line in text.read_text(encoding="utf-8").splitlines() if line]
        cut = len(documents) * 9 // 10
        with train_json_writer(folder / "train.json") as write:
            for document in documents[:cut]:
                write(document)
        print(f"{text.name}: vocabulary from {cut:,} documents, rates on the last {len(documents) - cut:,}")
        for compat in (False, True):
            vocabulary = folder / "vocab.txt"
            flags = ["--raw_data_path", folder / "train.json", "--vocab_file", vocabulary]
            config = ["--model_config", ROOT / "config" / "model_config_small.json"]
            stage("make-vocab.py", *flags, *(["--compat"] if compat else config))
            tokenizer = WordTokenizer(read_vocabulary(vocabulary), compat=compat)
            tokens = unknown = characters = whole = 0
            for document in documents[cut:]:
                ids = tokenizer.encode(document)
                tokens += len(ids)
                unknown += ids.count(tokenizer.marks.unknown)
                characters += len(document)
                whole += tokenizer.decode(ids) == tokenizer.normalize(document)
            print(
                f"  {'reference (--compat)' if compat else 'default'}: vocabulary of {len(tokenizer):,}; "
                f"[UNK] {unknown / tokens:.4%}; round trip {whole / (len(documents) - cut):.2%} of the lines; "
                f"{tokens / characters:.3f} tokens per character"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of stages 2 and 3.")
    parser.add_argument("what", choices=["speed", "memory", "held-out"])
    parser.add_argument("texts", nargs="+", type=Path, help="TXT files in UTF-8, one document a line")
    parser.add_argument("--megabytes", type=float, default=50, help="size of the input, the texts repeated")
    parser.add_argument("--tokenizer", choices=["word", "char", "bpe"], default="word", help="of speed")
    parser.add_argument("--sample_documents", type=int, default=3000, help="documents of the baseline's sample")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"speed": speed, "memory": memory, "held-out": held_out}[args.what](args, Path(folder))


if __name__ == "__main__":
    main()
