"""Stage 3: turn the corpus into token ids.

Reads data/train.json and vocab/vocab_user.txt, writes tokenized/tokenized_train_{i}.txt and tokenized/manifest.json.

    python make-tokenized.py
    python make-tokenized.py --num_pieces 10 --min_length 20
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from gpt2_chinese.artifacts import replacing, sha256_of, write_json
from gpt2_chinese.command_line import print_settings, run_script
from gpt2_chinese.corpus import read_train_json
from gpt2_chinese.tokenizer import PART_PREFIX, Tokenizer, dropped_characters
from gpt2_chinese.vocabulary import CLS_ID, MASK_ID, UNK_ID, read_vocabulary

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turn data/train.json into token ids.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    # files
    parser.add_argument("--raw_data_path", default="data/train.json", help="the corpus, from build_trainfile.py")
    parser.add_argument("--vocab_filename", default="vocab/vocab_user.txt", help="the vocabulary, from make-vocab.py")
    parser.add_argument("--tokenized_data_path", default="tokenized/", help="the folder to write to")
    # what is kept, and how
    parser.add_argument("--num_pieces", type=int, default=100, help="files to split the documents into")
    parser.add_argument("--min_length", type=int, default=128, help="documents of more characters than this are kept")
    parser.add_argument("--compat", action="store_true", help="write GPT2-Chinese's ids byte for byte, with its [UNK]s")
    args = parser.parse_args(argv)
    if args.num_pieces < 1:
        parser.error(f"--num_pieces {args.num_pieces}: give at least 1")
    if args.min_length < 0:
        parser.error(f"--min_length {args.min_length}: give 0 or more")
    return args


def piece_sizes(documents: int, num_pieces: int) -> list[int]:
    """How many documents each piece gets: equal shares, and the last one what is left, as in the reference."""
    share = documents // num_pieces
    return [share] * (num_pieces - 1) + [documents - share * (num_pieces - 1)]


def measured_length(document: str, *, compat: bool) -> int:
    """The length that --min_length speaks of: the reference measures a line break as " [SEP] "."""
    return len(document) + compat * document.count("\n") * (len(" [SEP] ") - 1)


class Report:
    """What became of the documents, for the summary and the manifest."""

    def __init__(self) -> None:
        self.kept = self.too_short = self.empty = 0
        self.tokens = self.unknown_tokens = self.spelled_words = self.words = self.dropped_characters = 0
        self.unknown_words: Counter[str] = Counter()


def document_ids(document: str, tokenizer: Tokenizer, report: Report) -> list[int]:
    """Give `[MASK] ids [CLS]` of one document and add to the report."""
    ids = [MASK_ID]
    for word in tokenizer.words(document):
        word_ids = tokenizer.word_ids(word)
        ids += word_ids
        report.words += 1
        report.spelled_words += len(word_ids) > 1
        if UNK_ID in word_ids:
            report.unknown_words[word] += 1
            report.unknown_tokens += word_ids.count(UNK_ID)
    ids.append(CLS_ID)
    return ids


def write_piece(
    path: Path, documents: Iterator[str], args: argparse.Namespace, tokenizer: Tokenizer, report: Report
) -> dict:
    """Tokenize the documents of one piece into its file, and give its entry in the manifest."""
    tokens = kept = 0
    with replacing(path) as file:
        for document in documents:
            if measured_length(document, compat=args.compat) <= args.min_length:
                report.too_short += 1
                continue
            report.dropped_characters += dropped_characters(document)
            ids = document_ids(document, tokenizer, report)
            if len(ids) == 2 and not args.compat:
                report.empty += 1
                continue
            # A space behind every id, the last one too: the reference's format.
            file.write(" ".join(map(str, ids)) + " ")
            tokens += len(ids)
            kept += 1
    report.kept += kept
    report.tokens += tokens
    return {"file": path.name, "sha256": sha256_of(path), "tokens": tokens, "documents": kept}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    print_settings(args)

    # 1) Read the vocabulary and the whole corpus once: an error is found before anything is written.
    tokenizer = Tokenizer(read_vocabulary(args.vocab_filename), compat=args.compat)
    if not args.compat and not any(token.startswith(PART_PREFIX) for token in tokenizer.vocabulary):
        print(
            f"warning: {args.vocab_filename} has no ## parts, so words outside it may become [UNK]; it comes from "
            "make-vocab.py --compat or from GPT2-Chinese: build one without --compat, or give --compat here too"
        )
    total = long_enough = 0
    for document in read_train_json(args.raw_data_path):
        total += 1
        long_enough += measured_length(document, compat=args.compat) > args.min_length
    if not total:
        raise ValueError(f"--raw_data_path {args.raw_data_path}: there is no document in it; nothing was written")
    if not long_enough:
        raise ValueError(
            f"none of the {total:,} documents in {args.raw_data_path} is longer than --min_length {args.min_length} "
            "characters; give a smaller --min_length, or make longer documents with build_trainfile.py "
            "--document paragraph or file; nothing was written"
        )

    # 2) Write piece after piece.
    folder = Path(args.tokenized_data_path)
    report = Report()
    pieces = []
    with tqdm(total=total, unit=" documents", desc="tokenizing") as bar:
        documents = _counted(read_train_json(args.raw_data_path), bar)
        for number, size in enumerate(piece_sizes(total, args.num_pieces)):
            path = folder / f"tokenized_train_{number}.txt"
            pieces.append(write_piece(path, islice(documents, size), args, tokenizer, report))

    # 3) The manifest, and away with pieces of an earlier run that are not in it.
    write_json(
        folder / MANIFEST,
        {
            "format": MANIFEST_FORMAT,
            "vocabulary": {
                "path": str(args.vocab_filename),
                "sha256": sha256_of(args.vocab_filename),
                "size": len(tokenizer),
            },
            "corpus": {"path": str(args.raw_data_path), "sha256": sha256_of(args.raw_data_path), "documents": total},
            "options": {"num_pieces": args.num_pieces, "min_length": args.min_length, "compat": args.compat},
            "documents": report.kept,
            "tokens": report.tokens,
            "unknown_tokens": report.unknown_tokens,
            "pieces": pieces,
        },
    )
    names = {piece["file"] for piece in pieces}
    stale = [path for path in folder.glob("tokenized_train_*.txt") if path.name not in names]
    for path in stale:
        path.unlink()
    print_summary(report, total, args, len(stale))


def _counted(documents: Iterator[str], bar: tqdm) -> Iterator[str]:
    for document in documents:
        yield document
        bar.update()


def print_summary(report: Report, total: int, args: argparse.Namespace, stale: int) -> None:
    print(f"{args.tokenized_data_path}: {args.num_pieces} pieces, {report.tokens:,} tokens, {MANIFEST}")
    print(
        f"documents: {total:,}, kept {report.kept:,}; dropped {report.too_short:,} that are not longer than "
        f"{args.min_length} characters, {report.empty:,} with nothing left after cleaning"
    )
    if report.dropped_characters:
        print(f"characters dropped: {report.dropped_characters:,} control characters, NULs or U+FFFD")
    inner = max(report.tokens - 2 * report.kept, 1)
    print(
        f"[UNK]: {report.unknown_tokens:,} of {report.tokens:,} tokens ({report.unknown_tokens / inner:.4%}); "
        f"words spelled with several tokens: {report.spelled_words:,} of {report.words:,} "
        f"({report.spelled_words / max(report.words, 1):.2%})"
    )
    if report.unknown_words:
        print("most frequent unknown words:", ", ".join(f"{w} {n:,}" for w, n in report.unknown_words.most_common(10)))
    if stale:
        print(f"removed {stale:,} pieces of an earlier run with more of them")


if __name__ == "__main__":
    run_script(main)
