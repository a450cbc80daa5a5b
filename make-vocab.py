"""Stage 2: build the vocabulary from the words of the corpus.

Reads data/train.json, writes vocab/vocab_user.txt: five special tokens, then THULAC's words, ranked as Keras' Tokenizer
does, or single characters; or vocab/tokenizer.json, byte-level BPE.

    python make-vocab.py
    python make-vocab.py --vocab_size 20000
    python make-vocab.py --tokenizer char
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from gpt2_chinese.artifacts import atomic_write, read_json, sha256_of, write_json, write_lines
from gpt2_chinese.command_line import (
    add_output_flags,
    localized,
    print_settings,
    progress_disabled,
    project_file,
    run_script,
    set_quiet,
)
from gpt2_chinese.help_formatter import HelpFormatter
from gpt2_chinese.parallel import default_workers, open_workers
from gpt2_chinese.text.char_tokenizer import fold_characters
from gpt2_chinese.text.corpus import read_train_json
from gpt2_chinese.text.preparation import (
    batches,
    count_batch,
    count_batch_of_characters,
    count_batch_of_reference,
    fold_character_counts,
    fold_counts,
    shared_segmenter,
)
from gpt2_chinese.text.tokenizers import KINDS
from gpt2_chinese.text.vocabulary import BERT_SPECIAL_TOKENS, SPECIAL_TOKENS
from gpt2_chinese.text.vocabulary_choice import (
    MAX_WORD,
    MIN_COUNT,
    Candidates,
    Choice,
    bpe_rows,
    character_part_counts,
    choose_tokens,
    coverage_rows,
    recommend,
    size_for_a_small_model,
    word_part_counts,
)
from gpt2_chinese.text.vocabulary_manifest import manifest_of, read_vocabulary_manifest
from gpt2_chinese.text.word_tokenizer import KEEP_CASE, KEEP_SPACES, RULES_VERSION, SPACE_TOKEN

DESCRIPTIONS = {"word": "words", "char": "characters and runs of letters or digits", "bpe": "byte-level BPE"}
COUNTING = {"word": "counting words", "char": "counting characters"}
DEFAULT_FILES = {"word": "vocab/vocab_user.txt", "char": "vocab/vocab_user.txt", "bpe": "vocab/tokenizer.json"}
END_OF_TEXT = "<|endoftext|>"
AUTO = "auto"  # --vocab_size
SMALLEST_SIZES = {"word": 2000, "char": 2000, "bpe": 3000}  # of it; in fewer tokens of BPE many characters are bytes
BPE_SAMPLE = 1_000_000  # characters of the corpus that sizes of BPE are compared on
# Characters of the corpus for each token that --vocab_size auto learns BPE from, and at least: more of them change few
# merges, and take seconds of the minutes that such a model has.
BPE_LEARNT_FROM, BPE_LEARNT_AT_LEAST = 100, 500_000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build the vocabulary from data/train.json.",
        formatter_class=HelpFormatter,
    )
    # files
    parser.add_argument("--raw_data_path", default="data/train.json", help="the corpus, from build_trainfile.py")
    parser.add_argument(
        "--vocab_file", help="the file to write; by default vocab/vocab_user.txt, for bpe vocab/tokenizer.json"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a vocabulary that is not of this corpus, or not of this script",
    )
    # the vocabulary
    parser.add_argument(
        "--tokenizer",
        choices=KINDS,
        default="word",
        help="what a token is: THULAC's words, single characters (BERT's WordPiece), or byte-level BPE",
    )
    parser.add_argument(
        "--vocab_size",
        type=size_or_auto,
        default=50000,
        help="tokens at most; for words and characters the five special tokens are not counted; auto grows with the "
        "square root of the corpus, which suits a small model, and learns BPE from a part of a large corpus",
    )
    parser.add_argument(
        "--compat", action="store_true", help="write GPT2-Chinese's vocabulary byte for byte, with its gaps"
    )
    parser.add_argument("--keep_case", action="store_true", help="keep upper case; otherwise letters become lower case")
    parser.add_argument(
        "--keep_spaces",
        action="store_true",
        help=f"keep white space beside Chinese, as the token {SPACE_TOKEN}; otherwise it is dropped",
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
    add_output_flags(parser)
    args = parser.parse_args(argv)
    for flag in ("vocab_size", "workers"):
        if getattr(args, flag) != AUTO and getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: give at least 1")
    if args.compat and args.tokenizer != "word":
        parser.error("--compat writes GPT2-Chinese's vocabulary of words; leave out --compat or --tokenizer")
    if (args.keep_case or args.keep_spaces) and (args.compat or args.tokenizer == "bpe"):
        parser.error("--keep_case and --keep_spaces are for words and characters: GPT2-Chinese keeps neither, BPE both")
    args.vocab_file = args.vocab_file or DEFAULT_FILES[args.tokenizer]
    if args.compat and args.report:
        parser.error("--report is about the default vocabulary; leave out --compat or --report")
    return args


def size_or_auto(text: str) -> int | str:
    return text if text == AUTO else int(text)


def read_config(path: str) -> dict[str, int]:
    """Read what the report needs of a model configuration.

    Raises:
        ValueError: there is no such file, or a number is missing in it.
    """
    path = project_file(path)
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
    """Rank words as Keras' Tokenizer does: the most frequent first, ties in the order of first appearance."""
    return sorted(counts, key=counts.__getitem__, reverse=True)  # equal ones stay in their order


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


