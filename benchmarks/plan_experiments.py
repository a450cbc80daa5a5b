"""The experiments behind the plan of --minutes: what each shape reaches in each time, as a table and a picture.

    .venv-train/bin/python benchmarks/plan_experiments.py medical_qa.txt songci.txt --minutes 1 2 4
    .venv-train/bin/python benchmarks/plan_experiments.py --only_draw

Every shape is trained on every corpus for every time, with the plan's other settings and without teachers, and measured
on the tune tenth of quality.py, which must not be what a model is judged by. The results are added to
plan_experiments.jsonl, one line for a run; the picture is drawn from all of that file, a line for each machine and
number of its cores, with the mean of the seeds.

The fit is bits per character = floor + gap * epochs ** -1.13, of plan.py, for each corpus and shape with three runs or
more of at least one epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import quality  # noqa: E402
from benchmarks.yardstick import as_arrays  # noqa: E402
from gpt2_chinese.training.ngram import ngram_bits  # noqa: E402

RESULTS = Path(__file__).with_name("plan_experiments.jsonl")
PICTURE = ROOT / "docs" / "plan.png"
EXPONENT = -1.13
SHAPES = ("2x128", "3x192", "4x256")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="TXT files, a document a line, each a corpus")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 2, 4], help="(default: %(default)s)")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="of config/plan/ (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--machine", default="", help="its letter in RESULTS.md")
    parser.add_argument("--folder", type=Path, default=Path("plan_experiments"), help="to work in")
    parser.add_argument("--vocab_python", default=str(ROOT / ".venv-vocab/bin/python"), help="of make-vocab.py")
    parser.add_argument("--only_draw", action="store_true", help="train nothing")
    return parser.parse_args()


def run_corpus(args: argparse.Namespace, file: Path) -> None:
    """All shapes and times of one corpus; what the file of results has already is not run again."""
    folder = args.folder.resolve() / file.stem
    settings = argparse.Namespace(
        folder=folder,
        tokenizer="bpe",
        vocab_size="auto",
        min_length="1",
        held_out="tune",
        vocab_python=args.vocab_python,
    )
    parts = quality.split([line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()])
    held_out = parts["tune"]
    counted = min(ngram_bits(as_arrays(parts["train"]), as_arrays(held_out), order=order) for order in (5, 7))
    vocabulary, prepared_in = quality.prepare(settings, parts)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for minutes in args.minutes:
        for shape in args.shapes:
            key = {"corpus": file.name, "shape": shape, "minutes": minutes, "seed": args.seed, "cores": cores}
            key["machine"] = args.machine
            if any(key.items() <= row.items() for row in read_results()):
                continue
            trial = f'--minutes {minutes:g} --teacher "" --model_config config/plan/{shape}.json'
            model, _ = quality.train(settings, trial, args.seed, vocabulary, prepared_in)
            log = (model.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            epochs = max(line["epoch"] for line in map(json.loads, log) if "epoch" in line)
            found = {
                "epochs": round(epochs, 2),
                "bits_per_character": round(quality.measure(settings, model), 4),
                "ngram": round(counted / sum(map(len, held_out)), 4),
            }
            with open(RESULTS, "a", encoding="utf-8") as output:
                output.write(json.dumps(key | found, ensure_ascii=False) + "\n")
            print(f"{file.name} {shape} {minutes:g} min: {found}", flush=True)


def read_results() -> list[dict[str, Any]]:
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def groups(results: list[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The rows of each corpus and shape, by epochs."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(results, key=lambda row: (row["corpus"], row["shape"], row["epochs"])):
        found[row["corpus"]][row["shape"]].append(row)
    return found


def print_table(results: list[dict[str, Any]]) -> None:
    for corpus, shapes in groups(results).items():
        print(corpus)
        for shape, rows in shapes.items():
            line = ", ".join(f"{row['epochs']:g} epochs {row['bits_per_character']:.4f}" for row in rows)
            print(f"  {shape}: {line}")
            rows = [row for row in rows if row["epochs"] >= 1]
            if len(rows) > 2:
                terms = np.stack([np.ones(len(rows)), np.array([row["epochs"] for row in rows]) ** EXPONENT], axis=1)
                bits = np.array([row["bits_per_character"] for row in rows])
                (floor, gap), *_ = np.linalg.lstsq(terms, bits, rcond=None)
                error = np.abs(terms @ [floor, gap] - bits).max()
                print(f"    floor {floor:.3f}, gap {gap:.3f}, largest error {error:.4f}")


def draw(results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    corpora = groups(results)
    figure, panels = pyplot.subplots(1, len(corpora), figsize=(4.5 * len(corpora), 3.4), squeeze=False)
    for panel, (corpus, shapes) in zip(panels[0], corpora.items(), strict=True):
        machines = sorted({(row["machine"], row["cores"]) for rows in shapes.values() for row in rows})
        for shape, rows in shapes.items():
            for machine, cores in machines:
                bits = defaultdict(list)
                for row in rows:
                    if (row["machine"], row["cores"]) == (machine, cores):
                        bits[row["minutes"]].append(row["bits_per_character"])
                times = sorted(bits)
                name = f"{shape}, {machine}, {cores}" if len(machines) > 1 else shape
                panel.plot(times, [np.mean(bits[time]) for time in times], marker="o", label=name)
        counted = next(iter(shapes.values()))[0]["ngram"]
        panel.axhline(counted, linestyle="--", color="gray", label="n-gram of characters")
        panel.set(title=corpus, xlabel="minutes", ylabel="bits per character", xscale="log")
        times = sorted({row["minutes"] for rows in shapes.values() for row in rows})
        panel.set_xticks(times, labels=[f"{time:g}" for time in times])
        panel.minorticks_off()
        panel.legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    args = parse_args()
    if not args.only_draw:
        for file in args.files:
            run_corpus(args, file)
    results = read_results()
    print_table(results)
    draw(results)
    print(f"{PICTURE.relative_to(ROOT)} is drawn")


if __name__ == "__main__":
    main()
