"""What `train.py --minutes` trains when the flags do not say: the shape, the epochs and the settings that are likely to
give the fewest bits per character of unseen text in the time.

The rules come from experiments, which docs/training.md lists. In short:

- The largest shape that sees the text `enough_epochs` times, or `ENOUGH_TOKENS` tokens a parameter, is the best one: a
  larger one learns less in the time, a smaller one has learnt what it can. Where a small text has teachers, it is the
  largest one that sees the text `SMALL_PUPIL_EPOCHS` times beside them.
- A model memorises a small text however slowly it learns: parameters are bounded by the tokens, and so are the epochs.
- With several epochs, windows at other places in each help; dropout and weight decay too, as far as a model memorises.
- Tokens that attend to their own document only help, the more the shorter documents are.
- Where there is time for twice as many epochs as a model can use, one of its kind is its teacher.
- What is memorised is learnt from a trigram and a cache too, unless there are teachers. A small text always is, and it
  has teachers wherever a part of the time is enough for them: small, trained for a few epochs and strongly
  regularized, since a teacher that has memorised its text teaches no more than the text.
- The tokens of a text of less than `CHARACTER_TOKENS`, which shows most of them a few times, share vectors of their
  characters.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_chinese.artifacts import read_json, write_json
from gpt2_chinese.best_model import FINAL_MODEL
from gpt2_chinese.command_line import project_file, remark, say
from gpt2_chinese.model_folder import read_config
from gpt2_chinese.precision import Precision, choose_devices, choose_precision
from gpt2_chinese.text.pieces import HOW_TO_FIX, MANIFEST, read_manifest
from gpt2_chinese.training.allocator import keep_freed_memory
from gpt2_chinese.training.estimates import flops_per_token
from gpt2_chinese.training.hold_out import MAX_BYTES, MIN_BYTES
from gpt2_chinese.training.loss import WindowLoss
from gpt2_chinese.training.optimizers import make_optimizer
from gpt2_chinese.training.teachers import bytes_of_soft_targets

PLAN = "plan.json"
TEACHERS = "teachers"  # their folder in --output_dir
SHAPES = ("2x128", "3x192", "4x256", "6x384", "8x512", "12x768")  # of config/plan/, the smallest first
ENOUGH_TOKENS = 20  # for each parameter of the layers; Hoffmann et al. 2022, for text that is not repeated
SMALL = 200_000  # tokens of a text that is memorised soon; between the two that were tried
VERY_SMALL = 40_000  # a guess, for texts that would have too few updates
BATCH_SIZE, SMALL_BATCH_SIZE, VERY_SMALL_BATCH_SIZE = 16, 8, 4  # windows of an update
MAX_PARAMETERS = 30  # of the layers, for each token of the text
LITTLE, MUCH = 8.0, 20.0  # epochs times parameters for a token: below, dropout only slows down; above, it wants more
WARMUP_STEPS = 30
MEASURED_UPDATES = 30  # after them the number of updates is decided, from how long they took,
CORRECTED_EVERY = 1.25  # and corrected when there have been so many times as many
REPORT_SECONDS = 12  # at the end, for model/report.html,
REPORT_SECONDS_PER_MILLION = 6.5  # and for each million tokens after the first, which are counted and searched
REPORTED_TOKENS = 13_000_000  # some 20 million characters; of more text the report reads a sample
SPARED = 0.015  # of the time, for saving and for what other programs take
MAX_TEACHERS = 4
TEACHING_GAIN = 0.07  # bits per character
TAUGHT_WIDTH = 256
TAUGHT_EPOCHS = 17  # in the time, from which on a teacher and its pupil are better than one model
PUPIL_SHARE = 0.2  # of an update's time, that each teacher adds to it
ENOUGH_OF_PUPIL = 14  # epochs of a pupil, from which on more teachers are better than more of them
TEACHING_PART = 0.3  # of the time, for all teachers together
# Teachers of a small text, of the smallest shape: a few more epochs where there is time for `MAX_TEACHERS` of them, and
# otherwise as many as there is time for, or one that may take `MOST_OF_ONE` of it.
FEW_EPOCHS, MORE_EPOCHS = 4, 6
MOST_OF_ONE = 0.45
SMALL_PUPIL_SHARE = 0.3  # of an update's time, that each of these adds where it predicts in every update;
SOFT_SHARE = 0.1  # that soft targets and a trigram add together,
SOFT_EPOCHS = 0.45  # and epochs of a teacher's training that making its soft targets takes as long as
SMALL_PUPIL_EPOCHS = 7  # that a larger pupil has to have: 3x192 with 6 is as good as 2x128 in the same time
TEACHER_OVERHEAD = 3.0  # seconds, for a teacher's beginning, measurements and saving
SMALL_SHARES = {"teacher_share": 0.42, "ngram_share": 0.28}  # in what a model of a small text learns
SHARES_TOGETHER = 0.7
LONE_NGRAM_SHARE = 0.4  # without teachers
CHARACTER_LR = 8.0  # of a very small text, times the learning rate
CHARACTER_TOKENS = 100_000  # below which vectors of characters pay: with 55,000 they did, with 145,000 no more
NGRAM_SHARE = 0.15  # of a text that is not small, where something is memorised and no teachers help
SMALL_VAL_BYTES = (8_000, MAX_BYTES)  # held out of a small text, some 2,000 tokens of BPE: more is missed in training
MEASURING = 0.02  # of the time, for a measurement of the validation set, at most
MEASURED_FASTER = 1.2  # tokens are measured and calibrated on, in windows that overlap by half, than trained
BYTES_OF_A_TOKEN = 4  # of Chinese text, roughly
_PROBE_SECONDS = 1.0  # for a shape
_TRIED_TOKENS = (50_000, 1_600_000)
_TRIED_WIDTHS = (128, 192, 256)

_KINDS: dict[str, type] = {
    **dict.fromkeys(("model_config", "optimizer", "embedding_init", "schedule"), str),
    **dict.fromkeys(("epochs", "batch_size", "stride", "warmup_steps", "patience", "log_step", "max_steps"), int),
    **dict.fromkeys(("lr", "muon_lr", "character_lr", "dropout", "weight_decay", "muon_weight_decay"), float),
    **dict.fromkeys(("teacher_share", "ngram_share"), float),
    "val_bytes": list,
    **dict.fromkeys(("shift_windows", "document_mask", "calibrate", "report"), bool),
}  # of the flags that a plan has

# Bits per character of medical_qa.txt after so many epochs e: floor + gap * e ** -1.13, fitted to the experiments.
_CURVES = {"3x192": (3.11, 0.417), "4x256": (3.00, 0.512)}


@dataclass(frozen=True)
class Facts:
    """What a plan is made from: the corpus, in tokens and documents, the size of its vocabulary, and the minutes."""

    tokens: int
    documents: int
    vocab_size: int
    seconds: float


@dataclass
class Plan:
    """
    Attributes:
        flags: of train.py, those that were not given.
        reasons: why, a line each.
        deadline: Unix time at which the run has to be over.
        seconds: of the run without its teachers, from their soft targets or its first update to the deadline.
        teachers: models that are trained before, for the last one to learn from.
        teacher_seconds: of each.
        teacher_flags: theirs that are others than the last model's.
        most_updates: that were allowed by --max_steps; 0 is no limit.
        is_settled: the number of updates was decided before the run was interrupted; not written.
    """

    flags: dict[str, Any]
    reasons: list[str] = field(default_factory=list)
    deadline: float = 0.0
    seconds: float = 0.0
    teachers: int = 0
    teacher_seconds: float = 0.0
    teacher_flags: dict[str, Any] = field(default_factory=dict)
    most_updates: int = 0
    is_settled: bool = False

    def apply(self, args: argparse.Namespace) -> None:
        for name, value in self.flags.items():
            setattr(args, name, value)
        if self.teachers:
            args.teacher = ",".join(map(str, self.teacher_folders(args)))

    def teacher_folders(self, args: argparse.Namespace) -> list[Path]:
        """The --output_dir of each teacher."""
        return [Path(args.output_dir) / TEACHERS / str(number) for number in range(1, self.teachers + 1)]

    def teacher_runs(self, args: argparse.Namespace) -> Iterator[tuple[argparse.Namespace, Plan]]:
        """The flags of each teacher and its own plan, whose time begins when it is asked for."""
        for number, folder in enumerate(self.teacher_folders(args), 1):
            own = copy.copy(args)
            own.output_dir, own.writer_dir = str(folder), str(Path(args.writer_dir) / TEACHERS / str(number))
            own.seed, own.teacher, own.report = args.seed + number, "", False
            if args.resume != "none":
                own.resume = "auto" if args.resume else None
            own.max_steps = self.flags.get("max_steps", args.max_steps)
            for flag, value in self.teacher_flags.items():
                setattr(own, flag, value)
            seconds = self.teacher_seconds
            plan = replace(self, teachers=0, seconds=seconds, deadline=time.time() + seconds, is_settled=False)
            yield own, plan

    def write(self, path: Path) -> None:
        written = asdict(self)
        del written["is_settled"]
        write_json(path, written)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read the plan of a run that is resumed.

        Raises:
            ValueError: it is not what `write` wrote.
        """
        what = f"{path} is not a plan that train.py --minutes wrote"
        mend = "copy it again, or start over with --resume none"
        try:
            plan = cls(**read_json(path))
        except TypeError as error:
            raise ValueError(f"{what} ({error}); {mend}") from error
        numbers = (plan.deadline, plan.seconds, plan.teacher_seconds)
        if (
            not all(isinstance(flags, dict) for flags in (plan.flags, plan.teacher_flags))
            or not all(_is_of_kind(*flag) for flag in [*plan.flags.items(), *plan.teacher_flags.items()])
            or not isinstance(plan.reasons, list)
            or not all(isinstance(reason, str) for reason in plan.reasons)
            or any(type(number) not in (int, float) or not math.isfinite(number) for number in numbers)
            or type(plan.teachers) is not int
            or type(plan.most_updates) is not int
            or not 0 <= plan.teachers <= MAX_TEACHERS
        ):
            raise ValueError(f"{what}; {mend}")
        return plan


