"""Where an embedding may begin: at what the corpus says about its tokens, instead of at random numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from transformers import GPT2LMHeadModel

COUNTED_TOKENS = 10_000_000
"""So many tokens at a corpus's beginning are counted; pairs of more would change little and fill the memory."""
STANDARD_DEVIATION = 0.08
"""Of the numbers of an embedding; found by trial, with 0.02 as GPT-2 has it half of what is gained is lost."""
LAST_NORM = 0.2
SMOOTHING = 0.75
"""Power of the neighbours' counts: rare ones are less surprising than their counts say."""


def init_embedding_from_cooccurrence(model: GPT2LMHeadModel, tokens: npt.NDArray[np.integer], *, seed: int) -> int:
    """Give a new model the embedding of `cooccurrence_embedding`; gives the number of tokens counted.

    Such a model would say with confidence that each token follows itself, for it is most like itself; a small weight
    of the last norm lets it begin without an opinion. The state of torch's random generator stays as it is.
    """
    weight = model.transformer.wte.weight
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        weight.copy_(cooccurrence_embedding(tokens[:COUNTED_TOKENS], weight.detach()))
        model.transformer.ln_f.weight.fill_(LAST_NORM)
    return min(len(tokens), COUNTED_TOKENS)


def cooccurrence_embedding(
    tokens: npt.NDArray[np.integer], embedding: torch.Tensor, *, window: int = 2
) -> torch.Tensor:
    """An embedding in which tokens with the same neighbours lie together.

    The positive pointwise mutual information of neighbours, log(P(a, b) / (P(a) P(b)^0.75)) where that is positive,
    is a symmetric matrix [V, V]; its truncated singular value decomposition U S V^T gives the vectors U sqrt(S)
    (Levy and Goldberg 2014; Levy, Goldberg and Dagan 2015). They are turned at random, since an optimizer that steps
    by coordinates should not meet all that is frequent in the first of them.

    Args:
        tokens: of the corpus, ids below V.
        embedding: [V, width], random: the rows of tokens that do not occur stay.
        window: tokens count as neighbours at distances up to it, with a weight of 1 over their distance.

    Returns:
        A new tensor [V, width]; the same for the same state of torch's random generator and number of threads.
    """
    vocab_size, width = embedding.shape
    information = _positive_information(tokens, vocab_size, window)
    rank = min(width, vocab_size)
    left, values, _ = torch.svd_lowrank(information, rank, niter=3)
    turn = torch.linalg.qr(torch.randn(width, width)).Q
    vectors = (left * values.sqrt()) @ turn[:rank]
    lengths = vectors.norm(dim=1)
    occurs = lengths > 1e-4 * lengths.max()  # others are rounding errors
    if not occurs.any():
        return embedding.clone()
    vectors -= vectors[occurs].mean(dim=0)
    vectors *= STANDARD_DEVIATION / vectors[occurs].std()
    return torch.where(occurs[:, None], vectors, embedding)


def _positive_information(tokens: npt.NDArray[np.integer], vocab_size: int, window: int) -> torch.Tensor:
    """The matrix of positive pointwise mutual information, sparse and symmetric [V, V]."""
    ids = tokens.astype(np.int64)
    pairs, weights = [], []
    for distance in range(1, window + 1):
        first, second = ids[:-distance], ids[distance:]
        both = np.concatenate([first * vocab_size + second, second * vocab_size + first])
        found, counts = np.unique(both, return_counts=True)
        pairs.append(found)
        weights.append(counts / distance)
    found, places = np.unique(np.concatenate(pairs), return_inverse=True)
    counts = np.bincount(places, weights=np.concatenate(weights), minlength=len(found))
    rows, columns = found // vocab_size, found % vocab_size
    totals = np.bincount(rows, weights=counts, minlength=vocab_size)
    smoothed = totals**SMOOTHING / max((totals**SMOOTHING).sum(), 1e-9)
    # The mean of both directions, for smoothing makes them differ.
    information = sum(
        np.log(counts / (totals[one] * smoothed[other])).clip(0) / 2
        for one, other in ((rows, columns), (columns, rows))
    )
    return torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([rows, columns])),
        torch.from_numpy(information).float(),
        (vocab_size, vocab_size),
        check_invariants=True,
    ).coalesce()
