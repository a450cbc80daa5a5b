"""How well a model predicts documents that it was not trained on, and what it makes of a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from gpt2_chinese.decoding.sampling import sample_tokens, uniform_random
from gpt2_chinese.decoding.whole_characters import CharacterMasks
from gpt2_chinese.text.pieces import document_begins
from gpt2_chinese.text.tokenizers import Tokenizer
from gpt2_chinese.text.vocabulary import Marks

UNKNOWN_BITS = math.log2(0x110000)
"""What an `[UNK]` is charged on top of its own loss: to name one of all code points of Unicode, 20.09 bits."""

_UNCOUNTED = -100  # cross_entropy's mark for targets that are not predicted
_COMPLETION_LENGTH = 50
_LOGITS_AT_ONCE = 1 << 25  # 128 MB in float32; a signal is heard between two products


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats for a token
    bits_per_character: float
    tokens: int  # predicted

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def figures(self) -> dict[str, float]:
        """What TensorBoard and metrics.jsonl get."""
        return {"loss": self.loss, "perplexity": self.perplexity, "bits_per_character": self.bits_per_character}


class Documents:
    """Documents to be measured on, cut into windows so that each token but a document's first is predicted once.

    A document longer than a window is read in windows that overlap by half, so that every token but those of the
    first window has at least `n_ctx // 2` before it; only what the window before has not seen is counted.

    Args:
        tokens: documents one after the other, each with its marks.
    """

    def __init__(self, tokens: npt.NDArray[Any], n_ctx: int, tokenizer: Tokenizer) -> None:
        self.tokens = tokens
        self._padding = tokenizer.marks.padding if tokenizer.marks.padding is not None else tokenizer.marks.end
        found = document_begins(tokens, tokenizer.marks)
        begins = np.union1d([0], found).astype(np.int64) if len(tokens) else np.empty(0, np.int64)
        ends = np.append(begins[1:], len(tokens))
        windows = [
            window
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=False)
            for window in document_windows(begin, end, n_ctx)
        ]
        # The longest first: windows of a batch are of about one length, and memory is at its peak at once.
        self.windows = sorted(windows, key=lambda window: window[0] - window[1])
        self.characters, self.unknown = 0, 0
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=False):
            characters, unknown = count_characters(tokens[begin:end], tokenizer)
            self.characters += characters
            self.unknown += unknown

    def batch(self, windows: Iterable[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and targets of windows, int64 [windows, length]; what pads shorter ones is not counted."""
        windows = list(windows)
        length = max(end - begin for begin, end, _ in windows)
        input_ids = np.full((len(windows), length), self._padding, np.int64)
        targets = np.full((len(windows), length - 1), _UNCOUNTED, np.int64)
        for row, (begin, end, first) in enumerate(windows):
            input_ids[row, : end - begin] = self.tokens[begin:end]
            targets[row, first - begin - 1 : end - begin - 1] = self.tokens[first:end]
        return torch.from_numpy(input_ids), torch.from_numpy(targets)

    def evaluation(self, nats: float, tokens: float) -> Evaluation:
        """The figures of a model, given the sum of its losses over so many predicted tokens."""
        return Evaluation(
            loss=nats / max(1.0, tokens),
            bits_per_character=bits_per_character(nats, self.characters, self.unknown),
            tokens=int(tokens),
        )


