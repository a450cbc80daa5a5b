"""Stage 3: turn the corpus into token ids.

Reads data/train.json and vocab/vocab_user.txt, writes tokenized/tokenized_train_{i}.txt and tokenized/manifest.json.

    python make-tokenized.py
    python make-tokenized.py --num_pieces 10 --min_length 20
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gpt2_chinese.artifacts import atomic_write, exclusive_lock, has_shape, sha256_of, write_json
from gpt2_chinese.command_line import (
    add_output_flags,
    localized,
    print_settings,
    progress_disabled,
    remark,
    run_script,
    set_quiet,
)
from gpt2_chinese.help_formatter import HelpFormatter
from gpt2_chinese.parallel import MapInOrder, default_workers, open_workers
from gpt2_chinese.text.corpus import read_train_json, read_train_json_blocks
from gpt2_chinese.text.pieces import ENTRY, MANIFEST, PROGRESS, UNKNOWN_ERROR, check_unknown, read_manifest_file
from gpt2_chinese.text.preparation import (
    PieceReport,
    Tokenizing,
    batches,
    measured_lengths,
    shared_segmenter,
    tokenize_batch,
)
from gpt2_chinese.text.tokenizers import KINDS, TokenizerSpec, read_tokenizer, vocabulary_of_folder
from gpt2_chinese.text.vocabulary_manifest import read_vocabulary_manifest
from gpt2_chinese.text.word_tokenizer import PART_PREFIX, RULES_VERSION

MANIFEST_FORMAT = 1
DESCRIPTIONS = {"word": "words", "char": "characters (WordPiece)", "bpe": "byte-level BPE"}
CHANGES = {
    "case": "{:,} letters to lower case",
    "accents": "{:,} characters, of which an accent or another mark was dropped",
    "white_space": "{:,} characters of white space, dropped beside Chinese, in runs and at the ends of lines",
    "control": "{:,} control characters, dropped",
}
SAMPLED_DOCUMENTS, SAMPLED_CHARACTERS = 512, 500
HELD_CHARACTERS = 1 << 25  # 64 MiB of Chinese text in memory


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn data/train.json into token ids.", formatter_class=HelpFormatter)
    # files
    parser.add_argument("--raw_data_path", default="data/train.json", help="the corpus, from build_trainfile.py")
    parser.add_argument(
        "--vocab_filename",
        "--tokenizer_path",
        default="vocab/vocab_user.txt",
        help="the vocabulary, from make-vocab.py or elsewhere; a tokenizer.json; or a model folder",
    )
    parser.add_argument("--tokenized_data_path", default="tokenized/", help="the folder to write to")
    # what is kept, and how
    parser.add_argument("--num_pieces", type=int, default=100, help="files to split the documents into")
    parser.add_argument("--min_length", type=int, default=128, help="documents of more characters than this are kept")
    parser.add_argument("--compat", action="store_true", help="write GPT2-Chinese's ids byte for byte, with its [UNK]s")
    parser.add_argument(
        "--tokenizer",
        choices=KINDS,
        help="THULAC's words, BERT's WordPiece over single characters, or byte-level BPE; by default recognised by the "
        "vocabulary",
    )
    parser.add_argument(
        "--document_marks",
        nargs=2,
        metavar=("BEGIN", "END"),
        help="tokens around a document, by default those of the tokenizer: [MASK] and [CLS] as GPT2-Chinese has them, "
        "[CLS] and [SEP] for a folder with BERT's tokenizer, the end of text for BPE",
    )
    parser.add_argument(
        "--keep_case", action="store_true", help="keep upper case; by default as make-vocab.py was told"
    )
    parser.add_argument(
        "--keep_spaces",
        action="store_true",
        help="keep white space beside Chinese; by default as make-vocab.py was told",
    )
    parser.add_argument("--allow_unk", action="store_true", help="go on where a fifth and more of the tokens are [UNK]")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace pieces of another corpus or another vocabulary"
    )
    # where it runs
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes on this machine")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="a Dask scheduler to run on, such as tcp://host:8786")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    for flag, least in (("num_pieces", 1), ("min_length", 0), ("workers", 1)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag} {getattr(args, flag)}: give {least} or more")
    return args


def choose_tokenizer(args: argparse.Namespace) -> tuple[TokenizerSpec, Path]:
    """The tokenizer that the flags ask for, and the file of its vocabulary.

    Raises:
        ValueError, FileNotFoundError: there is none, or the flags contradict it; the message names file and mend.
    """
    path = Path(args.vocab_filename)
    spec = read_tokenizer(path, kind=args.tokenizer, compat=args.compat or None)
    if args.tokenizer not in (None, spec.kind):
        raise ValueError(f"{path} has a tokenizer of kind {spec.kind}, not {args.tokenizer}; leave --tokenizer out")
    if args.compat and spec.kind == "bpe":
        raise ValueError("--compat is for words and characters, which GPT2-Chinese has; leave it out for BPE")
    kept = kept_by_vocabulary(path) if not spec.compat else {}
    case, spaces = (getattr(args, name) or bool(kept.get(name)) for name in ("keep_case", "keep_spaces"))
    spec = spec.keeping(case=case, spaces=spaces)
    if args.document_marks:
        spec = spec.with_marks(*args.document_marks)
        spec.build()
    vocab_file = vocabulary_of_folder(path) if path.is_dir() else path
    assert vocab_file is not None  # it has been read
    return spec, vocab_file


def kept_by_vocabulary(vocab_file: Path) -> dict[str, Any]:
    """The options that make-vocab.py wrote a vocabulary with; none of one from elsewhere, or changed since."""
    manifest = read_vocabulary_manifest(vocab_file) if vocab_file.is_file() else None
    if manifest is None or manifest["vocabulary"]["sha256"] != sha256_of(vocab_file):
        return {}
    return dict(manifest.get("options") or {})


def piece_sizes(documents: int, num_pieces: int) -> list[int]:
    """How many documents each piece gets: equal shares, and the last one what is left, as in the reference."""
    share = documents // num_pieces
    return [share] * (num_pieces - 1) + [documents - share * (num_pieces - 1)]


def tokenize_pieces(
    documents: Iterator[str], sizes: list[int], done: set[int], map_in_order: MapInOrder
) -> Iterator[tuple[int, Iterator[tuple[bytes, PieceReport]]]]:
    """Give, for each piece that is not done, its number and the text and report of its batches in order."""
    numbers: deque[int] = deque()

    def batches_of_pieces() -> Iterator[list[str]]:
        for number, size in enumerate(sizes):
            own = islice(documents, size)
            if number in done:
                deque(own, maxlen=0)
                continue
            for batch in batches(own) if size else [[]]:
                numbers.append(number)
                yield batch

    numbered = ((numbers.popleft(), result) for result in map_in_order(tokenize_batch, batches_of_pieces()))
    for number, group in groupby(numbered, key=itemgetter(0)):
        yield number, map(itemgetter(1), group)


def write_piece(path: Path, parts: Iterable[tuple[bytes, PieceReport]]) -> tuple[dict[str, Any], PieceReport]:
    """Write one piece, and give its entry in the manifest and its report."""
    report = PieceReport()
    digest = hashlib.sha256()
    with atomic_write(path, "wb") as file:
        for text, part in parts:
            file.write(text)
            digest.update(text)
            report.add(part)
    entry = {"file": path.name, "sha256": digest.hexdigest(), "tokens": report.tokens, "documents": report.documents}
    return entry, report


def read_progress(line: str) -> tuple[int, dict[str, Any], PieceReport] | None:
    """The number of a finished piece, its entry in the manifest and its report; None for a line that is damaged."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, list) or len(value) != 3:
        return None
    number, entry, report = value
    blank = vars(PieceReport())
    shape = {name: type(value) for name, value in blank.items()} | {"unknown_words": dict, "examples": dict}
    if type(number) is not int or not has_shape(entry, ENTRY) or not has_shape(report, shape):
        return None
    if report.keys() != blank.keys() or not has_shape([*report["unknown_words"].values()], [int]):
        return None
    if not has_shape([*report["examples"].values()], [[str]]):
        return None
    return number, entry, PieceReport(**report | {"unknown_words": Counter(report["unknown_words"])})


