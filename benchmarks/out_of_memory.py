"""server.py where memory runs out: the kernel ends the model's process, the server answers 503 and starts it again.

As root on Linux, in the training environment; it makes a memory cgroup of its own and removes it:

    .venv-train/bin/python benchmarks/out_of_memory.py --model_path demo/model/final_model

A warm server gets a limit of 12 MB above what it uses, for so many seconds, under requests that need more; then the
limit goes. The status is 1 if the server ended, answered something else than 200 or 503, or did not come back.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import serving

LEEWAY = 12 << 20
LONG = "".join(chr(0x4E00 + number % 5000) for number in range(3000))
LARGE = {"context": LONG, "maxlength": 120, "samples": 16, "temperature": 1.5, "top_k": 0}
SMALL = {"context": "孩子", "maxlength": 20, "samples": 2, "seed": 1}


class MemoryGroup:
    """A memory cgroup, of version 1 or 2."""

    def __init__(self) -> None:
        root, is_first = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory/cgroup.procs").exists()
        self.folder = (root / "memory" if is_first else root) / "gpt2_out_of_memory"
        self._limit, self._usage = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_first else ("memory.max", "memory.current")
        )
        self.folder.mkdir(exist_ok=True)

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    def limit(self, size: int | None) -> None:
        nothing = "-1" if self._limit.endswith("bytes") else "max"
        (self.folder / self._limit).write_text(nothing if size is None else str(size), encoding="ascii")

    def usage(self) -> int:
        return int((self.folder / self._usage).read_text(encoding="ascii"))


class LimitedServer(serving.Server):
    """A server whose processes are in the group."""

    def __init__(self, group: MemoryGroup, *args: str) -> None:
        popen = subprocess.Popen
        try:
            subprocess.Popen = lambda *a, **k: popen(*a, preexec_fn=group.enter, **k)  # type: ignore[misc, assignment]
            super().__init__(*args)
        finally:
            subprocess.Popen = popen  # type: ignore[misc]


async def starve(server: serving.Server, group: MemoryGroup, seconds: float) -> dict[str, Any]:
    answers: Counter[int] = Counter()
    async with aiohttp.ClientSession(server.url) as session:

        async def ask(fields: dict[str, Any]) -> int:
            try:
                async with session.post("/generate", json=fields) as response:
                    await response.read()
                    return response.status
            except aiohttp.ClientError:
                return 0

        assert set(await asyncio.gather(*(ask(SMALL) for _ in range(20)))) == {200}
        group.limit(group.usage() + LEEWAY)
        end = time.monotonic() + seconds
        while time.monotonic() < end and server.process.poll() is None:
            answers.update(await asyncio.gather(*(ask(LARGE | {"seed": seed}) for seed in range(12))))
            await asyncio.sleep(0.05)
        group.limit(None)
        begin = time.monotonic()
        while server.process.poll() is None and time.monotonic() - begin < 60 and await ask(SMALL) != 200:
            await asyncio.sleep(0.05)
        recovered = time.monotonic() - begin
        ended = server.process.poll() is not None
        return {"answers": dict(answers), "server ended": ended, "recovered in s": recovered}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="demo/model/final_model")
    parser.add_argument("--seconds", type=float, default=20, help="of the limit (default: %(default)s)")
    args = parser.parse_args()
    group = MemoryGroup()
    with LimitedServer(group, args.model_path, "--device", "cpu") as server:
        found = asyncio.run(starve(server, group, args.seconds))
    time.sleep(0.5)
    group.folder.rmdir()
    print(found)
    return int(found["server ended"] or not set(found["answers"]) <= {200, 503} or found["recovered in s"] > 59)


if __name__ == "__main__":
    sys.exit(main())
