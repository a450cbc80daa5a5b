"""One process for each device: how they are started, and what they tell each other."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import ProcessExitedException

from gpt2_chinese.command_line import as_sentence
from gpt2_chinese.parallel import safe_folder
from gpt2_chinese.training.stopping import signal_handlers

GRACE_SECONDS = 10  # for the other ranks to end when one has failed


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
        ValueError: what is wrong, as a ValueError or OSError of `work` says it.
        OSError: a rank was killed.
        RuntimeError: another error of a rank, with its traceback.
    """
    interrupts: list[int] = []
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
        is_whole = True
        logging.getLogger(torch.multiprocessing.spawn.__module__).setLevel(logging.ERROR)  # says whom it terminates
        with signal_handlers({signal.SIGINT: lambda number, _: interrupts.append(number), signal.SIGTERM: pass_on}):
            try:
                while not ranks.join(grace_period=GRACE_SECONDS):
                    pass
            except ProcessExitedException:
                is_whole = False
        outcomes: list[_Outcome] = []
        while not outcome.empty():
            outcomes.append(outcome.get())
    # The ranks that only lost another one say nothing, so the first that says something has the cause.
    for ended in outcomes:
        if ended.bug:
            raise RuntimeError(f"rank {ended.rank}:\n{ended.bug}")
        if ended.error:
            raise ValueError(ended.error)
    if not is_whole and not interrupts:
        raise OSError("a rank was killed, or memory ran out; the same command with --resume goes on from a checkpoint")
    for ended in outcomes:
        if ended.rank == 0:
            return ended.status
    raise KeyboardInterrupt  # Ctrl-C before the ranks could listen


class _Outcome(NamedTuple):
    """How a rank has ended: with an exit status, an error of the user's or the traceback of ours."""

    rank: int
    status: int = 0
    error: str = ""
    bug: str = ""


def _run_spawned(
    number: int,
    run_folder: str,
    devices: list[torch.device],
    address: str,
    outcome: Any,
    work: Callable[..., int],
    args: Sequence[Any],
) -> None:
    """A process of `run_on_all`; hands back how it has ended."""
    os.chdir(run_folder)
    rank = Rank(number, len(devices), devices[number])
    if rank.device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // rank.world_size))
    try:
        with process_group(rank, address):
            outcome.put(_Outcome(number, status=work(rank, *args)))
    except (ValueError, OSError) as error:
        outcome.put(_Outcome(number, error=as_sentence(error)))
        sys.exit(1)  # a rank that waits for this one on a GPU would wait for long
    except Exception as error:
        # Gloo says so where another rank has ended, which has said why or was killed.
        if "by peer" not in str(error):
            outcome.put(_Outcome(number, bug=traceback.format_exc()))
        sys.exit(1)