def _is_of_kind(name: str, value: Any) -> bool:
    if type(value) is not _KINDS.get(name):
        return False
    return not isinstance(value, list) or [type(one) for one in value] == [int, int]


def make_plan(
    args: argparse.Namespace,
    given: set[str],
    speed_of: Callable[[str, int], float] | None = None,
    say: Callable[[str], None] = remark,
) -> Plan:
    """Plan what no flag says.

    Args:
        given: the flags that were given, as attributes of `args`.
        speed_of: tokens a second that a shape trains with so large a vocabulary; measured by default.
        say: is told what is being measured.

    Raises:
        ValueError, FileNotFoundError: there are no pieces, or the time is too short for anything.
    """
    deadline = (args.minutes_from or time.time()) + 60 * args.minutes
    facts = _facts(args, deadline - time.time())
    if speed_of is None:
        say("measuring how fast this machine trains")
        speed_of = Probe(args, args.batch_size if "batch_size" in given else batch_size(facts.tokens))
    speed_of = cache(speed_of)
    shapes = [args.model_config] if "model_config" in given else [_path_of(shape) for shape in SHAPES]
    may_be_taught, is_small = "teacher" not in given, facts.tokens < SMALL
    shape, speed, is_taught = choose_shape(facts, shapes, speed_of, may_be_taught=may_be_taught and not is_small)
    epochs = facts.seconds * (1 - SPARED) * speed / facts.tokens  # in all of the time
    reserved = report_seconds(facts.tokens) if args.report or "report" not in given else 0.0
    available = max(0.0, deadline - time.time() - reserved)
    teachers = Teachers()
    if is_small and may_be_taught:
        known_epochs = args.epochs if "epochs" in given else SMALL_PUPIL_EPOCHS
        is_soft = bytes_of_soft_targets(facts.tokens, facts.vocab_size, known_epochs) > 0
        teachers = small_teachers(facts, available, shapes[0], speed_of, is_soft=is_soft)
        if teachers.number:
            shape = shape_of_small_pupil(facts, available, shapes[: shapes.index(shape) + 1], speed_of, teachers)
            speed = speed_of(shape, facts.vocab_size)
            epochs = facts.seconds * (1 - SPARED) * speed / facts.tokens
    elif is_taught:
        teachers = large_teachers(available, epochs)
    left = 1 - (teachers.number * teachers.seconds + teachers.soft_seconds) / facts.seconds
    epochs_left = epochs * left / (1 + teachers.slowdown)
    flags, reasons = _settings(facts, shape, epochs_left, teachers, is_taught=teachers.number > 0 or bool(args.teacher))
    flags |= _shares_beside_given(args, given, flags)
    most_bytes = int(BYTES_OF_A_TOKEN * MEASURING * facts.seconds * MEASURED_FASTER * speed)
    if "val_bytes" not in flags and most_bytes < BYTES_OF_A_TOKEN * args.val_fraction * facts.tokens:
        flags["val_bytes"] = [MIN_BYTES, max(MIN_BYTES, min(MAX_BYTES, most_bytes))]
        reasons.append("much text for the time: less is held out, so that measuring it takes 2 % of the time at most")
    # What a trigram has taught is not too sure of itself, and the few held-out documents of a small text mislead.
    flags["calibrate"] = args.val_fraction > 0 and not is_small
    # A GPU's fastest attention takes no mask; what it costs there has not been measured.
    flags["document_mask"] = choose_devices(args.device)[0][0].type == "cpu"
    if (
        facts.tokens < CHARACTER_TOKENS
        and "character_lr" not in given
        and _kept(args, given, flags, "optimizer") == "muon"
    ):
        flags["character_lr"] = CHARACTER_LR * _kept(args, given, flags, "lr")
        reasons.append(
            "a small text: tokens that begin or end alike share vectors of these characters (--character_lr)"
        )
    flags = {name: value for name, value in flags.items() if name not in given}
    teacher_flags = {
        name: value for name, value in teachers.flags.items() if name not in given or name == "ngram_share"
    }
    windows = flags.get("batch_size", args.batch_size) * args.gradient_accumulation
    epochs_at_most = min(epochs_left, flags.get("epochs", args.epochs))
    if "max_steps" not in given:
        flags["max_steps"] = _updates(epochs_at_most, facts, windows, shape)
        if "epochs" in teacher_flags:
            teacher_flags["max_steps"] = _updates(teacher_flags["epochs"], facts, windows, shapes[0])
    why = [
        f"{facts.tokens:,} tokens in {facts.documents:,} documents, vocabulary {facts.vocab_size:,}, "
        f"{facts.seconds / 60:.1f} minutes left",
        f"{Path(shape).stem}: {speed:,.0f} tokens/s here, {epochs:.1f} epochs in the time",
        *_teaching(teachers, shape, epochs_left),
        *reasons,
        *_expectation(facts, shape, epochs_at_most, teachers.number),
        *_untried(facts, shape, args),
    ]
    seconds = deadline - time.time() - teachers.number * teachers.seconds
    most_updates = args.max_steps if "max_steps" in given else 0
    return Plan(flags, why, deadline, seconds, teachers.number, teachers.seconds, teacher_flags, most_updates)