def count_candidates(args: argparse.Namespace, size: int) -> Candidates:
    """Segment, count and rank what the vocabulary may have; `size` is that of the corpus in bytes."""
    with (
        open_workers(args.workers, args.scheduler) as map_in_order,
        tqdm(
            total=size,
            unit="B",
            unit_scale=True,
            desc=localized(COUNTING[args.tokenizer]),
            disable=progress_disabled(args),
        ) as bar,
    ):
        documents = batches(read_train_json(args.raw_data_path, progress=bar.update))
        if args.compat:
            counts = reference_counts(map_in_order(count_batch_of_reference, documents))
        elif args.tokenizer == "char":
            count = partial(count_batch_of_characters, keep_spaces=args.keep_spaces)
            fold_word = partial(fold_characters, lowercase=not args.keep_case)
            counts = fold_character_counts(map_in_order(count, documents), fold_word)
        else:
            rules = RULES_VERSION + KEEP_CASE * args.keep_case + KEEP_SPACES * args.keep_spaces
            counts = fold_counts(map_in_order(partial(count_batch, rules=rules), documents), rules)
    if not counts:
        raise ValueError(f"--raw_data_path {args.raw_data_path}: there is no word in it; nothing was written")
    ranked = rank_words(counts)
    if args.compat:
        return Candidates(counts, ranked, [], bytes=False)
    # The token for white space is in the vocabulary if that is kept, and never otherwise, even if texts have it.
    ranked = [word for word in ranked if word != SPACE_TOKEN]
    if args.keep_spaces:
        ranked = [SPACE_TOKEN, *ranked]
    spelled = {word: count for word, count in counts.items() if word != SPACE_TOKEN}
    counts.setdefault(SPACE_TOKEN, 0) if args.keep_spaces else counts.pop(SPACE_TOKEN, None)
    fold = str if args.keep_case else str.lower
    if args.tokenizer == "char":
        # A run of letters that is seen a few times only is better spelled; every single character is a word.
        ranked = [word for word in ranked if len(word) == 1 or (counts[word] >= MIN_COUNT and len(word) <= MAX_WORD)]
        return Candidates(counts, ranked, rank_words(character_part_counts(spelled, fold)), bytes=False)
    ranked = [word for word in ranked if len(word) <= MAX_WORD]
    return Candidates(counts, ranked, rank_words(word_part_counts(spelled, fold)), bytes=True)


