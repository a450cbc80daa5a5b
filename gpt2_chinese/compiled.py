"""Machine code that Numba makes once on a machine, and that every later process loads without importing Numba.

Numba's own cache (`njit(cache=True)`) needs half a second to load even one function, for it sets up the compiler
first. Here the object code is kept in a file and loaded with llvmlite alone, in some milliseconds.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib
import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

from gpt2_chinese.artifacts import atomic_write
from gpt2_chinese.command_line import remark

DIGEST_SIZE = hashlib.sha256().digest_size
FUNCTION_NAME = "entry"

_engines: list[llvm.ExecutionEngine] = []  # they own the code that the functions run


def load_function(
    module_name: str, sources: Sequence[Path], arguments: int, *, keep_lock: bool = True
) -> Callable[..., None]:
    """Load the compiled function of a module, or compile it where that has not been done yet on this machine.

    The module is imported only to be compiled. It has a function `compile_entry()` that returns a `numba.cfunc`
    without a result, whose arguments are pointers and int64 and which cannot raise.

    Args:
        module_name: such as "gpt2_chinese.text.segmenter_kernel".
        sources: the files that the machine code depends on; code made from other contents of them is not used.
        arguments: the number of arguments.
        keep_lock: whether calls keep the interpreter's lock; without it other Python threads run meanwhile.

    Returns:
        The function. It trusts the addresses that it is given.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    file_name = cache_file_name(module_name, sources)
    code = read_cached_code(file_name)
    if code is None:
        remark(f"compiling {module_name}, once on this machine: less than a minute", file=sys.stderr)
        code = compile_module(module_name)
        write_cached_code(file_name, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    kind = ctypes.PYFUNCTYPE if keep_lock else ctypes.CFUNCTYPE
    prototype = kind(None, *[ctypes.c_void_p] * arguments)
    return prototype(engine.get_function_address(FUNCTION_NAME))


def is_cached(module_name: str, sources: Sequence[Path]) -> bool:
    """Whether load_function will find the code on disk."""
    return read_cached_code(cache_file_name(module_name, sources)) is not None


def cache_file_name(module_name: str, sources: Sequence[Path]) -> str:
    return f"{module_name.rpartition('.')[2]}-{cache_key(sources)[:32]}.code"


def target_machine() -> llvm.TargetMachine:
    """The processor that this runs on, with all that it can do."""
    # Object files are ELF also on Windows: what is loaded into memory here is not linked by the system.
    triple = llvm.get_process_triple() + ("-elf" if sys.platform == "win32" else "")
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static" if "86" in triple.partition("-")[0] else "default",
        codemodel="jitdefault",
        jit=True,
    )


def cache_key(sources: Sequence[Path]) -> str:
    """What the machine code depends on: the sources, the compiler, the processor."""
    digest = hashlib.sha256()
    for path in (Path(__file__), *sources):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    machine = (llvmlite.__version__, llvm.get_process_triple(), llvm.get_host_cpu_name())
    digest.update("\n".join((*machine, llvm.get_host_cpu_features().flatten())).encode())
    return digest.hexdigest()


def compile_module(module_name: str) -> bytes:
    """Compile the entry of a module, with all that it calls, to one object file."""
    entry = importlib.import_module(module_name).compile_entry()
    module = llvm.parse_assembly(entry.inspect_llvm())
    for function in module.functions:
        if function.name == entry.native_name:
            function.name = FUNCTION_NAME
        elif not function.is_declaration:
            function.linkage = llvm.Linkage.internal
    machine = target_machine()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    needed = {function.name for function in module.functions if function.is_declaration}
    needed = {name for name in needed if not name.startswith("llvm.") and name not in ("memset", "memcpy", "memmove")}
    assert not needed, f"{module_name} calls {', '.join(sorted(needed))}, which only Numba's runtime has"
    return machine.emit_object(module)


def cache_folders() -> list[Path]:
    """Where machine code may be kept, first choice first."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return [Path(os.environ["NUMBA_CACHE_DIR"])]
    folders = [Path(__file__).parent / "__pycache__", user_cache_folder()]
    return [folder for folder in folders if folder.is_absolute()]


def user_cache_folder() -> Path:
    """This user's own cache folder of the project; not absolute where there is no home, for "~" stays then."""
    cache = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return Path(cache or os.path.expanduser("~/.cache")) / "gpt2_chinese"


def make_trusted_folder(folder: Path) -> Path:
    """Make a folder for files that are run, or take the one that is there; gives its true path, without links.

    Raises:
        OSError: it cannot be made or written, or somebody whom `may_be_forged` does not trust may write or exchange it.
    """
    if not folder.is_absolute():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    if os.name == "posix":
        for place in (folder, *folder.parents):
            found = place.stat()
            # Where the sticky bit is set, as on /tmp, others may add names and exchange none of ours.
            shared = place != folder and found.st_uid == 0 and found.st_mode & stat.S_ISVTX
            if not shared and may_be_forged(found):
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(place))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def read_cached_code(file_name: str) -> bytes | None:
    """The code in the first cache folder that has it whole: it begins with its digest.

    The digest tells damaged files, not forged ones: code is run only if nobody else can have written it.
    """
    for folder in cache_folders():
        try:
            data = read_trusted(folder / file_name)
        except OSError:
            continue
        if code_digest(file_name, data[DIGEST_SIZE:]) == data[:DIGEST_SIZE]:
            return data[DIGEST_SIZE:]
    return None


def code_digest(file_name: str, code: bytes) -> bytes:
    return hashlib.sha256(file_name.encode() + b"\n" + code).digest()


def read_trusted(path: Path) -> bytes:
    """Read a file that belongs to this user, to root or to whom this program belongs, and that no other may write.

    Raises:
        OSError: there is none, or it is not such a file.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NOFOLLOW", 0))) as file:
        if os.name == "posix" and may_be_forged(os.fstat(file.fileno())):
            raise PermissionError(errno.EPERM, "others may write this file, so its code is not run", str(path))
        return file.read()


def may_be_forged(found: os.stat_result) -> bool:
    """Whether somebody but this user, root and whom this program belongs to owns or may write it (POSIX only)."""
    by_others = found.st_mode & stat.S_IWOTH or (
        found.st_mode & stat.S_IWGRP and not is_private_group(found.st_gid, found.st_uid)
    )
    return bool(found.st_uid not in {0, os.geteuid(), os.stat(__file__).st_uid} or by_others)


def is_private_group(group: int, user: int) -> bool:
    """Whether a group has nobody in it but the user that it is named after."""
    import grp
    import pwd

    try:
        entry, name = grp.getgrgid(group), pwd.getpwuid(user).pw_name
    except KeyError:
        return False
    return entry.gr_name == name and set(entry.gr_mem) <= {name}


def write_cached_code(file_name: str, code: bytes) -> None:
    """Write the code to the first cache folder that can be written."""
    for folder in cache_folders():
        try:
            with atomic_write(folder / file_name, "wb") as file:
                file.write(code_digest(file_name, code) + code)
                if os.name == "posix":
                    os.fchmod(file.fileno(), 0o644)
            return
        except OSError:
            continue
    tried = ", ".join(map(str, cache_folders()))
    print(
        f"the compiled code cannot be kept in {tried}, so every run will compile it: "
        "set NUMBA_CACHE_DIR to a folder that can be written",
        file=sys.stderr,
    )
