"""GPT-2 decoding on a GPU: a decode step of fixed shapes, captured once as a CUDA graph and replayed.

A step of a small model is hundreds of kernels of a few microseconds each, and launching them one by one from Python
takes longer than they run. A CUDA graph launches all of them at once, but it repeats exactly what was captured: the
same shapes, the same addresses, no branch that depends on a value on the device. So a step is computed for the smallest
of a few sizes that it fits into, and each size has a graph. On other devices the same step runs without a graph.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2_chinese.command_line import remark
from gpt2_chinese.decoding.decoder import Decoder, PrefilledPrompt
from gpt2_chinese.precision import to_device

MIN_KEYS = 64
"""Positions that the smallest size attends over; the larger ones double it."""

KEY_ALIGNMENT = 16
"""SDPA's memory-efficient kernel copies the mask unless the number of positions is a multiple of this."""

WARMUP_STEPS = 3

MIN_COMPARED_VALUES = 2**15
"""Values of attention that are compared, at least, before a size is taken to give the same bits.

In half precision most differences between sums are rounded away: perhaps one value in a thousand shows one.
"""

# The one kernel of SDPA that takes a mask, and the fallback for shapes that it does not support. The others are left
# out: flash attention splits the keys by the size of the batch, so that a larger batch would round otherwise.
SDPA_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# CUDA allows one capture at a time in a process, and what sdpa_kernel sets holds for all threads.
_CAPTURE_LOCK = threading.RLock()


class StepSize(NamedTuple):
    """The shape of a step: so many sequences attend over so many positions."""

    num_seqs: int
    num_keys: int


class Graph(Protocol):
    """A captured step: `replay()` runs it again."""

    def replay(self) -> None: ...


