"""Stage 2: build the vocabulary from the words of the corpus.

Reads data/train.json, writes vocab/vocab_user.txt: five special tokens, then THULAC's words ranked by Keras' Tokenizer.

    python make-vocab.py
    python make-vocab.py --vocab_size 20000
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import string
import sys
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from gpt2_chinese.artifacts import read_json, write_json, write_lines
from gpt2_chinese.command_line import print_settings, run_script
from gpt2_chinese.parallel import default_workers, open_workers
from gpt2_chinese.text.corpus import read_train_json
from gpt2_chinese.text.preparation import (
    batches,
    count_batch,
    count_batch_of_reference,
    fold_counts,
    shared_segmenter,
)
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, PART_PREFIX, fold, is_spaced, spelling

REPORT_SIZES = (1000, 2000, 5000, 10000, 20000, 50000)
LEARNT_COUNT = 5  # a word that is seen less often is hardly learnt
MAX_WORD = 100  # characters; longer "words" (links, encoded data) are spelled, as the reference gives them up
MIN_SIZE_FOR_BYTES = 2048  # below, 256 byte tokens would be more than an eighth of the vocabulary


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build vocab/vocab_user.txt from data/train.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # files
    parser.add_argument("--raw_data_path", default="data/train.json", help="the corpus, from build_trainfile.py")
    parser.add_argument("--vocab_file", default="vocab/vocab_user.txt", help="the file to write")
    # the vocabulary
    parser.add_argument(
        "--vocab_size", type=int, default=50000, help="tokens at the most, the five special tokens not counted"
    )
    parser.add_argument(
        "--compat", action="store_true", help="write GPT2-Chinese's vocabulary byte for byte, with its gaps"
    )
    # where it runs
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes on this machine")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="a Dask scheduler to run on, such as tcp://host:8786")
    # what it reports
    parser.add_argument(
        "--model_config",
        default="config/model_config_small.json",
        help="the model whose parameters the report compares the embedding with",
    )
    parser.add_argument("--report", metavar="FILE", help="write the coverage of several sizes as JSON, too")
    args = parser.parse_args(argv)
    for flag in ("vocab_size", "workers"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: give at least 1")
    if args.compat and args.report:
        parser.error("--report is about the default vocabulary; leave out --compat or --report")
    return args


def read_config(path: str) -> dict[str, int]:
    """Read what the report needs of a model configuration.

    Raises:
        ValueError: there is no such file, or a number is missing in it.
    """
    if not Path(path).is_file():
        raise ValueError(f"--model_config {path}: there is no such file; config/ has some")
    config = read_json(path)
    for name in ("n_embd", "n_layer", "n_positions"):
        if not isinstance(config, dict) or not isinstance(config.get(name), int):
            raise ValueError(f"--model_config {path}: {name} must be a number")
    return config


def load_keras_text() -> ModuleType:
    """Load the module of `tf.keras.preprocessing.text` without the 4 seconds that importing TensorFlow takes.

    The module is plain Python, but importing it by its name imports Keras and its backend first. Here its parent
    packages are only named, not run. If Keras keeps the module elsewhere, TensorFlow is imported after all.
    """
    spec = importlib.util.find_spec("keras")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    before = {name for name in sys.modules if name.partition(".")[0] == "keras"}
    if not before and (folder / "src" / "legacy" / "preprocessing" / "text.py").is_file():
        try:
            for parent in ("keras", "keras.src", "keras.src.legacy", "keras.src.legacy.preprocessing"):
                package = ModuleType(parent)
                package.__path__ = [str(folder.joinpath(*parent.split(".")[1:]))]
                sys.modules[parent] = package
            return importlib.import_module("keras.src.legacy.preprocessing.text")
        except ImportError:
            pass  # a Keras with other dependencies: import it as a whole
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "keras"]:
                del sys.modules[name]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow greets at import
    return importlib.import_module("tensorflow.keras.preprocessing.text")


def rank_words(counts: dict[str, int]) -> list[str]:
    """Rank words by Keras' Tokenizer: the most frequent first, ties in the order of first appearance."""
    tokenizer = load_keras_text().Tokenizer(filters="", lower=False)
    tokenizer.word_counts = OrderedDict(counts)
    tokenizer.fit_on_texts([])  # ranks the counts that it holds
    return list(tokenizer.index_word.values())


