"""A model folder as one GGUF file for llama.cpp; needs the package gguf (`pip install gguf==0.19.0`).

    python -m gpt2_chinese.gguf model/final_model model.gguf

BPE is written with its merges, characters as WordPiece; both complete texts in llama.cpp. It has no tokenizer that cuts
Chinese words: such a model takes token ids (the server's `prompt` as a list of numbers), and gives ids and text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2_chinese.command_line import run_script
from gpt2_chinese.help_formatter import HelpFormatter
from gpt2_chinese.model_folder import load_weights
from gpt2_chinese.text.tokenizers import HasDefinition, Tokenizer
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, PART_PREFIX

TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # and llama.cpp's number of a file of them
_WORD_BEGIN = "\u2581"  # before what begins a word, in llama.cpp's WordPiece
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpt2_chinese.gguf",
        description="Write a model folder as one GGUF file for llama.cpp.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", help="the model folder")
    parser.add_argument("output", help="the GGUF file to write")
    parser.add_argument("--vocab_file", help="vocabulary of a model folder that has none")
    parser.add_argument(
        "--type", choices=TYPES, default="f32", help="of the weight matrices; llama-quantize makes others"
    )
    return parser.parse_args(argv)


def tensors_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under llama.cpp's names, matrices as (out, in), in float32."""
    body = model.transformer
    yield "token_embd.weight", body.wte.weight
    yield "position_embd.weight", body.wpe.weight
    for number, block in enumerate(body.h):
        name = f"blk.{number}."
        for ours, theirs in (
            (block.ln_1, "attn_norm"),
            (block.attn.c_attn, "attn_qkv"),
            (block.attn.c_proj, "attn_output"),
            (block.ln_2, "ffn_norm"),
            (block.mlp.c_fc, "ffn_up"),
            (block.mlp.c_proj, "ffn_down"),
        ):
            # transformers' Conv1D keeps its matrices as (in, out).
            yield f"{name}{theirs}.weight", ours.weight.t() if ours.weight.ndim == 2 else ours.weight
            yield f"{name}{theirs}.bias", ours.bias
    yield "output_norm.weight", body.ln_f.weight
    yield "output_norm.bias", body.ln_f.bias
    yield "output.weight", model.lm_head.weight


def add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    """Write the vocabulary as llama.cpp's tokenizer of that kind wants it."""
    marks = tokenizer.marks
    types = [_NORMAL] * len(tokenizer)
    for id_ in {marks.begin, marks.end, *marks.never_produced}:
        types[id_] = _CONTROL
    if marks.unknown is not None:
        types[marks.unknown] = _UNKNOWN
    if isinstance(tokenizer, HasDefinition):
        merges = json.loads(tokenizer.definition)["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokenizer.vocabulary)
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    elif tokenizer.kind == "word":
        tokens = list(tokenizer.vocabulary)
        for id_, token in enumerate(tokens):
            if token in BYTE_TOKENS:
                types[id_] = _BYTE
            elif types[id_] == _NORMAL:
                tokens[id_] = _sentence_piece(token)
        if marks.line_break is not None:
            tokens[marks.line_break], types[marks.line_break] = "\n", _NORMAL
        writer.add_tokenizer_model("llama")  # SentencePiece: it joins tokens and bytes to text as we do
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_add_space_prefix(False)
        writer.add_unk_token_id(marks.unknown if marks.unknown is not None else marks.end)
    else:
        writer.add_tokenizer_model("bert")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([_word_piece(token, types[id_]) for id_, token in enumerate(tokenizer.vocabulary)])
        writer.add_token_type_count(2)
        writer.add_bool("tokenizer.ggml.normalizer.lowercase", bool(getattr(tokenizer, "lowercase", True)))
        writer.add_sep_token_id(marks.end)
        writer.add_add_sep_token(False)  # a prompt is not to end as a document does
        if marks.unknown is not None:
            writer.add_unk_token_id(marks.unknown)
    writer.add_token_types(types)
    writer.add_bos_token_id(marks.begin)
    writer.add_eos_token_id(marks.end)
    if marks.padding is not None:
        writer.add_pad_token_id(marks.padding)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _word_piece(token: str, type_: int) -> str:
    """A token as llama.cpp's WordPiece has it: what begins a word is marked, and not what goes on in one."""
    if type_ != _NORMAL:
        return token
    attached = token.startswith(PART_PREFIX) and len(token) > len(PART_PREFIX)
    return token[len(PART_PREFIX) :] if attached else _WORD_BEGIN + token


def _sentence_piece(token: str) -> str:
    """A word as llama.cpp's SentencePiece has it: a space only before what begins with a Latin letter or a digit."""
    if token.startswith(PART_PREFIX) and len(token) > len(PART_PREFIX):
        return token[len(PART_PREFIX) :]
    return _WORD_BEGIN + token if token[:1].isascii() and token[:1].isalnum() else token


def write_gguf(folder: str | Path, output: str | Path, *, vocab_file: str | None = None, type_: str = "f32") -> None:
    """Write a model folder to one file.

    Raises:
        ValueError: the package gguf is not installed, or the folder cannot be read; the message names it.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"{error}: pip install gguf==0.19.0") from error
    model, tokenizer = load_weights(folder, vocab_file=vocab_file)
    config = model.config
    if getattr(config, "activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"{folder}: llama.cpp's GPT-2 has gelu_new, not {config.activation_function}")
    writer = gguf.GGUFWriter(str(output), "gpt2")
    writer.add_name(Path(folder).resolve().name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(min(getattr(config, "n_ctx", config.n_positions), config.n_positions))
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(TYPES[type_])
    add_tokenizer(writer, tokenizer)
    for name, tensor in tensors_of(model):
        data = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
        kind = gguf.GGMLQuantizationType[type_.upper()]
        # Rows of other lengths than whole blocks cannot be quantized.
        if data.ndim < 2 or "position" in name or data.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    write_gguf(args.folder, args.output, vocab_file=args.vocab_file, type_=args.type)
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:,.1f} MB, for llama.cpp")


if __name__ == "__main__":
    run_script(main)
