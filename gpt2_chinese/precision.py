"""Devices, and the numbers that they compute in: fp32, bf16, fp16 with loss scaling, or apex."""

from __future__ import annotations

import argparse
import importlib
import math
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

_TRIED_SIZE = 512  # of the matrices whose products tell in which numbers a CPU is faster
_TRIES = 6


def choose_devices(text: str) -> tuple[list[torch.device], str]:
    """Turn `--device` into devices, and say what of it is not there.

    Raises:
        ValueError: not a list of GPU numbers and not `cpu`, or none of the GPUs is there.
    """
    names = [name.strip() for name in text.split(",")]
    if all(name == "cpu" for name in names):
        return [torch.device("cpu")] * len(names), ""
    if not all(name.isascii() and name.isdigit() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"--device {text}: give numbers of GPUs, as 0 or 0,1, or cpu")
    count = torch.cuda.device_count()
    if count == 0:
        return [torch.device("cpu")], "no CUDA GPU is visible: training on the CPU"
    present = [name for name in names if int(name) < count]
    if not present:
        raise ValueError(f"--device {text}: this machine has {count} GPUs, numbered from 0")
    missing = [name for name in names if name not in present]
    note = f"GPU {', '.join(missing)} is not there: training on {', '.join(present)}" if missing else ""
    return [torch.device("cuda", int(name)) for name in present], note


def choose_precision(args: argparse.Namespace, device: torch.device) -> tuple[str, str]:
    """Give fp32, bf16, fp16 or fp16-only (O3), and what there is to say about it.

    Raises:
        ValueError: flags that contradict each other.
    """
    if args.fp16 and args.precision not in ("auto", "fp16"):
        raise ValueError(f"--fp16 and --precision {args.precision} contradict each other: leave one out")
    if args.fp16 or args.precision == "fp16":
        level = args.fp16_opt_level
        if args.amp_backend == "apex":
            return "fp16", f"fp16 by apex, {level}"
        if level == "O2":
            return "fp16", "O2 is computed as O1: torch has no fp16 weights with fp32 masters"
        return {"O0": "fp32", "O1": "fp16", "O3": "fp16-only"}[level], f"--fp16_opt_level {level}"
    if args.amp_backend == "apex":
        raise ValueError("--amp_backend apex is for fp16: add --fp16, or leave it out")
    if args.precision != "auto":
        return args.precision, ""
    if is_bf16_fast(device):
        return "bf16", ""
    if has_bf16(device):
        return "fp32", f"this {device.type.upper()} multiplies bf16 more slowly than fp32"
    return "fp32", f"this {device.type.upper()} has no bf16 instructions"


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes bf16 itself."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def is_bf16_fast(device: torch.device) -> bool:
    """Whether a device computes products of matrices faster in bf16 than in fp32.

    A CPU that has the instructions is asked by trying, some 70 ms once in a process: an Intel Xeon with AVX512-BF16 and
    without AMX had half the speed in bf16.
    """
    if device.type == "cuda" or not has_bf16(device):
        return has_bf16(device)
    return _cpu_bf16_gain() > 1


@cache
def _cpu_bf16_gain() -> float:
    """How many times as fast as fp32 a CPU multiplies matrices in bf16."""
    wide = torch.ones(_TRIED_SIZE, _TRIED_SIZE)
    matrices = {dtype: wide.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    fastest = dict.fromkeys(matrices, math.inf)
    for _ in range(_TRIES):  # in turns, for other programs come and go; the first are slower
        for dtype, matrix in matrices.items():
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            fastest[dtype] = min(fastest[dtype], time.perf_counter() - began)
    return fastest[torch.float32] / fastest[torch.bfloat16]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the CPU on a device; a GPU gets it in its turn, and nothing waits for what it is still at."""
    if device.type != "cuda":
        return tensor.to(device)
    # From pinned memory only; torch keeps that memory until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def load_apex() -> ModuleType:
    """Import `apex.amp`.

    Raises:
        ValueError: it is not there, with the reason why it hardly can be.
    """
    try:
        return importlib.import_module("apex.amp")
    except ImportError as error:
        raise ValueError(
            f"--amp_backend apex: {error}. NVIDIA removed amp from apex in May 2025 (and the package `apex` on PyPI is "
            "another program); leave the flag out, torch has had the same inside since 1.6"
        ) from error


class Precision:
    """In which numbers the model is computed: what differs between fp32, bf16, fp16 and apex within an update."""

    def __init__(self, name: str, device: torch.device, apex: ModuleType | None = None) -> None:
        self.name = name
        self._device = device
        self._autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name) if apex is None else None
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16" and apex is None)
        self._apex = apex

    def autocast(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._autocast)

    def backward(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        if self._apex is None:
            self._scaler.scale(loss).backward()
        else:
            with self._apex.scale_loss(loss, optimizer) as scaled_loss:
                scaled_loss.backward()

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> torch.Tensor:
        """Unscale, clip and step, once per update; give the norm before clipping, inf or nan for a step left out."""
        self._scaler.unscale_(optimizer)
        norm = clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_grad_norm)
        if self.may_skip:
            self._scaler.step(optimizer)
            self._scaler.update()
        else:
            # Fused AdamW and Muon leave the step out on the device, so nothing waits for the norm.
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            optimizer.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The state of the scaler (apex keeps its own to itself)."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)

    @property
    def may_skip(self) -> bool:
        """Whether an update may be left out because fp16 overflowed, which is no mistake."""
        return self._scaler.is_enabled() or self._apex is not None
