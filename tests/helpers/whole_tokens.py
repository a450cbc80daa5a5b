"""Greedy texts that other programs can be compared with: they draw tokens that are no whole characters, we do not."""

from __future__ import annotations

from gpt2_chinese.decoding.completion import SamplingParams
from gpt2_chinese.text.tokenizers import Tokenizer, bytes_of_tokens


def partial_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that are bytes of a character, or begin or end within one."""
    found = []
    for id_, data in enumerate(bytes_of_tokens(tokenizer)):
        try:
            (data or b"").decode("utf-8")
        except UnicodeDecodeError:
            found.append(id_)
    return found


def greedy_without(ids: list[int]) -> SamplingParams:
    """The likeliest token that is none of these."""
    return SamplingParams(temperature=0, logit_bias=tuple((id_, -100.0) for id_ in ids))
