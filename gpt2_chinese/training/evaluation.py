"""How well a model predicts documents that it was not trained on, and what it makes of a prompt."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GPT2LMHeadModel

from gpt2_chinese.command_line import is_quiet, localized
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

AS_IT_IS = (1.0,)
SCALE_STEP = 0.04
SCALES = tuple(round(0.72 + SCALE_STEP * number, 2) for number in range(9))
"""Factors on the logits, 0.72 to 1.04, that are tried where a model is calibrated (examples: benchmarks/TRIED.md)."""
_SCALED_ROWS = 64  # of logits at a time on a CPU, in whose cache they stay


@dataclass(frozen=True)
class Evaluation:
    """
    Attributes:
        loss: nats for a token.
        error: the standard error of `bits_per_character`, as documents like these vary; nan for fewer than two.
        tokens: predicted.
        scale: factor on the logits for which the figures are; None where they are the model's own.
    """

    loss: float
    bits_per_character: float
    error: float
    tokens: int
    scale: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def figures(self) -> dict[str, float]:
        """What TensorBoard and metrics.jsonl get."""
        figures = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_character": self.bits_per_character}
        figures |= {"bits_per_character_error": self.error} if math.isfinite(self.error) else {}
        return figures | ({"logit_scale": self.scale} if self.scale is not None else {})


class Window(NamedTuple):
    """Tokens `begin` to `end` of which those from `first` are counted, of one of the documents."""

    begin: int
    end: int
    first: int
    document: int


class Documents:
    """Documents to be measured on, cut into windows so that each token but a document's first is predicted once.

    A document longer than a window is read in windows that overlap by half, so that every token but those of the
    first window has at least `n_ctx // 2` before it; only what the window before has not seen is counted.

    Args:
        tokens: documents one after the other, each with its marks.
        lengths: of the documents, or of slices of them; None to begin one at every mark.
    """

    def __init__(
        self, tokens: npt.NDArray[Any], n_ctx: int, tokenizer: Tokenizer, lengths: Sequence[int] | None = None
    ) -> None:
        self.tokens = tokens
        self._padding = tokenizer.marks.padding if tokenizer.marks.padding is not None else tokenizer.marks.end
        if lengths is None:
            found = document_begins(tokens, tokenizer.marks)
            ends = np.append(found[found > 0], len(tokens)) if len(tokens) else np.empty(0, np.int64)
        else:
            ends = np.cumsum(lengths, dtype=np.int64)
        self.bounds = list(zip([0, *ends.tolist()], ends.tolist(), strict=False))
        windows = [
            Window(*window, document)
            for document, (begin, end) in enumerate(self.bounds)
            for window in document_windows(begin, end, n_ctx)
        ]
        # The longest first: windows of a batch are of about one length, and memory is at its peak at once.
        self.windows = sorted(windows, key=lambda window: window.begin - window.end)
        counts = [count_characters(tokens[begin:end], tokenizer) for begin, end in self.bounds]
        self._characters = np.array([characters for characters, _ in counts], np.float64)
        self._unknown = np.array([unknown for _, unknown in counts], np.float64)
        self.characters, self.unknown = int(self._characters.sum()), int(self._unknown.sum())

    def batch(self, windows: Iterable[Window]) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and targets of windows, int64 [windows, length]; what pads shorter ones is not counted."""
        windows = list(windows)
        length = max(window.end - window.begin for window in windows)
        input_ids = np.full((len(windows), length), self._padding, np.int64)
        targets = np.full((len(windows), length - 1), _UNCOUNTED, np.int64)
        for row, (begin, end, first, _) in enumerate(windows):
            input_ids[row, : end - begin] = self.tokens[begin:end]
            targets[row, first - begin - 1 : end - begin - 1] = self.tokens[first:end]
        return torch.from_numpy(input_ids), torch.from_numpy(targets)

    def evaluation(
        self, nats: npt.NDArray[np.float64], tokens: float, scales: Sequence[float] = AS_IT_IS
    ) -> Evaluation:
        """The figures of a model at the scale that suits it best.

        Args:
            nats: the sum of its losses for each document at each scale, [scales, documents].
            tokens: that it predicted.
            scales: factors on its logits.
        """
        best = int(nats.sum(1).argmin())
        of_document = nats[best]
        total = float(of_document.sum())
        bits = bits_per_character(total, self.characters, self.unknown)
        return Evaluation(
            loss=total / max(1.0, tokens),
            bits_per_character=bits,
            error=self._standard_error(of_document, bits),
            tokens=int(tokens),
            scale=None if scales is AS_IT_IS else scales[best] if math.isfinite(total) else 1.0,
        )

    def _standard_error(self, nats: npt.NDArray[np.float64], mean: float) -> float:
        """Of bits per character, a ratio of two sums over documents: Cochran (1977), Sampling Techniques, 6.4."""
        count = len(self.bounds)
        if count < 2:
            return math.nan
        deviations = nats / math.log(2) + self._unknown * UNKNOWN_BITS - mean * self._characters
        return math.sqrt(count / (count - 1) * float(np.square(deviations).sum())) / max(1, self.characters)


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
    nats, tokens = sum_of_losses(model, documents, rows=rows, batch_size=batch_size, autocast=autocast)
    return documents.evaluation(nats.cpu().numpy(), float(tokens))


