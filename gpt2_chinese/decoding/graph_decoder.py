"""GPT-2 decoding on a GPU: a step of fixed shapes over fixed memory, captured once as a CUDA graph and replayed.

A small model's step is hundreds of kernels of some microseconds, and launching them one by one from Python takes longer
than they do. A graph launches all of them at once, but it repeats exactly what was captured: the same shapes, the same
addresses, no decision that depends on a number on the device. So a step is computed for the smallest of a few sizes
that holds it, and each size has a graph. On any other device the same step runs without being captured.
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

from gpt2_chinese.decoding.decoder import Decoder, Prefix
from gpt2_chinese.precision import to_device

FEWEST_KEYS = 64
"""Positions that the smallest size attends over; the others have twice, four times … as many."""

ALIGNMENT = 16
"""Positions in multiples of this need no copy of the mask in SDPA's memory-efficient kernel."""

HEAD_ALIGNMENT = 64
"""Logits in multiples of this: with an odd number of them cuBLAS has no kernel for the tensor cores."""

WARM_UPS = 3

TRIED_NUMBERS = 2**15
"""So many numbers of attention are compared, or more, before a size is taken to give the same bits.

In half precision most differences of the sums are rounded away: of a thousand numbers perhaps one is another.
"""

# The one kernel of SDPA that takes a mask, and what stands in where it does not take the model's shape. The others are
# left out: flash splits the keys by the size of the batch, which would round a row otherwise in a crowd.
BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# CUDA allows one capture at a time in a process; and what sdpa_kernel sets holds for all threads.
_ONE_AT_A_TIME = threading.RLock()


class Size(NamedTuple):
    """A step's size: so many rows attend over so many positions."""

    rows: int
    keys: int


class Graph(Protocol):
    """What a capture gives: `replay()` does the captured work once more."""

    def replay(self) -> None: ...


