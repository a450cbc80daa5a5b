"""Complete texts with a trained model: on the screen, and in samples.txt.

Reads   model/final_model/     a model folder from train.py, or of the GPT2-Chinese family
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

from gpt2_chinese.artifacts import atomic_write, read_text_file
from gpt2_chinese.command_line import (
    add_output_flags,
    is_quiet,
    localized,
    print_settings,
    remark,
    run_script,
    set_quiet,
)
from gpt2_chinese.decoding.completion import (
    PRECISION_HELP,
    PRECISIONS,
    SAMPLING_LIMITS,
    Completion,
    SamplingParams,
    TextDelta,
)
from gpt2_chinese.decoding.engine import Engine, choose_device
from gpt2_chinese.help_formatter import HelpFormatter
from gpt2_chinese.model_folder import load_weights, note_of_a_better_model

SAMPLES_FILE = "samples.txt"
IGNORED_FLAGS = {
    "--model_config": "the model folder has its own config.json",
    "--fast_pattern": "every completion is decoded with a KV cache",
    "--no_wordpiece": "the model folder says what its tokenizer is",
    "--segment": "the model folder says what its tokenizer is",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Complete texts with a trained model. Without --prefix it asks for texts until an empty line.",
        formatter_class=HelpFormatter,
    )
    # the model
    parser.add_argument("--model_path", default="model/final_model", help="model folder")
    parser.add_argument(
        "--vocab_file",
        "--tokenizer_path",
        help="vocabulary of a model folder that has none, such as GPT2-Chinese's",
    )
    parser.add_argument(
        "--document_marks",
        nargs=2,
        metavar=("BEGIN", "END"),
        help="tokens around a document (default: those that the folder tells)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or the number of a GPU")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help=PRECISION_HELP)
    # the completions
    parser.add_argument("--prefix", help="the text to complete; without it the script asks for texts")
    parser.add_argument("--length", type=int, default=50, help="most tokens of a completion, -1 is n_ctx")
    parser.add_argument("--nsamples", type=int, default=5, help="completions of each text")
    parser.add_argument("--batch_size", type=int, default=32, help="completions decoded at once, at most")
    # sampling
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--topk", type=int, default=30, help="sample from the k likeliest tokens, 0 is off")
    parser.add_argument(
        "--topp", type=float, default=0.0, help="sample from the likeliest tokens of total probability p, 0 is off"
    )
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 avoids repetition")
    parser.add_argument(
        "--min_p", type=float, default=0.0, help="keep tokens of at least this share of the likeliest's, 0 is off"
    )
    parser.add_argument("--presence_penalty", type=float, default=0.0, help="off the logits of tokens made")
    parser.add_argument("--frequency_penalty", type=float, default=0.0, help="the same, each time")
    parser.add_argument("--no_repeat_ngram_size", type=int, default=0, help="no n-gram of n tokens twice, 0 is off")
    parser.add_argument("--logit_bias", nargs="+", metavar="ID=BIAS", default=[], help="added to logits of token ids")
    parser.add_argument("--bad_words", nargs="+", metavar="TEXT", default=[], help="texts that no completion has")
    parser.add_argument("--min_tokens", type=int, default=0, help="least tokens of a completion")
    parser.add_argument("--ignore_eos", action="store_true", help="never end a document")
    parser.add_argument("--stop_token_ids", nargs="+", type=int, metavar="ID", default=[], help="ids that end it")
    parser.add_argument("--seed", type=int, help="the same seed gives the same completions (default: random)")
    # the candidates
    parser.add_argument(
        "--distinct",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="no two completions of a text are the same (default: on)",
    )
    parser.add_argument("--until", choices=["sentence"], help="end a completion with its first sentence")
    parser.add_argument("--sort", choices=["likely"], help="order the completions by their mean log-probability")
    parser.add_argument("--scores", action="store_true", help="print the mean log-probability of each completion")
    parser.add_argument("--best_of", type=int, help="decode so many, and give the --nsamples likeliest")
    # articles to titles, as GPT2-Chinese's generate_texts.py
    parser.add_argument("--titles", help="complete each of these titles, separated by spaces, and write files")
    parser.add_argument("--titles_file", help="the same, a title a line")
    parser.add_argument("--articles_per_title", type=int, default=5, help="files of each title")
    parser.add_argument("--save_path", default="generated/", help="their folder")
    # flags of GPT2-Chinese that change nothing here; main says so
    for flag in IGNORED_FLAGS:
        parser.add_argument(flag, nargs="?", const=True, help=argparse.SUPPRESS)
    # the output file
    parser.add_argument("--save_samples", action="store_true", help=f"also write {SAMPLES_FILE}, replacing an old one")
    parser.add_argument("--save_samples_path", default=".", help=f"folder of {SAMPLES_FILE} (default: the current one)")
    add_output_flags(parser)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag whose value is out of its range."""
    for name, (low, high) in SAMPLING_LIMITS.items():
        flag = {"top_k": "topk", "top_p": "topp"}.get(name, name)
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{flag} must be from {low} to {high}, it is {value}")
    if args.length < 1 and args.length != -1:
        raise ValueError(f"--length must be 1 or more, or -1 for the model's n_ctx, it is {args.length}")
    if args.best_of is not None and args.best_of < args.nsamples:
        raise ValueError(f"--best_of must not be less than --nsamples, {args.nsamples}, it is {args.best_of}")
    if not all(word.strip() for word in args.bad_words):
        raise ValueError("--bad_words has a text of white space only; leave it out")
    for flag in ("nsamples", "batch_size", "articles_per_title"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be 1 or more, it is {getattr(args, flag)}")
    if args.save_samples and Path(args.save_samples_path).exists() and not Path(args.save_samples_path).is_dir():
        raise NotADirectoryError(f"--save_samples_path {args.save_samples_path} is not a folder")


def typed_contexts() -> Iterator[str]:
    """Lines that the user types, up to an empty one or the end of the input."""
    while True:
        try:
            context = input("" if is_quiet() else localized("text (an empty line ends): "))
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise ValueError(f"the typed text is not in this terminal's encoding, {error.encoding}") from error
        if not context:
            return
        yield context


def parse_logit_bias(values: Sequence[str]) -> tuple[tuple[int, float], ...]:
    """The pairs of --logit_bias.

    Raises:
        ValueError: one of them is not a token id, "=" and a number.
    """
    pairs = []
    for value in values:
        id_, _, bias = value.partition("=")
        try:
            pairs.append((int(id_), float(bias)))
        except ValueError:
            raise ValueError(f"--logit_bias {value}: write a token id, = and a number, such as 25=-2.5") from None
        if not -100 <= pairs[-1][1] <= 100:
            raise ValueError(f"--logit_bias {value}: the number must be from -100 to 100")
    return tuple(pairs)


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.topk,
        top_p=args.topp,
        repetition_penalty=args.repetition_penalty,
        min_p=args.min_p,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        logit_bias=parse_logit_bias(args.logit_bias),
        bad_words=tuple(args.bad_words),
        min_tokens=args.min_tokens,
        ignore_eos=args.ignore_eos,
        stop_token_ids=tuple(args.stop_token_ids),
    )


