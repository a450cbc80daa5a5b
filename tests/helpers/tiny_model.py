"""GPT-2 models of random weights, small enough to make in every test that decodes, and what they must generate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from book_order import CLS_ID, MASK_ID, NEVER_PRODUCED, PAD_ID
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_chinese.decoding.completion import Prompt
from gpt2_chinese.model_folder import save_model
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import WordTokenizer

torch.set_num_threads(1)

WORDS = ["hello", "world", "##ing", ",", "。", *(chr(0x4E00 + number) for number in range(190))]


class Characters:
    """A stand-in for the segmenter: every character is a word, and a run of Latin letters is one."""

    def cut(self, text: str) -> list[str]:
        words: list[str] = []
        for character in text:
            if words and character.isascii() and character.isalpha() and words[-1][-1].isascii():
                words[-1] += character
            else:
                words.append(character)
        return words


def tiny_tokenizer(*, words: list[str] | None = None) -> WordTokenizer:
    return WordTokenizer([*SPECIAL_TOKENS, *(words or WORDS)], segmenter=Characters())


def tiny_model(*, n_ctx: int = 32, n_positions: int | None = None, vocab_size: int = 200) -> GPT2LMHeadModel:
    """The model of `tiny_tokenizer`. Its weights are large: the greatest logit is clear, attention is not uniform."""
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_positions or n_ctx,
        n_embd=48,
        n_layer=2,
        n_head=4,
        bos_token_id=MASK_ID,
        eos_token_id=CLS_ID,
        pad_token_id=PAD_ID,
    )
    config.n_ctx = n_ctx
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_model(**shape: Any) -> GPT2LMHeadModel:
    """A model of any shape, without a tokenizer; its logits are far apart, and attention is not uniform."""
    torch.manual_seed(3)
    shape = {"vocab_size": 203, "n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 4} | shape
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=MASK_ID, eos_token_id=CLS_ID, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def set_likeliest(model: GPT2LMHeadModel, *ids: int) -> None:
    """Make the logits of these ids the greatest everywhere, in this order."""
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(10.0)
        for rank, id_ in enumerate(ids):
            model.transformer.wte.weight[id_] = 20.0 - rank


def endless_model(*, n_ctx: int = 32) -> GPT2LMHeadModel:
    """A model that never ends a document, so that every completion reaches its maximum length."""
    model = tiny_model(n_ctx=n_ctx)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[CLS_ID] = -5.0
    return model


def save_tiny_model(folder: Path, model: GPT2LMHeadModel | None = None) -> Path:
    save_model(folder, model or tiny_model(), tiny_tokenizer(), facts={})
    return folder


def random_prompts(count: int, longest: int) -> list[Prompt]:
    """Prompts of `tiny_model`, of 1 to `longest` tokens."""
    source = random.Random(3)
    return [
        Prompt("", (MASK_ID, *(source.randrange(5, 200) for _ in range(source.randrange(longest)))), 0)
        for _ in range(count)
    ]


def greedy_by_transformers(model: GPT2LMHeadModel, prompt: Prompt, length: int, **options: Any) -> list[int]:
    """The tokens that transformers' greedy decoding appends, up to the [CLS] that ends a document."""
    inputs = torch.tensor([prompt.ids], device=model.device)
    ids = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=length,
        do_sample=False,
        suppress_tokens=list(NEVER_PRODUCED),
        **options,
    )[0, len(prompt.ids) :].tolist()
    return ids[: ids.index(CLS_ID)] if CLS_ID in ids else ids


def prefill_slots(decoder: Any, texts: Sequence[Sequence[int]]) -> list[int]:
    """Prefill each text, of ids, into the slot of its index; returns the lengths."""
    with torch.inference_mode():
        for slot, ids in enumerate(texts):
            decoder.load_prefill(slot, decoder.prefill(ids))
    return [len(ids) for ids in texts]