def document_windows(begin: int, end: int, n_ctx: int) -> list[tuple[int, int, int]]:
    """The windows of one document: begin, end, and the first token that is counted.

    Example:
        >>> document_windows(0, 11, n_ctx=4)
        [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8), (7, 11, 10)]
    """
    windows: list[tuple[int, int, int]] = []
    first = begin + 1
    while first < end:
        last = min(end, first + n_ctx - 1 if not windows else first + max(1, n_ctx // 2))
        windows.append((max(begin, last - n_ctx), last, first))
        first = last
    return windows


def count_characters(ids: npt.NDArray[Any], tokenizer: Tokenizer) -> tuple[int, int]:
    """The characters of a document's text, in which an `[UNK]` counts as one; and how many `[UNK]` there are."""
    marks = tokenizer.marks
    unknown = 0 if marks.unknown is None else int(np.count_nonzero(ids == marks.unknown))
    text = tokenizer.decode(id_ for id_ in ids.tolist() if id_ not in (marks.begin, marks.end))
    return len(text) + unknown, unknown


def bits_per_character(nats: float, characters: int, unknown: int) -> float:
    """The bits that a model needs for a character of text, the figure to compare vocabularies by.

        (nats / ln 2 + unknown * log2(0x110000)) / characters

    Args:
        nats: the loss, summed over every token but a document's first: over line breaks and ends too.
        characters: of the text that the tokens decode to; a line break is one, an `[UNK]` counts as one, an end as
            none.
        unknown: how many `[UNK]` there are. Such a token says that something was there and not what, so it is
            charged what it costs to name any character of Unicode, 20.09 bits; or a vocabulary that spells nothing
            would seem the best.
    """
    return (nats / math.log(2) + unknown * UNKNOWN_BITS) / max(1, characters)


@torch.no_grad()
def evaluate(
    model: GPT2LMHeadModel,
    documents: Documents,
    *,
    rows: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Evaluation:
    """Measure a model, without dropout and without touching a random state.

    Args:
        rows: of the embedding, those that are tokens; the model may have more.
        batch_size: windows at once.
    """
    sums = sum_of_losses(model, documents, rows=rows, batch_size=batch_size, autocast=autocast)
    return documents.evaluation(*sums.tolist())


@torch.no_grad()
def sum_of_losses(
    model: GPT2LMHeadModel,
    documents: Documents,
    *,
    rows: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    rank: int = 0,
    world_size: int = 1,
) -> torch.Tensor:
    """The loss of one rank's share of the documents, in nats, and its predicted tokens: float64 [2], to be summed.

    `evaluate` describes the arguments.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(model):
        for begin in range(rank * batch_size, len(documents.windows), world_size * batch_size):
            input_ids, targets = documents.batch(documents.windows[begin : begin + batch_size])
            targets = targets.to(device)
            with autocast():
                hidden = model.transformer(input_ids.to(device), use_cache=False).last_hidden_state
            hidden, targets = hidden[:, :-1].flatten(0, 1), targets.flatten()
            size = max(1, _LOGITS_AT_ONCE // rows)
            for some, their_targets in zip(hidden.split(size), targets.split(size), strict=True):
                with autocast():
                    logits = model.lm_head(some)[:, :rows]
                nats = F.cross_entropy(logits.float(), their_targets, reduction="sum", ignore_index=_UNCOUNTED)
                sums += torch.stack([nats.double(), (their_targets != _UNCOUNTED).sum().double()])
    return sums


@contextmanager
def evaluating(model: GPT2LMHeadModel) -> Iterator[None]:
    """Without dropout, however it ends."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def complete(
    model: GPT2LMHeadModel,
    prompt: list[int],
    *,
    rows: int,
    marks: Marks,
    seed: int,
    masks: CharacterMasks | None = None,
) -> list[int]:
    """Continue a prompt, at temperature 1 among the 30 likeliest tokens, until the document or the window ends.

    There is no cache of keys and values: it is a look at the model now and then, with the model as it stands. The
    random numbers come from `seed` alone. With `masks` the text has whole characters only.
    """
    device = next(model.parameters()).device
    ids = prompt[-(model.config.n_ctx - 1) :]
    begin = len(ids)
    one = torch.ones(1)
    masks = masks or CharacterMasks([None] * rows, rows, marks.never_produced)
    state = masks.state_after(ids)
    length = min(_COMPLETION_LENGTH, model.config.n_ctx - len(ids))
    with evaluating(model):
        for step in range(length):
            hidden = model.transformer(torch.tensor([ids], device=device), use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, -1])[:, :rows].float().cpu()
            logits.masked_fill_(torch.from_numpy(masks.banned(state, length - step - 1)), -torch.inf)
            id_ = int(sample_tokens(logits, uniform_random([seed], [step]), one, torch.tensor([30]), one))
            if id_ == marks.end:
                break
            ids = [*ids, id_]
            state = int(masks.next_state[state, id_])
    return ids[begin:]
