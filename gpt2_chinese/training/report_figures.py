"""The figures of a training report: what report.json has and report.html shows."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_chinese.artifacts import has_shape, read_json
from gpt2_chinese.best_model import BEST_MODEL, FINAL_MODEL
from gpt2_chinese.decoding.compiled_decoder import is_decoder_cached
from gpt2_chinese.decoding.completion import SamplingParams
from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.model_folder import CONFIG, MANIFEST, load_weights, read_config
from gpt2_chinese.text.tokenizers import Tokenizer
from gpt2_chinese.training.copy_meter import MIN_RUN, copied_from, distinct_n, repetition
from gpt2_chinese.training.corpus_text import CorpusText
from gpt2_chinese.training.metrics import read_point
from gpt2_chinese.training.ngram import ORDER, measure_yardstick
from gpt2_chinese.training.plan import PLAN, Plan
from gpt2_chinese.training.run import METRICS
from gpt2_chinese.training.token_cache import Corpus

FORMAT = 1
COMPLETIONS, UNPROMPTED, SHOWN = 200, 100, 10
COMPLETION_LENGTH, BEGINNING_LENGTH = 100, 12  # tokens, at most
SAMPLING = SamplingParams(temperature=1.0, top_k=0, top_p=0.95)
MAX_SEARCHED_CHARACTERS = 20_000_000
"""Of the training text that the copy meter reads, which takes a minute; more is sampled by documents. It is read as a
stream: memory does not grow with it."""
MAX_POINTS = 400  # of a curve; each is the mean of those it stands for

_MAX_SEQUENCES = 32
_FACTS = {
    "updates": (int, None),
    "corpus_tokens": (int, None),
    "settings": (
        {
            "tokenized_data_path": str,
            "vocab_file": (str, None),
            "val_fraction": (float, int),
            "val_bytes": ([int], None),
        },
        None,
    ),
}
"""What of a manifest's facts is used, as `artifacts.has_shape` takes it."""
_TRAIN_FIGURES = ("loss", "learning_rate", "tokens_per_second")
_VALIDATION_FIGURES = ("loss", "perplexity", "bits_per_character", "bits_per_character_error", "logit_scale")


class Curves(NamedTuple):
    """
    Attributes:
        training: update, epoch, loss (nats for a token), learning_rate, tokens_per_second; at most MAX_POINTS of each.
        validation: update, epoch, loss, perplexity, bits_per_character, and its standard error where it is known; the
            factor on the logits where the run was calibrated.
    """

    training: dict[str, list[float | None]]
    validation: dict[str, list[float | None]]


class Beginning(NamedTuple):
    """The beginning of a held-out document.

    Attributes:
        ids: with the mark that begins a document.
        original: the text that follows there, of as many tokens as a completion has at most.
    """

    ids: list[int]
    original: str


