"""Stand-ins for CUDA on the CPU: a graph that is recorded and replayed, and the calls that a capture makes.

Like a CUDA graph, a recording knows nothing of the Python around the operations: a number that was read from a tensor,
a shape, a tensor made of a list stay as they were. What CUDA refuses to capture, because it synchronizes with the
device, is refused here too.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2_chinese.decoding.graph_decoder import SDPA_BACKENDS

SYNCHRONIZING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "equal",
    "lift_fresh",
    "masked_select",
    "unique",
}


class RecordedGraph(TorchDispatchMode):
    """Records the operations of `work` while it runs once; `replay` runs them again on the same tensors."""

    def __init__(self, work) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        with self:
            work()
        assert self.operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in SYNCHRONIZING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    @torch.inference_mode()
    @sdpa_kernel(SDPA_BACKENDS)  # the recording has chosen a kernel already
    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
            again = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                # A result that shares the memory of an input is a view, or the input itself: it is up to date.
                if old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)


def tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class FakeCuda:
    """What CudaCapture calls in torch.cuda, recorded in `events`; `streams` is the stack of the current streams."""

    def __init__(self, monkeypatch) -> None:
        self.events: list = []
        self.streams = ["current"]
        names = iter(["warm-up", "capture"])
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream(next(names), self.events))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream(self.streams[-1], self.events))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        end = lambda *arguments: self.events.append(("allocation to pool ended", *arguments))  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)

    @contextlib.contextmanager
    def device(self, device):
        self.events.append(("device", device.index))
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        before = list(self.streams)
        self.streams.append(stream.name)
        yield
        self.streams[:] = before

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.streams.append(stream.name)
        self.events.append(("begin capture", pool))
        yield  # an error within the capture leaves its stream as the current one, as in PyTorch
        self.streams.pop()


class FakeStream:
    def __init__(self, name, events) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other) -> None:
        self.events.append((self.name, "waits for", other.name))
