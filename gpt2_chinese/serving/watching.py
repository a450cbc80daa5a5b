"""Which of the model folders of a training run --watch serves next."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

Fingerprint = tuple[tuple[str, int, int], ...]
"""Name, time of writing in nanoseconds and size of each file of a folder."""


class WatchedFolder:
    """The --output_dir of a training run, as a server that serves one of its models sees it.

    The newest model comes next. A folder that could not be loaded is passed over until its files are others and have
    stayed the same from one look to the next: it may have been arriving, file by file.

    Args:
        folder: in which the model folders are.
        served: the one that is served.
    """

    def __init__(self, folder: Path, served: Path) -> None:
        self._folder = folder
        self._served_at = stamp_of(served)
        self._refused: dict[Path, Fingerprint] = {}
        self._changing: dict[Path, Fingerprint] = {}

    def next_model(self) -> Path | None:
        """The folder to load now, if there is one; `took` or `refuse` says what became of it."""
        for path in newest_models(self._folder):
            if stamp_of(path) <= self._served_at:
                return None
            if path not in self._refused or self._has_settled(path):
                return path
        return None

    def _has_settled(self, path: Path) -> bool:
        files = fingerprint_of(path)
        if files == self._refused[path]:
            return False
        was, self._changing[path] = self._changing.get(path), files
        return was == files

    def took(self, path: Path) -> None:
        self._served_at = stamp_of(path)
        self._refused.pop(path, None)

    def refuse(self, path: Path) -> None:
        """`path` cannot be loaded as it is."""
        self._refused[path] = fingerprint_of(path)


def newest_models(folder: Path) -> list[Path]:
    """The model folders that train.py writes into its --output_dir, `model_epoch{n}` and `best_model`, newest first."""
    found = [path for path in (*folder.glob("model_epoch*"), folder / "best_model") if stamp_of(path)]
    return sorted(found, key=stamp_of, reverse=True)


def newest_model(folder: Path) -> Path | None:
    return next(iter(newest_models(folder)), None)


def stamp_of(folder: Path) -> int:
    """When a model folder was written, in nanoseconds; 0 if there is none, or none that may be read."""
    try:
        return (folder / "config.json").stat().st_mtime_ns
    except OSError:
        return 0


def fingerprint_of(folder: Path) -> Fingerprint:
    """What changes when a file of a folder does; empty if the folder cannot be read."""
    with suppress(OSError):
        return tuple(sorted((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()))
    return ()
