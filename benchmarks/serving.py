"""server.py under load, at four times its capacity, under abuse, at SIGTERM, beside slow connections, and its /health.

Run in the training environment. Each starts its own server on the loopback interface and prints what it counted:

    .venv-train/bin/python benchmarks/serving.py load     --model_path demo/model/final_model
    .venv-train/bin/python benchmarks/serving.py overload --model_path demo/model/final_model
    .venv-train/bin/python benchmarks/serving.py abuse    --model_path demo/model/final_model
    .venv-train/bin/python benchmarks/serving.py sigterm  --model_path demo/model/final_model
    .venv-train/bin/python benchmarks/serving.py slow     --model_path demo/model/final_model
    .venv-train/bin/python benchmarks/serving.py health   --model_path demo/model/final_model --clients 32
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS = ["孩子", "感冒了，", "高血压患者", "睡不着", "", "每天早上起来"]
MAX_CONNECTIONS = 400
"""The most that `overload` opens; server.py accepts 800."""
TICK = 0.002
"""Seconds between two steps of `overload`, each of which sends what is due and reads what has arrived."""
BAD = [b"", b"{", b"[]", b'{"context": 5}', b'{"context": "\xff"}', b'{"context": "a", "samples": 99999}']


class Server:
    """A process of server.py on a free port; `with Server(...) as server:` ends it."""

    def __init__(self, model_path: str, *flags: str) -> None:
        command = [sys.executable, str(ROOT / "server.py"), "--model_path", model_path, "--port", "0"]
        command += ["--lang", "en", *flags]
        begin = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.match(r"serving on (http://[\d.]+:(\d+))", line):
                self.url, self.port = found[1], int(found[2])
                break
        else:
            raise RuntimeError(f"the server ended with status {self.process.wait()}")
        self.seconds_to_ready = time.perf_counter() - begin

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def processes(self) -> list[int]:
        """The server's process and its children (Linux)."""
        found = [self.process.pid]
        for one in found:
            for thread in Path(f"/proc/{one}/task").iterdir():  # a process belongs to the thread that started it
                with contextlib.suppress(FileNotFoundError):
                    found += map(int, (thread / "children").read_text(encoding="utf-8").split())
        return found

    def resources(self) -> dict[str, int]:
        """Resident megabytes, threads and open files of the processes (Linux)."""
        total: Counter[str] = Counter()
        for one in self.processes():
            folder = Path(f"/proc/{one}")
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            total["megabytes"] += int(status["VmRSS"].split()[0]) // 1024
            total["threads"] += int(status["Threads"])
            total["files"] += len(list((folder / "fd").iterdir()))
        return dict(total)


def percentile(values: Sequence[float], share: float) -> float:
    """The percentile in milliseconds of values in seconds, `share` from 0 to 1."""
    ranked = sorted(values) or [float("nan")]
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] * 1000


def sample_requests(count: int, *, longest: int = 30) -> list[dict[str, Any]]:
    source = random.Random(5)
    return [
        {
            "context": source.choice(CONTEXTS),
            "maxlength": source.randrange(5, longest + 1),
            "samples": source.randrange(1, 4),
            "temperature": source.choice([0, 0.7, 1]),
            "top_p": source.choice([0, 0.9]),
            "seed": seed,
        }
        for seed in range(count)
    ]


async def post_generate(session: aiohttp.ClientSession, fields: dict[str, Any]) -> tuple[int, list[str]]:
    async with session.post("/generate", json=fields) as response:
        return response.status, await response.json() if response.status == 200 else []


async def post_stream(session: aiohttp.ClientSession, fields: dict[str, Any]) -> tuple[int, list[str]]:
    """The same from a stream; the status is 0 if it breaks off."""
    async with session.post("/generate", json=fields | {"stream": True}) as response:
        if response.status != 200:
            return response.status, []
        texts = [fields["context"]] * fields["samples"]
        ended: set[int] = set()  # without those that the model has no different text for
        name = ""
        async for line in response.content:
            if line.startswith(b"event: "):
                name = line[7:].strip().decode()
            elif line.startswith(b"data: ") and name == "text":
                data = json.loads(line[6:])
                texts[data["sample"]] += data["text"]
            elif line.startswith(b"data: ") and name == "end":
                data = json.loads(line[6:])
                ended |= {data["sample"]} if data["finish_reason"] != "missing" else set()
        return (200 if name == "done" else 0), [texts[sample] for sample in sorted(ended)]


