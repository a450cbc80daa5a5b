"""train.py killed again and again (SIGKILL, at random times), and whether it ends as the run that nobody killed.

    .venv-train/bin/python benchmarks/kill_training.py --kills 50 --precision fp32
    .venv-train/bin/python benchmarks/kill_training.py --kills 20 --precision bf16 --device cpu,cpu

The run has what is hard to resume: dropout, weight decay, Muon, shifted windows, a trigram to learn from, a best model,
patience, measurements and checkpoints all few updates. `make demo` leaves the pieces that it trains on. The status is 1
if a model folder is not the same bit for bit, or the figures in metrics.jsonl are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--model_config config/plan/2x128.json --batch_size 8 --stride 127 --epochs 3 --max_steps 150 --optimizer muon "
    "--lr 1.5e-2 --muon_lr 6e-3 --warmup_steps 30 --embedding_init cooccurrence --dropout 0.1 --weight_decay 0.5 "
    "--muon_weight_decay 1.5 --shift_windows --document_mask --ngram_share 0.3 --patience 12 --val_steps 10 "
    "--save_steps 4 --log_step 1 --quiet"
)
MODELS = ("final_model", "best_model")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu,cpu for two ranks (default: %(default)s)")
    parser.add_argument("--tokenized_data_path", default="demo/tokenized", help="(default: %(default)s)")
    parser.add_argument("--vocab_file", default="demo/vocab.txt", help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("killed"), help="to work in (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills (default: %(default)s)")
    return parser.parse_args()


def command(args: argparse.Namespace, output: Path, *more: str) -> list[str]:
    own = ["--tokenized_data_path", args.tokenized_data_path, "--vocab_file", args.vocab_file, "--device", args.device]
    own += ["--precision", args.precision, "--output_dir", str(output), "--writer_dir", str(output / "tensorboard")]
    return [sys.executable, str(ROOT / "train.py"), *FLAGS.split(), *own, *more]


def figures(output: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What metrics.jsonl says of each update and measurement; what depends on time is left out."""
    found = {}
    for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        point = json.loads(line)
        if "step" in point:
            found[point.get("kind", ""), point["step"]] = {
                name: value for name, value in point.items() if "second" not in name and "time" not in name
            }
    return found


def weights(output: Path) -> list[str]:
    return [hashlib.sha256((output / name / "model.safetensors").read_bytes()).hexdigest() for name in MODELS]


def main() -> int:
    args = parse_args()
    whole, killed = args.folder.resolve() / "whole", args.folder.resolve() / "killed"
    os.chdir(ROOT)
    shutil.rmtree(whole, ignore_errors=True)
    began = time.monotonic()
    subprocess.run(command(args, whole), check=True, capture_output=True)
    seconds = time.monotonic() - began
    expected, of_whole = weights(whole), figures(whole)
    print(f"not killed: {seconds:.1f} s, {max(step for _, step in of_whole)} updates", flush=True)

    source, kills, runs, different = random.Random(args.seed), 0, 0, 0
    while kills < args.kills:
        runs += 1
        shutil.rmtree(killed, ignore_errors=True)
        resume: list[str] = []
        while True:
            process = subprocess.Popen(
                command(args, killed, *resume),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                wait = source.uniform(0.2, 0.7) * seconds if kills < args.kills else 600
                _, errors = process.communicate(timeout=wait)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills += 1
                resume = ["--resume"] if (killed / "checkpoints").is_dir() else ["--overwrite"]
                continue
            if process.returncode:
                print(errors.decode(errors="replace"), flush=True)
                return 1
            break
        is_same = weights(killed) == expected and figures(killed) == of_whole
        different += not is_same
        print(f"after {kills} kills: {'the same' if is_same else 'NOT the same'} models and figures", flush=True)
    print(f"{args.precision}, {args.device}: {kills} kills of {runs} runs, {different} of them ended otherwise")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
