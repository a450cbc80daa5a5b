"""The forms of weights that compiled_decoder.py multiplies with, as this CPU reads them fastest.

A matrix is divided into panels of PANEL_COLUMNS outputs, whose weights stand in the order in which they are multiplied.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import llvmlite.binding as llvm
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FP32, BF16, INT8, BF16_PAIRS = range(4)
CACHE_LINE = 64  # bytes


def _simd_registers() -> tuple[int, int]:
    """Floats in a vector register of this CPU, and rows of a block.

    A block's sums, two vectors a row, stay in registers during a product, and leave some of them for the weights.
    """
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 12
    if features.get("avx2"):
        return 8, 6
    return 4, 12 if features.get("neon") else 6


DOT_PRODUCTS = ("vpdpbusd", "vpmaddwd", "plain")


def _dot_product(lanes: int) -> str:
    """The fastest of DOT_PRODUCTS on this CPU: instructions that multiply 8-bit integers and add up the products."""
    features = llvm.get_host_cpu_features()
    if features.get({16: "avx512vnni", 8: "avxvnni"}.get(lanes, "")):
        return "vpdpbusd"
    return "vpmaddwd" if features.get({16: "avx512bw", 8: "avx2", 4: "sse2"}[lanes]) else "plain"


def _multiplies_pairs(lanes: int) -> bool:
    """Whether this CPU multiplies pairs of bf16 and adds up the products in float32, faster than floats.

    Only AMD's Zen 4 was measured: twice as fast. An Intel Xeon with this instruction multiplied bf16 more slowly.
    """
    is_zen = llvm.get_host_cpu_name().startswith("znver")
    return is_zen and lanes == 16 and bool(llvm.get_host_cpu_features().get("avx512bf16"))


LANES, MAX_BLOCK_ROWS = _simd_registers()
MULTIPLIES_PAIRS = _multiplies_pairs(LANES)
PRECISION_CODES = {"fp32": FP32, "bf16": BF16_PAIRS if MULTIPLIES_PAIRS else BF16, "int8": INT8}
DOT_PRODUCT = _dot_product(LANES)
PANEL_COLUMNS = 2 * LANES
"""Columns of a product that are computed at once; the weights are stored in panels [in_features, PANEL_COLUMNS]."""

NUM_HIGH_BYTES = 16
"""Different high bytes, the sign and most of the exponent, that the weights of a panel may have for BF16_PAIRS."""


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A contiguous float32 array."""
    return np.ascontiguousarray(tensor.detach().float().numpy())


