"""Takes away from Python what Windows does not have; every process that has this folder in PYTHONPATH is so.

`make test-windows-like` runs the scripts' tests with it. It is no Windows: `os.name`, `sys.platform` and the separators
of paths stay, for the libraries load other files by them. What is taken away or behaves as there:

* `fcntl`, `os.fork` (processes are spawned), `add_signal_handler` of the event loop, `pass_fds` of subprocess;
* a folder cannot be opened with `os.open`;
* a file that is open or mapped in this process can be neither replaced, renamed nor deleted;
* text mode writes `\\r\\n`, unless it is told not to;
* with a locale of GBK (see the Makefile) text mode without an encoding is GBK.
"""

from __future__ import annotations

import asyncio.unix_events
import builtins
import io
import multiprocessing.context
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from typing import Any

_import = builtins.__import__


def _import_without_fcntl(name: str, globals: Any = None, *args: Any, **keywords: Any) -> Any:
    # For this project only: libraries have other locks on Windows, which are not here.
    if name == "fcntl" and globals and str(globals.get("__name__")).startswith(("gpt2_chinese", "__main__", "test_")):
        raise ImportError("No module named 'fcntl'", name="fcntl")
    return _import(name, globals, *args, **keywords)


builtins.__import__ = _import_without_fcntl

# ---- processes and signals

for name in ("fork", "forkpty", "register_at_fork"):
    if name != "register_at_fork" and hasattr(os, name):
        delattr(os, name)
for method in ("fork", "forkserver"):
    multiprocessing.context._concrete_contexts.pop(method, None)
multiprocessing.context._default_context._actual_context = multiprocessing.context._concrete_contexts["spawn"]


def _no_signal_handler(self: Any, *_: Any) -> None:
    raise NotImplementedError


asyncio.unix_events._UnixSelectorEventLoop.add_signal_handler = _no_signal_handler  # type: ignore[method-assign]

_popen_init = subprocess.Popen.__init__


def _popen(self: Any, *args: Any, pass_fds: Any = (), **keywords: Any) -> None:
    # The resource tracker of multiprocessing is a part of Python on Unix, which Windows does without.
    from_library = sys._getframe(1).f_code.co_filename.endswith(("multiprocessing/util.py", "subprocess.py"))
    if pass_fds and not from_library:
        raise ValueError("pass_fds not supported on Windows.")
    _popen_init(self, *args, pass_fds=pass_fds, **keywords)


subprocess.Popen.__init__ = _popen  # type: ignore[method-assign]

# ---- files

_open_descriptor, _stat, _readlink, _listdir = os.open, os.stat, os.readlink, os.listdir


def _os_open(path: Any, flags: int, *args: Any, **keywords: Any) -> int:
    caller = sys._getframe(1).f_code
    # shutil.rmtree opens folders where the system lets it; flush_folder does nothing where os.name is "nt".
    library = caller.co_filename.endswith(("shutil.py", "pathlib.py", "tempfile.py"))
    if not library and not caller.co_name.endswith("flush_folder"):
        try:
            is_folder = stat.S_ISDIR(_stat(path, dir_fd=keywords.get("dir_fd")).st_mode)
        except (OSError, TypeError):
            is_folder = False
        if is_folder:
            raise PermissionError(13, "Permission denied", os.fspath(path))
    return _open_descriptor(path, flags, *args, **keywords)


os.open = _os_open


def _is_in_use(path: Any, dir_fd: int | None) -> bool:
    """Whether this process has a file open or mapped."""
    try:
        wanted = _stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except (OSError, TypeError):
        return False
    if not stat.S_ISREG(wanted.st_mode):
        return False
    for descriptor in _listdir("/proc/self/fd"):
        try:
            there = _stat(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    with _io_open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        inode = f" {wanted.st_ino} "
        return any(inode in line for line in maps)


def _refusing(function: Callable[..., Any], descriptors: tuple[str, ...]) -> Callable[..., Any]:
    """The function, but of files that are not in use."""

    def checked(*args: Any, **keywords: Any) -> Any:
        for place, name in enumerate(descriptors):
            if place < len(args) and _is_in_use(args[place], keywords.get(name)):
                raise PermissionError(
                    13, "The process cannot access the file because it is being used", str(args[place])
                )
        return function(*args, **keywords)

    checked.__name__ = function.__name__
    return checked


_io_open = io.open


def _text_open(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
               newline: Any = None, closefd: bool = True, opener: Any = None) -> Any:  # fmt: skip
    if newline is None and "b" not in mode and any(letter in mode for letter in "wax+") and isinstance(mode, str):
        newline = "\r\n"
    return _io_open(file, mode, buffering, encoding, errors, newline, closefd, opener)


builtins.open = io.open = _text_open
for name, descriptors in (
    ("replace", ("src_dir_fd", "dst_dir_fd")),
    ("rename", ("src_dir_fd", "dst_dir_fd")),
    ("unlink", ("dir_fd",)),
    ("remove", ("dir_fd",)),
):
    checked = _refusing(getattr(os, name), descriptors)
    for group in (os.supports_dir_fd, os.supports_follow_symlinks):
        if getattr(os, name) in group:
            group.add(checked)
    setattr(os, name, checked)