def report_seconds(tokens: int) -> float:
    """What a plan keeps of its time for the report of a text of so many tokens."""
    return REPORT_SECONDS + REPORT_SECONDS_PER_MILLION * max(0, min(tokens, REPORTED_TOKENS) - 1_000_000) / 1e6


def _shares_beside_given(args: argparse.Namespace, given: set[str], flags: dict[str, Any]) -> dict[str, float]:
    """The share of teachers or of the trigram where the other one is given, so that the text keeps a part."""
    names = ("teacher_share", "ngram_share")
    return {
        name: min(flags[name], SHARES_TOGETHER * (1 - getattr(args, other)))
        for name, other in (names, names[::-1])
        if set(names) <= flags.keys() and other in given and name not in given
    }


def _kept(args: argparse.Namespace, given: set[str], flags: dict[str, Any], name: str) -> Any:
    """The value of a flag: what was given, or what is planned."""
    return getattr(args, name) if name in given else flags[name]


def _updates(epochs: float, facts: Facts, windows: int, shape: str) -> int:
    """Of so many windows each."""
    return max(1, math.ceil(epochs * facts.tokens / (windows * (read_config(shape).n_ctx - 1))))


def _path_of(shape: str) -> str:
    return project_file(f"config/plan/{shape}.json")


class Choice(NamedTuple):
    """A shape, its speed in tokens a second, and whether it is to have teachers of its own kind."""

    shape: str
    speed: float
    is_taught: bool = False


