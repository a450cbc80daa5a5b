"""Bits per character of unseen documents for several settings of train.py, beside what counting characters can do.

    .venv-train/bin/python benchmarks/quality.py medical_qa.txt --trial "--minutes 2" --seeds 1 2 3
    .venv-train/bin/python benchmarks/quality.py songci.txt --trials benchmarks/hand_picked.txt

The files are TXT, a document a line, and are one corpus together. By a hash of its text a document belongs to a tenth
that is measured on at the end (`--held_out test`), to another tenth for choosing settings (`--held_out tune`), or to
the rest, which every trial is trained on. A trial is a line of flags for train.py. make-vocab.py runs in the other
environment. With `--minutes` in a trial its time includes what comes before train.py. Models that an earlier call with
the same --folder has trained are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.transfer import position, run  # noqa: E402
from benchmarks.yardstick import as_arrays  # noqa: E402
from gpt2_chinese.text.tokenizers import KINDS  # noqa: E402
from gpt2_chinese.training.ngram import ngram_bits  # noqa: E402

SHARES = {"test": (0.0, 0.1), "tune": (0.1, 0.2)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--trial", action="append", default=[], help="flags of train.py, in one argument")
    parser.add_argument("--trials", type=Path, help="a file with a trial on each line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="(default: %(default)s)")
    parser.add_argument("--held_out", choices=SHARES, default="test", help="tenth to measure on (default: %(default)s)")
    parser.add_argument("--tokenizer", default="bpe", choices=KINDS, help="(default: %(default)s, as in make model)")
    parser.add_argument("--vocab_size", default="auto", help="of make-vocab.py (default: %(default)s)")
    parser.add_argument("--min_length", default="1", help="of make-tokenized.py (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("quality"), help="to work in (default: %(default)s)")
    parser.add_argument("--vocab_python", default=str(ROOT / ".venv-vocab/bin/python"), help="of make-vocab.py")
    args = parser.parse_args()
    if args.trials:
        args.trial += [line for line in args.trials.read_text(encoding="utf-8").splitlines() if line.strip()]
    args.folder = args.folder.resolve()
    return args


def split(documents: list[str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {"train": [], **{name: [] for name in SHARES}}
    for document in documents:
        place = position(document)
        name = next((name for name, (begin, end) in SHARES.items() if begin <= place < end), "train")
        parts[name].append(document)
    return parts


def prepare(args: argparse.Namespace, parts: dict[str, list[str]]) -> tuple[Path, float]:
    """Stages 2 and 3 for the documents to train on, and 3 for those to measure on.

    Returns:
        The vocabulary, and the seconds that the first of it took.
    """
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
    vocabulary = folder / ("tokenizer.json" if args.tokenizer == "bpe" else "vocab.txt")
    began = time.time()
    flags = ["--raw_data_path", folder / "train.json", "--vocab_file", vocabulary, "--vocab_size", args.vocab_size]
    flags += ["--tokenizer", args.tokenizer]
    run(args.vocab_python, "make-vocab.py", *flags, "--model_config", "config/model_config_mini.json", "--overwrite")
    for name in ("train", args.held_out):
        flags = ["--raw_data_path", folder / f"{name}.json", "--vocab_filename", vocabulary, "--overwrite"]
        flags += ["--tokenizer", args.tokenizer, "--min_length", args.min_length if name == "train" else "0"]
        run(sys.executable, "make-tokenized.py", *flags, "--tokenized_data_path", folder / f"tokenized_{name}")
        if name == "train":
            seconds = time.time() - began
    return vocabulary, seconds


def train(args: argparse.Namespace, trial: str, seed: int, vocabulary: Path, prepared_in: float) -> tuple[Path, float]:
    """The model of a trial, and the seconds that it took, preparation included; 0 if it was there."""
    flags = shlex.split(trial)
    output = args.folder / hashlib.sha256(f"{trial} {seed}".encode()).hexdigest()[:12]
    model = output / ("best_model" if "--val_fraction 0" not in trial else "final_model")
    if (output / "final_model").is_dir():
        return model, 0.0
    began = time.time() - prepared_in
    common = ["--tokenized_data_path", args.folder / "tokenized_train", "--vocab_file", vocabulary]
    common += ["--output_dir", output, "--writer_dir", output / "tensorboard", "--seed", seed, "--overwrite"]
    if "--minutes" in flags:
        common += ["--minutes_from", int(began)]
    run(sys.executable, "train.py", *common, *flags)
    return model, time.time() - began


def measure(args: argparse.Namespace, model: Path) -> float:
    pieces = args.folder / f"tokenized_{args.held_out}"
    flags = ["--eval_only", "--pretrained_model", model, "--tokenized_data_path", pieces, "--batch_size", 16]
    return float(json.loads(run(sys.executable, "train.py", *flags).strip().splitlines()[-1])["bits_per_character"])


def main() -> None:
    args = parse_args()
    documents = [line for file in args.files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    parts = split(documents)
    held_out = parts[args.held_out]
    characters = sum(map(len, held_out))
    counts = f"{len(parts['train']):,} documents to train on, {len(held_out):,} to measure on"
    print(f"{counts} ({args.held_out})", flush=True)
    for order in (5, 7):
        bits = ngram_bits(as_arrays(parts["train"]), as_arrays(held_out), order=order)
        print(f"{order}-gram of characters: {bits / characters:.4f} bits per character", flush=True)
    vocabulary, prepared_in = prepare(args, parts)
    print(f"stages 2 and 3: {prepared_in:.1f} s", flush=True)
    for trial in args.trial:
        found = []
        for seed in args.seeds:
            model, seconds = train(args, trial, seed, vocabulary, prepared_in)
            found.append(measure(args, model))
            print(f"  seed {seed}: {found[-1]:.4f} bits per character, {seconds:.0f} s", flush=True)
        spread = f" ({min(found):.4f} to {max(found):.4f})" if len(found) > 1 else ""
        print(f"{statistics.mean(found):.4f}{spread}  {trial}", flush=True)


if __name__ == "__main__":
    main()
