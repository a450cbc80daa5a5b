"""The flags of train.py, in groups: input, output, validation, the run, hardware."""

from __future__ import annotations

import argparse
import math

from gpt2_chinese.command_line import add_output_flags
from gpt2_chinese.help_formatter import HelpFormatter
from gpt2_chinese.training.hold_out import MAX_BYTES, MIN_BYTES
from gpt2_chinese.training.run import DEFAULT_VOCABULARY, MAX_DEFAULT_WARMUP, SAVE_SECONDS

MAX_INTEGER = 2**62  # of a flag: a seed and what is added to it have 63 bits
NEW_MODEL_LR, PRETRAINED_LR = 1.5e-4, 5e-5


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = _parser(description)
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = PRETRAINED_LR if args.pretrained_model else NEW_MODEL_LR
    if args.plan and not args.minutes:
        parser.error("--plan needs --minutes, the time to plan for")
    return args


def given_flags(argv: list[str] | None = None) -> set[str]:
    """The flags that a command line has, as attributes of `parse_args`; no default is among them."""
    unset = argparse.Namespace(**dict.fromkeys(vars(parse_args([]))))
    parser = _parser(None)
    return {name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train.py", description=description, formatter_class=HelpFormatter)
    _add_plan(parser)
    _add_input(parser)
    _add_output(parser)
    _add_validation(parser)
    _add_run(parser)
    _add_hardware(parser)
    add_output_flags(parser)
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes",
        type=_positive_number,
        help="train for so long: the shape, the epochs and the settings that no flag says are planned, from the corpus "
        "and the speed of this machine (default: no plan)",
    )
    parser.add_argument("--plan", action="store_true", help="with --minutes: print the plan and train nothing")
    parser.add_argument("--minutes_from", type=float, help=argparse.SUPPRESS)  # Unix time at which they began


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenized_data_path", default="tokenized/", help="folder of the tokenized pieces")
    parser.add_argument(
        "--vocab_file",
        "--vocab_filename",
        "--tokenizer_path",
        help=f"vocabulary of the pieces (default: the one in their manifest, else {DEFAULT_VOCABULARY})",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="run make-tokenized.py first, with these flags of it: --raw_data_path, --num_pieces, --min_length, "
        "--segment for a vocabulary of words, --bpe_token for BPE",
    )
    parser.add_argument("--raw_data_path", default="data/train.json", help=argparse.SUPPRESS)
    parser.add_argument("--num_pieces", type=_positive, default=100, help=argparse.SUPPRESS)
    parser.add_argument("--min_length", type=_not_negative, default=128, help=argparse.SUPPRESS)
    parser.add_argument("--segment", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bpe_token", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--allow_unk", action="store_true", help="train on pieces of which a fifth and more of the tokens are [UNK]"
    )
    parser.add_argument(
        "--model_config",
        default="config/model_config_small.json",
        help="shape of a new model",
    )
    parser.add_argument(
        "--pretrained_model",
        default="",
        help="model folder to continue training from, ours or GPT2-Chinese's (default: a new model)",
    )
    parser.add_argument(
        "--document_marks",
        nargs=2,
        metavar=("BEGIN", "END"),
        help="with --pretrained_model: tokens around a document, if the folder does not tell them right",
    )
    parser.add_argument(
        "--embedding_init",
        choices=["normal", "cooccurrence"],
        default="normal",
        help="initialisation of a new model's token embedding: normal, as the other weights; or a factorisation of the "
        "corpus's co-occurrence statistics, from which it learns faster",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", default="model/", help="folder of the model folders and checkpoints")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="delete an earlier run in --output_dir: its models, checkpoints, metrics and TensorBoard events",
    )
    parser.add_argument("--writer_dir", default="tensorboard_summary/", help="TensorBoard folder")
    parser.add_argument("--log_step", type=_positive, default=1, help="updates between two TensorBoard points")
    parser.add_argument(
        "--save_steps",
        type=_not_negative,
        help="updates between two checkpoints, besides those after each epoch; 0 is none (default: one every "
        f"{SAVE_SECONDS // 60} minutes)",
    )
    parser.add_argument("--keep_checkpoints", type=_positive, default=2, help="checkpoints to keep, the latest")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|none|PATH",
        help="resume from the latest valid checkpoint of --output_dir, or from one that is named, exactly as if the "
        "run had never stopped; none deletes the checkpoints of an interrupted run and starts over (default: a "
        "new run, unless there is an interrupted one)",
    )


