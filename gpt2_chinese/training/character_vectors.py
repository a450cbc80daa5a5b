"""Vectors of characters, which the embeddings of tokens share while they are trained.

The embedding of a token counts as the sum of a vector of its own, of one for its first character and of one for its
last character, as words are composed of their parts (Ling et al. 2015; fastText, Bojanowski et al. 2017). A rare token
so learns from all that are written alike. A model holds the sums only, and so is a plain GPT-2 at any time: what a
vector of a character changes by is added to the embedding of every token that has it.

A character of a single token has vectors too, and so has a token that is no text: otherwise such a token's embedding
would move by far smaller steps than the others', which costs more than sharing brings (benchmarks/TRIED.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class CharacterVectors:
    """Which tokens share a first and which a last character.

    Attributes:
        number: of the vectors.
    """

    def __init__(self, texts: Sequence[bytes], rows: int, device: torch.device) -> None:
        """
        Args:
            texts: of the tokens, UTF-8 or parts of it (`text_of_tokens`).
            rows: of the embedding; those behind the tokens have no vectors.
        """
        found: dict[tuple[int, str | int], int] = {}
        vector_of = np.zeros((len(texts), 2), dtype=np.int64)
        for token, text in enumerate(texts):
            for place in range(2):
                vector_of[token, place] = found.setdefault((place, _character(token, text, place)), len(found))
        self.number = len(found)
        self._rows = rows
        in_order = np.argsort(vector_of, axis=None, kind="stable")
        starts = np.searchsorted(vector_of.reshape(-1)[in_order], np.arange(self.number))
        self._vector_of, self._tokens, self._starts = (
            torch.from_numpy(array).to(device) for array in (vector_of, in_order // 2, starts)
        )

    def gather(self, gradient: Tensor) -> Tensor:
        """The gradients of the vectors [number, width], from that of the embedding [rows, width]: sums over tokens."""
        return F.embedding_bag(self._tokens, gradient, self._starts, mode="sum")

    def spread(self, steps: Tensor) -> Tensor:
        """What steps of the vectors [number, width] are to the embedding, [rows, width]."""
        moved = F.embedding_bag(self._vector_of, steps, mode="sum")
        return F.pad(moved, (0, 0, 0, self._rows - len(moved)))


def _character(token: int, text: bytes, place: int) -> str | int:
    """The first character (place 0) or the last one (1); of a token that is no text, the token."""
    try:
        characters = text.decode("utf-8")
    except UnicodeDecodeError:
        return token
    return characters[-place] if characters else token
