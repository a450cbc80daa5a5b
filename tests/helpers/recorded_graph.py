"""Stands in for a CUDA graph on the CPU: the operations of a piece of work, repeated on the tensors of the recording.

Like a graph it knows nothing of the Python around them: a number that was taken from a tensor, a shape, a tensor made
of a list stay what they were. What a capture on CUDA refuses, because it waits for the device, is refused here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2_chinese.decoding.graph_decoder import BACKENDS

WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "lift_fresh", "masked_select", "unique"}


class RecordedGraph(TorchDispatchMode):
    """Records `work` while doing it once."""

    def __init__(self, work) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        with self:
            work()
        assert self.operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    @torch.inference_mode()
    @sdpa_kernel(BACKENDS)  # which kernel is taken was settled in the recording
    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
            again = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                # What shares the memory of an input is a view, or the input itself: it is up to date.
                if old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)


def tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
