"""A GPT-2 of random weights, a vocabulary and a model folder, small enough to make in every test that decodes."""

from __future__ import annotations

from pathlib import Path

import torch
from book_order import CLS_ID, MASK_ID, PAD_ID
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_chinese.model_folder import save_model
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS
from gpt2_chinese.text.word_tokenizer import WordTokenizer

torch.set_num_threads(1)

WORDS = ["hello", "world", "##ing", ",", "。", *(chr(0x4E00 + number) for number in range(190))]


class Characters:
    """Stands in for the segmenter: every character a word, Latin words whole."""

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
    """Weights are large, so that the greatest logit is clear and attention is far from uniform."""
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


def favour(model: GPT2LMHeadModel, *ids: int) -> None:
    """Make the logits of these ids the greatest everywhere, in this order."""
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(10.0)
        for rank, id_ in enumerate(ids):
            model.transformer.wte.weight[id_] = 20.0 - rank


def endless_model(*, n_ctx: int = 32) -> GPT2LMHeadModel:
    """A model that never ends a document, so that its texts get as long as they are asked to be."""
    model = tiny_model(n_ctx=n_ctx)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[CLS_ID] = -5.0
    return model


def save_tiny_model(folder: Path, model: GPT2LMHeadModel | None = None) -> Path:
    save_model(folder, model or tiny_model(), tiny_tokenizer(), facts={})
    return folder
