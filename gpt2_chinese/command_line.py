"""How every script ends: with its result, or with one line that says what is wrong and what mends it."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import TextIO

USER_ERROR = 2
INTERRUPTED = 130


def run_script(main: Callable[[], int | None]) -> None:
    """Call `main` and exit; a user's mistake (ValueError, OSError) is printed without a traceback.

    The exit status is what `main` returns (None is 0), 2 after a user's mistake and 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console of GBK, say, has not every character
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {as_sentence(error)}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def as_sentence(error: ValueError | OSError) -> str:
    """What an error says, without the number that the system has for it."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    files = " and ".join(str(name) for name in (error.filename, error.filename2) if name)
    return f"{files}: {error.strerror}" if files else error.strerror


def print_settings(args: argparse.Namespace, *, file: TextIO | None = None) -> None:
    """Print the resolved flags of a run, in one line, as they would be typed."""
    say("settings: " + " ".join(f"--{name}={value}" for name, value in vars(args).items()), file=file)


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
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