class GraphDecoder(Decoder):
    """A Decoder whose steps have one of a few `sizes`, each of them captured as a CUDA graph when it is first used.

    Batch invariance: the logits of a sequence are the same to the bit whatever the other slots hold and however many
    there are, since only sizes are used that give the bits of the largest one, as tried in the constructor:

    - The matrix products are computed for a multiple of `pad_to_multiple_of` rows, as in Decoder.
    - Attention is computed for 1, 2, 4 … sequences over 64, 128, 256 … positions. The positions beyond a sequence's
      own length are masked, so that their weights are exactly 0. A kernel that goes over the keys in blocks of a fixed
      size, from the first to the last (SDPA's memory-efficient one does), then adds exactly 0 for them, whatever their
      number. The trial covers this assumption too.
    - A graph is used only if its first replay gives the bits of the step that it was captured from.

    This is tested by trial and not proven. Half precision shows few of the differences, so many values are compared.

    The rows that pad a batch to its size write into a slot of their own, the last one.
    """

    trial_batches = 32  # cheap on a GPU, and one batch in half precision shows too little
    vocab_alignment = 64  # otherwise cuBLAS has no tensor core kernel for the logits

    def __init__(self, model: Any, max_num_seqs: int, dtype: torch.dtype | None = None) -> None:
        """As Decoder, and find the sizes."""
        super().__init__(model, max_num_seqs, dtype)
        # What every graph reads and writes; these tensors must keep their addresses.
        self._inputs = torch.zeros(3, self._padded(max_num_seqs), dtype=torch.int64, device=self.device)
        self._key_positions = torch.arange(self._cache_length, device=self.device)
        self._outputs = torch.zeros(max_num_seqs, self.vocab_size, device=self.device)
        self._graphs: dict[StepSize, Graph] = {}
        self.capture: Callable[[Callable[[], None]], Graph] | None = None
        if self.device.type == "cuda":
            self.capture = CudaCapture(self.device)
        self.sizes = self._find_bit_identical_sizes()

    def _allocate_kv_cache(self) -> None:
        """As in Decoder, with aligned positions and one more slot, for the rows that pad a batch."""
        self._cache_length = -(-self.n_ctx // KEY_ALIGNMENT) * KEY_ALIGNMENT
        shape = (self.max_num_seqs + 1, self.n_head, self._cache_length, self.head_size)
        self.key_cache = [self._lazy_zeros(shape) for _ in self.layers]
        self.value_cache = [self._lazy_zeros(shape) for _ in self.layers]

    def _padded(self, batch: int) -> int:
        return -(-batch // self.pad_to_multiple_of) * self.pad_to_multiple_of

    @torch.inference_mode()
    def _find_bit_identical_sizes(self) -> list[StepSize]:
        """The sizes, smallest first, at which a step gives the bits of the largest one, found by trying.

        Each is tried with random tokens, keys and lengths; slot 0 also has the longest and the shortest length.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        for cache in (*self.key_cache, *self.value_cache):
            cache.normal_(generator=generator)
        source = random.Random(0)
        trials = min(32, max(3, MIN_COMPARED_VALUES // (len(self.layers) * self.n_head * self.head_size)))
        largest = StepSize(self.max_num_seqs, self._cache_length)
        identical = [largest]
        for num_keys in doubling(MIN_KEYS, largest.num_keys):
            candidates = [
                size for num_seqs in doubling(1, self.max_num_seqs) if (size := StepSize(num_seqs, num_keys)) != largest
            ]
            longest = min(num_keys, self.n_ctx) - 1
            for trial in range(trials):
                lengths = [source.randint(0, longest) for _ in range(self.max_num_seqs)]
                if trial < 2:
                    lengths[0] = (0, longest)[trial]
                self._set_inputs([source.randrange(self.vocab_size) for _ in lengths], lengths)
                self._static_step(largest)
                expected = self._outputs.clone()
                still_identical = []
                for size in candidates:
                    self._static_step(size)
                    if torch.equal(self._outputs[: size.num_seqs], expected[: size.num_seqs]):
                        still_identical.append(size)
                candidates = still_identical
            identical += candidates
        return sorted(identical, key=lambda size: (size.num_seqs * size.num_keys, size))

    def load_prefill(self, slot: int, prefilled: PrefilledPrompt) -> None:
        """Copy the keys and values of a prefilled prompt into a slot."""
        keys, values = ([self._make_finite(part) for part in parts] for parts in (prefilled.keys, prefilled.values))
        super().load_prefill(slot, replace(prefilled, keys=keys, values=values))

    def _make_finite(self, tensor: Tensor) -> Tensor:
        """Replace what is not finite among keys or values, since 0 times that is not 0.

        A sequence attends with weight 0 over what an earlier one left beyond its own length. Only fp16 can overflow.
        """
        return tensor.nan_to_num() if self.dtype == torch.float16 else tensor

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """A decode step of the first B slots: append `tokens[i]` to the `lengths[i]` tokens of slot i.

        Returns:
            Logits [B, V] in float32; a GPU may still be computing them.
        """
        batch = len(tokens)
        assert batch == len(lengths) <= self.max_num_seqs and max(lengths) < self.n_ctx
        size = next(size for size in self.sizes if size.num_seqs >= batch and size.num_keys > max(lengths))
        self._set_inputs(tokens, lengths)
        graph = self._graphs.get(size) or self._capture_graph(size)
        if graph is None:
            self._static_step(size)
        else:
            graph.replay()
        return self._outputs[:batch].clone()

    def _set_inputs(self, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        batch, padding = len(tokens), self._inputs.shape[1] - len(tokens)
        zeros, padding_slot = [0] * padding, [self.max_num_seqs] * padding
        inputs = [[*tokens, *zeros], [*lengths, *zeros], [*range(batch), *padding_slot]]
        self._inputs.copy_(to_device(torch.tensor(inputs), self.device))

    def _static_step(self, size: StepSize) -> None:
        """One step from `_inputs` (tokens, positions, slots) to `_outputs`: what a graph captures.

        Nothing here may synchronize with the device, or depend on anything but the size and the contents of tensors
        that keep their addresses.
        """
        num_seqs, num_keys = size
        tokens, positions, slots = self._inputs[:, : self._padded(num_seqs)]
        own_positions, slots = positions[:num_seqs], slots[:num_seqs]
        mask = torch.zeros(size, dtype=self.dtype, device=self.device)
        mask.masked_fill_(self._key_positions[:num_keys] > own_positions[:, None], -torch.inf)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.key_cache[layer], self.value_cache[layer]
            keys[slots, :, own_positions] = self._make_finite(k[:num_seqs])
            values[slots, :, own_positions] = self._make_finite(v[:num_seqs])
            mixed = F.scaled_dot_product_attention(
                q[:num_seqs, :, None],
                keys[:num_seqs, :, :num_keys],
                values[:num_seqs, :, :num_keys],
                attn_mask=mask[:, None, None],
                scale=self.layers[layer].scale,
            )[:, :, 0]
            padding = len(q) - num_seqs
            return F.pad(mixed, (0, 0, 0, 0, 0, padding)) if padding else mixed

        with _CAPTURE_LOCK, sdpa_kernel(SDPA_BACKENDS):
            hidden = self._blocks(self.wte[tokens] + self.wpe[positions], attention)
            self._outputs[:num_seqs] = self._logits(hidden)[:num_seqs]

    def _capture_graph(self, size: StepSize) -> Graph | None:
        """Capture the step of a size. If that fails, say so on stderr, capture no more and return None."""
        if self.capture is None:
            return None
        outputs = self._outputs[: size.num_seqs]
        try:
            self._static_step(size)
            expected = outputs.nan_to_num()
            graph = self.capture(lambda: self._static_step(size))
            outputs.zero_()
            # Repeating a step is harmless: it stores the same keys and values again.
            graph.replay()
            if not torch.equal(outputs.nan_to_num(), expected):
                raise RuntimeError("the replayed graph gives other logits than the step itself")
        except Exception as error:  # whatever CUDA raises: decoding continues without graphs, only slower
            self.capture = None
            remark(f"note: decoding without a CUDA graph, which is slower: {error}", file=sys.stderr)
            return None
        self._graphs[size] = graph
        return graph


class CudaCapture:
    """Captures work on one CUDA device. Its graphs share a memory pool, so only one of them may run at a time.

    The work must leave its results in tensors that were there before: what it allocates belongs to the pool.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            # Not the warm-up's stream: cuBLAS has a workspace for each stream, and that of the capture must be in the
            # graphs' pool, where nothing can free it.
            self._warmup_stream, self._capture_stream = torch.cuda.Stream(), torch.cuda.Stream()
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        # Those whose capture failed too: PyTorch's allocator keeps a reference to a capture that was not completed.
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Run the work a few times, since libraries initialize themselves at first use; then capture it.

        Raises:
            RuntimeError: the work contains what cannot be captured, or there is no memory for it.
        """
        with _CAPTURE_LOCK, torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            self._graphs.append(graph)
            current = torch.cuda.current_stream()
            self._warmup_stream.wait_stream(current)
            with torch.cuda.stream(self._warmup_stream):
                for _ in range(WARMUP_STEPS):
                    work()
            current.wait_stream(self._warmup_stream)
            # thread_local, since other threads may use CUDA meanwhile.
            capture = torch.cuda.graph(
                graph, pool=self._pool, stream=self._capture_stream, capture_error_mode="thread_local"
            )
            try:
                # A capture that fails leaves its own stream as the current one; the outer context restores it.
                with torch.cuda.stream(current), capture:
                    work()
            except BaseException:
                # It also leaves the allocator in the graphs' pool, where it refuses to free memory.
                with contextlib.suppress(Exception):  # it raises if the capture itself was completed
                    torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                raise
        return graph


def make_gpu_decoder(model: Any, max_num_seqs: int, precision: str | None) -> GraphDecoder:
    """A GraphDecoder in float32 or bfloat16 where `precision` is fp32 or bf16, else in the model's dtype.

    Raises:
        ValueError: the model has cross-attention, or weights that are not finite.
    """
    if precision == "int8":
        remark("note: --precision int8 is for CPUs; this GPU computes in the model's own precision", file=sys.stderr)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision or "")
    return GraphDecoder(model, max_num_seqs, dtype)


def doubling(first: int, last: int) -> list[int]:
    """Numbers from `first` on, each twice the one before, and `last` at the end.

    Example:
        >>> doubling(1, 6)
        [1, 2, 4, 6]
    """
    numbers = []
    while first < last:
        numbers.append(first)
        first *= 2
    return [*numbers, last]
