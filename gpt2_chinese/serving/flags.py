"""The flags of server.py, in groups: model, network, limits; and the checks of their values."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gpt2_chinese.command_line import add_output_flags
from gpt2_chinese.decoding.completion import PRECISION_HELP, PRECISIONS
from gpt2_chinese.help_formatter import HelpFormatter
from gpt2_chinese.serving.api import Limits
from gpt2_chinese.serving.keys import ADMIN_KEY_VARIABLE, KEY_VARIABLE

MEGABYTE = 1_000_000
DEFAULT_MODEL_PATH = "model/final_model"
MAX_BATCH_SIZE = 4096
"""A place in the batch of GPT-2 small takes 75 MB in float32, and half of that otherwise."""


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="server.py", description=description, formatter_class=HelpFormatter)
    _add_model(parser)
    _add_healing(parser)
    _add_network(parser)
    _add_limits(parser)
    add_output_flags(parser)
    # For the processes that devices.py starts: the socket they share, and where they say that they are ready.
    parser.add_argument("--listen_fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ready_fd", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.model_path = args.model_path or [DEFAULT_MODEL_PATH]
    return args


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model_path",
        action="append",
        help="model folder; with several of these flags, requests choose a model with their field model "
        f"(default: {DEFAULT_MODEL_PATH})",
    )
    parser.add_argument(
        "--vocab_file",
        "--tokenizer_path",
        help="vocabulary, for a model folder without one (default: the one in the model folder)",
    )
    parser.add_argument(
        "--document_marks",
        nargs=2,
        metavar=("BEGIN", "END"),
        help="tokens that begin and end a document (default: those that the model folder tells)",
    )
    parser.add_argument(
        "--model_name",
        action="append",
        help="name of the model in /v1/models and on the web page; one for each --model_path, in the same order "
        "(default: the folder's name)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, or the number of a GPU; several, such as 0,1, start one process for each",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help=PRECISION_HELP)


def _add_healing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restart",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start a model again whose process has died or hangs; with --no-restart the server exits with status 1",
    )
    parser.add_argument(
        "--hang_timeout",
        type=float,
        default=30.0,
        help="seconds without a decode step, while there are requests, after which the model's process is killed",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="follow a training run: serve each new model_epoch{n} or best_model that appears beside the model folder, "
        "or in it if --model_path is train.py's output folder",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 is every address of this machine",
    )
    parser.add_argument("--port", type=int, default=5005, help="port to listen on; 0 is any free one")
    parser.add_argument(
        "--api_key", action="append", help="a key that clients must send; repeat it for several keys (default: none)"
    )
    parser.add_argument(
        "--api_key_file",
        help=f"file with one API key per line; the environment variable {KEY_VARIABLE} may hold one more key",
    )
    parser.add_argument(
        "--admin_key",
        action="append",
        help="a key for POST /admin/reload, which exists only if there is one (default: none)",
    )
    parser.add_argument(
        "--admin_key_file",
        help=f"file with one such key per line; the environment variable {ADMIN_KEY_VARIABLE} may hold one too",
    )
    parser.add_argument(
        "--allowed_hosts",
        default="",
        help="names under which the server is reached, separated by commas; others are answered with 421. * is any. "
        "(default: if --host is an address of this machine alone, its own names; otherwise any)",
    )
    parser.add_argument(
        "--cors_origins",
        default="*",
        help="sites whose pages may complete texts from a browser: *, none, or a list such as "
        "https://a.example,https://b.example",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = Limits()
    parser.add_argument(
        "--max_samples",
        type=int,
        default=limits.samples,
        help="maximum number of completions per prompt",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        default=limits.length,
        help="maximum number of tokens per completion",
    )
    parser.add_argument(
        "--max_prompts",
        type=int,
        default=limits.prompts,
        help="maximum number of prompts in a request of /v1/completions",
    )
    parser.add_argument(
        "--max_body",
        type=int,
        default=limits.body_bytes,
        help="maximum size of a request body in bytes",
    )
    parser.add_argument(
        "--max_answer",
        type=int,
        default=limits.answer_bytes,
        help="maximum bytes that the answer to a request could have; it is computed before the request is accepted",
    )
    parser.add_argument(
        "--max_pending",
        type=int,
        default=limits.pending_bytes,
        help="maximum bytes that the answers to all accepted requests could have together; beyond it requests are "
        "answered with 429",
    )
    parser.add_argument(
        "--body_timeout",
        type=float,
        default=limits.body_seconds,
        help="seconds in which a client must send its body, and read what is sent to it",
    )
    parser.add_argument(
        "--request_timeout",
        type=float,
        default=limits.request_seconds,
        help="seconds until a request is answered with 504",
    )
    parser.add_argument(
        "--idle_timeout",
        type=float,
        default=limits.idle_seconds,
        help="seconds until a connection without a request is closed",
    )
    parser.add_argument(
        "--max_connections",
        type=int,
        default=limits.connections,
        help="maximum number of open connections per process",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="maximum number of sequences decoded together")
    parser.add_argument(
        "--prefix_cache",
        type=int,
        default=256,
        metavar="MB",
        help="megabytes of each model for the keys and values of recent contexts, so that one that begins like them "
        "computes only what is new; at most what the batch takes. On a CPU; 0 keeps none",
    )
    parser.add_argument(
        "--max_waiting",
        type=int,
        default=512,
        help="maximum number of sequences in the queue; when it is full, requests are answered with 429 until an "
        "eighth of it is free",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Check what argparse does not.

    Raises:
        ValueError: the value of a flag is not possible; the message names the flag.
    """
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, it is {args.port}")
    for flag in (
        "max_samples",
        "max_length",
        "max_prompts",
        "max_body",
        "max_answer",
        "max_pending",
        "max_connections",
        "batch_size",
        "max_waiting",
    ):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be 1 or more, it is {getattr(args, flag)}")
    if args.prefix_cache < 0:
        raise ValueError(f"--prefix_cache must be 0 or more megabytes, it is {args.prefix_cache}")
    for flag in ("body_timeout", "request_timeout", "idle_timeout", "hang_timeout"):
        if not getattr(args, flag) > 0:
            raise ValueError(f"--{flag} must be above 0 seconds, it is {getattr(args, flag)}")
    if args.batch_size > MAX_BATCH_SIZE:
        raise ValueError(f"--batch_size must be at most {MAX_BATCH_SIZE}, it is {args.batch_size}")
    parse_origins(args.cors_origins)
    model_names(args)