def choose_shape(
    facts: Facts, shapes: list[str], speed_of: Callable[[str, int], float], *, may_be_taught: bool = True
) -> Choice:
    """The largest shape that there are time and text enough for, or one that there is time to teach.

    In the same time the larger of two models is better up to a width of `TAUGHT_WIDTH`, and above it the taught one.

    Args:
        shapes: paths of configurations, the smallest first.
    """
    chosen: Choice | None = None
    taught: Choice | None = None
    for shape in shapes:
        config = read_config(shape)
        parameters = layer_parameters(config)
        if chosen is not None and parameters > MAX_PARAMETERS * facts.tokens:
            break
        speed = speed_of(shape, facts.vocab_size)
        seen = facts.seconds * speed
        if may_be_taught and seen * (1 - SPARED) >= TAUGHT_EPOCHS * facts.tokens:
            taught = Choice(shape, speed, is_taught=True)
        enough = seen >= min(enough_epochs(config) * facts.tokens, ENOUGH_TOKENS * parameters)
        if chosen is None or enough:
            chosen = Choice(shape, speed)
        if not enough:
            break
    assert chosen is not None
    if taught is not None and (taught.shape == chosen.shape or read_config(taught.shape).n_embd >= TAUGHT_WIDTH):
        return taught
    return chosen


