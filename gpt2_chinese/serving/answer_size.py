"""How large an answer can become, computed before its request is admitted."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence

from gpt2_chinese.serving.api import CompletionRequest, Limits
from gpt2_chinese.serving.errors import ApiError

CHOICE_BYTES = 256
"""Names, numbers and signs of one completion in JSON, and of the events around it."""
NUMBER_BYTES = 26
"""A logprob or an offset in JSON, with what separates it from the next."""
ID_BYTES = 12
"""A token id in JSON, with what separates it from the next."""
MIN_TOKEN_BYTES = 6
"""A byte token can be a control character: \\u0001."""


def longest_token_bytes(vocabulary: Sequence[str]) -> int:
    """The most bytes of JSON that one token's text can have, its quotation marks included."""
    longest = max(
        (len(json.dumps(token, ensure_ascii=False).encode("utf-8", "replace")) for token in vocabulary), default=0
    )
    return max(MIN_TOKEN_BYTES, longest)


def largest_answer(request: CompletionRequest, token_bytes: int, n_ctx: int) -> int:
    """The most bytes of JSON that the answer to a request can have.

    Args:
        token_bytes: see `longest_token_bytes`.
        n_ctx: the most tokens of a prompt.
    """
    total = 0
    logprob_bytes = 0
    if request.logprobs is not None:
        # A token with its logprob and offset, and the alternatives with theirs; one more may be the token itself.
        logprob_bytes = (token_bytes + NUMBER_BYTES) * (2 + request.logprobs) + NUMBER_BYTES
    for context in request.contexts:
        if isinstance(context, str):
            context_bytes = len(json.dumps(context, ensure_ascii=False).encode())
        else:
            context_bytes = len(context) * (token_bytes + 1)
        prompt_tokens = 0
        if request.scored:
            # A text of n_ctx characters may have as many tokens; of a shorter one the bytes are counted.
            is_short_text = isinstance(context, str) and len(context) < n_ctx
            prompt_tokens = min(n_ctx, (most_tokens(str(context)) if is_short_text else len(context)) + 1)
        choice = CHOICE_BYTES + context_bytes + request.length * (token_bytes + 1)
        total += choice + (request.length + prompt_tokens) * logprob_bytes
    return total * max(request.samples, request.sequences)


def most_tokens(text: str) -> int:
    """The most tokens that a text can have: one for each byte, after tokenizers have taken its characters apart."""
    # A character at a time: `unicodedata` takes time that is quadratic in the length of a run of marks.
    apart = Counter(text.lower())
    return max(len(text.encode()), sum(len(unicodedata.normalize("NFD", one).encode()) * apart[one] for one in apart))


def largest_tokenize_answer(text: str, token_bytes: int, *, with_names: bool) -> int:
    """The most bytes of JSON that /tokenize can answer, with or without the tokens as the vocabulary spells them."""
    return CHOICE_BYTES + (most_tokens(text) + 1) * (ID_BYTES + (token_bytes + 2 if with_names else 0))


def largest_detokenize_answer(ids: Sequence[int], token_bytes: int) -> int:
    """The most bytes of JSON that /detokenize can answer."""
    return CHOICE_BYTES + len(ids) * (token_bytes + 1)


def how_to_shrink(request: CompletionRequest) -> str:
    """What makes the answer to a request smaller, for `check_answer_size`."""
    return f"ask for fewer completions or prompts, a smaller {request.length_field}" + (
        ", or leave out logprobs" if request.logprobs is not None else ""
    )


def check_answer_size(size: int, limits: Limits, how_to_shrink: str, field: str) -> None:
    """Refuse a request whose answer could be larger than the limit; the message ends with how it becomes smaller.

    Raises:
        ApiError: it could.
    """
    if size > limits.answer_bytes:
        message = (
            f"the answer could have {size} bytes, and the limit (--max_answer) is {limits.answer_bytes}; "
            f"{how_to_shrink}"
        )
        raise ApiError(400, "answer_too_large", message, field)