def gather_figures(
    output_dir: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    plan: Mapping[str, Any] | None = None,
    device: str = "cpu",
    precision: str | None = "auto",
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Collect and compute all that a report tells of a run; JSON values.

    What cannot be computed is None. With the same files and seed the figures are the same.

    Args:
        output_dir: of the run, with metrics.jsonl and final_model.
        corpus: what was trained on and what was held out.
        plan: what was planned, a value for each name, and the reasons as text under "reason"; None takes the run's
            plan.json, if there is one.
        device: that decodes.
        precision: of decoding, see `Engine`; on a CPU only where the compiled decoder is there already.
        seed: of the completions and of the choice of documents.

    Raises:
        FileNotFoundError, ValueError: the folder is not that of a finished run, or the corpus is not its corpus.
    """
    facts = read_facts(output_dir)
    check_corpus(output_dir, facts, corpus)
    folder = next(path for name in (BEST_MODEL, FINAL_MODEL) if (path := output_dir / name / CONFIG).is_file()).parent
    shape = vars(read_config(folder / CONFIG))
    curves = read_curves(output_dir / METRICS)

    say(f"report: counting {ORDER}-grams of the training text")
    yardstick = measure_yardstick(
        corpus.tokens,
        corpus.held_out,
        tokenizer,
        training_lengths=corpus.piece_lengths,
        held_out_lengths=corpus.held_out_lengths,
    )
    tokens_per_character = _tokens_per_character(corpus, tokenizer)
    bits_of_loss = tokens_per_character / math.log(2)
    training = curves.training | {
        "bits_per_character": [None if loss is None else loss * bits_of_loss for loss in curves.training["loss"]]
    }
    say(f"report: completions of {folder}")
    held_out = CorpusText(corpus.held_out, tokenizer, lengths=corpus.held_out_lengths)
    beginning_length = max(1, min(BEGINNING_LENGTH, shape["n_ctx"] // 4))
    length = max(1, min(COMPLETION_LENGTH, shape["n_ctx"] - 1 - beginning_length))
    beginnings = choose_beginnings(held_out, tokenizer, max_size=beginning_length, length=length, seed=seed)
    decoding: dict[str, Any] = {"length": length, "device": device, "precision": precision}
    texts = complete_beginnings(folder, beginnings, count=COMPLETIONS, seed=seed, **decoding) if beginnings else []
    # A model that has memorised its texts shows it where no beginning leads it away from them.
    count = UNPROMPTED if beginnings else COMPLETIONS
    unprompted = complete_beginnings(folder, [], count=count, seed=seed + COMPLETIONS, **decoding)
    model, parameters = _named_shape(shape), _count_parameters(folder)
    return {
        "format": FORMAT,
        "date": date.today().isoformat(),
        "folder": str(output_dir),
        "corpus": _corpus_figures(corpus, tokens_per_character),
        "model": model | {"parameters": parameters, "vocabulary": len(tokenizer), "tokenizer": tokenizer.kind},
        "settings": facts.get("settings", {}),
        "updates": facts.get("updates"),
        "training": training,
        "validation": curves.validation,
        "yardstick": None if yardstick is None else asdict(yardstick),
        "models": _models(output_dir, facts, curves),
        "plan": dict(plan) if plan is not None else _read_plan(output_dir / PLAN),
        "completions": _completions(folder, beginnings, texts, length, seed),
        "quality": _quality(corpus, tokenizer, beginnings, texts, unprompted),
    }


def read_facts(output_dir: Path) -> dict[str, Any]:
    """What the last model of a run tells of its training.

    Raises:
        FileNotFoundError: there is none, or no metrics.
        ValueError: its manifest is damaged.
    """
    manifest = output_dir / FINAL_MODEL / MANIFEST
    for path in (manifest, output_dir / METRICS):
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {path}: a report is of a finished run; name its --output_dir, or finish it with --resume"
            )
    content = read_json(manifest)
    facts = (content.get("facts") or {}) if has_shape(content, {"facts": (_FACTS, None)}) else None
    if facts is None or (facts.get("settings") and not _can_hold_out(facts["settings"])):
        raise ValueError(f"{manifest} does not tell of a training; copy it again, or train again")
    return {name: value for name, value in facts.items() if value is not None}


def _can_hold_out(settings: Mapping[str, Any]) -> bool:
    """Whether --val_fraction and --val_bytes are such as train.py takes."""
    sizes = settings.get("val_bytes")
    return 0 <= settings["val_fraction"] < 1 and (sizes is None or (len(sizes) == 2 and 0 <= sizes[0] <= sizes[1]))


def check_corpus(output_dir: Path, facts: Mapping[str, Any], corpus: Corpus) -> None:
    """Refuse pieces that were made again since, with which held-out documents may have been trained on."""
    expected = facts.get("corpus_tokens")
    if expected is not None and expected != len(corpus.tokens):
        raise ValueError(
            f"{corpus.path.parent} has {len(corpus.tokens):,} tokens to train on, {output_dir / FINAL_MODEL} was "
            f"trained on {expected:,}: the pieces were made again since; train again, or put the old ones back"
        )


def _read_plan(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    plan = Plan.read(path)
    return plan.flags | {"reason": "\n".join(plan.reasons)}


# --- curves


def read_curves(path: Path) -> Curves:
    """Read metrics.jsonl; a line that a killed run has left half, or that is damaged, is skipped."""
    steps, epochs = array("d"), array("d")
    training = {name: array("d") for name in _TRAIN_FIGURES}
    validation: dict[int, dict[str, float]] = {}
    with open(path, "rb") as file:
        for line in file:
            point = read_point(line)
            if point is None or not _are_figures([point["step"], point.get("epoch")]):
                continue
            if point["kind"] == "train":
                steps.append(point["step"])
                epochs.append(point["epoch"])
                for name, values in training.items():
                    values.append(point[name] if _are_figures([point.get(name)]) else math.nan)
            elif "loss" in point:
                figures = {name: point[name] for name in _VALIDATION_FIGURES if name in point}
                if _are_figures(figures.values()):
                    validation[point["step"]] = {"update": point["step"], "epoch": point["epoch"], **figures}
    columns = {"update": steps, "epoch": epochs, **training}
    points = [validation[step] for step in sorted(validation)]
    names = [name for name in ("update", "epoch", *_VALIDATION_FIGURES) if any(name in point for point in points)]
    return Curves(
        {name: thinned(values) for name, values in columns.items()},
        {name: [point.get(name) for point in points] for name in names},
    )


def _are_figures(values: Iterable[Any]) -> bool:
    """Whether they are numbers, none of them of more digits than a float has room for."""
    return all(type(value) is float or (type(value) is int and abs(value) < 1 << 63) for value in values)


def thinned(values: Sequence[float], points: int = MAX_POINTS) -> list[float | None]:
    """At most so many points: means of stretches of about one length, of what is finite; None where nothing is."""
    numbers = np.asarray(values, np.float64)
    stretches = [some[np.isfinite(some)] for some in np.array_split(numbers, max(1, min(points, len(numbers))))]
    return [float(some.mean()) if len(some) else None for some in stretches] if len(numbers) else []


def _models(output_dir: Path, facts: Mapping[str, Any], curves: Curves) -> dict[str, Any]:
    """The best model and the last one, with their measurements; None where nothing was measured."""
    found: dict[str, Any] = {"best": None, "final": None}
    columns = curves.validation
    if columns:
        rows = [
            {name: values[row] for name, values in columns.items() if values[row] is not None}
            for row in range(len(columns["update"]))
        ]
        bits = [row.get("bits_per_character") or math.inf for row in rows]
        best = rows[bits.index(min(bits))]
        folder = BEST_MODEL if (output_dir / BEST_MODEL / CONFIG).is_file() else None
        if folder is None and best["update"] == facts.get("updates"):
            folder = FINAL_MODEL
        found["best"] = best | {"folder": folder}
        found["final"] = rows[-1] | {"folder": FINAL_MODEL} if rows[-1]["update"] == facts.get("updates") else None
    return found


# --- the corpus and the model


def _tokens_per_character(corpus: Corpus, tokenizer: Tokenizer) -> float:
    """Predicted tokens of the training text for a character, of some documents chosen at random."""
    text = CorpusText(corpus.tokens, tokenizer, lengths=corpus.piece_lengths, max_characters=200_000)
    tokens = characters = 0
    for document, one in text:
        if len(one) == len(whole := text.text(document)):
            tokens += len(text.ids(document)) - 1
            characters += len(whole)
    return tokens / characters if characters else 0.0


def _corpus_figures(corpus: Corpus, tokens_per_character: float) -> dict[str, Any]:
    tokens = len(corpus.tokens)
    return {
        "tokens": tokens,
        "documents": corpus.documents,
        "characters_about": round(tokens / tokens_per_character) if tokens_per_character else 0,
        "tokens_per_character": round(tokens_per_character, 4),
        "held_out_tokens": len(corpus.held_out),
        "held_out_documents": corpus.held_out_documents,
        "held_out_slices": corpus.held_out_slices,
    }


def _named_shape(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {name: shape.get(name) for name in ("n_layer", "n_embd", "n_head", "n_ctx", "resid_pdrop")}


def _count_parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


# --- completions


def choose_beginnings(
    held_out: CorpusText, tokenizer: Tokenizer, *, max_size: int, length: int, seed: int, count: int = COMPLETIONS
) -> list[Beginning]:
    """Beginnings of held-out documents chosen at random, no two alike.

    Args:
        max_size: tokens of a beginning, at most; it is at most a third of its document.
        length: tokens of what follows, at most.
    """
    beginnings: dict[tuple[int, ...], Beginning] = {}
    marks = (tokenizer.marks.begin, tokenizer.marks.end)
    for document in np.random.default_rng(seed).permutation(held_out.documents).tolist():
        if len(beginnings) == count:
            break
        ids = [id_ for id_ in held_out.ids(document).tolist() if id_ not in marks]
        size = min(max_size, len(ids) // 3)
        if size < 1:
            continue
        beginning, context = ids[:size], tokenizer.decode(ids[:size])
        original = tokenizer.decode(ids[: size + length])[len(context) :]
        if context.strip() and original.strip():
            beginnings.setdefault(tuple(beginning), Beginning([tokenizer.marks.begin, *beginning], original))
    return list(beginnings.values())


def complete_beginnings(
    folder: Path,
    beginnings: Sequence[Beginning],
    *,
    length: int,
    device: str,
    precision: str | None,
    seed: int,
    count: int,
) -> list[tuple[str, str]]:
    """Complete beginnings in turn, as often as it takes to have `count`; without any, documents from their beginning.

    Where the compiled decoder has not been compiled on this machine yet, PyTorch's decodes: to compile takes most of a
    minute, which a run of some minutes has not got.

    Returns:
        The context and the completion behind it, of each; the beginnings in their order, again and again.
    """
    model, tokenizer = load_weights(folder, device=device)
    prompts = [beginning.ids for beginning in beginnings] or [[tokenizer.marks.begin]]
    if device == "cpu" and not is_decoder_cached():
        precision = None
    with Engine(model, tokenizer, max_num_seqs=_MAX_SEQUENCES, precision=precision) as engine:
        requests = []
        for number, ids in enumerate(prompts):
            prompt = engine.prompt_from_ids(ids, length)
            samples = len(range(number, count, len(prompts)))
            request = engine.submit(
                prompt, samples=samples, length=length, sampling_params=SAMPLING, seed=seed + number
            )
            requests.append((prompt.context, request))
        texts = [
            [(context, one.text[len(context) :]) for one in request.future.result()] for context, request in requests
        ]
    return [texts[number % len(texts)][number // len(texts)] for number in range(count)]


def _completions(
    folder: Path, beginnings: Sequence[Beginning], texts: Sequence[tuple[str, str]], length: int, seed: int
) -> dict[str, Any]:
    shown = [
        {"beginning": context, "completion": completion, "original": beginning.original}
        for beginning, (context, completion) in list(zip(beginnings, texts, strict=False))[:SHOWN]
    ]
    return {
        "model": folder.name,
        "count": len(texts),
        "beginnings": len(beginnings),
        "max_tokens": length,
        "temperature": SAMPLING.temperature,
        "top_p": SAMPLING.top_p,
        "seed": seed,
        "shown": shown,
    }


def _quality(
    corpus: Corpus,
    tokenizer: Tokenizer,
    beginnings: Sequence[Beginning],
    texts: Sequence[tuple[str, str]],
    unprompted: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Copying, repetition and variety: of completions, of what the model writes by itself, of what really followed.

    The variety depends on the amount of text, so it is that of the first characters, as many of each.
    """
    training = CorpusText(
        corpus.tokens, tokenizer, lengths=corpus.piece_lengths, max_characters=MAX_SEARCHED_CHARACTERS
    )
    columns = {
        "completions": [completion for _, completion in texts],
        "unprompted": [completion for _, completion in unprompted],
        "originals": [beginning.original for beginning in beginnings],
    }
    found = copied_from(training, [text for column in columns.values() for text in column])
    least = min(sum(map(len, column)) for column in columns.values() if column)
    figures: dict[str, Any] = {}
    first = 0
    for name, column in columns.items():
        copied = sum(found.copied[first : first + len(column)])
        figures[name] = _figures_of(column, copied, least) if column else None
        first += len(column)
    return {
        "min_run": MIN_RUN,
        "searched_characters": found.searched_characters,
        "is_sample": training.is_sample,
        **figures,
        "longest_copies": [
            {
                "text": run.text,
                "characters": len(run.text),
                "unprompted": run.completion >= len(texts),
                "document": run.document + 1,
                "character": run.offset + 1,
            }
            for run in found.longest(completions=len(texts) + len(unprompted))
        ],
    }


def _figures_of(texts: Sequence[str], copied: int, variety_characters: int) -> dict[str, Any]:
    characters = sum(map(len, texts))
    return {
        "texts": len(texts),
        "characters": characters,
        "copied_characters": copied,
        "copied_share": copied / characters if characters else None,
        "repeated_4_grams": repetition(texts),
        "distinct_2": distinct_n(_first(texts, variety_characters)),
    }


def _first(texts: Sequence[str], characters: int) -> list[str]:
    """The first texts, so many characters of them."""
    taken = []
    for text in texts:
        if characters <= 0:
            break
        taken.append(text[:characters])
        characters -= len(text)
    return taken
