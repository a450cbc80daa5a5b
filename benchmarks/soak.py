"""server.py among hostile and good traffic at once: what grows, who waits, whether every good answer is right.

Run in the training environment; it starts its own server on the loopback interface:

    .venv-train/bin/python benchmarks/soak.py --model_path demo/model/final_model --minutes 120
    .venv-train/bin/python benchmarks/soak.py --model_path demo/model/final_model --kills 50 --hangs 20

The status is 1 if a good request was answered wrongly, a process grew above 1.5 times its memory after the warm-up, or
something was left behind. /health is measured from this process, which shares the processors with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.serving import Server, open_session, percentile, post_generate, post_stream, sample_requests

GOOD_CLIENTS, HOSTILE_CLIENTS = 4, 8
GROWTH = 1.5
LARGE = {"n": 32, "logprobs": 5, "temperature": 10, "top_k": 0}


def memory_of(server: Server) -> dict[int, int]:
    """Resident megabytes of each process."""
    found = {}
    for one in server.processes():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, KeyError):
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text(encoding="utf-8").splitlines()
            )
            found[one] = int(status["VmRSS"].split()[0]) // 1024
    return found


async def raw_bytes(port: int, data: bytes, *, wait: float = 0.5) -> None:
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(65536), wait)
        writer.close()


async def hostile(server: Server, session: aiohttp.ClientSession, source: random.Random) -> str:
    """One hostile request; gives its kind and what became of it."""
    kind = source.choice(["digits", "letters", "large", "answer", "aborted", "raw", "json", "sentences"])
    fields: dict[str, Any] = {"maxlength": 1, "samples": 1}
    path = "/generate"
    if kind == "digits":
        fields["context"] = "".join(source.choices("0123456789", k=60_000))
    elif kind == "letters":
        fields["context"] = "".join(source.choices("abcdefghij", k=60_000))
    elif kind == "sentences":
        fields["context"] = "".join(source.choices("孩子发烧，要去医院。吗？\n", k=20_000))
    elif kind == "large":
        path, fields = "/v1/completions", {"prompt": ["孩子"] * 16, "max_tokens": 1024, **LARGE}
    elif kind == "answer":
        path, fields = "/v1/completions", {"prompt": "孩子", "max_tokens": source.randrange(1, 120), **LARGE}
    elif kind == "aborted":
        task = asyncio.create_task(post_stream(session, {"context": "孩子", "maxlength": 1000, "samples": 4}))
        await asyncio.sleep(source.random())
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError, KeyError):
            await task
        return kind
    elif kind == "raw":
        good = b'POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{"context": "a"}    '
        place = source.randrange(len(good))
        change = source.choice([b"", b"\0", b"\r\n", b"\xff" * 9, b"Content-Length: 5\r\n", b" " * 9000])
        await raw_bytes(server.port, good[:place] + change + good[place + source.randrange(3) :])
        return kind
    else:
        body = source.choice(
            [b"[" * 60_000, b'{"context": "' + b"\\u0000" * 9000 + b'"}', b"\xff" * 50, b'{"a": 1e999}']
        )
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
            async with session.post(path, data=body) as response:
                await response.read()
                return f"{kind} {response.status}"
    try:
        async with session.post(path, json=fields) as response:
            await response.read()
            return f"{kind} {response.status}"
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        return f"{kind} {type(error).__name__}"


async def soak(server: Server, seconds: float, harm: Sequence[int], pause: float) -> dict[str, Any]:
    """Good and hostile clients for so long.

    Args:
        harm: signals that the model's process gets, one after the other, at random moments.
        pause: seconds between two of them.
    """
    outcomes: Counter[str] = Counter()
    attacks: Counter[str] = Counter()
    health: list[float] = []
    recoveries: dict[str, list[float]] = {}
    peak: dict[int, int] = {}
    async with open_session(server.url) as session:
        requests = sample_requests(40)
        await full_speed(session)
        alone = [(await post_generate(session, fields))[1] for fields in requests]
        before = server.resources()
        end = time.monotonic() + seconds
        warm: dict[int, int] = {}

        async def good(number: int) -> None:
            source = random.Random(number)
            while time.monotonic() < end:
                place = source.randrange(len(requests))
                try:
                    status, texts = await source.choice([post_generate, post_stream])(session, requests[place])
                except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                    outcomes[f"error {type(error).__name__}"] += 1
                    continue
                right = status == 200 and texts == alone[place]
                outcomes["right" if right else "WRONG" if status == 200 else f"status {status}"] += 1
                if status in (0, 429, 503):
                    await asyncio.sleep(0.2)

        async def attack(number: int) -> None:
            source = random.Random(1000 + number)
            while time.monotonic() < end:
                attacks[await hostile(server, session, source)] += 1

        async def watch() -> None:
            while True:
                begin = time.perf_counter()
                async with session.get("/health") as response:
                    await response.read()
                health.append(time.perf_counter() - begin)
                await asyncio.sleep(0.05)

        async def measure() -> None:
            await asyncio.sleep(min(60, seconds / 4))
            warm.update(memory_of(server))
            before.update(server.resources())  # by now each kind of work has started its thread
            while True:
                for one, megabytes in memory_of(server).items():
                    peak[one] = max(megabytes, peak.get(one, 0))
                await asyncio.sleep(1)

        async def do_harm() -> None:
            nonlocal end
            source = random.Random(7)
            for number in harm:
                await asyncio.sleep(pause * (0.5 + source.random()))
                before = await restarts(session)
                os.kill(server.processes()[1], number)
                begin = time.perf_counter()
                while await restarts(session) <= before:
                    await asyncio.sleep(0.02)
                recoveries.setdefault(signal.Signals(number).name, []).append(time.perf_counter() - begin)
            end = time.monotonic()

        background = [asyncio.create_task(watch()), asyncio.create_task(measure())]
        clients = [good(number) for number in range(GOOD_CLIENTS)]
        clients += [attack(number) for number in range(HOSTILE_CLIENTS if not harm else 2)]
        await asyncio.gather(*clients, *([do_harm()] if harm else []))
        for task in background:
            task.cancel()
        await asyncio.sleep(3)
        async with session.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        after = server.resources()
    left = {
        line.split("{")[0]: float(line.split()[-1])
        for line in lines
        if line.startswith(("gpt2_admitted", "gpt2_tasks"))
    }
    return {
        "good": dict(outcomes),
        "hostile": dict(sorted(attacks.items())),
        "/health p50, p99, most ms": [round(percentile(health, share), 1) for share in (0.5, 0.99, 1)],
        "megabytes warm": list(warm.values()),
        "megabytes most": list(peak.values()),
        "grown": max((peak[one] / warm[one] for one in warm if one in peak), default=0.0),
        "recovery s, median, 0.9 and most": {
            name: [round(percentile(times, share) / 1000, 2) for share in (0.5, 0.9, 1)]
            for name, times in recoveries.items()
        },
        "left": left,
        "before": before,
        "after": after,
    }


async def full_speed(session: aiohttp.ClientSession) -> None:
    """Wait for the compiled decoder, which rounds otherwise than PyTorch does until then; a seed's texts may differ."""
    while True:
        async with session.get("/health") as response:
            if (await response.json()).get("full_speed"):
                return
        await asyncio.sleep(0.2)