async def post_v1(session: aiohttp.ClientSession, fields: dict[str, Any]) -> tuple[int, list[str]]:
    same = {name: fields[name] for name in ("temperature", "seed")}
    same |= {
        "prompt": fields["context"],
        "n": fields["samples"],
        "max_tokens": fields["maxlength"],
        "top_k": 30,
        "echo": True,
    }
    async with session.post("/v1/completions", json=same | {"top_p": fields["top_p"] or 1}) as response:
        answer = await response.json()
        return response.status, [choice["text"] for choice in answer.get("choices", [])]


def open_session(url: str) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    return aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(total=150))


async def watch_health(session: aiohttp.ClientSession, latencies: list[float]) -> None:
    while True:
        begin = time.perf_counter()
        async with session.get("/health") as response:
            await response.read()
        latencies.append(time.perf_counter() - begin)
        await asyncio.sleep(0.05)


async def load(url: str, *, clients: int, seconds: float) -> dict[str, Any]:
    """Clients that send one request after the other; every answer is compared with that of its seed without load."""
    async with open_session(url) as session:
        requests = sample_requests(60)
        alone = [(await post_generate(session, fields))[1] for fields in requests]
        outcomes: Counter[str] = Counter()
        latencies: list[float] = []
        health: list[float] = []
        end = time.perf_counter() + seconds

        async def client(number: int) -> None:
            source = random.Random(number)
            while time.perf_counter() < end:
                place = source.randrange(len(requests))
                begin = time.perf_counter()
                try:
                    status, texts = await source.choice([post_generate, post_generate, post_stream, post_v1])(
                        session, requests[place]
                    )
                except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
                    outcomes[f"error {type(error).__name__}"] += 1
                    continue
                latencies.append(time.perf_counter() - begin)
                right = status == 200 and texts == alone[place]
                outcomes["right" if right else "wrong" if status == 200 else f"status {status}"] += 1

        watching = asyncio.create_task(watch_health(session, health))
        begin = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(clients)))
        took = time.perf_counter() - begin
        watching.cancel()
    return {
        "outcomes": dict(outcomes),
        "requests per second": round(outcomes["right"] / took, 1),
        "p50 ms": round(percentile(latencies, 0.5), 1),
        "p99 ms": round(percentile(latencies, 0.99), 1),
        "/health p99 ms": round(percentile(health, 0.99), 1),
    }


