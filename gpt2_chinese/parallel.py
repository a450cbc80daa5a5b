"""Runs the same function on many items, in processes of this machine or on a Dask cluster, results in order."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gpt2_chinese.artifacts import drop_inherited_locks

Item = TypeVar("Item")
Result = TypeVar("Result")
MapInOrder = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

_WATCH_SECONDS = 0.5


def default_workers() -> int:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def safe_folder() -> Iterator[str]:
    """Stand in this program's own folder while `multiprocessing` starts processes that are not forked.

    It starts them with `python -c`, so that the folder one stands in comes first on their path until they have set it,
    and a `signal.py` that lies there would run. They must go back to the folder of the run, which is given, themselves.
    """
    folder = os.getcwd()
    os.chdir(Path(__file__).resolve().parents[1])
    try:
        yield folder
    finally:
        os.chdir(folder)


@contextmanager
def safe_path() -> Iterator[None]:
    """Let Python processes that a library starts meanwhile take no modules from the folder one stands in.

    Python 3.10 knows nothing of it; there only `safe_folder` helps.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        # The scripts of this project find the package beside them, which this takes away too.
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


@contextmanager
def open_workers(workers: int, scheduler: str | None = None, shared: Any = None) -> Iterator[MapInOrder]:
    """Start workers and give a function like `map` whose results come in the order of the items.

    Items are taken from their iterable only as fast as results are, so that memory does not grow with their number.
    The function must be importable by its name, and what it returns must not depend on which worker ran it.

    Args:
        workers: processes on this machine; with 1 everything runs in this one.
        scheduler: the address of a Dask scheduler, used instead of processes of this machine.
        shared: the first argument of every call, the item being the second one; it reaches a process of this machine
            once, and a Dask cluster with every item. None: the item is the only argument.

    Raises:
        ValueError: the scheduler cannot be reached, or the package `distributed` is not installed.
        OSError: a worker process died.
    """
    if scheduler is not None:
        with _dask_client(scheduler) as client:
            window = 2 * max(1, len(client.scheduler_info(n_workers=-1)["workers"])) + 2
            yield lambda function, items: _in_order(
                lambda item: client.submit(_with_shared(function, shared), item, pure=False), items, window
            )
    elif workers == 1:
        yield lambda function, items: map(_with_shared(function, shared), items)
    else:
        # A forked worker has this process's compiled code and mapped models; where there is no fork it loads its own.
        can_fork = sys.platform == "linux" and hasattr(os, "fork")
        context = multiprocessing.get_context("fork" if can_fork else None)
        arguments = (os.getpid(), os.getcwd(), shared)
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=arguments)
        try:
            if not can_fork:
                with safe_folder():
                    pool.submit(os.getpid).result()  # starts all of them
            yield lambda function, items: _in_order(
                lambda item: pool.submit(_call, function, item), items, 2 * workers + 2
            )
        except BrokenProcessPool:
            raise OSError(
                "a worker process died (killed, or out of memory); try again, with fewer --workers if memory was short"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _in_order(submit: Callable[[Any], Future[Any]], items: Iterable[Any], window: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_shared: Any = None  # in a worker process: the first argument of every call


def _with_shared(function: Callable[..., Any], shared: Any) -> Callable[[Any], Any]:
    return function if shared is None else partial(function, shared)


def _call(function: Callable[..., Any], item: Any) -> Any:
    return _with_shared(function, _shared)(item)


def _begin_worker(parent: int, run_folder: str, shared: Any) -> None:
    """Go to the run's folder, drop the parent's locks, and end when it is gone: after kill -9 nobody else would."""
    global _shared
    _shared = shared
    os.chdir(run_folder)
    drop_inherited_locks()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    if sys.platform != "win32":
        threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _dask_client(address: str) -> Iterator[Any]:
    try:
        from distributed import Client
    except ImportError:
        raise ValueError(
            "--scheduler needs the package distributed, here and on the cluster: pip install distributed"
        ) from None
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise ValueError(f"--scheduler {address}: no Dask scheduler answers there ({error})") from None
    with client:
        yield client
