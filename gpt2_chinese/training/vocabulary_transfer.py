"""A new vocabulary on the layers of a trained model: a new token begins at the rows of what spells it in the old one.

Fast Vocabulary Transfer (Gee et al. 2022): a token that both vocabularies have keeps its row; another one gets the mean
of the rows of the old tokens that its text is made of. The mean of several rows is shorter than a row, so it is scaled
to the length that rows have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import GPT2LMHeadModel

from gpt2_chinese.text.tokenizers import Tokenizer
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, PART_PREFIX


@dataclass(frozen=True)
class TransferReport:
    """How many rows were found in the old vocabulary, composed of several rows, and are new."""

    found: int
    composed: int
    new: int


@torch.no_grad()
def transfer_vocabulary(model: GPT2LMHeadModel, old: Tokenizer, new: Tokenizer, *, seed: int) -> TransferReport:
    """Replace the embedding of a model, and an output layer of its own, by rows for another vocabulary.

    A row that nothing spells is drawn from the normal distribution of the old rows' numbers. The state of torch's
    random generator stays as it is.
    """
    old_ids = {token: id_ for id_, token in enumerate(old.vocabulary)}
    sources = [old_tokens_of(id_, new, old, old_ids) for id_ in range(len(new))]
    tied = model.lm_head.weight is model.transformer.wte.weight
    embedding = torch.nn.Parameter(_compose(model.transformer.wte.weight.detach(), sources, seed))
    model.transformer.wte = torch.nn.Embedding.from_pretrained(embedding.detach(), freeze=False)
    model.lm_head.out_features = len(new)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    else:
        model.lm_head.weight = torch.nn.Parameter(_compose(model.lm_head.weight.detach(), sources, seed))
    model.config.vocab_size = len(new)
    model.config.bos_token_id, model.config.eos_token_id = new.marks.begin, new.marks.end
    model.config.pad_token_id = new.marks.padding
    lengths = [len(source) for source in sources]
    return TransferReport(lengths.count(1), sum(length > 1 for length in lengths), lengths.count(0))


def _compose(rows: torch.Tensor, sources: list[list[int]], seed: int) -> torch.Tensor:
    """A row for each source: the row of its one old token, the scaled mean of several, or random numbers."""
    generator = torch.Generator().manual_seed(seed)
    length = rows.norm(dim=1).median()
    random = torch.randn(len(sources), rows.shape[1], generator=generator)
    composed = rows.mean(dim=0) + rows.std(dim=0) * random.to(rows)
    for id_, source in enumerate(sources):
        if len(source) == 1:
            composed[id_] = rows[source[0]]
        elif source:
            mean = rows[source].mean(dim=0)
            composed[id_] = mean * (length / mean.norm().clamp(min=1e-6))
    return composed


def old_tokens_of(id_: int, new: Tokenizer, old: Tokenizer, old_ids: Mapping[str, int]) -> list[int]:
    """The old tokens that spell a new one; none where the old vocabulary has nothing of it.

    What marks a document or a line break is taken from what does so in the old vocabulary.
    """
    roles = (
        (new.marks.begin, old.marks.begin),
        (new.marks.end, old.marks.end),
        (new.marks.line_break, old.marks.line_break),
        (new.marks.unknown, old.marks.unknown),
        (new.marks.padding, old.marks.padding),
    )
    for new_id, old_id in roles:
        if new_id == id_:
            return [] if old_id is None else [old_id]
    token = new.vocabulary[id_]
    if new.kind == old.kind and token in old_ids:
        return [old_ids[token]]
    if token in BYTE_TOKENS:
        return []
    text = new.decode([id_])
    if new.kind != "bpe":
        text = token.removeprefix(PART_PREFIX) if len(token) > len(PART_PREFIX) else token
    if "\ufffd" in text or not text.strip():
        return []
    return [piece for piece in old.encode(text) if piece != old.marks.unknown]