def complete(
    engine: Engine,
    context: str,
    length: int,
    samples: int,
    seed: int,
    args: argparse.Namespace,
    *,
    stream: bool,
) -> list[Completion]:
    """Complete one context as the flags say. What it does not get, and what is cut off, is said on stderr.

    With `stream` the completions are printed while they are decoded: all at once, printed one after the other.
    """
    prompt = engine.prompt(context, length)
    if prompt.truncated:
        note = f"the text is longer than the model's {engine.n_ctx} tokens; its first {prompt.truncated} were cut off"
        remark(f"note: {note}", file=sys.stderr)
    deltas: SimpleQueue[TextDelta | None] = SimpleQueue()
    on_delta = deltas.put if stream else None
    request = engine.submit(
        prompt,
        samples=samples if args.best_of is None else max(args.best_of, samples),
        length=length,
        sampling_params=sampling_params(args),
        seed=seed,
        on_delta=on_delta,
        distinct=args.distinct,
        until_sentence=args.until == "sentence",
        scores=True,
    )
    if stream:
        request.future.add_done_callback(lambda _: deltas.put(None))  # also when the model thread has failed
        print_deltas(context, deltas, request.samples)
    completions = request.future.result()
    if len(completions) < samples:
        remark(
            f"note: the model has {len(completions)} different completions of this text, not {samples}", file=sys.stderr
        )
    if args.sort == "likely" or args.best_of is not None:
        completions.sort(key=lambda completion: -(completion.score or 0.0))
    return completions[:samples]


def notes_of_limits(length: int, top_k: int, n_ctx: int, vocab_size: int) -> Iterator[str]:
    """What the flags ask for beyond what the model has."""
    if length > n_ctx:
        yield (
            f"--length {length} is more than the model's n_ctx of {n_ctx} tokens: a longer text goes on from its last "
            f"{n_ctx // 2} to {n_ctx} tokens only"
        )
    if top_k > vocab_size:
        yield f"--topk {top_k} is more than the vocabulary's {vocab_size} tokens: the same as --topk 0"


