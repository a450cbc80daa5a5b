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
        num_vectors: those of first and those of last characters together.
    """

    def __init__(self, texts: Sequence[bytes], device: torch.device) -> None:
        """
        Args:
            texts: of the tokens, UTF-8 or parts of it (`text_of_tokens`).
        """
        found: dict[tuple[int, str | int], int] = {}
        vectors_of = np.zeros((len(texts), 2), dtype=np.int64)
        for token, text in enumerate(texts):
            for place, character in enumerate(_first_and_last(token, text)):
                vectors_of[token, place] = found.setdefault((place, character), len(found))
        self.num_vectors = len(found)
        in_order = np.argsort(vectors_of, axis=None, kind="stable")
        starts = np.searchsorted(vectors_of.reshape(-1)[in_order], np.arange(self.num_vectors))
        self._vectors_of, self._tokens, self._starts = (
            torch.from_numpy(array).to(device) for array in (vectors_of, in_order // 2, starts)
        )

    def gather(self, gradient: Tensor) -> Tensor:
        """The gradients of the vectors [num_vectors, width], sums over tokens of that of the embedding [rows, width].

        The embedding may have more rows than there are tokens.
        """
        return F.embedding_bag(self._tokens, gradient, self._starts, mode="sum")

    def spread(self, steps: Tensor) -> Tensor:
        """What steps of the vectors [num_vectors, width] are to the tokens' embeddings, [tokens, width]."""
        return F.embedding_bag(self._vectors_of, steps, mode="sum")


def _first_and_last(token: int, text: bytes) -> tuple[str | int, str | int]:
    """The first and the last character; of a token that is no text, the token."""
    try:
        characters = text.decode("utf-8")
    except UnicodeDecodeError:
        characters = ""
    return (characters[0], characters[-1]) if characters else (token, token)
