"""Operations of training on a CPU that PyTorch has only as several passes over memory, or slowly.

The code is in fused_kernel.py; compiled.py caches its machine code.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum, auto
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from gpt2_chinese.compiled import load_function

DTYPES = (torch.float32, torch.bfloat16)
SUM_ROWS = 64  # whose sums are one portion
TILE = 16  # rows and columns that are transposed at once
_NUMBERS_WORTH_A_THREAD = 1 << 15  # chosen for a pool of Python's; not measured again for OpenMP's threads
_SOURCES = (
    "training/fused.py",
    "training/fused_kernel.py",
    "decoding/decoder_kernel.py",
)


class Operation(IntEnum):
    """What the compiled code can do; fused_kernel.py has a function for each."""

    NORMALIZE = 0
    NORMALIZE_BACKWARD = auto()
    SUM_OF_ROWS = auto()
    GELU = auto()
    GELU_BACKWARD = auto()
    SPLIT_HEADS = auto()
    JOIN_HEADS = auto()
    SOFTMAX = auto()
    SOFTMAX_BACKWARD = auto()
    CROSS_ENTROPY = auto()
    ADD_SOFTMAX = auto()
    WRITE_NGRAMS = auto()
    MOMENTUM = auto()
    ADD_STEPS = auto()


@cache
def _kernel() -> Callable[..., None]:
    package = Path(__file__).resolve().parents[1]
    sources = [package / name for name in _SOURCES]
    return load_function("gpt2_chinese.training.fused_kernel", sources, arguments=1, keep_lock=False)


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="fused")


@cache
def _openmp_parallel() -> Callable[..., None] | None:
    """`GOMP_parallel` of the OpenMP that PyTorch has loaded: it runs a C function in each of OpenMP's threads.

    They spin where they have just done a product, so they begin at once. Other threads would have to wake, and to wait
    until these have slept.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).GOMP_parallel  # found in what the library is linked to
    except (OSError, AttributeError):
        return None  # not Linux, or built with another OpenMP
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return cast(Callable[..., None], function)


def _forget_threads() -> None:
    """A forked process has no threads but one, and OpenMP waits for the others forever."""
    global _openmp_works
    _helpers.cache_clear()
    _openmp_works = False


_openmp_works = True
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _threads() -> int:
    return torch.get_num_threads()


def _call(kernel: Callable[..., None], task: ctypes.Array[ctypes.c_int64], kept: tuple[object, ...]) -> None:
    kernel(task)


def run(operation: Operation, dtype: torch.dtype, rows: int, numbers: int, *args: Tensor | int | None) -> None:
    """Run an operation on some rows with as many threads as PyTorch has.

    Args:
        dtype: one of `DTYPES`.
        rows: what is divided among the threads.
        numbers: that are read, which tells whether threads are worth it.
        args: as the operation wants them; tensors are contiguous, and only their addresses are given.
    """
    assert dtype in DTYPES and all(arg.is_contiguous() for arg in args if isinstance(arg, Tensor))
    given = (ctypes.c_int64 * len(args))(*[arg.data_ptr() if isinstance(arg, Tensor) else arg or 0 for arg in args])
    threads = _threads()
    parts = min(rows, max(1, numbers // _NUMBERS_WORTH_A_THREAD), threads)
    begun = ctypes.c_int64(0)
    # What each thread is given: where the arguments are, what to do, of how many parts, and how many have been begun.
    task = (ctypes.c_int64 * 6)(
        ctypes.addressof(given), operation, dtype == torch.bfloat16, rows, parts, ctypes.addressof(begun)
    )
    kernel, parallel = _kernel(), _openmp_parallel() if _openmp_works else None
    if parts == 1:
        kernel(task)
    elif parallel is not None:
        # All of the threads, also where there are fewer parts: GNU's OpenMP ends those that a call has no use for.
        parallel(kernel, task, threads, 0)
    else:
        kept = given, begun, args  # what the addresses are of, as long as a thread has the task
        others = [_helpers(parts - 1).submit(_call, kernel, task, kept) for _ in range(parts - 1)]
        kernel(task)
        for other in others:
            other.result()


def cross_entropy_in_place(
    logits: Tensor, targets: Tensor, distributions: Tensor | None = None, share: float = 0.0
) -> Tensor:
    """The losses of rows of logits [N, V] in nats; the logits become their gradient, softmax less what is wanted.

    A row with a number that is not finite becomes nan.

    Args:
        targets: int64 [N].
        distributions: that are wanted too, [N, V] of the type of the logits.
        share: of the distributions in what is wanted; the losses are those of the targets alone.
    """
    rows, columns = logits.shape
    lowest, highest = targets.aminmax()
    assert 0 <= lowest and highest < columns  # the compiled code would not notice
    assert distributions is None or distributions.shape == logits.shape
    portions = -(-rows // SUM_ROWS)
    losses, room = torch.empty(rows), torch.empty(portions, columns)
    arguments = (logits, columns, targets.contiguous(), losses, room, rows, distributions, torch.tensor([share]))
    run(Operation.CROSS_ENTROPY, logits.dtype, portions, logits.numel(), *arguments)
    return losses


def add_softmax(logits: Tensor, distributions: Tensor, factor: float) -> None:
    """Add the softmax of each row of logits [N, V], times a factor, to distributions [N, V] of the same type."""
    assert distributions.shape == logits.shape  # the compiled code would not notice
    rows, columns = logits.shape
    portions = -(-rows // SUM_ROWS)
    room = torch.empty(portions, columns)
    arguments = (logits, columns, distributions, room, rows, torch.tensor([factor]))
    run(Operation.ADD_SOFTMAX, logits.dtype, portions, logits.numel(), *arguments)


def write_ngrams(
    distributions: Tensor,
    weight: float,
    unigram: Tensor,
    rows: Sequence[Tensor],
    levels: Sequence[Tensor],
    tokens: Tensor,
    first: int,
) -> None:
    """Fill distributions [N, V] with those of a trigram and of a cache, times a weight.

    Args:
        unigram: float32 [V].
        rows: for each of N: the context of bigrams, that of trigrams or -1, the only token that may follow or -1, how
            many tokens the cache has (int64); the weights of the unigram, of the bigrams and of the cache (float32).
        levels: of the bigrams and then of the trigrams: where each context's n-grams begin, their last tokens (int64),
            and their probabilities (float32).
        tokens: int64, of which the caches are made: a row's last one is at `first` plus its number, the others are
            before it.
    """
    assert 0 <= first and first + len(distributions) <= len(tokens)  # the compiled code would not notice
    count, columns = distributions.shape
    portions = -(-count // SUM_ROWS)
    room = torch.empty(portions, columns)
    given = (distributions, columns, room, count, unigram, torch.tensor([weight]))
    operation, dtype, numbers = Operation.WRITE_NGRAMS, distributions.dtype, distributions.numel()
    run(operation, dtype, portions, numbers, *given, *rows, *levels, tokens, first)
