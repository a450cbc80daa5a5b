"""One process for each device: how they are started, and what they tell each other."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2_chinese.parallel import safe_folder
from gpt2_chinese.training.stopping import signal_handlers


@dataclass(frozen=True)
class Rank:
    """One of `world_size` processes that train together; rank 0 reads, writes and prints."""

    number: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.number == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks; every rank calls this."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def reduce(self, loss: Tensor, flags: Sequence[bool]) -> tuple[Tensor, list[bool]]:
        """The sum of the losses, and which flags any rank has set; every rank calls this."""
        if self.world_size == 1:
            return loss, list(flags)
        parts = torch.cat([loss[None], torch.tensor([float(flag) for flag in flags], device=self.device)])
        dist.all_reduce(parts)
        return parts[0], [count > 0 for count in parts[1:].tolist()]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value; other machines need not see its files."""
        if self.world_size > 1:
            dist.broadcast_object_list(shared := [value])
            value = shared[0]
        return value

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in their order."""
        if self.world_size == 1:
            return [value]
        dist.all_gather_object(values := [None] * self.world_size, value)
        return values


@dataclass(frozen=True)
class Torchrun:
    """What torchrun says in the environment of the processes that it starts."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> Torchrun | None:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        if not os.environ.keys() >= set(names):
            return None
        return cls(*(int(os.environ[name]) for name in names))

    def device(self, devices: Sequence[torch.device], flag: str) -> torch.device:
        """The device of this process, of those of its machine.

        Raises:
            ValueError: there is no GPU for it.
        """
        on_cpu = devices[0].type == "cpu"
        if not on_cpu and self.local_rank >= len(devices):
            raise ValueError(f"--device {flag} has no GPU for local rank {self.local_rank}; list one for each")
        return devices[0 if on_cpu else self.local_rank]


@contextmanager
def process_group(rank: Rank, address: str = "env://") -> Iterator[None]:
    """Join the other ranks, over NCCL on GPUs and gloo on the CPU."""
    if rank.device.type == "cuda":
        torch.cuda.set_device(rank.device)
    backend = "nccl" if rank.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank.number, world_size=rank.world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_on_all(devices: Sequence[torch.device], work: Callable[..., int], *args: Any) -> int:
    """Call `work(rank, *args)` in a process for each device and wait for them; gives rank 0's exit status.

    Args:
        work: importable by its name; what it is given is pickled.

    Raises:
        ValueError: raised by `work` of rank 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        address = (Path(folder) / "ranks").as_uri()
        with safe_folder() as run_folder:
            outcome = torch.multiprocessing.get_context("spawn").SimpleQueue()
            ranks = torch.multiprocessing.spawn(
                _run_spawned,
                args=(run_folder, list(devices), address, outcome, work, args),
                nprocs=len(devices),
                join=False,
            )

        def pass_on(number: int, _: object) -> None:
            for pid in ranks.pids():
                os.kill(pid, number)

        # A terminal sends Ctrl-C to every process; this one only waits while the ranks save.
        with signal_handlers({signal.SIGINT: lambda *_: None, signal.SIGTERM: pass_on}):
            while not ranks.join():
                pass
        if outcome.empty():  # Ctrl-C before the ranks could listen
            raise KeyboardInterrupt
        result = outcome.get()
    if isinstance(result, str):
        raise ValueError(result)
    return int(result)


def _run_spawned(
    number: int,
    run_folder: str,
    devices: list[torch.device],
    address: str,
    outcome: Any,
    work: Callable[..., int],
    args: Sequence[Any],
) -> None:
    """A process of `run_on_all`; rank 0 hands back the exit status, or what is wrong."""
    os.chdir(run_folder)
    rank = Rank(number, len(devices), devices[number])
    if rank.device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // rank.world_size))
    try:
        with process_group(rank, address):
            result: int | str = work(rank, *args)
    except ValueError as error:
        result = str(error)
    if rank.is_main:
        outcome.put(result)
