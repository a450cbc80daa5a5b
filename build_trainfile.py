"""Stage 1: gather TXT files into one training file.

Reads data/*.txt (and .txt.gz) in the natural order of their names, writes data/train.json, a JSON array of documents.

    python build_trainfile.py
    python build_trainfile.py --data_path my_texts --encoding auto --document paragraph
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from gpt2_chinese.command_line import print_settings, run_script
from gpt2_chinese.text.corpus import (
    DOCUMENT_UNITS,
    ON_ERROR,
    DecodeReport,
    check_encoding,
    read_text,
    split_documents,
    train_json_writer,
    txt_files,
)

MIN_LENGTH = 128  # make-tokenized.py's default: it keeps documents of more characters


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Gather TXT files into data/train.json.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    # files
    parser.add_argument("--data_path", default="data/", help="the folder of the .txt and .txt.gz files")
    parser.add_argument("--output_path", default="data/train.json", help="the file to write")
    # how the files are read
    parser.add_argument(
        "--encoding",
        default="utf-8",
        help="of the files: a name such as utf-8, gb18030, big5, or auto to tell each file's",
    )
    parser.add_argument(
        "--on_error", default="stop", choices=ON_ERROR, help="what to do at bytes that are not in the encoding"
    )
    parser.add_argument(
        "--document",
        default="line",
        choices=DOCUMENT_UNITS,
        help="what a document is; a paragraph ends at a blank line, and its line breaks are kept",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    print_settings(args)
    encoding = check_encoding(args.encoding)
    passed_over: list[Path] = []
    files = txt_files(args.data_path, passed_over=passed_over)
    documents = characters = short = 0

    total = sum(path.stat().st_size for path in files)
    with (
        train_json_writer(args.output_path) as write,
        tqdm(total=total, unit="B", unit_scale=True, desc="reading") as bar,
    ):
        for path in files:
            report = DecodeReport()
            before = documents
            text = read_text(path, encoding=encoding, on_error=args.on_error, report=report, progress=bar.update)
            for document in split_documents(text, args.document):
                write(document)
                documents += 1
                characters += len(document)
                short += len(document) <= MIN_LENGTH
            if encoding == "auto":
                bar.write(f"{path}: {report.encoding}")
            for warning in report.warnings(path, args.on_error):
                bar.write(warning)
            if documents == before:
                bar.write(f"warning: {path} has no document: it is empty or blank")
        if not documents:
            raise ValueError(
                f"--data_path {args.data_path}: there is no text in {len(files)} files; nothing was written"
            )

    if passed_over:
        names = ", ".join(path.name for path in passed_over[:5]) + (", …" if len(passed_over) > 5 else "")
        print(f"passed over {len(passed_over):,} hidden files and locks of systems and editors: {names}")
    print(f"{args.output_path}: {len(files):,} files, {documents:,} documents, {characters:,} characters")
    if short:
        print(
            f"{short:,} documents ({short / documents:.1%}) are not longer than {MIN_LENGTH} characters: "
            f"make-tokenized.py leaves them out unless it is given a smaller --min_length than {MIN_LENGTH}"
        )
    if short == documents:
        print("warning: that is every document; --document paragraph or file makes longer ones")


if __name__ == "__main__":
    run_script(main)
