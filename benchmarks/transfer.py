"""What a trained model gives a small new corpus, beside a new model: going on from it, also with another vocabulary.

    .venv-train/bin/python benchmarks/transfer.py songci.txt medical_qa.txt --share 0.1

Both corpora are TXT files, a document a line. The old model is trained on the first one. A tenth of the second one, by
a hash of each document, is measured on; a share of the rest, by the same hash, is trained on by every other model, with
as many updates. Bits per character compare them, whatever their vocabulary. make-vocab.py runs in the other
environment. Models that an earlier call with the same --folder has trained are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUON = "--optimizer muon --batch_size 16 --stride 127 --dropout 0.1 --weight_decay 0.1 --muon_weight_decay 0.5"
NEW = f"{MUON} --lr 1.5e-2 --muon_lr 6e-3 --embedding_init cooccurrence"
ADAMW = "--batch_size 16 --stride 127 --dropout 0.1"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="TXT file that the old model is trained on")
    parser.add_argument("new", help="TXT file that the models go on with")
    parser.add_argument(
        "--share", type=float, default=0.1, help="of the second file to train on (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=6, help="on the share (default: %(default)s)")
    parser.add_argument("--old_epochs", type=int, default=1, help="of the old model (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("transfer"), help="to work in (default: %(default)s)")
    parser.add_argument("--vocab_python", default=str(ROOT / ".venv-vocab/bin/python"), help="of make-vocab.py")
    parser.add_argument("--tokenizer", choices=["word", "char"], default="word", help="(default: %(default)s)")
    parser.add_argument("--lrs", nargs="+", default=["5e-5", "5e-4"], help="of AdamW, for going on")
    return parser.parse_args()


def position(document: str) -> float:
    """A number from 0 to below 1 that the text decides."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big") / 2.0**64


def run(python: str, *arguments: object) -> str:
    """Run a script of the project; its output is shown only if it fails."""
    command = [python, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def prepare(args: argparse.Namespace, name: str, documents: list[str]) -> Path:
    folder: Path = args.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
    return folder


def make_vocabulary(args: argparse.Namespace, folder: Path) -> Path:
    path = folder / "vocab.txt"
    flags = ["--raw_data_path", folder / "train.json", "--vocab_file", path, "--vocab_size", 5000, "--overwrite"]
    run(args.vocab_python, "make-vocab.py", *flags, "--tokenizer", args.tokenizer)
    return path


def tokenize(args: argparse.Namespace, folder: Path, vocabulary: Path, name: str) -> Path:
    flags = ["--raw_data_path", folder / "train.json", "--vocab_filename", vocabulary, "--num_pieces", 10]
    flags += ["--min_length", 0, "--tokenized_data_path", folder / name, "--overwrite"]
    run(sys.executable, "make-tokenized.py", *flags)
    return folder / name


def train(args: argparse.Namespace, pieces: Path, name: str, flags: str) -> Path:
    output = args.folder / name
    if (output / "final_model").is_dir():
        return output / "final_model"
    common = ["--model_config", "config/model_config_mini.json", "--tokenized_data_path", pieces, "--val_fraction", 0]
    common += ["--output_dir", output, "--writer_dir", output / "tensorboard", "--device", "cpu", "--log_step", 100]
    run(sys.executable, "train.py", *common, *flags.split(), "--resume", "none", "--overwrite")
    return output / "final_model"


def measure(model: Path, pieces: Path) -> float:
    """Bits per character of a model on the documents of a folder of pieces."""
    flags = ["--eval_only", "--pretrained_model", model, "--tokenized_data_path", pieces, "--device", "cpu"]
    printed = run(sys.executable, "train.py", *flags, "--batch_size", 16)
    return float(json.loads(printed.strip().splitlines()[-1])["bits_per_character"])


def main() -> None:
    args = parse_args()
    old_documents = Path(args.old).read_text(encoding="utf-8").splitlines()
    documents = Path(args.new).read_text(encoding="utf-8").splitlines()
    test = [document for document in documents if position(document) < 0.1]
    share = [document for document in documents if 0.1 <= position(document) < 0.1 + 0.9 * args.share]
    print(f"old: {len(old_documents):,} documents; trained on: {len(share):,}; measured on: {len(test):,}", flush=True)

    old, small, measured = (
        prepare(args, name, texts) for name, texts in (("old", old_documents), ("share", share), ("test", test))
    )
    old_vocabulary, new_vocabulary = make_vocabulary(args, old), make_vocabulary(args, small)
    old_model = train(args, tokenize(args, old, old_vocabulary, "old"), "m_old", f"{NEW} --epochs {args.old_epochs}")
    pieces = {
        "old": (tokenize(args, small, old_vocabulary, "old"), tokenize(args, measured, old_vocabulary, "old")),
        "new": (tokenize(args, small, new_vocabulary, "new"), tokenize(args, measured, new_vocabulary, "new")),
    }
    print(f"the old model, as it is: {measure(old_model, pieces['old'][1]):.4f} bits per character", flush=True)

    epochs = f"--epochs {args.epochs}"
    transplant = f"--pretrained_model {old_model} --vocab_file {new_vocabulary}"
    going_on = f"--pretrained_model {old_model}"
    trials = [
        ("a new model, its own vocabulary", "new", f"{NEW} {epochs}"),
        ("a new model, the old vocabulary", "old", f"{NEW} {epochs}"),
        *((f"going on, AdamW at {lr}", "old", f"{going_on} {ADAMW} --lr {lr} {epochs}") for lr in args.lrs),
        ("going on, Muon at 5e-3 and 2e-3", "old", f"{going_on} {MUON} --lr 5e-3 --muon_lr 2e-3 {epochs}"),
        *(
            (f"its own vocabulary on the old layers, AdamW at {lr}", "new", f"{transplant} {ADAMW} --lr {lr} {epochs}")
            for lr in args.lrs[-1:]
        ),
        *(
            (
                f"its own vocabulary on the old layers, Muon at {lr} and {muon}",
                "new",
                f"{transplant} {MUON} --lr {lr} --muon_lr {muon} {epochs}",
            )
            for lr, muon in (("5e-3", "2e-3"), ("1.5e-2", "6e-3"))
        ),
        ("going on, Muon at 1.5e-2 and 6e-3", "old", f"{going_on} {MUON} --lr 1.5e-2 --muon_lr 6e-3 {epochs}"),
    ]
    for number, (title, vocabulary, flags) in enumerate(trials):
        trained_on, measured_on = pieces[vocabulary]
        model = train(args, trained_on, f"m{number}", flags)
        print(f"{title}: {measure(model, measured_on):.4f} bits per character", flush=True)


if __name__ == "__main__":
    main()