def make_word_vocabulary(args: argparse.Namespace, size: int, config: dict[str, int] | None) -> None:
    """Write a vocabulary of words or of characters, and say what it covers."""
    # 1) Segment, count, rank, and choose what fits.
    candidates = count_candidates(args, size)
    counts = candidates.counts
    chosen = Choice(list(candidates.words[: args.vocab_size]))
    if not args.compat:
        chosen = choose_tokens(candidates, args.vocab_size)

    # 2) Write, and say what it covers.
    special = SPECIAL_TOKENS if args.tokenizer == "word" else BERT_SPECIAL_TOKENS
    tokens = [*special, *chosen.words, *chosen.parts]
    write_lines(args.vocab_file, tokens)
    seen = sum(counts.values())
    covered = sum(counts[word] for word in chosen.words)
    kind = "words" if args.tokenizer == "word" else DESCRIPTIONS["char"]
    how = "characters, parts and bytes" if args.tokenizer == "word" else "parts"
    lines = f"{args.vocab_file}: {len(tokens):,} lines: 5 special tokens, {len(chosen.words):,} {kind}"
    print(lines if args.compat else f"{lines}, {len(chosen.parts):,} {how} to spell other words")
    print(f"words seen: {seen:,}, {len(counts):,} different; {len(chosen.words):,} kept cover {covered / seen:.2%}")
    if covered < seen:
        fate = "become [UNK]" if args.compat else "are spelled"
        print(f"{len(counts) - len(chosen.words):,} words, seen {seen - covered:,} times, {fate}")
    if config is not None:
        rows = coverage_rows(candidates, config)
        recommended = recommend(rows)
        print_coverage(rows, recommended, args.model_config)
        if args.report:
            report = {
                "words_seen": seen,
                "different_words": len(counts),
                "lines": len(tokens),
                "coverage": covered / seen,
            }
            write_report(args, report, rows, recommended)


