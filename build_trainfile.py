"""Stage 1: gather text files into one training file.

Reads the files of data/ and its subfolders in the natural order of their names (TXT, JSON lines, CSV, Markdown, e-books
and others), writes data/train.json, a JSON array of documents.

    python build_trainfile.py
    python build_trainfile.py --data_path novels --encoding auto --document chapter
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from tqdm import tqdm

from gpt2_chinese.artifacts import atomic_write
from gpt2_chinese.command_line import (
    add_output_flags,
    check_stdout,
    localized,
    print_settings,
    progress_disabled,
    run_script,
    set_quiet,
)
from gpt2_chinese.help_formatter import HelpFormatter
from gpt2_chinese.messages import language_of
from gpt2_chinese.text.cleaning import RULES as CLEANING_RULES
from gpt2_chinese.text.cleaning import Cleaner, parse_rules
from gpt2_chinese.text.corpus import ON_ERROR, check_encoding, train_json_writer
from gpt2_chinese.text.division import UNITS, choose_unit, divide, survey
from gpt2_chinese.text.doctor import examine, screen
from gpt2_chinese.text.duplicates import MODES, SIMILARITY, Duplicates
from gpt2_chinese.text.formats import (
    BOOK_SUFFIXES,
    FileReport,
    format_of,
    has_records,
    list_files,
    passed_over_lines,
    read_texts,
    record_notes,
)

MIN_LENGTH = 128  # make-tokenized.py's default: it keeps documents of more characters


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Gather text files into data/train.json.", formatter_class=HelpFormatter
    )
    # files
    parser.add_argument("--data_path", default="data/", help="the folder of the text files; subfolders are read too")
    parser.add_argument("--output_path", default="data/train.json", help="the file to write")
    # how the files are read
    parser.add_argument(
        "--encoding",
        default="utf-8",
        help="of the files: a name such as utf-8, gb18030, big5, or auto to tell each file's",
    )
    parser.add_argument(
        "--on_error",
        default="stop",
        choices=ON_ERROR,
        help="what to do at bytes that are not in the encoding, lines that are not JSON, and damaged e-books",
    )
    parser.add_argument(
        "--text_field",
        help="of JSON lines, CSV and TSV: the field or column with the text, or several with commas between; found by "
        "itself where only one can be meant",
    )
    # what a document is
    parser.add_argument(
        "--document",
        default="line",
        choices=UNITS,
        help="what a document is; a paragraph ends at a blank line, auto chooses for each file; a record of JSON "
        "lines, CSV or TSV is one, or is divided into paragraphs or chapters",
    )
    parser.add_argument(
        "--join_lines", action="store_true", help="join lines that are broken where a page was full (text from PDF)"
    )
    # what is changed and left out
    parser.add_argument(
        "--clean",
        nargs="?",
        const="",
        metavar="RULES",
        help="clean the texts; without RULES all but simplified, otherwise names with commas between, no-NAME to turn "
        "one off: " + ", ".join(CLEANING_RULES),
    )
    parser.add_argument("--clean_report", metavar="FILE", help="write twenty examples of each rule and of duplicates")
    parser.add_argument(
        "--deduplicate",
        nargs="?",
        const="near",
        choices=MODES,
        help="leave out documents that repeat an earlier one: exact, or near (also nearly the same; what the flag "
        "alone means)",
    )
    parser.add_argument(
        "--similarity",
        type=float,
        default=SIMILARITY,
        help="of near duplicates: the share of common pairs of neighbouring characters, from which on they are one",
    )
    # instead of building
    parser.add_argument(
        "--doctor",
        action="store_true",
        help="write nothing; say on one screen what the texts are and what is wrong with them, in Chinese or English "
        "as LANG says",
    )
    add_output_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    set_quiet(args.quiet)
    print_settings(args, file=sys.stderr)
    encoding = check_encoding(args.encoding)
    # Indents are what tells lines that go on from those that do not; joining takes them away.
    cleaner = Cleaner(rule for rule in parse_rules(args.clean) if not (args.join_lines and rule == "indents"))
    if args.clean_report and not cleaner.rules and not args.deduplicate:
        raise ValueError("--clean_report needs --clean or --deduplicate: without them there is nothing to report")
    own = [path for path in (args.output_path, args.clean_report) if path]
    listing = list_files(args.data_path, own=own, may_be_empty=args.doctor)
    if args.doctor:
        found = examine(
            listing, encoding=encoding, unit=args.document, text_field=args.text_field, min_length=MIN_LENGTH
        )
        print(*screen(found, args.data_path, args.lang or language_of(os.environ)), sep="\n")
        check_stdout()
        return
    for line in passed_over_lines(listing.passed_over):
        if not args.quiet:
            print(line, file=sys.stderr)
    files = listing.files
    documents = read = characters = short = 0
    counts: Counter[str] = Counter()

    total = sum(path.stat().st_size for path in files)
    with (
        open_duplicates(args, total) as duplicates,
        train_json_writer(args.output_path) as write,
        tqdm(total=total, unit="B", unit_scale=True, desc=localized("reading"), disable=progress_disabled(args)) as bar,
    ):

        def say(message: str) -> None:
            if not args.quiet or message.startswith("warning:"):
                bar.write(message, file=sys.stderr)

        # 1) Which lines stand in many places is known only when all are read.
        if "repeated" in cleaner.rules:
            for path in files:
                with suppress(ValueError):  # a damaged file, of which the second pass says what is wrong
                    texts = texts_of(path, encoding, args, FileReport())
                    cleaner.count_repeated(texts, are_records=has_records(path))
            cleaner.finish_counting()

        # 2) File after file, document after document.
        for path in files:
            report = FileReport()
            before = read
            try:
                for document in documents_of(path, encoding, args, report, cleaner, counts, say, bar.update):
                    read += 1
                    if duplicates is not None and duplicates(document) is not None:
                        continue
                    write(document)
                    documents += 1
                    characters += len(document)
                    short += len(document) <= MIN_LENGTH
            except ValueError as error:
                if args.on_error == "stop" or format_of(path) not in BOOK_SUFFIXES:
                    raise
                say(f"warning: passed over, after {read - before:,} documents of it: {error}")
            if encoding == "auto":
                say(f"{path}: {report.encoding}")
            for warning in report.warnings(path, args.on_error):
                say(warning)
            for note in record_notes(path, report):
                say(note)
            if read == before:
                say(f"warning: {path} has no document: it is empty or blank")
        if not documents:
            raise ValueError(
                f"--data_path {args.data_path}: there is no text in {len(files)} files; nothing was written"
            )

    # 3) What has become of them.
    print(f"{args.output_path}: {len(files):,} files, {documents:,} documents, {characters:,} characters")
    if counts["chapters"]:
        print(f"chapters: {counts['chapters']:,}")
    if args.join_lines:
        print(f"line breaks taken out: {counts['joined']:,}")
    if cleaner.rules:
        print("cleaned:", *cleaner.summary(), sep="\n")
    if duplicates is not None:
        print(*duplicates.summary(), sep="\n")
    if args.clean_report:
        write_report(args.clean_report, cleaner, duplicates)
    if short:
        print(
            f"{short:,} documents ({short / documents:.1%}) are not longer than {MIN_LENGTH} characters: "
            f"make-tokenized.py leaves them out unless it is given a smaller --min_length than {MIN_LENGTH}"
        )
    if short == documents:
        print("warning: that is every document; --document paragraph or file makes longer ones")


def open_duplicates(args: argparse.Namespace, total: int) -> AbstractContextManager[Duplicates | None]:
    """What finds duplicates, if that is asked for; `total` is the bytes of the files."""
    if not args.deduplicate:
        return nullcontext()
    return Duplicates(args.deduplicate, Path(args.output_path).parent, total, args.similarity)


def write_report(path: str, cleaner: Cleaner, duplicates: Duplicates | None) -> None:
    """Write examples of what was changed and left out, for a person."""
    with atomic_write(path) as file:
        cleaner.write_report(file)
        if duplicates is not None:
            duplicates.write_report(file)


def texts_of(
    path: Path,
    encoding: str,
    args: argparse.Namespace,
    report: FileReport,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[Iterable[str]]:
    """The texts of one file, as `formats.read_texts`."""
    return read_texts(
        path,
        encoding=encoding,
        on_error=args.on_error,
        text_field=args.text_field,
        report=report,
        progress=progress,
    )


def documents_of(
    path: Path,
    encoding: str,
    args: argparse.Namespace,
    report: FileReport,
    cleaner: Cleaner,
    counts: Counter[str],
    say: Callable[[str], None],
    progress: Callable[[int], object],
) -> Iterator[str]:
    """The documents of one file, which is read twice where its form decides what they are."""

    def cleaned(text: Iterable[str], *, count: bool) -> Iterable[str]:
        return cleaner.clean(text, str(path), count=count) if cleaner.rules else text

    unit = args.document
    texts = texts_of(path, encoding, args, report, progress)
    if has_records(path):
        unit = "file" if unit in ("line", "auto") else unit
        for text in texts:
            lines = list(cleaned(text, count=True))
            found = survey(lines) if unit == "chapter" or args.join_lines else None
            yield from divide(lines, unit, found, join=args.join_lines, counts=counts)
        return
    found = None
    if unit in ("chapter", "auto") or args.join_lines:
        first_pass = texts_of(path, encoding, args, FileReport())
        found = survey(block for text in first_pass for block in cleaned(text, count=False))
    if unit == "auto":
        assert found is not None
        unit, reason = choose_unit(found)
        say(f"{path}: --document {unit} ({reason})")
    elif unit == "chapter" and found is not None and not any(heading.begins_document for heading in found.headings):
        say(f"warning: {path} has no chapter headings: it is one document")
    for text in texts:
        yield from divide(cleaned(text, count=True), unit, found, join=args.join_lines, counts=counts)


if __name__ == "__main__":
    run_script(main)
