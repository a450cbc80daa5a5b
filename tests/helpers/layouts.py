"""Tiny model folders in the layouts in which Chinese GPT-2s are published, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_chinese.artifacts import write_lines
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS

CHARACTERS = [
    *"的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工高血压病少吃盐多喝水好"
]
CHARACTERS += "，。！？,."
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PIECES = [*LETTERS, *("##" + letter for letter in LETTERS)]
LAYOUTS = ("book", "gpt2_chinese_char", "guwen_order", "uer", "bpe")
END_OF_TEXT = "<|endoftext|>"


def vocabulary_of(layout: str) -> list[str]:
    """The tokens of a layout, in the order of their ids; those of bpe are in its tokenizer.json."""
    unused = [f"[unused{number}]" for number in range(1, 100)]
    return {
        "book": [*SPECIAL_TOKENS, "高血压", "我们", "中国", *CHARACTERS, *PIECES, *BYTE_TOKENS],
        "gpt2_chinese_char": ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *PIECES],
        "guwen_order": ["[UNK]", "[CLS]", "[MASK]", "[SEP]", "[PAD]", *CHARACTERS, "", *PIECES],
        "uer": ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *PIECES],
    }[layout]


def bpe_definition() -> str:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(["".join(CHARACTERS), "高血压病人少吃盐多喝水 hello world"] * 3, trainer)
    return str(made.to_str())


def write_layout(folder: Path, layout: str, *, untied: bool = False, sharded: bool = False, n_ctx: int = 32) -> Path:
    """Write a folder as it is published: no manifest, old keys, wrong or missing begin and end tokens.

    Args:
        untied: with an output layer of its own.
        sharded: the weights in two safetensors files with an index.
    """
    folder.mkdir(parents=True)
    if layout == "bpe":
        (folder / "tokenizer.json").write_text(bpe_definition(), encoding="utf-8")
        size = len(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
        settings = {"eos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    else:
        write_lines(folder / "vocab.txt", vocabulary_of(layout))
        size = len(vocabulary_of(layout))
    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=size, n_positions=n_ctx, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=not untied,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # so that the greatest logit is clear
        if untied:
            model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.1)
    described: dict[str, Any] = {
        "activation_function": "gelu_new", "model_type": "gpt2", "n_embd": 48, "n_head": 4, "n_layer": 2,
        "n_positions": n_ctx, "vocab_size": size, "layer_norm_epsilon": 1e-05, "output_past": True,
        "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": not untied,
    }  # fmt: skip
    if layout == "uer":
        described |= {"tokenizer_class": "BertTokenizer", "bos_token_id": 50256, "eos_token_id": 50256}
    elif layout != "bpe":
        described |= {"n_ctx": n_ctx, "num_labels": 1, "finetuning_task": None}  # transformers 2.1.1
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if not untied:
        del state["lm_head.weight"]
    if sharded:
        names = sorted(state)
        files = {
            name: f"model-0000{1 + (2 * place >= len(names))}-of-00002.safetensors" for place, name in enumerate(names)
        }
        for file in sorted(set(files.values())):
            save_file({name: state[name] for name in names if files[name] == file}, folder / file)
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    elif layout == "bpe":
        save_file(state, folder / "model.safetensors")
    else:
        if not untied:
            state["lm_head.weight"] = state["transformer.wte.weight"]
        torch.save(state, folder / "pytorch_model.bin")
    return folder
