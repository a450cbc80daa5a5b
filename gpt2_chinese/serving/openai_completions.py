"""The shapes of OpenAI's API: a completion, its chunks in a stream, logprobs, usage, models."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from gpt2_chinese.decoding.completion import MISSING, Completion, TextDelta, TokenLogprob
from gpt2_chinese.serving.events import format_event
from gpt2_chinese.serving.responses import EncodedItems
from gpt2_chinese.serving.running_request import RunningRequest, count_tokens
from gpt2_chinese.serving.service import ServedModel, Service
from gpt2_chinese.serving.writing import MAX_INLINE_ANSWER


class OpenAICompletion:
    """The response to one request of /v1/completions, whole (`body`) or as events (`delta` and `end`)."""

    def __init__(self, running: RunningRequest) -> None:
        self._running = running
        self._request = running.completion_request
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": running.model.name,
        }
        self._begun: set[tuple[int, int]] = set()  # prompts and samples whose first chunk has been sent
        self._is_large = running.answer_bytes > MAX_INLINE_ANSWER
        self._encoded_prompts: dict[int, dict[str, list[Any]]] = {}  # the arrays of their logprobs, in large answers

    def body(self, completions: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """The whole response, from the completions by prompt and sample."""
        choices = []
        for prompt_index, group in enumerate(completions):
            context = self._running.prompts[prompt_index].context
            for sample, completion in enumerate(group):
                text = completion.text.removeprefix(context)
                choices.append(
                    self._choice(prompt_index, sample, text, completion.logprobs, completion.finish_reason, first=True)
                )
        return {**self._head, "choices": choices, "usage": self._usage(completions), **self._missing()}

    def delta(self, prompt_index: int, delta: TextDelta) -> bytes:
        """A chunk; the first one of a sample has the prompt, if it is echoed."""
        sample = (prompt_index, delta.sample)
        if delta.finish_reason == MISSING:  # OpenAI's clients know no such reason, and would take it for a text
            return b""
        first = sample not in self._begun
        self._begun.add(sample)
        choice = self._choice(*sample, delta.text, delta.logprobs, delta.finish_reason, first=first)
        no_usage = {"usage": None} if self._request.include_usage else {}
        in_pieces = first and self._is_large
        return format_event({**self._head, "choices": [choice], **no_usage}, in_pieces=in_pieces)

    def end(self, completions: Sequence[Sequence[Completion]]) -> bytes:
        last = {**self._head, "choices": [], **self._missing()}
        if self._request.include_usage:
            last["usage"] = self._usage(completions)
        has_news = self._request.include_usage or self._running.num_missing
        return (format_event(last) if has_news else b"") + b"data: [DONE]\n\n"

    def _missing(self) -> dict[str, int]:
        """How many texts were asked for that the model does not have, if any."""
        missing = self._running.num_missing
        return {"missing_samples": missing} if missing else {}

    def _choice(
        self,
        prompt_index: int,
        sample: int,
        text: str,
        logprobs: Sequence[TokenLogprob],
        finish_reason: str | None,
        *,
        first: bool,
    ) -> dict[str, Any]:
        """A sample's text and logprobs, or a part of them; the echoed prompt is before the `first` part."""
        if self._request.echo and first:
            text = self._running.prompts[prompt_index].context + text
        return {
            "text": text,
            "index": prompt_index * self._request.samples + sample,
            "logprobs": self._logprobs(prompt_index, logprobs, first=first),
            "finish_reason": finish_reason,
        }

    def _logprobs(
        self, prompt_index: int, logprobs: Sequence[TokenLogprob], *, first: bool
    ) -> dict[str, list[Any] | None] | None:
        if self._request.logprobs is None:
            return None
        arrays: dict[str, list[Any] | None] = dict(_logprob_arrays(logprobs))
        if self._request.scored:
            # The text begins with the prompt: its tokens come first, and the others' offsets count from its beginning.
            shift = len(self._running.prompts[prompt_index].context)
            arrays["text_offset"] = [one.offset + shift for one in logprobs]
            if first:
                before = self._prompt_arrays(prompt_index)
                arrays = {name: before[name] + (array or []) for name, array in arrays.items()}
        return arrays if self._request.logprobs > 0 else arrays | {"top_logprobs": None}

    def _prompt_arrays(self, prompt_index: int) -> dict[str, list[Any]]:
        """The arrays of a prompt's logprobs; in a large answer they are encoded once for all samples."""
        if prompt_index in self._encoded_prompts:
            return self._encoded_prompts[prompt_index]
        arrays = _logprob_arrays(self._running.requests[prompt_index].prompt_logprobs or ())
        if self._is_large:
            arrays = {name: [EncodedItems.of(array)] if array else [] for name, array in arrays.items()}
            self._encoded_prompts[prompt_index] = arrays
        return arrays

    def _usage(self, completions: Sequence[Sequence[Completion]]) -> dict[str, int]:
        """Tokens as the model gets them: those of a prompt include the [MASK] that begins a document."""
        prompt_tokens = sum(len(prompt.ids) for prompt in self._running.prompts)
        completion_tokens = count_tokens(completions)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


def _logprob_arrays(logprobs: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
    return {
        "tokens": [one.token for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [one.top for one in logprobs],
        "text_offset": [one.offset for one in logprobs],
    }


def openai_model(service: Service, model: ServedModel) -> dict[str, Any]:
    """A model of /v1/models. vLLM's clients want `root`, a path there; the name discloses none."""
    return {
        "id": model.name,
        "object": "model",
        "created": service.started,
        "owned_by": "gpt2-chinese",
        "root": model.name,
        "max_model_len": model.engine.n_ctx if model.engine else None,
    }