@torch.no_grad()
def sum_of_losses(
    model: GPT2LMHeadModel,
    documents: Documents,
    *,
    rows: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    scales: Sequence[float] = AS_IT_IS,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one rank's share of the documents, and its predicted tokens; the ranks' add up.

    `evaluate` describes the arguments.

    Args:
        scales: factors on the logits, `AS_IT_IS` or `SCALES`.

    Returns:
        The nats of each document, float64 [scales, documents], and the tokens, float64 [].
    """
    device = next(model.parameters()).device
    losses = torch.zeros(len(scales), len(documents.bounds), dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    starts = range(rank * batch_size, len(documents.windows), world_size * batch_size)
    with evaluating(model):
        interval = 0.1 if sys.stderr.isatty() else 10  # in a log file every refresh is a line
        hidden_bar = rank > 0 or is_quiet()
        for begin in tqdm(
            starts,
            desc=localized("measuring"),
            unit=localized(" batches"),
            leave=False,
            delay=5,
            mininterval=interval,
            disable=hidden_bar,
        ):
            windows = documents.windows[begin : begin + batch_size]
            input_ids, targets = documents.batch(windows)
            of_document = torch.tensor([window.document for window in windows])
            of_document = of_document.repeat_interleave(targets.shape[1]).to(device)
            targets = targets.to(device)
            with autocast():
                hidden = model.transformer(input_ids.to(device), use_cache=False).last_hidden_state
            hidden, targets = hidden[:, :-1].flatten(0, 1), targets.flatten()
            size = max(1, _LOGITS_AT_ONCE // rows)
            parts = zip(hidden.split(size), targets.split(size), of_document.split(size), strict=True)
            for some, their_targets, their_documents in parts:
                with autocast():
                    logits = model.lm_head(some)[:, :rows]
                nats = losses_at_scales(logits.float(), their_targets, scales)
                losses.index_add_(1, their_documents, nats.double())
                tokens += (their_targets != _UNCOUNTED).sum()
    return losses, tokens


def losses_at_scales(logits: torch.Tensor, targets: torch.Tensor, scales: Sequence[float]) -> torch.Tensor:
    """The cross-entropy of logits [N, V] times each scale, for targets [N], in nats: [scales, N].

    Args:
        logits: of float32; with `SCALES` they are overwritten.
        scales: `AS_IT_IS` or `SCALES`.
    """
    if scales is AS_IT_IS:
        return F.cross_entropy(logits, targets, reduction="none", ignore_index=_UNCOUNTED)[None]
    assert scales is SCALES  # others may not be `SCALE_STEP` from each other
    size = len(logits) if logits.is_cuda else _SCALED_ROWS
    parts = [_losses_of_rows(*part, scales) for part in zip(logits.split(size), targets.split(size), strict=True)]
    return torch.cat(parts, 1)


def _losses_of_rows(logits: torch.Tensor, targets: torch.Tensor, scales: Sequence[float]) -> torch.Tensor:
    logits -= logits.amax(1, keepdim=True)
    of_targets = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    # The scales are equally far from each other, so each one's powers of e are those before times the same numbers.
    powers, factors = (logits * scales[0]).exp_(), logits.mul_(SCALE_STEP).exp_()
    losses = [powers.sum(1).log() - scales[0] * of_targets]
    for scale in scales[1:]:
        powers *= factors
        losses.append(powers.sum(1).log() - scale * of_targets)
    return torch.stack(losses).masked_fill(targets == _UNCOUNTED, 0.0)


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
