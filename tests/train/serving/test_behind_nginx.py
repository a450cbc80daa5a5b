"""Two servers behind nginx, with the configuration of docs/running-in-public.md: streams, cancellation, a death."""

from __future__ import annotations

import asyncio
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from tiny_model import endless_model, save_tiny_model

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "running-in-public.md"
CLIENTS, REQUESTS = 8, 12  # of each client

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")


class Site(NamedTuple):
    """
    Attributes:
        url: of nginx.
        servers: process and address of each server behind it.
    """

    url: str
    servers: list[tuple[subprocess.Popen[bytes], str]]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def configuration(folder: Path, port: int, servers: list[int]) -> str:
    """The page's configuration for these ports, in a file that needs nothing of the system's."""
    page = PAGE.read_text(encoding="utf-8")
    (block,) = re.findall(r"```nginx\n(upstream .*?)```", page, re.DOTALL)
    assert block.count("10.0.0.") == 2 == len(servers)
    for number, server in enumerate(servers, start=1):
        block = block.replace(f"10.0.0.1{number}:5005", f"127.0.0.1:{server}")
    block = re.sub(r"listen 80;", f"listen 127.0.0.1:{port};", block)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    user = f"user {getpass.getuser()};\n" if os.getuid() == 0 else ""
    head = f"{user}daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nworker_processes 1;\n"
    return f"{head}events {{}}\nhttp {{\naccess_log off;\n{temporary}{block}}}\n"


def wait_for(url: str, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes), url
            time.sleep(0.1)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("nginx")
    save_tiny_model(folder / "model", endless_model())
    port, *ports = free_ports(3)
    servers = []
    for number in ports:
        flags = ["--model_path", str(folder / "model"), "--port", str(number), "--device", "cpu"]
        flags += ["--max_length", "100000", "--max_answer", "100000000"]
        command = [sys.executable, str(ROOT / "server.py"), *flags]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        servers.append((process, f"http://127.0.0.1:{number}"))
    (folder / "nginx.conf").write_text(configuration(folder, port, ports), encoding="utf-8")
    nginx = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")], stderr=subprocess.DEVNULL)
    try:
        for _, address in servers:
            wait_for(f"{address}/health", [process for process, _ in servers])
        wait_for(f"http://127.0.0.1:{port}/health", [nginx])
        yield Site(f"http://127.0.0.1:{port}", servers)
    finally:
        nginx.terminate()
        for process, _ in servers:
            if process.poll() is None:
                process.terminate()
        for process in [nginx, *(process for process, _ in servers)]:
            process.wait(30)


async def running(session: aiohttp.ClientSession, site: Site) -> int:
    """The sequences that are being decoded on both servers."""
    total = 0
    for _, address in site.servers:
        async with session.get(f"{address}/health") as response:
            total += (await response.json())["running"]
    return total


def with_session(test: Any) -> Any:
    async def run() -> Any:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
            return await test(session)

    return asyncio.run(run())


def test_a_stream_comes_through_as_it_is_decoded(site):
    async def test(session):
        fields = {"context": "一", "maxlength": 20000, "samples": 1, "seed": 1, "stream": True}
        async with session.post(f"{site.url}/generate", json=fields) as response:
            assert response.status == 200
            first = await response.content.readline()
            still_running = await running(session, site)
            rest = await response.content.read()
        assert first.startswith(b"event:") and still_running == 1
        assert rest.count(b"event: text") > 10

    with_session(test)


def test_leaving_a_stream_ends_the_decoding_behind_nginx(site):
    async def test(session):
        fields = {"context": "一", "maxlength": 50000, "samples": 8, "seed": 1, "stream": True}
        response = await session.post(f"{site.url}/generate", json=fields)
        await response.content.readline()
        began, at_first = time.monotonic(), await running(session, site)
        response.close()
        while await running(session, site):
            assert time.monotonic() < began + 10
            await asyncio.sleep(0.01)
        assert at_first == 8

    with_session(test)


def test_the_death_of_a_server_loses_no_request(site):
    """SIGKILL of one of them under load: what it had not answered goes to the other, which loses none of its own."""
    process, address = site.servers[0]
    other = site.servers[1][1]
    fields = {"context": "一丁", "maxlength": 60, "samples": 2}

    async def ask(session: aiohttp.ClientSession, url: str, seed: int) -> list[str]:
        async with session.post(f"{url}/generate", json=fields | {"seed": seed}) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    async def test(session):
        answered = 0
        texts: dict[int, list[str]] = {}

        async def client(number: int) -> None:
            nonlocal answered
            for request in range(REQUESTS):
                seed = number * REQUESTS + request
                texts[seed] = await ask(session, site.url, seed)
                answered += 1
                if answered == CLIENTS * REQUESTS // 3:
                    os.killpg(process.pid, signal.SIGKILL)

        await asyncio.gather(*map(client, range(CLIENTS)))
        assert process.wait(10) == -signal.SIGKILL
        with pytest.raises(aiohttp.ClientError):
            await ask(session, address, 0)
        assert len(texts) == CLIENTS * REQUESTS
        for seed in range(0, CLIENTS * REQUESTS, 7):
            assert texts[seed] == await ask(session, other, seed)
        async with session.get(f"{other}/metrics") as response:
            page = await response.text()
        assert re.search(r"^gpt2_http_requests_total\{.*200.*\} \d", page, re.MULTILINE)

    with_session(test)