class Teachers(NamedTuple):
    """
    Attributes:
        number: how many there are.
        seconds: of the training of each.
        flags: theirs that are others than the last model's.
        soft_seconds: that it takes to make the soft targets of all of them, if they are made.
        slowdown: what the teachers add to an update of the last model, as a part of its time.
    """

    number: int = 0
    seconds: float = 0.0
    flags: Mapping[str, Any] = MappingProxyType({})
    soft_seconds: float = 0.0
    slowdown: float = 0.0


def large_teachers(available: float, epochs: float) -> Teachers:
    """Teachers of the last model's shape, which leave it the most of the time, as far as it can use that.

    Args:
        available: seconds, for them and the last model.
        epochs: of one model in the time.
    """
    number = teachers_for(epochs)
    slowdown = PUPIL_SHARE * number
    part = max(TEACHING_PART, 1 - ENOUGH_OF_PUPIL * (1 + slowdown) / epochs)
    return Teachers(number, available * part / number, slowdown=slowdown)


def teachers_for(epochs: float) -> int:
    """As many as there is time for when the last model has enough, and one at least."""
    affordable = (epochs - ENOUGH_OF_PUPIL) / (FEW_EPOCHS + 1 + PUPIL_SHARE * ENOUGH_OF_PUPIL)
    return min(MAX_TEACHERS, max(1, int(affordable)))


def small_teachers(
    facts: Facts, available: float, shape: str, speed_of: Callable[[str, int], float], *, is_soft: bool
) -> Teachers:
    """Teachers of a small text, which do not need more time than for a few epochs of the smallest shape.

    Args:
        available: seconds, for them and the last model.
        is_soft: their predictions are computed once, as soft targets (see teachers.py).
    """
    epoch = facts.tokens / speed_of(shape, facts.vocab_size)
    soft_seconds = SOFT_EPOCHS * epoch if is_soft else 0.0
    for epochs in (MORE_EPOCHS, FEW_EPOCHS):
        seconds = epochs * epoch + TEACHER_OVERHEAD
        number = min(MAX_TEACHERS, int(TEACHING_PART * available / (seconds + soft_seconds)))
        if number == MAX_TEACHERS:
            break
    if number == 0 and seconds + soft_seconds <= MOST_OF_ONE * available:
        number = 1
    if number == 0:
        return Teachers()
    dropout, weight_decay, muon_weight_decay = 0.2, 1.0, 3.0
    flags = {
        "model_config": shape,
        "epochs": epochs,
        "dropout": dropout,
        "weight_decay": weight_decay,
        "muon_weight_decay": muon_weight_decay,
        "ngram_share": 0.0,
        "character_lr": 0.0,
    }
    slowdown = SOFT_SHARE if is_soft else SMALL_PUPIL_SHARE * number
    return Teachers(number, seconds, flags, number * soft_seconds, slowdown)


