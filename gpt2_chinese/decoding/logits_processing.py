"""What changes logits before a token is drawn, in PyTorch, on any device: bias, penalties, and tokens that are banned.

The order is that of vLLM: bias, repetition penalty, frequency and presence penalty, then what is banned. The compiled
decoder has the same in logits_kernel.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gpt2_chinese.precision import to_device


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """CTRL's repetition penalty: positive logits of seen tokens are divided by it, negative ones are multiplied.

    Args:
        logits: [B, V].
        seen: [B, V], true for the tokens so far.
        penalty: [B]; 1 changes nothing.
    """
    penalty = penalty.to(logits.dtype)[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_penalties(
    logits: Tensor,
    row: int,
    history: np.ndarray,
    prompt_length: int,
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> None:
    """Apply the penalties of a sequence to its row of logits [B, V], in place.

    Args:
        history: the tokens of the prompt and of the completion so far.
        prompt_length: how many of them are the prompt's, which presence and frequency do not count.
    """
    seen = np.unique(history)
    made, times = np.unique(history[prompt_length:], return_counts=True)
    counts = np.zeros(len(seen), dtype=np.float32)
    counts[np.searchsorted(seen, made)] = times
    ids, counted = (to_device(torch.from_numpy(part), logits.device) for part in (seen, counts))
    chosen = logits[row, ids]
    if repetition != 1:
        chosen = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
    logits[row, ids] = chosen - counted * frequency - (counted > 0) * presence


def tokens_ending_repeated_ngrams(history: np.ndarray, size: int) -> np.ndarray:
    """The tokens that would end an n-gram of this size which is in the history already."""
    if len(history) < size:
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(history, size)
    is_equal = (windows[:, :-1] == history[len(history) - size + 1 :]).all(axis=1)
    return np.unique(windows[is_equal, -1])


def tokens_ending_bad_words(history: np.ndarray, words: Sequence[Sequence[int]]) -> list[int]:
    """The last token of each bad word whose other tokens end the history."""
    return [
        word[-1]
        for word in words
        if len(word) - 1 <= len(history) and list(history[len(history) - len(word) + 1 :]) == list(word[:-1])
    ]


def ban(logits: Tensor, row: int, ids: Sequence[int] | np.ndarray) -> None:
    """Make sure that these tokens are not drawn in a row of logits [B, V]."""
    if len(ids):
        indices = to_device(torch.as_tensor(np.asarray(ids, dtype=np.int64)), logits.device)
        logits[row].index_fill_(0, indices, -torch.inf)