def reference_counts(batches: Iterable[dict[str, int]]) -> dict[str, int]:
    """Add up counts of THULAC's words as those of the words that Keras' default filters make of them.

    The reference joins THULAC's words with spaces and lets Keras lower-case the line, drop ASCII punctuation and split
    it at spaces: word by word it gives the same, and each word needs to be looked at only once.
    """
    text_to_word_sequence = load_keras_text().text_to_word_sequence
    counts: dict[str, int] = {}  # words stay in the order of first appearance in the corpus
    for batch in batches:
        for word, count in batch.items():
            counts[word] = counts.get(word, 0) + count
    filtered: dict[str, int] = {}
    for word, count in counts.items():
        for part in text_to_word_sequence(word):
            filtered[part] = filtered.get(part, 0) + count
    return filtered


def part_counts(counts: dict[str, int]) -> dict[str, int]:
    """Count the one-character tokens that spell the words, in the order of first appearance.

    A character that may touch its neighbour is there with and without `##`, even if the corpus has only one of them,
    and so are all of ASCII: a number or a Latin word of a user need not have stood in the corpus.
    """
    parts: dict[str, int] = {}
    for word, count in counts.items():
        for part in spelling(word):
            parts[part] = parts.get(part, 0) + count
    spaced = dict.fromkeys(part[-1] for part in parts if is_spaced(part[-1]))
    for character in [*spaced, *sorted(set(map(fold, string.digits + string.ascii_letters + string.punctuation)))]:
        parts.setdefault(character, 0)
        parts.setdefault(PART_PREFIX + character, 0)
    return parts


@dataclass
class Vocabulary:
    """The tokens behind the special ones: ranked words, then what spells the others."""

    words: list[str]
    parts: list[str]
    spells_all: bool = True  # every character of the corpus has its place