def shape_of_small_pupil(
    facts: Facts, available: float, shapes: list[str], speed_of: Callable[[str, int], float], teachers: Teachers
) -> str:
    """The largest shape that sees a small text `SMALL_PUPIL_EPOCHS` times in what its teachers leave of the time, or
    the smallest one if none does.

    Args:
        available: seconds, for them and the last model.
        shapes: paths of configurations, the smallest first.
    """
    own = available - teachers.number * teachers.seconds - teachers.soft_seconds
    seconds = own * (1 - SPARED) / (1 + teachers.slowdown)
    needed = SMALL_PUPIL_EPOCHS * facts.tokens
    fast_enough = [shape for shape in shapes if seconds * speed_of(shape, facts.vocab_size) >= needed]
    return fast_enough[-1] if fast_enough else shapes[0]


def enough_epochs(config: GPT2Config) -> float:
    """How often a shape has to see a text to do better than the next smaller one in the same time.

    Where the fitted curves of two shapes cross (`_CURVES`). For 6x384 3.7 epochs were far too few (docs/training.md);
    10 are a guess.
    """
    return 2.5 if config.n_embd <= 256 else 10


def layer_parameters(config: GPT2Config) -> int:
    """The weights of the matrices of all layers: attention 4, the feed-forward network 8 times the width squared."""
    return 12 * int(config.n_layer) * int(config.n_embd) ** 2


def _facts(args: argparse.Namespace, seconds: float) -> Facts:
    if seconds < 20:
        raise ValueError(f"--minutes {args.minutes:g}: {max(0.0, seconds):.0f} seconds are left, too few to train")
    folder = Path(args.tokenized_data_path)
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"--minutes plans by {folder / MANIFEST}, which is not there; {HOW_TO_FIX}")
    pieces = manifest["pieces"]
    tokens = sum(piece["tokens"] for piece in pieces)
    if tokens == 0:
        raise ValueError(f"{folder} has no tokens: put text into data/ and run the stages before again")
    documents = sum(piece["documents"] for piece in pieces)
    return Facts(tokens, documents, manifest["vocabulary"]["size"], seconds)


def _settings(
    facts: Facts, shape: str, epochs: float, teachers: Teachers, *, is_taught: bool
) -> tuple[dict[str, Any], list[str]]:
    """The flags for a shape and so many epochs, and why.

    Args:
        is_taught: by those teachers, or by others that are given.
    """
    config = read_config(shape)
    limit = max_epochs(facts.tokens, is_taught=is_taught)
    repeated = epochs >= 1.5
    dropout, weight_decay, muon_weight_decay = regularization(
        facts.tokens, epochs, layer_parameters(config), is_taught=is_taught
    )
    scale = min(1.0, 256 / config.n_embd)  # of the learning rates, for wider models than were tried
    flags: dict[str, Any] = {
        "model_config": shape,
        "epochs": limit,
        "batch_size": batch_size(facts.tokens),
        "stride": config.n_ctx - 1,
        "optimizer": "muon",
        "embedding_init": "cooccurrence",
        "lr": 1.5e-2 * scale,
        "muon_lr": 6e-3 * math.sqrt(scale),
        "warmup_steps": WARMUP_STEPS,
        "schedule": "linear",
        "dropout": dropout,
        "weight_decay": weight_decay,
        "muon_weight_decay": muon_weight_decay,
        "shift_windows": repeated,
        "patience": 3,
        "log_step": 10,
        "report": True,
    }
    reasons = []
    if facts.tokens < SMALL:
        flags |= SMALL_SHARES if is_taught else {"ngram_share": LONE_NGRAM_SHARE}
        flags["val_bytes"] = list(SMALL_VAL_BYTES)
        reasons.append("a small text: a trigram of the tokens and a cache of each document are learnt from too")
    elif dropout and not is_taught:
        flags["ngram_share"] = NGRAM_SHARE
        reasons.append(
            "many epochs for such a model: a trigram of the tokens and a cache of each document are learnt from too"
        )
    if dropout:
        reasons.append(
            f"several epochs: dropout {dropout}, weight decay {weight_decay} and {muon_weight_decay} (Muon), windows "
            "at other places in each"
        )
    else:
        reasons.append("few epochs for such a model, little is memorised: no dropout and little weight decay")
    if epochs > limit:
        fixed = teachers.number * teachers.seconds if teachers.flags else 0.0
        minutes = (fixed + (facts.seconds - fixed) * limit / epochs) / 60
        reasons.append(
            f"a text of this size is memorised after {limit} epochs: some {minutes:.0f} minutes are enough; more text "
            "is what helps"
        )
    return flags, reasons


