"""How every script ends: with its result, or with one line that says what is wrong and what mends it."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from gpt2_chinese.messages import TranslatedStream, language_of, translated

USER_ERROR = 2
INTERRUPTED = 130


def run_script(main: Callable[[], int | None], *, texts_on_stdout: bool = False) -> None:
    """Call `main` and exit; a user's mistake (ValueError, OSError) is printed without a traceback.

    The exit status is what `main` returns (None is 0), 2 after a user's mistake and 130 after Ctrl-C. The script speaks
    Chinese where the locale or its --lang says so (messages.py); with `texts_on_stdout` only what goes to stderr is
    translated, and `localized` does it for the other lines.
    """
    prepare_streams(language_of(os.environ, sys.argv[1:]), texts_on_stdout=texts_on_stdout)
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except (ValueError, OSError) as error:
        print(f"error: {as_sentence(error)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # Python would try it again at its end
            _to_nowhere(sys.stdout.fileno())
        sys.exit(USER_ERROR)
    except MemoryError:
        print("error: memory ran out; smaller values of the flags that are numbers need less", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def prepare_streams(language: str, *, texts_on_stdout: bool = False) -> None:
    """Let stdout and stderr write a replacement for what a console lacks, and messages in a language, "en" or "zh".

    Messages that cannot be written, because their reader has gone or the disk is full, end no run: see `_MessageFile`.
    With `texts_on_stdout` a text that cannot be written to stdout is an error all the same. A process that a script
    starts calls this itself.
    """
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console of GBK, say, has not every character
    sys.stderr = _for_messages(sys.stderr)
    if not texts_on_stdout:
        sys.stdout = _for_messages(sys.stdout)
    if language == "zh":
        sys.stderr = TranslatedStream(sys.stderr)
        if not texts_on_stdout:
            sys.stdout = TranslatedStream(sys.stdout)


def open_closed_streams() -> None:
    """Put the null device where a script was started without stdin, stdout or stderr (`2>&-`).

    The first file that is opened would get the number of the missing stream, and what is written there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # has the least number that is free, this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _to_nowhere(descriptor: int) -> None:
    """Let what is written to a file from now on go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


class _MessageFile(io.FileIO):
    """A file of messages: from the first one on that cannot be written they go nowhere.

    A run of days does not end because `head` has read enough of what it says, or because the disk of its log is full.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            _to_nowhere(self.fileno())
            return len(data)


def _for_messages(stream: TextIO) -> TextIO:
    """The same stream on a `_MessageFile`, if it is a file of this process: not a capture or a console of Windows."""
    if stream not in (sys.__stdout__, sys.__stderr__) or not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = _raw_file(stream)
    if type(raw) is not io.FileIO:
        return stream
    stream.flush()
    file = _MessageFile(raw.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        file if raw is stream.buffer else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _raw_file(stream: TextIO) -> Any:
    """What a stream writes to in the end; after `python -u` there is no buffer between them."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def check_stdout() -> None:
    """Raise the error that stdout has had, if what was printed there is the result of the script.

    Nothing is wrong where a reader has gone that had read enough.
    """
    stream = text_stream()
    stream.flush()
    file = _raw_file(stream)
    if isinstance(file, _MessageFile) and file.failure is not None and file.failure.errno != errno.EPIPE:
        raise OSError(file.failure.errno, file.failure.strerror, "stdout")


def message_language() -> str:
    """The language that `prepare_streams` was given."""
    return "zh" if isinstance(sys.stderr, TranslatedStream) else "en"


def localized(text: str) -> str:
    """A message for a stream that is not translated, in the language of the others."""
    return translated(text) if message_language() == "zh" else text


def text_stream() -> TextIO:
    """Stdout for what must stay as it is, such as completions."""
    return sys.stdout.untranslated if isinstance(sys.stdout, TranslatedStream) else sys.stdout


def project_file(path: str) -> str:
    """A file that comes with the project, such as a configuration: from the working folder, or beside the scripts."""
    beside_scripts = Path(__file__).resolve().parent.parent / path
    return str(beside_scripts) if not Path(path).exists() and beside_scripts.exists() else path


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add --quiet, which leaves out settings, notes and progress but no results, warnings and errors; and --lang."""
    parser.add_argument("--quiet", action="store_true", help="no settings, notes and progress bars")
    parser.add_argument(
        "--lang",
        choices=("en", "zh"),
        help="the language of messages and of this help; by default as the locale (LANG) says",
    )


_is_quiet = False


def set_quiet(quiet: bool) -> None:
    """Say to this process whether --quiet is given, for `remark` and progress bars."""
    global _is_quiet
    _is_quiet = quiet


def is_quiet() -> bool:
    return _is_quiet


def remark(line: str, *, file: TextIO | None = None) -> None:
    """Print what --quiet leaves out: a setting, a note, progress. A warning is printed all the same."""
    if not _is_quiet or line.startswith("warning:"):
        say(line, file=file)


def progress_disabled(args: argparse.Namespace) -> bool | None:
    """What tqdm takes as `disable`: None shows a bar on a terminal only."""
    return True if args.quiet else None


def as_sentence(error: ValueError | OSError) -> str:
    """What an error says, without the number that the system has for it."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    files = " and ".join(str(name) for name in (error.filename, error.filename2) if name)
    return f"{files}: {error.strerror}" if files else error.strerror


def print_settings(args: argparse.Namespace, *, file: TextIO | None = None) -> None:
    """Print the resolved flags of a run, in one line, as they would be typed; nothing with --quiet.

    The two flags of `add_output_flags` change nothing of what is done.
    """
    if getattr(args, "quiet", False):
        return
    flags = [f"--{name}={value}" for name, value in vars(args).items() if name not in ("quiet", "lang")]
    say(f"settings: {' '.join(flags)}", file=file)


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print a line at once. If its reader has gone (`server.py | head -1`), this line and the next ones go nowhere."""
    stream = file or sys.stdout
    if stream is None:
        return
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except OSError:
        _to_nowhere(stream.fileno())
