"""The C library's allocator, set for training on a CPU."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Let glibc keep what tensors give back for the next ones; False where the C library is another.

    An update takes and frees the same hundreds of MB as the one before. By default large blocks go back to the system
    and come again page by page, cleared, which is some percent of the time of a small model's update.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**30) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