def _teaching(teachers: Teachers, shape: str, epochs: float) -> list[str]:
    if not teachers.number:
        return []
    own = Path(teachers.flags.get("model_config", shape)).stem
    return [
        f"time for teachers ({teachers.number} of {own}, {teachers.seconds:.0f} s each) and a model that learns from "
        f"the text and from them, {epochs:.1f} epochs"
    ]


def regularization(
    tokens: int, epochs: float, parameters: int, *, is_taught: bool = False
) -> tuple[float, float, float]:
    """Dropout, and the weight decay of AdamW's and Muon's part.

    What a model memorises grows with the passes over the text and with its parameters for each token.

    Args:
        parameters: of the layers.
    """
    if epochs < 1.5:
        return 0.0, 0.0, 0.0
    if tokens < SMALL:
        return (0.05 if is_taught else 0.1), 0.5, 1.5  # a trigram, and teachers, regularize too
    memorised = epochs * parameters / tokens
    if memorised < LITTLE:
        return 0.0, 0.03, 0.1
    return (0.05, 0.3, 0.5) if memorised < MUCH else (0.1, 0.3, 0.5)


def batch_size(tokens: int) -> int:
    """Windows of an update: a model of a small text overfits less with few, and has more updates."""
    if tokens < VERY_SMALL:
        return VERY_SMALL_BATCH_SIZE
    return SMALL_BATCH_SIZE if tokens < SMALL else BATCH_SIZE


def max_epochs(tokens: int, *, is_taught: bool) -> int:
    """How often a text is shown at most: a small one is memorised sooner, later by a model that has teachers."""
    if tokens >= SMALL:
        return 16
    return 14 if is_taught else 10


def _expectation(facts: Facts, shape: str, epochs: float, teachers: int) -> list[str]:
    curve = _CURVES.get(Path(shape).stem)
    if curve is None or not SMALL <= facts.tokens <= _TRIED_TOKENS[1]:
        return []
    floor, gap = curve
    bits = floor + gap * max(1.0, epochs) ** -1.13 - (TEACHING_GAIN if teachers else 0)
    return [
        f"expected: about {bits:.2f} bits per character if the text is like "
        "medical_qa.txt, a megaword of modern prose; less text or verse gives more bits"
    ]


def _untried(facts: Facts, shape: str, args: argparse.Namespace) -> list[str]:
    """What this plan has that no experiment had."""
    name, has_tried_size = Path(shape).stem, _TRIED_TOKENS[0] <= facts.tokens <= _TRIED_TOKENS[1]
    if read_config(shape).n_embd in _TRIED_WIDTHS:
        if has_tried_size:
            return []
        what = f"{facts.tokens:,} tokens"
    else:
        what = f"the shape {name}" if has_tried_size else f"{facts.tokens:,} tokens and the shape {name}"
    return [f"not tried before: {what}; the plan is an extrapolation"]