def limits_of(args: argparse.Namespace) -> Limits:
    return Limits(
        samples=args.max_samples,
        length=args.max_length,
        prompts=args.max_prompts,
        body_bytes=args.max_body,
        answer_bytes=args.max_answer,
        pending_bytes=max(args.max_pending, args.max_answer),
        body_seconds=args.body_timeout,
        request_seconds=args.request_timeout,
        idle_seconds=args.idle_timeout,
        connections=args.max_connections,
    )


def model_names(args: argparse.Namespace) -> list[str]:
    """The name of each model: --model_name, or the name of its folder.

    Raises:
        ValueError: the numbers of names and models differ, or two models have the same name.
    """
    folders = [Path(folder).resolve().name for folder in args.model_path]
    names: list[str] = args.model_name or folders
    if len(names) != len(folders):
        raise ValueError(
            f"--model_name is given {len(names)} times and --model_path {len(folders)} times; give one name for each"
        )
    for name, count in Counter(names).items():
        if not name or count > 1:
            problem = f"{count} models are called {name}" if name else "a model has no name"
            raise ValueError(f"{problem}; give each --model_path a --model_name of its own")
    return names


def parse_devices(flag: str) -> list[str]:
    """The devices of --device."""
    return [device.strip() for device in flag.split(",")]


def parse_origins(flag: str) -> list[str]:
    """The sites of --cors_origins; "*" is every site.

    Raises:
        ValueError: one is not a scheme and a host.
    """
    if flag == "none":
        return []
    sites = [site.strip() for site in flag.split(",")]
    for site in sites:
        scheme, _, host = site.partition("://")
        if site != "*" and (scheme not in ("http", "https") or not host or "/" in host):
            raise ValueError(f"--cors_origins {flag}: {site!r} is not *, none or a site such as https://a.example")
    return sites