async def restarts(session: aiohttp.ClientSession) -> int:
    async with session.get("/health") as response:
        health = await response.json()
    return -1 if health["status"] == "restarting" else sum(model["restarts"] for model in health["models"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="demo/model/final_model")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--kills", type=int, default=0, help="times that the model's process is killed")
    parser.add_argument("--hangs", type=int, default=0, help="times that it is stopped (SIGSTOP)")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two of them")
    args = parser.parse_args()
    harm = [signal.SIGKILL] * args.kills + [signal.SIGSTOP] * args.hangs
    random.Random(5).shuffle(harm)
    with Server(args.model_path, "--device", "cpu", "--hang_timeout", "3") as server:
        result = asyncio.run(soak(server, args.minutes * 60 if not harm else 1e9, harm, args.pause))
    print(json.dumps(result, ensure_ascii=False, indent=2))
    before, after = result["before"], result["after"]
    wrong = result["good"].get("WRONG", 0) or result["good"].get("right", 0) == 0
    grown = result["grown"] > GROWTH and not harm
    left = after["threads"] > before["threads"] or after["files"] > before["files"] + 2
    print(
        "wrong" if wrong else "right", "grown" if grown else "flat", "left behind" if left else "nothing left", sep=", "
    )
    return int(bool(wrong or grown or left))


if __name__ == "__main__":
    sys.exit(main())