def _add_validation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--val_fraction",
        type=_fraction,
        default=0.01,
        help="share of the text held out as validation set: whole documents, and slices of long ones; 0 trains on all "
        "of it",
    )
    parser.add_argument(
        "--val_bytes",
        nargs=2,
        type=_not_negative,
        metavar=("MIN", "MAX"),
        help="bounds of the validation set, in bytes of UTF-8, three a Chinese character; the lower one is at most a "
        f"fifth of the text (default: {MIN_BYTES} {MAX_BYTES})",
    )
    parser.add_argument(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="measure with the factor on the logits (1 / temperature) that suits the validation set best, and save "
        "best_model and final_model with it: a model that sees its text several times is too sure of itself",
    )
    parser.add_argument(
        "--patience",
        type=_not_negative,
        default=0,
        help="stop after so many measurements in a row without fewer bits per character; 0 never stops",
    )
    parser.add_argument(
        "--val_steps",
        type=_not_negative,
        default=0,
        help="updates between two measurements, besides those after each epoch; 0 is none",
    )
    parser.add_argument(
        "--sample_prompts",
        default="",
        help="prompts to complete at every measurement: a file with one a line, or a list separated by commas or "
        "semicolons, also the Chinese ones (default: none)",
    )
    parser.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="at the end of the run write report.html and report.json to --output_dir: curves, completions, how much "
        "of them is copied (default: no)",
    )
    parser.add_argument(
        "--report_only", metavar="FOLDER", help="write the report of a finished run again, by its --output_dir"
    )
    parser.add_argument(
        "--eval_only",
        action="store_true",
        help="measure --pretrained_model on all documents of --tokenized_data_path; no training",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=_positive, default=5, help="passes over the corpus")
    parser.add_argument(
        "--max_steps",
        type=_not_negative,
        default=0,
        help="updates at most, also in the middle of an epoch; 0 is no limit",
    )
    parser.add_argument(
        "--batch_size",
        type=_positive,
        default=8,
        help="windows of a micro-batch, over all devices together",
    )
    parser.add_argument(
        "--gradient_accumulation",
        type=_positive,
        default=1,
        help="micro-batches of an update",
    )
    parser.add_argument(
        "--stride",
        type=_positive,
        default=768,
        help="tokens from one window to the next, at most n_ctx - 1; a quarter of n_ctx shows a small corpus at other "
        "positions too, which delays overfitting",
    )
    parser.add_argument(
        "--shift_windows",
        action="store_true",
        help="cut the windows at other places in each epoch, which delays overfitting",
    )
    parser.add_argument(
        "--document_mask",
        action="store_true",
        help="tokens attend to their own document only, and positions are counted from its beginning, as completions "
        "are",
    )
    parser.add_argument(
        "--lr",
        type=_positive_number,
        help=f"peak learning rate (default: {NEW_MODEL_LR}; {PRETRAINED_LR} with --pretrained_model)",
    )
    parser.add_argument(
        "--warmup_steps",
        type=_not_negative,
        help=f"updates of linear warm-up (default: {MAX_DEFAULT_WARMUP}, at most a tenth of the run)",
    )
    parser.add_argument(
        "--schedule",
        choices=["linear", "wsd", "cosine"],
        default="linear",
        help="of the learning rate after the warm-up: linear decay to 0; constant, then linear decay to 0 over "
        "--decay_fraction of the run; cosine decay to 0",
    )
    parser.add_argument("--decay_fraction", type=_share, default=0.4, help="share of the run that wsd decays in")
    parser.add_argument(
        "--optimizer",
        choices=["adamw", "muon"],
        default="adamw",
        help="muon is Muon for the weight matrices of the layers and AdamW for the rest",
    )
    parser.add_argument("--muon_lr", type=_positive_number, help="peak learning rate of Muon (default: --lr)")
    parser.add_argument(
        "--character_lr",
        type=_not_negative_number,
        default=0.0,
        help="with --optimizer muon: peak learning rate of the vectors that the embeddings of tokens with the same "
        "first or last character share (0: they share none)",
    )
    parser.add_argument(
        "--weight_decay",
        type=_not_negative_number,
        default=0.0,
        help="decoupled weight decay, as a share of the learning rate; norms and biases do not decay",
    )
    parser.add_argument(
        "--muon_weight_decay",
        type=_not_negative_number,
        help="of the matrices that Muon updates (default: --weight_decay)",
    )
    parser.add_argument(
        "--dropout",
        type=_fraction,
        help="of the embedding, the attention and the residual branches (default: what --model_config says)",
    )
    parser.add_argument(
        "--teacher",
        default="",
        metavar="FOLDER[,FOLDER...]",
        help="model folders of the same vocabulary, or --output_dir of runs: learn the mean of their predictions "
        "beside the text; an empty value keeps --minutes from planning teachers (default: none)",
    )
    parser.add_argument(
        "--teacher_share",
        type=_share,
        default=0.6,
        help="of the teachers in what is learnt; the rest is the text's",
    )
    parser.add_argument(
        "--ngram_share",
        type=_fraction,
        default=0.0,
        help="of a trigram of the tokens, and a cache of those before in the document, in what is learnt, for texts "
        "that are memorised (0: none); with --teacher both shares together are at most 1",
    )
    parser.add_argument(
        "--max_bad_updates",
        type=_positive,
        default=3,
        help="stop after so many updates in a row whose loss or gradient is not finite; none of them is applied",
    )
    parser.add_argument("--max_grad_norm", type=_positive_number, default=1.0, help="clip gradients to this norm")
    parser.add_argument(
        "--seed",
        type=_not_negative,
        default=42,
        help="of the weights, the dropout and the order of windows",
    )


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="0,1,2,3",
        help="GPUs, of which those present are used; cpu; cpu,cpu for two processes there",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto is bf16 where the device multiplies faster in it, else fp32",
    )
    parser.add_argument(
        "--compile",
        choices=["auto", "on", "off"],
        default="auto",
        help="torch.compile; auto is on for GPUs: on a CPU it gains nothing over the code that is there already",
    )
    parser.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, a third more time",
    )
    parser.add_argument("--fp16", action="store_true", help="the same as --precision fp16")
    parser.add_argument(
        "--fp16_opt_level",
        choices=["O0", "O1", "O2", "O3"],
        default="O1",
        help="with fp16: O0 computes in fp32, O1 in mixed precision with loss scaling, O2 as O1 (apex has another), "
        "O3 in fp16 throughout, which may not converge",
    )
    parser.add_argument("--amp_backend", choices=["torch", "apex"], default="torch", help="of fp16")


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{int(text)} is not above 0")
    return _not_negative(text)


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    if value > MAX_INTEGER:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to {MAX_INTEGER}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0, at most 1")
    return value


def _not_negative_number(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return value


def _positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value