def make_bpe_vocabulary(args: argparse.Namespace, size: int, config: dict[str, int]) -> None:
    """Train byte-level BPE with the `tokenizers` package, write its tokenizer.json, and compare sizes on a sample."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    # 1) Train.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample: list[str] = []
    characters = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc=localized("reading"), disable=progress_disabled(args)) as bar:

        def documents() -> Iterator[str]:
            nonlocal characters
            for document in read_train_json(args.raw_data_path, progress=bar.update):
                if characters < (BPE_SAMPLE // 10 if args.chooses_size else BPE_SAMPLE):
                    sample.append(document)
                    characters += len(document)
                yield document

        def learnt_from() -> Iterator[str]:
            """All documents, or as many as it takes, evenly from the whole corpus."""
            wanted = max(BPE_LEARNT_AT_LEAST, BPE_LEARNT_FROM * args.vocab_size) if args.chooses_size else math.inf
            seen = taken = 0
            for document in documents():
                seen += len(document)
                if taken <= wanted * 3 * seen / size:  # a Chinese character is three bytes
                    taken += len(document)
                    yield document

        tokenizer.train_from_iterator(learnt_from(), trainer)
    if not characters:
        raise ValueError(f"--raw_data_path {args.raw_data_path}: there is no text in it; nothing was written")

    # 2) Write, and say what it covers.
    with atomic_write(args.vocab_file) as file:
        file.write(tokenizer.to_str(pretty=True))
    described = json.loads(tokenizer.to_str())
    merges, vocabulary = described["model"]["merges"], described["model"]["vocab"]
    first = len(vocabulary) - len(merges)

    def tokens_per_character(lines: int) -> float:
        kept = max(0, lines - first)
        model = described["model"] | {
            "merges": merges[:kept],
            "vocab": {token: id_ for token, id_ in vocabulary.items() if id_ < first + kept},
        }
        smaller = Tokenizer.from_str(json.dumps(described | {"model": model}))
        return sum(map(len, smaller.encode_batch(sample))) / characters

    counts = [0] * tokenizer.get_vocab_size()
    for encoding in tokenizer.encode_batch(sample):
        for id_ in encoding.ids:
            counts[id_] += 1
    print(
        f"{args.vocab_file}: {len(counts):,} tokens: {END_OF_TEXT}, 256 bytes, {len(merges):,} merges; "
        f"{sum(counts) / characters:.3f} tokens per character of the first {characters:,} characters"
    )
    rows = bpe_rows(counts, tokens_per_character, config)
    recommended = recommend(rows)
    print_bpe_sizes(rows, recommended, args.model_config)
    if args.report:
        write_report(args, {"lines": len(counts)}, rows, recommended)


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
        f"{MIN_COUNT} times (or else the smallest that spells them): rarer words are hardly learnt, better spelled"
    )


def print_bpe_sizes(rows: list[dict[str, float]], recommended: int, config_path: str) -> None:
    print(f"what other sizes would give (embedding: its share of the parameters of {config_path}):")
    print("  --vocab_size       tokens  tokens per character  rarest seen  embedding")
    for row in rows:
        print(
            f"  {row['vocab_size']:12,} {row['words']:12,} {row['tokens_per_character']:21.3f} "
            f"{row['rarest_word_count']:12,} {row['embedding_share']:10.1%}"
        )
    print(
        f"recommended: --vocab_size {recommended}, the largest whose last merges are seen {MIN_COUNT} times in that "
        "sample: rarer tokens are hardly learnt"
    )


def write_report(
    args: argparse.Namespace, figures: dict[str, float], rows: list[dict[str, float]], recommended: int
) -> None:
    report = {"tokenizer": args.tokenizer, "vocab_size": args.vocab_size, "recommended_vocab_size": recommended}
    write_json(args.report, figures | report | {"model_config": args.model_config, "sizes": rows})


def check_replaceable(args: argparse.Namespace) -> None:
    """Say what lies where the vocabulary is written to, before the work begins.

    Raises:
        ValueError: a vocabulary of another corpus, or one that this script has not written, and no --overwrite.
    """
    vocab_file = Path(args.vocab_file)
    if not vocab_file.exists() or args.overwrite:
        return
    elsewhere = "write to another --vocab_file, or replace it with --overwrite"
    if vocab_file.is_dir():
        raise ValueError(f"--vocab_file {vocab_file} is a folder; name the file to write")
    manifest = read_vocabulary_manifest(vocab_file)
    if manifest is None:  # of an earlier version of this script, or from elsewhere
        begins = vocab_file.read_bytes()[:100].split()[:5]
        own = ([token.encode() for token in names] for names in (SPECIAL_TOKENS, BERT_SPECIAL_TOKENS))
        if args.tokenizer != "bpe" and begins not in own:
            raise ValueError(f"{vocab_file} is not a vocabulary that this script has written; {elsewhere}")
        return
    if manifest["vocabulary"]["sha256"] != sha256_of(vocab_file):
        raise ValueError(f"{vocab_file} was changed since this script wrote it; {elsewhere}")
    corpus = Path(manifest["corpus"]["path"])
    if corpus.is_file() and corpus.resolve() != Path(args.raw_data_path).resolve():
        raise ValueError(f"{vocab_file} was made from {corpus}, not from {args.raw_data_path}; {elsewhere}")


def write_manifest(args: argparse.Namespace) -> None:
    """Write beside the vocabulary which corpus and options it was made from."""
    corpus = {"path": str(Path(args.raw_data_path).resolve()), "sha256": sha256_of(args.raw_data_path)}
    vocabulary = {"path": args.vocab_file, "sha256": sha256_of(args.vocab_file)}
    options = {name: getattr(args, name) for name in ("tokenizer", "vocab_size", "compat", "keep_case", "keep_spaces")}
    write_json(manifest_of(Path(args.vocab_file)), {"vocabulary": vocabulary, "corpus": corpus, "options": options})


def refuse_a_name(path: str) -> None:
    """Refuse a corpus whose only document is the name of a file: GPT2-Chinese's documentation shows such a one.

    Raises:
        ValueError: it is.
    """
    documents = list(islice(read_train_json(path), 2))
    if len(documents) == 1 and re.fullmatch(r"\S{1,100}\.(txt|json|csv|md)", documents[0].strip(), re.IGNORECASE):
        raise ValueError(
            f"--raw_data_path {path}: its only document is {documents[0].strip()!r}, the name of a file, not its text; "
            "put that file into data/ and run build_trainfile.py"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    set_quiet(args.quiet)
    print_settings(args, file=sys.stderr)
    path = Path(args.raw_data_path)
    size = path.stat().st_size if path.is_file() else 0
    refuse_a_name(args.raw_data_path)
    check_replaceable(args)
    args.chooses_size = args.vocab_size == AUTO
    if args.chooses_size:
        args.vocab_size = size_for_a_small_model(size, SMALLEST_SIZES[args.tokenizer])
        print(f"--vocab_size auto: {args.vocab_size:,} for {size / 1e6:.1f} MB")
    config = None if args.compat else read_config(args.model_config)
    if args.tokenizer == "bpe":
        assert config is not None
        make_bpe_vocabulary(args, size, config)
    else:
        if args.tokenizer == "word":
            shared_segmenter()  # before the workers are forked, so that they share it
        make_word_vocabulary(args, size, config)
    write_manifest(args)


if __name__ == "__main__":
    run_script(main)