class Progress:
    """The pieces that are finished, kept in a file until the manifest takes its place.

    While the file is there the folder is not whole, and train.py refuses it. A run that finds it goes on behind the
    pieces in it, if corpus, vocabulary and options are the same and the pieces are as they were written.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self._path = folder / PROGRESS
        self.finished: dict[int, tuple[dict[str, Any], PieceReport]] = {}
        # What is damaged is no UTF-8 at times; it is written in ASCII.
        lines = self._path.read_text(encoding="ascii", errors="replace").split("\n") if self._path.is_file() else [""]
        for line in lines[1:] if lines[0] == json.dumps(key) else []:
            finished = read_progress(line)
            if finished is None:
                break  # the line that the interrupted run was writing
            number, entry, report = finished
            if number not in range(key["options"]["num_pieces"]):
                break
            path = folder / f"tokenized_train_{number}.txt"
            if path.name == entry["file"] and path.is_file() and sha256_of(path) == entry["sha256"]:
                self.finished[number] = entry, report
        with atomic_write(self._path) as file:
            file.write(json.dumps(key) + "\n")
            for number, (entry, report) in self.finished.items():
                file.write(json.dumps([number, entry, vars(report)]) + "\n")

    def add(self, number: int, entry: dict[str, Any], report: PieceReport) -> None:
        self.finished[number] = entry, report
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps([number, entry, vars(report)]) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def end(self) -> None:
        self._path.unlink()


def unchanged(folder: Path, key: dict[str, Any]) -> bool:
    """Whether the manifest was made from the same corpus, vocabulary and options, and the pieces fit it."""
    if (folder / PROGRESS).exists() or not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest_file(folder / MANIFEST)
    except ValueError:
        return False  # `check_replaceable` tells it
    if any(manifest.get(name) != value for name, value in key.items()):
        return False
    return all(
        (folder / piece["file"]).is_file() and sha256_of(folder / piece["file"]) == piece["sha256"]
        for piece in manifest["pieces"]
    )


class Samples:
    """Some hundred documents, evenly spread over all that come."""

    def __init__(self) -> None:
        self.documents: list[str] = []
        self._stride = 1
        self._number = 0

    def add(self, documents: list[str]) -> None:
        for number, document in enumerate(documents, start=self._number):
            if number % self._stride == 0:
                self.documents.append(document[:SAMPLED_CHARACTERS])
                if len(self.documents) == SAMPLED_DOCUMENTS:
                    self.documents = self.documents[::2]
                    self._stride *= 2
        self._number += len(documents)


def check_sample(samples: Samples, tokenizing: Tokenizing, args: argparse.Namespace) -> None:
    """Stop before anything is written where it is plain that the vocabulary is one of another text.

    Raises:
        ValueError: twice as much of a sample is [UNK] as is allowed of all.
    """
    _, report = tokenize_batch(replace(tokenizing, min_length=0), samples.documents)
    if report.unknown_tokens >= 2 * UNKNOWN_ERROR * report.inner_tokens and not (args.allow_unk or args.compat):
        check_unknown(report.unknown_tokens, report.inner_tokens, args.vocab_filename, allow=False)


@dataclass(frozen=True)
class Corpus:
    """What one reading of the corpus tells.

    Attributes:
        documents: how many.
        held: all of them if they are few; a large corpus is read again.
    """

    documents: int
    sha256: str
    samples: Samples
    held: list[str]


def check_replaceable(folder: Path, key: dict[str, Any], *, overwrite: bool) -> None:
    """Say what pieces are replaced, before they are.

    Raises:
        ValueError: they are of another corpus or vocabulary, which are still there, or nobody can say of which, and no
            --overwrite.
    """
    if not (folder / MANIFEST).is_file():
        return
    try:
        manifest = read_manifest_file(folder / MANIFEST)
    except ValueError as error:
        if overwrite:
            return
        raise ValueError(
            f"{folder / MANIFEST} is damaged, or of another program; write to another --tokenized_data_path, or "
            "replace it and the pieces with --overwrite"
        ) from error
    for name, flag in (("corpus", "--raw_data_path"), ("vocabulary", "--vocab_filename")):
        before, now = manifest.get(name), key[name]
        if not has_shape(before, {"path": str}) or before.get("sha256") == now["sha256"]:
            continue
        there = Path(before["path"])
        if there.is_file() and there.resolve() != Path(now["path"]).resolve() and not overwrite:
            raise ValueError(
                f"the pieces in {folder} are of the {name} {there}, not of {now['path']}; write to another "
                f"--tokenized_data_path, replace them with --overwrite, or give {flag} {there}"
            )
        remark(f"note: the pieces in {folder} are of an earlier {name} and are replaced", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    set_quiet(args.quiet)
    print_settings(args, file=sys.stderr)
    folder = Path(args.tokenized_data_path)

    # 1) Read the vocabulary and the whole corpus once: an error is found before anything is written.
    spec, vocab_file = choose_tokenizer(args)
    tokenizer = spec.build()
    kind = f"{DESCRIPTIONS[spec.kind]}, as GPT2-Chinese" if spec.compat else DESCRIPTIONS[spec.kind]
    begin, end = (tokenizer.vocabulary[id_] for id_ in (tokenizer.marks.begin, tokenizer.marks.end))
    print(f"tokenizer: {kind}; {len(tokenizer):,} tokens of {vocab_file}; a document is {begin} … {end}")
    if spec.kind == "word" and not args.compat and not any(token.startswith(PART_PREFIX) for token in spec.vocabulary):
        print(
            f"warning: {args.vocab_filename} has no ## parts, so words outside it may become [UNK]; it comes from "
            "make-vocab.py --compat or from GPT2-Chinese: build one without --compat, or give --compat here too"
        )
    corpus = read_corpus(args)
    key = {
        "format": MANIFEST_FORMAT,
        "tokenizer_rules": RULES_VERSION,
        "tokenizer": spec.settings(),
        "vocabulary": {"path": str(vocab_file), "sha256": sha256_of(vocab_file), "size": len(tokenizer)},
        "corpus": {"path": str(args.raw_data_path), "sha256": corpus.sha256, "documents": corpus.documents},
        "options": {"num_pieces": args.num_pieces, "min_length": args.min_length, "compat": args.compat},
    }

    with exclusive_lock(folder):
        if unchanged(folder, key):
            print(f"{folder / MANIFEST}: nothing to do; corpus, vocabulary and options are those of the pieces there")
            return
        check_replaceable(folder, key, overwrite=args.overwrite)
        tokenizing = Tokenizing(spec, args.min_length)
        if spec.kind == "word" and not args.compat:
            shared_segmenter()  # before the workers are forked, so that they share it
        check_sample(corpus.samples, tokenizing, args)

        # 2) Write piece after piece, but for those that an interrupted run has finished.
        progress = Progress(folder, key)
        if progress.finished:
            print(f"resuming an interrupted run: {len(progress.finished)} of {args.num_pieces} pieces are kept")
        write_pieces(corpus, progress, tokenizing, args)
        warning, report, stale = finish(folder, key, progress, args)
    print_summary(report, corpus.documents, args, stale)
    if warning:
        print(warning, file=sys.stderr)


def read_corpus(args: argparse.Namespace) -> Corpus:
    """Read the whole corpus once.

    Raises:
        ValueError: it is no train.json, or has no document that is long enough.
    """
    digest = hashlib.sha256()
    documents = long_enough = characters = 0
    samples = Samples()
    held: list[str] = []
    for block in read_train_json_blocks(args.raw_data_path, read=digest.update):
        lengths = measured_lengths(block, compat=args.compat)
        documents += len(block)
        samples.add(block)
        long_enough += sum(length > args.min_length for length in lengths)
        characters += sum(lengths)
        if characters <= HELD_CHARACTERS:
            held += block
        else:
            held.clear()
    if not documents:
        raise ValueError(f"--raw_data_path {args.raw_data_path}: there is no document in it; nothing was written")
    if not long_enough:
        raise ValueError(
            f"none of the {documents:,} documents in {args.raw_data_path} is longer than --min_length "
            f"{args.min_length} characters; give a smaller --min_length, or make longer documents with "
            "build_trainfile.py --document paragraph or file; nothing was written"
        )
    return Corpus(documents, digest.hexdigest(), samples, held)


def write_pieces(corpus: Corpus, progress: Progress, tokenizing: Tokenizing, args: argparse.Namespace) -> None:
    """Write the pieces that are not finished yet."""
    sizes = piece_sizes(corpus.documents, args.num_pieces)
    done = set(progress.finished)
    documents = iter(corpus.held) if len(corpus.held) == corpus.documents else read_train_json(args.raw_data_path)
    with (
        open_workers(args.workers, args.scheduler, shared=tokenizing) as map_in_order,
        tqdm(
            total=corpus.documents,
            unit=localized(" documents"),
            unit_scale=True,
            desc=localized("tokenizing"),
            disable=progress_disabled(args),
        ) as bar,
    ):
        bar.update(sum(sizes[number] for number in done))
        for number, parts in tokenize_pieces(documents, sizes, done, map_in_order):
            entry, report = write_piece(Path(args.tokenized_data_path) / f"tokenized_train_{number}.txt", parts)
            progress.add(number, entry, report)
            bar.update(sizes[number])


def finish(
    folder: Path, key: dict[str, Any], progress: Progress, args: argparse.Namespace
) -> tuple[str | None, PieceReport, int]:
    """Write the manifest, and remove the pieces of an earlier run that are not in it.

    Returns:
        A warning of many [UNK], the report of all pieces, and how many were removed.

    Raises:
        ValueError: there are so many [UNK] that the vocabulary is one of another text.
    """
    report = PieceReport()
    for number in range(args.num_pieces):
        report.add(progress.finished[number][1])
    allow = args.allow_unk or args.compat
    warning = check_unknown(report.unknown_tokens, report.inner_tokens, args.vocab_filename, allow=allow)
    write_json(
        folder / MANIFEST,
        {
            **key,
            "documents": report.documents,
            "tokens": report.tokens,
            "unknown_tokens": report.unknown_tokens,
            "changes": report.changes(),
            "pieces": [progress.finished[number][0] for number in range(args.num_pieces)],
        },
    )
    kept = {f"tokenized_train_{number}.txt" for number in range(args.num_pieces)}
    stale = [path for path in folder.glob("tokenized_train_*.txt") if path.name not in kept]
    for path in stale:
        path.unlink()
    progress.end()
    return warning, report, len(stale)


def print_summary(report: PieceReport, total: int, args: argparse.Namespace, stale: int) -> None:
    inner = max(report.inner_tokens, 1)
    print(f"{args.tokenized_data_path}: {args.num_pieces} pieces, {report.tokens:,} tokens, {MANIFEST}")
    print(
        f"documents: {total:,}, kept {report.documents:,}; dropped {report.too_short:,} that are not longer than "
        f"{args.min_length} characters, {report.empty:,} with nothing left after cleaning"
    )
    print(
        f"[UNK]: {report.unknown_tokens:,} of {inner:,} tokens ({report.unknown_tokens / inner:.4%}); "
        f"words spelled with several tokens: {report.spelled_words:,} of {report.words:,} "
        f"({report.spelled_words / max(report.words, 1):.2%})"
    )
    if report.unknown_words:
        # Equal counts in the order of the words, so that the list does not depend on how the work was shared out.
        most = sorted(report.unknown_words.items(), key=lambda item: (-item[1], item[0]))[:10]
        print("most frequent unknown words:", ", ".join(f"{word} {count:,}" for word, count in most))
    for kind, change in report.changes().items():
        if change["count"] and kind in CHANGES:
            examples = ", ".join(change["examples"])
            print(f"changed: {CHANGES[kind].format(change['count'])}, such as {examples}", file=sys.stderr)
    if stale:
        print(f"removed {stale:,} pieces of an earlier run that had more of them")


if __name__ == "__main__":
    run_script(main)