def round_up(count: int) -> int:
    """The next multiple of LANES, which fills whole vectors."""
    return -(-count // LANES) * LANES


class PackedWeights(NamedTuple):
    """A matrix in panels."""

    panels: np.ndarray  # bytes
    scales: np.ndarray  # of each output, float32; 1 but for INT8
    weight_sums: np.ndarray  # of each output's packed weights, int32; 0 but for INT8
    high_bytes: np.ndarray  # [panels, NUM_HIGH_BYTES], uint8; 0 but for BF16_PAIRS


def pack_weights(weight: Tensor, precision: int) -> PackedWeights:
    """Pack a matrix (out, in) into panels.

    A panel is [in, PANEL_COLUMNS]; for BF16 [in, LANES, 2], with column i beside column LANES + i; for INT8
    [in / 4, PANEL_COLUMNS, 4]; for BF16_PAIRS see `pack_pairs`. The last panel is padded with zeros, and for the last
    two the inputs to whole vectors.
    """
    out_features, in_features = weight.shape
    panels = -(-out_features // PANEL_COLUMNS)
    scales = torch.ones(panels * PANEL_COLUMNS)
    weight_sums = torch.zeros(panels * PANEL_COLUMNS, dtype=torch.int32)
    high_bytes = np.zeros((panels, NUM_HIGH_BYTES), dtype=np.uint8)
    if precision == INT8:
        scales[:out_features] = (weight.abs().amax(dim=1).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
    inputs = round_up(in_features) if precision in (INT8, BF16_PAIRS) else in_features
    panel_bytes = PANEL_COLUMNS * inputs * {FP32: 8, BF16: 4, INT8: 2, BF16_PAIRS: 3}[precision] // 2
    memory = aligned_zeros((panels, panel_bytes))
    full_panels = out_features // PANEL_COLUMNS

    def pack_panels(first: int, last: int, rows: Tensor) -> None:
        columns = slice(first * PANEL_COLUMNS, last * PANEL_COLUMNS)
        if precision == INT8:
            rows = (rows / scales[columns, None][: len(rows)]).round_()
            weight_sums[columns][: len(rows)] = rows.sum(dim=1)  # exact: below 2^24 for 132,000 inputs
        dtype = {FP32: torch.float32, INT8: torch.int8}.get(precision, torch.bfloat16)
        rows = rows.to(dtype)
        padding = inputs - in_features, -len(rows) % PANEL_COLUMNS
        if any(padding):
            rows = F.pad(rows, (0, padding[0], 0, padding[1]))
        if precision == BF16_PAIRS:
            for panel in range(first, last):
                words = rows[(panel - first) * PANEL_COLUMNS :][:PANEL_COLUMNS].contiguous().view(torch.int16)
                memory[panel], high_bytes[panel] = pack_pairs(words.numpy().view(np.uint16))
            return
        if precision == INT8:
            rows = rows.contiguous().view(torch.int32)  # four inputs, which are moved as one
        order = (0, 3, 2, 1) if precision == BF16 else (0, 3, 1, 2)
        packed = rows.unflatten(0, (last - first, 2, LANES)).permute(order)
        torch.from_numpy(memory[first:last]).view(packed.dtype).view(packed.shape).copy_(packed)

    if full_panels:
        pack_panels(0, full_panels, weight[: full_panels * PANEL_COLUMNS])
    if full_panels < panels:
        pack_panels(full_panels, panels, weight[full_panels * PANEL_COLUMNS :])
    return PackedWeights(memory, scales.numpy(), weight_sums.numpy(), high_bytes)


def pack_pairs(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pack a panel of bf16 in 12 bits a weight, which nearly all weights survive to the bit.

    The high byte of a bf16 is the sign and most of the exponent. A panel has few of them, but for tiny weights: a table
    of 16 has those of the greatest weights, of 16 powers of two where they are positive and 14 where they are negative,
    and zero. A weight that is smaller becomes the smallest of those or zero, whichever is nearer: a change of at most
    2^-15 of the greatest weight (negative: 2^-13), where rounding to bf16 has changed that one by up to 2^-9.

    Args:
        words: the bf16 as uint16 [PANEL_COLUMNS, inputs], whole vectors of inputs.

    Returns:
        For each four inputs, two pairs, three vectors of 4 * LANES bytes: the low bytes of the first pair, those of the
        second one, and the places of their high bytes in the table, of the first pair in the low half of a byte. The
        bytes of a vector stand as the CPU interleaves them with others, 8 at a time: both inputs of the columns 0 to 3,
        of LANES to LANES + 3, of 4 to 7 and so on. The second array is the table, uint8 [NUM_HIGH_BYTES].
    """
    # Both inputs of a pair stay together: half, four columns of it, column; four inputs, pair.
    parts = np.ascontiguousarray(words).view(np.uint32).reshape(2, LANES // 4, 4, -1, 2)
    in_order = parts.transpose(3, 4, 1, 0, 2).reshape(-1).view(np.uint8)
    low, high = in_order[0::2].copy(), in_order[1::2]
    signed = np.arange(256)
    is_negative = signed >= 0x80
    greatest = int((high & np.uint8(0x7F)).max())
    below = greatest - (signed & 0x7F)  # of each high byte; each step is two powers of two
    number_kept = np.where(is_negative, 7, 8)
    is_kept = below < number_kept
    numbers = np.where(is_kept, below + np.where(is_negative, 8, 0), NUM_HIGH_BYTES - 1).astype(np.uint8)
    codes = numbers[high]
    if (codes == NUM_HIGH_BYTES - 1).any():
        others = np.flatnonzero(codes == NUM_HIGH_BYTES - 1)
        of_others = high[others]
        # Half of the smallest number that is kept, and more, becomes that one.
        is_rounded_up = (below[of_others] == number_kept[of_others]) & (low[others] >= 0x80)
        codes[others[is_rounded_up]] = np.where(is_negative[of_others[is_rounded_up]], 14, 7)
        low[others] = 0
    table = np.zeros(NUM_HIGH_BYTES, dtype=np.uint8)
    table[:8] = np.maximum(greatest - np.arange(8), 0)
    table[8:15] = table[:7] | np.uint8(0x80)
    low, codes = low.reshape(-1, 2, 4 * LANES), codes.reshape(-1, 2, 4 * LANES)
    packed = np.concatenate([low, codes[:, :1] | codes[:, 1:] << np.uint8(4)], axis=1)
    return packed.reshape(-1), table


def aligned_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, as bytes, that begin with a cache line.

    NumPy asks Linux for huge pages, PyTorch does not; with small ones reading is a third slower.
    """
    memory = np.zeros(math.prod(shape) + CACHE_LINE, dtype=np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    return memory[begin:][: math.prod(shape)].reshape(shape)
