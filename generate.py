"""Complete texts: a model folder and a beginning in, completions out, on the screen and in samples.txt.

Reads   model/final_model/     what train.py wrote, or a folder of GPT2-Chinese
Writes  samples.txt            with --save_samples, in --save_samples_path

    python generate.py
    python generate.py --prefix 高血压患者 --nsamples 3 --length 100 --topp 0.9 --save_samples
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

from gpt2_chinese.artifacts import atomic_write
from gpt2_chinese.command_line import run_script
from gpt2_chinese.decoding.completion import PRECISIONS, SETTING_LIMITS, Settings, TextDelta
from gpt2_chinese.decoding.engine import Engine, choose_device
from gpt2_chinese.model_folder import load_weights

SAMPLES_FILE = "samples.txt"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Complete texts with a trained model. Without --prefix it asks for texts until an empty line."
    )
    # the model
    parser.add_argument("--model_path", default="model/final_model", help="model folder (%(default)s)")
    parser.add_argument("--vocab_file", help="vocabulary of a model folder that has none, such as GPT2-Chinese's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or a GPU's number (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="how a CPU keeps the weights: fp32 is exact, bf16 (auto) twice as fast for few texts; int8 also "
        "multiplies integers, is twice as fast again and less exact; a GPU computes in fp32 (auto) or bf16",
    )
    # what to write
    parser.add_argument("--prefix", help="the text to complete; without it the script asks")
    parser.add_argument("--length", type=int, default=50, help="tokens of a completion, -1 is n_ctx (%(default)s)")
    parser.add_argument("--nsamples", type=int, default=5, help="completions of a text (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="completions at once, for memory (%(default)s)")
    # how tokens are drawn
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest (%(default)s)")
    parser.add_argument("--topk", type=int, default=30, help="draw from the k likeliest, 0 is off (%(default)s)")
    parser.add_argument("--topp", type=float, default=0.0, help="draw from the likeliest that make p, 0 is off")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 avoids repeats (%(default)s)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same texts (a random one)")
    # where to save
    parser.add_argument("--save_samples", action="store_true", help=f"write {SAMPLES_FILE} too, replacing an old one")
    parser.add_argument("--save_samples_path", default=".", help=f"folder of {SAMPLES_FILE} (the current one)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag whose value makes no sense."""
    for name, (low, high) in SETTING_LIMITS.items():
        flag = {"top_k": "topk", "top_p": "topp"}.get(name, name)
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{flag} must be from {low} to {high}, it is {value}")
    if args.length < 1 and args.length != -1:
        raise ValueError(f"--length must be 1 or more, or -1 for the model's n_ctx, it is {args.length}")
    for flag in ("nsamples", "batch_size"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be 1 or more, it is {getattr(args, flag)}")
    if args.save_samples and Path(args.save_samples_path).exists() and not Path(args.save_samples_path).is_dir():
        raise NotADirectoryError(f"--save_samples_path {args.save_samples_path} is not a folder")


def asked_contexts() -> Iterator[str]:
    """What is typed, line by line, up to an empty line or the end of the input."""
    while True:
        try:
            context = input("text (an empty line ends): ")
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise ValueError(f"what was typed is not in this terminal's encoding, {error.encoding}") from error
        if not context:
            return
        yield context


def complete(
    engine: Engine, context: str, length: int, samples: int, settings: Settings, seed: int, *, show: bool
) -> list[str]:
    """Complete one context, and say so on stderr if its beginning did not fit the model.

    With `show` the completions are printed while they are decoded: all at once, shown one after the other.
    """
    prompt = engine.prompt(context, length)
    if prompt.cut:
        print(
            f"note: the text is longer than the model's {engine.n_ctx} tokens; its first {prompt.cut} were cut off",
            file=sys.stderr,
        )
    pieces: SimpleQueue[TextDelta | None] = SimpleQueue()
    on_delta = pieces.put if show else None
    ticket = engine.submit(prompt, samples=samples, length=length, settings=settings, seed=seed, on_delta=on_delta)
    if show:
        ticket.future.add_done_callback(lambda _: pieces.put(None))  # also when the model's thread has died
        print_pieces(context, pieces, samples)
    return [completion.text for completion in ticket.future.result()]


def print_pieces(context: str, pieces: SimpleQueue[TextDelta | None], samples: int) -> None:
    """Print the samples in their order, each as far as it has come; `pieces` ends with None."""
    arrived = [""] * samples
    ended: set[int] = set()
    for number in range(samples):
        print(f"{number + 1}  {context}{arrived[number]}", end="", flush=True)
        while number not in ended:
            piece = pieces.get()
            if piece is None:
                return
            arrived[piece.sample] += piece.text
            if piece.finish_reason:
                ended.add(piece.sample)
            if piece.sample == number:
                print(piece.text, end="", flush=True)
        print(flush=True)


def titled(number: int, text: str) -> str:
    """A sample under its number, as samples.txt has it."""
    return f"{'=' * 40} SAMPLE {number} {'=' * 40}\n{text}\n"


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse_args(argv)
    check(args)
    if args.seed is None:
        args.seed = secrets.randbits(32)
    print("settings: " + ", ".join(f"{name} {value}" for name, value in vars(args).items()))
    settings = Settings(args.temperature, args.topk, args.topp, args.repetition_penalty)
    model, tokenizer = load_weights(args.model_path, device=choose_device(args.device), vocab_file=args.vocab_file)
    tokenizer.encode("你好")  # loads the segmenter before the first question instead of behind it

    saved: list[str] = []
    with Engine(model, tokenizer, rows=min(args.batch_size, args.nsamples), precision=args.precision) as engine:
        length = engine.n_ctx if args.length == -1 else args.length
        contexts = asked_contexts() if args.prefix is None else iter([args.prefix])
        for asked, context in enumerate(contexts):
            # The second text asked for gets the next seed, or asking twice would give the same completions.
            try:
                show = args.prefix is None
                texts = complete(engine, context, length, args.nsamples, settings, args.seed + asked, show=show)
            except ValueError as error:
                if args.prefix is not None:
                    raise ValueError(f"--prefix: {error}") from error
                print(f"error: {error}", file=sys.stderr)
                continue
            if args.prefix is not None:
                for number, text in enumerate(texts, start=1):
                    print(titled(number, text), flush=True)
            if args.save_samples:
                saved += texts
                # Written after every text, so that Ctrl-C loses none.
                with atomic_write(Path(args.save_samples_path) / SAMPLES_FILE) as file:
                    file.writelines(titled(number, text) + "\n" for number, text in enumerate(saved, start=1))
    if saved:
        print(f"{len(saved)} samples written to {Path(args.save_samples_path) / SAMPLES_FILE}")
    return None


if __name__ == "__main__":
    run_script(main)