class GraphDecoder(Decoder):
    """A Decoder whose step has a few fixed sizes (`sizes`), on CUDA each of them a graph from its first use on.

    A row's logits are the same to the last bit whatever the other rows hold and however many there are, because only
    such sizes are used as give the same bits as the largest, which is tried when the decoder is made:

    - The matrix products are computed for a multiple of `padding` rows, as in Decoder.
    - Attention is computed for 1, 2, 4 … rows over 64, 128, 256 … positions. What stands behind a row's own length is
      masked: its weight is exactly 0. A kernel that goes over the keys in blocks of a fixed size, from the first to the
      last (SDPA's memory-efficient one does), then adds exactly 0 for them, whatever their number; that this is so is
      not taken on trust but is part of the trial.
    - A graph is used only if its first replay gives the bits of the step that it was captured from.

    All this is tried and not proven; what is tried is many numbers, as half precision shows few of its differences.

    The rows between those that are in use and the size's write into a row of their own, behind the others.
    """

    tried = 32  # these trials cost a GPU little, and one batch in half precision shows too little

    def _make_room(self) -> None:
        longest = -(-self.n_ctx // ALIGNMENT) * ALIGNMENT
        shape = (self.rows + 1, self.n_head, longest, self.head_size)  # the last row takes what is written for nobody
        self.keys = [self._buffer(shape) for _ in self.layers]
        self.values = [self._buffer(shape) for _ in self.layers]
        if missing := -self.vocab_size % HEAD_ALIGNMENT:
            self.head = F.pad(self.head, (0, 0, 0, missing))
        self.padding = self._find_padding()
        # What every graph reads and writes; these must stay where they are.
        self._inputs = torch.zeros(3, self._filled(self.rows), dtype=torch.int64, device=self.device)
        self._places = torch.arange(longest, device=self.device)
        self._outputs = torch.zeros(self.rows, self.vocab_size, device=self.device)
        self._graphs: dict[Size, Graph] = {}
        self.capture: Callable[[Callable[[], None]], Graph] | None = None
        if self.device.type == "cuda":
            self.capture = CudaCapture(self.device)
        self.sizes = self._sizes_of_same_bits()

    def _filled(self, rows: int) -> int:
        return -(-rows // self.padding) * self.padding

    @torch.inference_mode()
    def _sizes_of_same_bits(self) -> list[Size]:
        """The sizes, smallest first, at which a step gives the bits of the largest one, found by trying.

        Each is tried with random tokens, keys and lengths; the first row also has the longest text and the shortest.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        for buffer in (*self.keys, *self.values):
            buffer.normal_(generator=generator)
        source = random.Random(0)
        trials = min(32, max(3, TRIED_NUMBERS // (len(self.layers) * self.n_head * self.head_size)))
        largest = Size(self.rows, len(self._places))
        kept = [largest]
        for keys in doubled(FEWEST_KEYS, largest.keys):
            candidates = [size for rows in doubled(1, self.rows) if (size := Size(rows, keys)) != largest]
            last = min(keys, self.n_ctx) - 1
            for trial in range(trials):
                lengths = [source.randint(0, last) for _ in range(self.rows)]
                if trial < 2:
                    lengths[0] = (0, last)[trial]
                self._set_inputs([source.randrange(self.vocab_size) for _ in lengths], lengths)
                self._static_step(largest)
                expected = self._outputs.clone()
                same = []
                for size in candidates:
                    self._static_step(size)
                    if torch.equal(self._outputs[: size.rows], expected[: size.rows]):
                        same.append(size)
                candidates = same
            kept += candidates
        return sorted(kept, key=lambda size: (size.rows * size.keys, size))

    def load(self, row: int, prefix: Prefix) -> None:
        """Copy a prefix into a row's buffers."""
        keys, values = ([self._finite(part) for part in parts] for parts in (prefix.keys, prefix.values))
        super().load(row, replace(prefix, keys=keys, values=values))

    def _finite(self, tensor: Tensor) -> Tensor:
        """Keys or values as they may be kept: 0 times what is not finite is not 0.

        A row attends with weight 0 over what an earlier text left behind its own length. Only fp16 can overflow there.
        """
        return tensor.nan_to_num() if self.dtype == torch.float16 else tensor

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Give row i its next token, `tokens[i]`, behind the `lengths[i]` tokens it holds, for the first B rows.

        Returns:
            Logits [B, V] in float32; a GPU may still be computing them.
        """
        batch = len(tokens)
        assert batch == len(lengths) <= self.rows and max(lengths) < self.n_ctx
        size = next(size for size in self.sizes if size.rows >= batch and size.keys > max(lengths))
        self._set_inputs(tokens, lengths)
        graph = self._graphs.get(size) or self._new_graph(size)
        if graph is None:
            self._static_step(size)
        else:
            graph.replay()
        return self._outputs[:batch].clone()

    def _set_inputs(self, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        filling = self._inputs.shape[1] - len(tokens)
        inputs = [[*tokens, *[0] * filling], [*lengths, *[0] * filling], [*range(len(tokens)), *[self.rows] * filling]]
        self._inputs.copy_(to_device(torch.tensor(inputs), self.device))

    def _static_step(self, size: Size) -> None:
        """One step from `_inputs` (tokens, positions, rows of the buffers) to `_outputs`: what a graph captures.

        Nothing here may wait for the device, or depend on anything but the size and the contents of tensors that stay.
        """
        tokens, positions, slots = self._inputs[:, : self._filled(size.rows)]
        positions_of_rows, slots = positions[: size.rows], slots[: size.rows]
        mask = torch.zeros(size, dtype=self.dtype, device=self.device)
        mask.masked_fill_(self._places[: size.keys] > positions_of_rows[:, None], -torch.inf)

        def attention(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[number], self.values[number]
            keys[slots, :, positions_of_rows] = self._finite(k[: size.rows])
            values[slots, :, positions_of_rows] = self._finite(v[: size.rows])
            mixed = F.scaled_dot_product_attention(
                q[: size.rows, :, None],
                keys[: size.rows, :, : size.keys],
                values[: size.rows, :, : size.keys],
                attn_mask=mask[:, None, None],
                scale=self.layers[number].scale,
            )[:, :, 0]
            filling = len(q) - size.rows
            return F.pad(mixed, (0, 0, 0, 0, 0, filling)) if filling else mixed

        with _ONE_AT_A_TIME, sdpa_kernel(BACKENDS):
            hidden = self._blocks(self.token_embedding[tokens] + self.position_embedding[positions], attention)
            self._outputs[: size.rows] = self._logits(hidden)[: size.rows]

    def _new_graph(self, size: Size) -> Graph | None:
        """Capture the step at a size; None, and a note on stderr, where that cannot be done, here and from then on."""
        if self.capture is None:
            return None
        outputs = self._outputs[: size.rows]
        try:
            self._static_step(size)
            expected = outputs.nan_to_num()
            graph = self.capture(lambda: self._static_step(size))
            outputs.zero_()
            # The step stores the same keys and values again, so that it may be done as often as one likes.
            graph.replay()
            if not torch.equal(outputs.nan_to_num(), expected):
                raise RuntimeError("a replayed step has other numbers than the step itself")
        except Exception as error:  # whatever CUDA can come up with: decoding goes on without graphs, only slower
            self.capture = None
            print(f"note: decoding without a CUDA graph, which is slower: {error}", file=sys.stderr)
            return None
        self._graphs[size] = graph
        return graph


class CudaCapture:
    """Captures work on one CUDA device; its graphs share their memory, so they are replayed one after the other only.

    The work must leave its results in memory that was there before: what it allocates is the graphs' own.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            # Not the stream of the warm-up: cuBLAS has a workspace for each stream, and the captured one must be in the
            # graphs' memory, where nobody can free it.
            self._warming, self._capturing = torch.cuda.Stream(), torch.cuda.Stream()
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        # Also those that failed: torch's allocator does not forget a capture that did not come to its end.
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Do the work some times, for libraries set themselves up when they are first used; then capture it.

        Raises:
            RuntimeError: the work does what cannot be captured, or there is no memory for it.
        """
        with _ONE_AT_A_TIME, torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            self._graphs.append(graph)
            current = torch.cuda.current_stream()
            self._warming.wait_stream(current)
            with torch.cuda.stream(self._warming):
                for _ in range(WARM_UPS):
                    work()
            current.wait_stream(self._warming)
            # Other threads may use CUDA meanwhile, hence thread_local.
            capture = torch.cuda.graph(
                graph, pool=self._pool, stream=self._capturing, capture_error_mode="thread_local"
            )
            try:
                # A capture that fails leaves its own stream as the current one; the outer context does not.
                with torch.cuda.stream(current), capture:
                    work()
            except BaseException:
                # It also leaves the allocator at the graphs' memory, where it refuses to give any memory back.
                with contextlib.suppress(Exception):  # not if the capture itself came to its end
                    torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                raise
        return graph


def decoder_on_gpu(model: Any, rows: int, precision: str | None) -> GraphDecoder:
    """A GraphDecoder that computes in float32 or bfloat16 where `precision` is fp32 or bf16, else in the model's dtype.

    Raises:
        ValueError: the model has cross-attention, or weights that are not finite.
    """
    if precision == "int8":
        print("note: --precision int8 is for CPUs; this GPU computes in the model's own precision", file=sys.stderr)
    return GraphDecoder(model, rows, {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision or ""))


def doubled(first: int, last: int) -> list[int]:
    """Some numbers from `first` on, each twice the one before, and `last` at the end.

    Example:
        >>> doubled(1, 6)
        [1, 2, 4, 6]
    """
    numbers = []
    while first < last:
        numbers.append(first)
        first *= 2
    return [*numbers, last]