class Probe:
    """Tokens a second of a shape, found by a few updates of a new model on random tokens, without compiling it."""

    def __init__(self, args: argparse.Namespace, windows: int) -> None:
        self._args, self._windows = args, windows
        devices, _ = choose_devices(args.device)
        self._device, self._devices = devices[0], len(devices)
        self._precision = Precision(choose_precision(args, self._device)[0], self._device)
        self._known: list[tuple[float, float]] = []  # operations for a token, and seconds
        if self._device.type == "cpu":
            keep_freed_memory()

    def __call__(self, shape: str, vocab_size: int) -> float:
        config = read_config(shape, vocab_size=vocab_size)
        parameters = layer_parameters(config) + vocab_size * config.n_embd
        flops = flops_per_token(config, parameters)
        if (
            self._known
            and self._known[-1][1] * flops / self._known[-1][0] * self._windows * config.n_ctx > 4 * _PROBE_SECONDS
        ):
            seconds = self._known[-1][1] * flops / self._known[-1][0]  # too slow to be tried: as the one before
        else:
            seconds = self._measure(config)
        self._known.append((flops, seconds))
        return self._devices / seconds

    def _measure(self, config: GPT2Config) -> float:
        """Seconds for a token: the median of some updates, the first of which is left out.

        The fastest one promised 1.4 times as many epochs as there were, where other machines share the processor.
        """
        state = torch.get_rng_state()
        model = GPT2LMHeadModel(config).to(self._device).train()  # type: ignore[arg-type]
        loss_of = WindowLoss(model)
        optimizer = make_optimizer(model, 1e-4, optimizer="muon")
        windows = torch.randint(config.vocab_size, (self._windows, config.n_ctx), device=self._device)
        seconds: list[float] = []
        began = time.perf_counter()
        while len(seconds) < 3 or time.perf_counter() - began < _PROBE_SECONDS:
            start = time.perf_counter()
            with self._precision.autocast():
                loss = loss_of(windows) / windows.numel()
            self._precision.backward(loss, optimizer)
            self._precision.step(optimizer, 1.0)
            optimizer.zero_grad(set_to_none=True)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds.append(time.perf_counter() - start)
        torch.set_rng_state(state)
        return statistics.median(seconds[1:]) / windows.numel()


def updates_until(deadline: float, now: float, *, per_update: float, per_epoch: float, updates_per_epoch: int) -> int:
    """How many more updates fit in before a deadline.

    Args:
        deadline, now: Unix times, in seconds.
        per_update: seconds of an update.
        per_epoch: seconds that measuring and saving take at the end of each epoch, and at the end of the run.
    """
    seconds = (deadline - now) * (1 - SPARED) - per_epoch
    return max(1, int(seconds / (per_update + per_epoch / updates_per_epoch)))


def decides_after(step: int) -> bool:
    """Whether the number of updates is decided or corrected behind this one: 30, 38, 48, 60 …"""
    due = MEASURED_UPDATES
    while due < step:
        due = math.ceil(due * CORRECTED_EVERY)
    return due == step


def plan_run(args: argparse.Namespace, given: set[str]) -> Plan:
    """Make the plan of a run, or read that of a run which is resumed; apply it to the flags, and print it."""
    path = Path(args.output_dir) / PLAN
    resumes = args.resume not in (None, "none") and path.is_file()
    plan = Plan.read(path) if resumes else make_plan(args, given)
    plan.apply(args)
    if resumes:  # what was to come still has its time
        missing = sum(not (folder / FINAL_MODEL).is_dir() for folder in plan.teacher_folders(args))
        plan.deadline = time.time() + plan.seconds + missing * plan.teacher_seconds
    for line in [f"plan       as in {path}"] if resumes else describe(plan, args):
        (say if args.plan else remark)(line)
    return plan


def describe(plan: Plan, args: argparse.Namespace) -> list[str]:
    """The plan, a line for each thing to know, and the flags that do the same without planning."""
    flags, of_teachers = (
        " ".join(_as_flag(name, value) for name, value in some.items() if value is not False)
        for some in (plan.flags, plan.flags | plan.teacher_flags)
    )
    commands = [f"train.py {flags}"]
    if plan.teachers:
        commands = [
            f"train.py {of_teachers} --no-report --seed {one.seed} --output_dir {one.output_dir}"
            f" --writer_dir {one.writer_dir}"
            for one, _ in plan.teacher_runs(args)
        ]
        commands.append(f"train.py {flags} --teacher {args.teacher}")
    return [f"plan       {line}" for line in (*plan.reasons, *commands)]


def _as_flag(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *(f"{one:g}" if isinstance(one, float) else str(one) for one in values)])
