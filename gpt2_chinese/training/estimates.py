"""What a training run costs and what it can come to: operations, memory, whether the corpus is large enough."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GPT2Config

from gpt2_chinese.training.attention import BLOCK
from gpt2_chinese.training.loss import HEAD_ROWS

# Dense bf16 operations a second (fp16 where there is no bf16), from the makers' data sheets; the longest name first.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """The peak of a GPU, by the name that CUDA gives it; None for one that is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def flops_per_token(config: GPT2Config, parameters: int) -> float:
    """Operations of forward and backward pass for a token, by nanoGPT's formula: 6N + 12·L·H·Q·T.

    Args:
        parameters: with the position embeddings, which N does not count, being looked up and not multiplied.
    """
    without_positions = parameters - config.n_positions * config.n_embd
    return 6.0 * without_positions + 12.0 * config.n_layer * config.n_embd * config.n_ctx


def memory_estimate(
    config: GPT2Config,
    parameters: int,
    *,
    windows: int,
    precision: str,
    optimizer: str,
    recompute: bool,
    on_cpu: bool = False,
) -> float:
    """Bytes that training takes, to the next quarter or so; the library itself is left out.

    Weights, gradients and what the optimizer keeps (two numbers a weight, Muon one), 4 bytes each; for every token of
    a micro-batch 17 numbers a layer and unit of width. Then the logits as they are computed and in fp32 with their
    gradient: on a GPU of all tokens, on a CPU of `HEAD_ROWS` at a time, with a second gradient of the head. And on a
    CPU the weights of attention, some more than half of a square of tokens for each head. Where activations are
    computed again, those of one layer are there at a time, and on a GPU the logits of one window.
    """
    size = 4 if precision == "fp32" else 2
    kept = 4 * parameters * (4 if optimizer == "adamw" else 3)
    tokens = windows * config.n_ctx
    layer = 17 * size * tokens * config.n_embd
    rows = config.n_ctx if recompute else tokens
    if on_cpu:
        layer += size * tokens * config.n_head * (config.n_ctx + min(config.n_ctx, BLOCK)) // 2
        kept += 4 * config.vocab_size * config.n_embd
        rows = min(tokens, HEAD_ROWS)
    layers = config.n_layer * tokens * config.n_embd * size + layer if recompute else config.n_layer * layer
    return float(kept + layers + rows * config.vocab_size * (size + 8))


def will_overfit(tokens: int, parameters: int, epochs: int) -> bool:
    """Whether a model is so large for its corpus that it will learn the texts instead of the language.

    A model keeps about two bits a parameter, text has about six a token; and up to four epochs over the same text
    are nearly as good as new text (Muennighoff et al., 2023).
    """
    return epochs > 4 and parameters > 3 * tokens


@contextmanager
def memory_advice(windows: int, n_ctx: int, *, batch_size: int, accumulation: int) -> Iterator[None]:
    """Turn "out of memory" into what can be done about it.

    Raises:
        ValueError: there is not enough memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        words = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in words:
            raise
        found = re.search(r"allocate ([\d.]+ \w+)", words)
        wanted = f", when {found[1]} more were wanted" if found else ""
        raise ValueError(
            f"out of memory with a micro-batch of {windows} windows of {n_ctx} tokens{wanted}. Take a smaller "
            f"--batch_size and as much more --gradient_accumulation (they are {batch_size} and {accumulation}; their "
            "product decides the result), --gradient_checkpointing, or a smaller --model_config"
        ) from error