def print_deltas(context: str, deltas: SimpleQueue[TextDelta | None], samples: int) -> None:
    """Print the samples in their order, each as far as it is decoded; the queue ends with None."""
    texts = [""] * samples
    finished: set[int] = set()
    for sample in range(samples):
        print(f"{sample + 1}  {context}{texts[sample]}", end="", flush=True)
        while sample not in finished:
            delta = deltas.get()
            if delta is None:
                return
            texts[delta.sample] += delta.text
            if delta.finish_reason:
                finished.add(delta.sample)
            if delta.sample == sample:
                print(delta.text, end="", flush=True)
        print(flush=True)


def read_titles(args: argparse.Namespace) -> list[str]:
    """The titles of the flags.

    Raises:
        ValueError: the file has none or is not UTF-8, or both flags are there.
    """
    if args.titles is not None and args.titles_file is not None:
        raise ValueError("--titles and --titles_file are two ways to say the same; leave one out")
    if args.titles_file is None:
        return (args.titles or "").split()
    titles = [line.strip() for line in read_text_file(args.titles_file).splitlines()]
    if not any(titles):
        raise ValueError(f"--titles_file {args.titles_file} has no title; write one on a line")
    return [title for title in titles if title]


def write_articles(engine: Engine, titles: Sequence[str], length: int, args: argparse.Namespace) -> None:
    """Write --articles_per_title completions of each title, as GPT2-Chinese names and forms them."""
    folder, written = Path(args.save_path), 0
    for number, title in enumerate(titles):
        completions = complete(engine, title, length, args.articles_per_title, args.seed + number, args, stream=False)
        written += len(completions)
        for article, completion in enumerate(completions):
            with atomic_write(folder / f"{number}-{article}.txt") as file:
                file.write(f"{title}\n{completion.text}\n")
    print(localized(f"{written} articles written to {folder}/{{title}}-{{article}}.txt"))


def format_sample(number: int, text: str) -> str:
    """A sample under its header, as in samples.txt."""
    return f"{'=' * 40} SAMPLE {number} {'=' * 40}\n{text}\n"


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse_args(argv)
    set_quiet(args.quiet)
    check_args(args)
    if args.seed is None:
        args.seed = secrets.randbits(32)
    print_settings(args, file=sys.stderr)
    for flag, reason in IGNORED_FLAGS.items():
        if getattr(args, flag.removeprefix("--")) is not None:
            remark(f"note: {flag} changes nothing: {reason}", file=sys.stderr)
    better = note_of_a_better_model(args.model_path)
    if better:
        remark(f"note: {better}", file=sys.stderr)
    titles = read_titles(args)
    sampling_params(args)  # an error in a flag is said before the model is loaded
    model, tokenizer = load_weights(
        args.model_path,
        device=choose_device(args.device),
        vocab_file=args.vocab_file,
        document_marks=tuple(args.document_marks) if args.document_marks else None,
    )
    tokenizer.encode("你好")  # loads the segmenter now, and not after the first text is typed

    saved: list[str] = []
    samples = args.articles_per_title if titles else args.nsamples
    max_num_seqs = min(args.batch_size, max(samples, args.best_of or 0))
    with Engine(model, tokenizer, max_num_seqs=max_num_seqs, precision=args.precision) as engine:
        length = engine.n_ctx if args.length == -1 else args.length
        for note in notes_of_limits(length, args.topk, engine.n_ctx, len(tokenizer)):
            remark(f"note: {note}", file=sys.stderr)
        if titles:
            write_articles(engine, titles, length, args)
            return None
        contexts = typed_contexts() if args.prefix is None else iter([args.prefix])
        for index, context in enumerate(contexts):
            # Each text has a seed of its own, so that the same text typed twice gets other completions.
            seed, stream = args.seed + index, args.prefix is None
            try:
                completions = complete(engine, context, length, args.nsamples, seed, args, stream=stream)
            except ValueError as error:
                if args.prefix is not None:
                    raise ValueError(f"--prefix: {error}") from error
                print(f"error: {error}", file=sys.stderr)
                continue
            texts = [completion.text for completion in completions]
            if args.prefix is not None:
                for number, completion in enumerate(completions, start=1):
                    score = f"score {completion.score:.3f}\n" if args.scores and completion.score is not None else ""
                    print(format_sample(number, completion.text) + score, flush=True)
            if args.save_samples:
                saved += texts
                # Written after every text, so that Ctrl-C loses none.
                with atomic_write(Path(args.save_samples_path) / SAMPLES_FILE) as file:
                    file.writelines(format_sample(number, text) + "\n" for number, text in enumerate(saved, start=1))
    if saved:
        print(localized(f"{len(saved)} samples written to {Path(args.save_samples_path) / SAMPLES_FILE}"))
    return None


if __name__ == "__main__":
    run_script(main, texts_on_stdout=True)