class Connections:
    """Keep-alive connections that send one request repeatedly, the longest idle connection first.

    Of the answers only the status is parsed, since the client shares the processors with the server.
    """

    def __init__(self, port: int, fields: dict[str, Any]) -> None:
        self.port = port
        body = json.dumps(fields).encode()
        self.request = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        self.selector = selectors.DefaultSelector()
        self.free: deque[socket.socket] = deque()
        self.sent: dict[socket.socket, float] = {}
        self.answers: dict[socket.socket, bytes] = {}
        self.opened = 0

    def open(self, count: int) -> None:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", self.port))
            connection.setblocking(False)
            self.selector.register(connection, selectors.EVENT_READ)
            self.answers[connection] = b""
            self.free.append(connection)
        self.opened += count

    def send(self) -> bool:
        """Send the request on an idle connection; False if there is none."""
        if not self.free:
            return False
        connection = self.free.popleft()
        self.sent[connection] = time.perf_counter()
        connection.send(self.request)
        return True

    def answered(self, seconds: float) -> list[tuple[int, float]]:
        """Wait at most `seconds`; the status of each answer, 0 for a connection that was closed, and its latency.

        An idle connection that is closed loses no request and is not reported.
        """
        found = []
        for key, _ in self.selector.select(seconds):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                data = connection.recv(65536)
            except ConnectionError:
                data = b""
            answer = self.answers[connection] + data
            whole = length_of(answer)
            if data and len(answer) < whole:
                self.answers[connection] = answer
                continue
            if connection in self.sent:
                found.append((int(answer[9:12]) if data else 0, time.perf_counter() - self.sent.pop(connection)))
            if data:
                self.answers[connection] = b""
                self.free.append(connection)
            else:
                self._forget(connection)
        return found

    def _forget(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        del self.answers[connection]
        self.opened -= 1
        if connection in self.free:
            self.free.remove(connection)
        connection.close()

    def close(self) -> None:
        for connection in list(self.answers):
            self._forget(connection)
        self.selector.close()


def length_of(answer: bytes) -> float:
    """The length in bytes of an answer that begins so; infinite while its head is incomplete."""
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return float("inf")
    begin = answer.index(b"Content-Length: ") + 16
    return end + 4 + int(answer[begin : answer.index(b"\r", begin)])


def peak(connections: Connections, *, clients: int, seconds: float) -> float:
    """Answers per second to `clients` that each send one request after the other."""
    served = 0
    begin = time.perf_counter()
    for _ in range(clients):
        assert connections.send()
    waiting = clients
    while waiting:
        for status, _ in connections.answered(1):
            served += status == 200
            waiting -= 1
            if time.perf_counter() < begin + seconds and connections.send():
                waiting += 1
    return served / (time.perf_counter() - begin)


@dataclass
class Overload:
    """The outcome of `send_at_rate`; rates per second."""

    sent: float = 0.0
    served: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    refusals: list[float] = field(default_factory=list)  # seconds


def send_at_rate(connections: Connections, *, rate: float, seconds: float) -> Overload:
    """Send `rate` requests per second, whether they are answered or not; what is due is sent every TICK."""
    result = Overload()
    ramp = seconds / 4  # while the queue fills, the rate is not that of overload
    served = 0

    def look() -> None:
        nonlocal served
        for status, latency in connections.answered(0):
            result.outcomes[f"status {status}" if status else "error: the connection was closed"] += 1
            if status == 200:
                served += begin + ramp < time.perf_counter() < begin + seconds
            else:
                result.refusals.append(latency)

    begin = time.perf_counter()
    count = 0
    while (now := time.perf_counter()) < begin + seconds:
        while count < (now - begin) * rate:
            if connections.send():
                count += 1
            elif connections.opened < MAX_CONNECTIONS:
                connections.open(8)
            else:
                break  # until some are answered
        time.sleep(TICK)
        look()
    result.served = served / (seconds - ramp)
    result.sent = count / seconds
    while sum(result.outcomes.values()) < count:
        time.sleep(TICK)
        look()
    return result


def overload(port: int, *, clients: int, seconds: float, rounds: int = 1, times: float = 4) -> dict[str, Any]:
    """The peak rate, then `times` that rate, alternating because the speed of machines drifts; medians."""
    connections = Connections(port, {"context": "孩子", "maxlength": 20, "samples": 2, "temperature": 0.8})
    connections.open(4 * clients)
    peaks, overloads = [], []
    for _ in range(rounds):
        peaks.append(peak(connections, clients=clients, seconds=seconds))
        overloads.append(send_at_rate(connections, rate=times * peaks[-1], seconds=seconds))
    connections.close()
    refusals = [latency for one in overloads for latency in one.refusals]
    shares = sorted(one.served / most for one, most in zip(overloads, peaks, strict=True))
    return {
        "peak per second": round(statistics.median(peaks), 1),
        "sent per second": round(statistics.median(one.sent for one in overloads), 1),
        "served per second": round(statistics.median(one.served for one in overloads), 1),
        "served of the peak": round(statistics.median(shares), 3),
        "in each round": [round(share, 3) for share in shares],
        "refusals p50 ms": round(percentile(refusals, 0.5), 1),
        "refusals p99 ms": round(percentile(refusals, 0.99), 1),
        "outcomes": dict(sum((one.outcomes for one in overloads), Counter())),
    }


async def abort(url: str, port: int) -> float:
    """Begin a long request, disconnect, and give the milliseconds until its slots are free."""
    async with open_session(url) as session:

        async def running() -> int:
            async with session.get("/health") as response:
                return (await response.json())["running"]

        body = json.dumps({"context": "孩子", "maxlength": 1024, "samples": 16}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        deadline = time.perf_counter() + 20
        while not await running():
            assert time.perf_counter() < deadline, "the request did not begin"
        begin = time.perf_counter()
        writer.close()
        while await running():
            assert time.perf_counter() < deadline, "the slots are still occupied"
        return (time.perf_counter() - begin) * 1000


def expensive_requests(source: random.Random) -> list[tuple[str, dict[str, Any]]]:
    """Paths and bodies that once took memory, the event loop or the tokenizer for seconds; each is another one."""
    one = {"maxlength": 1, "samples": 1}
    answer = {"n": 32, "max_tokens": 1024, "logprobs": 5, "temperature": 10, "top_k": 0}
    return [
        ("/generate", one | {"context": "".join(source.choices("0123456789", k=65_000))}),
        ("/generate", one | {"context": "".join(source.choices("abcdefghij", k=64_000))}),
        ("/v1/completions", {"prompt": ["孩子"] * 16} | answer),
        ("/v1/completions", {"prompt": "孩子"} | answer | {"max_tokens": 100}),
    ]


def time_health(port: int, stop: Any, results: Any) -> None:
    """Ask for /health twenty times a second until `stop` is set; in a process that no client delays."""
    latencies = []
    while not stop.is_set():
        begin = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            while connection.recv(65_536):
                pass
        latencies.append(time.perf_counter() - begin)
        time.sleep(0.05)
    results.put(latencies)


async def expensive(url: str, *, clients: int, seconds: float) -> dict[str, int]:
    """Clients that send the expensive requests in endless rounds; what became of them."""
    outcomes: Counter[str] = Counter()
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        source = random.Random(number)
        while time.perf_counter() < end:
            for path, fields in expensive_requests(source)[number % 4 :]:
                try:
                    async with session.post(path, json=fields) as response:
                        async for _ in response.content.iter_chunked(65_536):
                            pass
                        outcomes[f"status {response.status}"] += 1
                except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                    outcomes[f"error {type(error).__name__}"] += 1

    async with open_session(url) as session:
        await asyncio.gather(*(client(number) for number in range(clients)))
    return dict(outcomes)


def health(server: Server, *, clients: int, seconds: float) -> dict[str, Any]:
    """/health beside clients that send expensive requests in endless rounds."""
    processes = multiprocessing.get_context("spawn")
    stop, results = processes.Event(), processes.Queue()
    watcher = processes.Process(target=time_health, args=(server.port, stop, results))
    watcher.start()
    outcomes = asyncio.run(expensive(server.url, clients=clients, seconds=seconds))
    stop.set()
    latencies = results.get()
    watcher.join()
    return {
        "outcomes": outcomes,
        "/health asked": len(latencies),
        "/health p50 ms": round(percentile(latencies, 0.5), 1),
        "/health p99 ms": round(percentile(latencies, 0.99), 1),
        "/health most ms": round(percentile(latencies, 1), 1),
    }


async def abuse(server: Server, *, requests: int, clients: int = 32, idle: float = 7) -> dict[str, Any]:
    """Many requests, a fifth of them invalid or abandoned midway; the process's resources before and after.

    `idle` is more than --idle_timeout, so that no connection is left when the resources are counted.
    """

    async def measured() -> dict[str, int]:
        await asyncio.sleep(idle)
        async with open_session(server.url) as session, session.get("/metrics") as response:
            tasks = re.search(r"^gpt2_tasks\S* (\d+)", await response.text(), re.MULTILINE)
        assert tasks is not None
        return server.resources() | {"tasks": int(tasks[1])}

    outcomes: Counter[str] = Counter()

    async def bombard(count: int) -> None:
        numbers = iter(range(count))
        bodies = sample_requests(60, longest=12)
        async with open_session(server.url) as session:

            async def client() -> None:
                for number in numbers:
                    kind = number % 10
                    try:
                        if kind == 0:
                            async with session.post("/generate", data=BAD[number // 10 % len(BAD)]) as response:
                                outcomes["bad, refused" if response.status == 400 else "bad, NOT REFUSED"] += 1
                        elif kind == 5:
                            await left_in_the_middle(server.port, number)
                            outcomes["left"] += 1
                        else:
                            status, _ = await (post_stream if kind == 7 else post_generate)(
                                session, bodies[number % 60]
                            )
                            outcomes[f"good, status {status}"] += 1
                    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                        outcomes[f"ERROR {type(error).__name__}"] += 1

            await asyncio.gather(*(client() for _ in range(clients)))

    await bombard(requests // 20)
    before = await measured()
    await bombard(requests)
    after = await measured()
    freed = [await abort(server.url, server.port) for _ in range(5)]
    return {
        "outcomes": dict(outcomes),
        "before": before,
        "after": after,
        "an aborted request frees its slots, ms": round(max(freed), 1),
    }


async def left_in_the_middle(port: int, number: int) -> None:
    body = json.dumps({"context": "孩子", "maxlength": 200, "samples": 3, "stream": number % 20 < 10}).encode()
    data = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data if number % 3 else data[: len(data) // 2])
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        await asyncio.sleep(0.01 * (number % 4))
        writer.close()
        await writer.wait_closed()


async def terminated(server: Server, *, clients: int, after: float) -> Counter[str]:
    """One SIGTERM under load; a request that was sent before it and is not answered counts as lost."""
    outcomes: Counter[str] = Counter()
    ended_at = float("inf")
    requests = sample_requests(60, longest=60)
    async with open_session(server.url) as session:

        async def client(number: int) -> None:
            source = random.Random(number)
            while True:
                sent = time.perf_counter()
                try:
                    status, _ = await source.choice([post_generate, post_stream])(session, source.choice(requests))
                except aiohttp.ClientConnectorError:
                    return  # it does not listen any more
                except (aiohttp.ClientError, ConnectionError):
                    outcomes["LOST" if sent < ended_at else "came too late"] += 1
                    return
                outcomes["LOST" if status == 0 else f"status {status}"] += 1
                if status == 503:
                    await asyncio.sleep(0.02)

        running = [asyncio.create_task(client(number)) for number in range(clients)]
        await asyncio.sleep(after)
        ended_at = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*running)
    status = await asyncio.to_thread(server.process.wait, 60)
    outcomes["ended with status 0" if status == 0 else f"ENDED WITH STATUS {status}"] += 1
    return outcomes


async def slow(url: str, port: int, *, connections: int, seconds: float) -> dict[str, Any]:
    """The p99 of good requests without and with slow and silent connections; how long those stay open."""
    fields = {"context": "孩子", "maxlength": 10, "samples": 1}

    async def good(session: aiohttp.ClientSession) -> list[float]:
        latencies = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            status, _ = await post_generate(session, fields)
            assert status == 200
            latencies.append(time.perf_counter() - begin)
        return latencies

    async def hold(number: int) -> float:
        begins = [
            (b"", b""),
            (b"POST /generate HTT", b""),
            (b"POST /generate HTTP/1.1\r\n", b"X"),
            (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n", b" "),
        ]
        begin, drip = begins[number % len(begins)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        opened = time.perf_counter()
        with contextlib.suppress(ConnectionError):
            writer.write(begin)
            while time.perf_counter() - opened < 30:
                with contextlib.suppress(asyncio.TimeoutError):
                    if not await asyncio.wait_for(reader.read(4096), 0.5):
                        break
                if drip:
                    writer.write(drip)
        writer.close()
        return time.perf_counter() - opened

    async with open_session(url) as session:
        await good(session)
        before = [latency for part in await asyncio.gather(*(good(session) for _ in range(4))) for latency in part]
        held = [asyncio.create_task(hold(number)) for number in range(connections)]
        await asyncio.sleep(0.1)
        beside = [latency for part in await asyncio.gather(*(good(session) for _ in range(4))) for latency in part]
        opened = await asyncio.gather(*held)
    return {
        "good p99 ms, alone": round(percentile(before, 0.99), 1),
        "good p99 ms, beside": round(percentile(beside, 0.99), 1),
        "times": round(percentile(beside, 0.99) / percentile(before, 0.99), 2),
        "all closed after s": round(max(opened), 1),
    }


def show(what: str, result: dict[str, Any]) -> None:
    print(what)
    for name, value in result.items():
        print(f"  {name}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the server under load and abuse.")
    parser.add_argument("what", choices=["load", "overload", "abuse", "sigterm", "slow", "health"])
    parser.add_argument("--model_path", default="demo/model/final_model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, default=20_000, help="of abuse")
    parser.add_argument("--rounds", type=int, default=50, help="of sigterm")
    parser.add_argument("--connections", type=int, default=200, help="of slow")
    args = parser.parse_args()
    if args.what == "sigterm":
        total: Counter[str] = Counter()
        for number in range(args.rounds):
            with Server(args.model_path) as server:
                total += asyncio.run(terminated(server, clients=16, after=0.2 + number % 10 / 10))
        show(f"{args.rounds} SIGTERMs under load", dict(total))
        return
    flags = ["--max_waiting", "64"] if args.what == "overload" else []
    with Server(args.model_path, *flags) as server:
        print(f"ready {server.seconds_to_ready:.1f} s after its start")
        if args.what == "load":
            result = asyncio.run(load(server.url, clients=args.clients, seconds=args.seconds))
            show(f"{args.clients} clients for {args.seconds:g} s", result)
        elif args.what == "overload":
            seconds = args.seconds / 10  # ten periods
            result = overload(server.port, clients=args.clients // 4, seconds=seconds, rounds=5)
            show("four times the capacity", result)
        elif args.what == "health":
            result = health(server, clients=args.clients, seconds=args.seconds)
            show(f"{args.clients} clients with expensive requests for {args.seconds:g} s", result)
        elif args.what == "abuse":
            show(f"{args.requests} requests", asyncio.run(abuse(server, requests=args.requests)))
        else:
            result = asyncio.run(slow(server.url, server.port, connections=args.connections, seconds=5))
            show(f"{args.connections} slow or silent connections", result)


if __name__ == "__main__":
    main()