def choose_tokens(ranked_words: list[str], ranked_parts: list[str], vocab_size: int) -> Vocabulary:
    """Share `vocab_size` places between words and the parts that spell the words left out.

    Every part has its place if all of them fit into half of the vocabulary, otherwise the most frequent ones; a part
    that is among the words anyway takes none. The words get the rest, in their order.
    """
    more = BYTE_TOKENS if vocab_size >= MIN_SIZE_FOR_BYTES else ()
    parts = [*ranked_parts[: vocab_size // 2 - len(more)], *more]
    not_words = set(parts)
    kept = 0
    while kept < len(ranked_words):
        missing = len(not_words) - (ranked_words[kept] in not_words)
        if kept + 1 + missing > vocab_size:
            break
        not_words.discard(ranked_words[kept])
        kept += 1
    spells_all = len(parts) == len(ranked_parts) + len(more)
    return Vocabulary(ranked_words[:kept], [part for part in parts if part in not_words], spells_all)


def parameters(config: dict[str, int], vocab_size: int) -> tuple[int, int]:
    """The parameters of the token embedding and of the whole GPT-2 (the output layer is the embedding)."""
    width, layers = config["n_embd"], config["n_layer"]
    embedding = vocab_size * width
    block = 12 * width * width + 13 * width  # attention, the 4-fold wide layer, biases and two layer norms
    return embedding, embedding + config["n_positions"] * width + layers * block + 2 * width


def coverage_rows(
    counts: dict[str, int], ranked: list[str], ranked_parts: list[str], config: dict[str, int]
) -> list[dict[str, float]]:
    """What vocabularies of several sizes would cover, as rows of the report."""
    seen = sum(counts.values())
    rows = []
    for size in REPORT_SIZES:
        chosen = choose_tokens(ranked, ranked_parts, size)
        covered = sum(counts[word] for word in chosen.words)
        lines = len(SPECIAL_TOKENS) + len(chosen.words) + len(chosen.parts)
        embedding, total = parameters(config, lines)
        rows.append(
            {
                "vocab_size": size,
                "words": len(chosen.words),
                "coverage": covered / seen,
                "spelled": 1 - covered / seen,
                "spells_all": chosen.spells_all,
                "rarest_word_count": counts[chosen.words[-1]] if chosen.words else 0,
                "embedding_share": embedding / total,
            }
        )
    return rows


def recommend(rows: list[dict[str, float]]) -> int:
    """The largest size whose rarest word is seen often enough to be learnt, but one that spells every character."""
    spelling_all = [row for row in rows if row["spells_all"]] or rows[-1:]
    learnt = [int(row["vocab_size"]) for row in spelling_all if row["rarest_word_count"] >= LEARNT_COUNT]
    return max(learnt, default=int(spelling_all[0]["vocab_size"]))


def print_coverage(rows: list[dict[str, float]], recommended: int, config_path: str) -> None:
    print(f"what other sizes would cover (embedding: its share of the parameters of {config_path}):")
    print("  --vocab_size   words kept  covered  spelled  rarest seen  embedding")
    for row in rows:
        print(
            f"  {row['vocab_size']:12,} {row['words']:12,} {row['coverage']:8.2%} {row['spelled']:8.2%} "
            f"{row['rarest_word_count']:12,} {row['embedding_share']:10.1%}"
        )
    print(
        f"recommended: --vocab_size {recommended}, the largest that spells all and whose rarest word is seen "
        f"{LEARNT_COUNT} times (or else the smallest that spells them): rarer words are hardly learnt, better spelled"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    print_settings(args)
    path = Path(args.raw_data_path)
    size = path.stat().st_size if path.is_file() else 0
    config = None if args.compat else read_config(args.model_config)

    # 1) Segment and count.
    shared_segmenter()  # before the workers are forked, so that they share it
    with (
        open_workers(args.workers, args.scheduler) as map_in_order,
        tqdm(total=size, unit="B", unit_scale=True, desc="counting words") as bar,
    ):
        documents = read_train_json(path, progress=bar.update)
        if args.compat:
            counts = reference_counts(map_in_order(count_batch_of_reference, batches(documents)))
        else:
            counts = fold_counts(map_in_order(count_batch, batches(documents)))
    if not counts:
        raise ValueError(f"--raw_data_path {path}: there is no word in it; nothing was written")

    # 2) Rank, and choose what fits.
    ranked = rank_words(counts)
    if args.compat:
        chosen = Vocabulary(ranked[: args.vocab_size], [])
    else:
        ranked = [word for word in ranked if len(word) <= MAX_WORD]
        ranked_parts = rank_words(part_counts(counts))
        chosen = choose_tokens(ranked, ranked_parts, args.vocab_size)

    # 3) Write, and say what it covers.
    tokens = [*SPECIAL_TOKENS, *chosen.words, *chosen.parts]
    write_lines(args.vocab_file, tokens)
    seen = sum(counts.values())
    covered = sum(counts[word] for word in chosen.words)
    print(f"{args.vocab_file}: {len(tokens):,} lines: 5 special tokens, {len(chosen.words):,} words", end="")
    print("" if args.compat else f", {len(chosen.parts):,} characters, parts and bytes to spell other words")
    print(f"words seen: {seen:,}, {len(counts):,} different; {len(chosen.words):,} kept cover {covered / seen:.2%}")
    if covered < seen:
        fate = "become [UNK]" if args.compat else "are spelled"
        print(f"{len(counts) - len(chosen.words):,} words that stand {seen - covered:,} times {fate}")
    if config is not None:
        rows = coverage_rows(counts, ranked, ranked_parts, config)
        recommended = recommend(rows)
        print_coverage(rows, recommended, args.model_config)
        if args.report:
            write_json(
                args.report,
                {
                    "words_seen": seen,
                    "different_words": len(counts),
                    "vocab_size": args.vocab_size,
                    "lines": len(tokens),
                    "coverage": covered / seen,
                    "recommended_vocab_size": recommended,
                    "model_config": args.model_config,
                    "sizes": rows,
                },
            )


if __name__ == "__main__":
    run_script(main)
