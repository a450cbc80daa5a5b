"""Whole processes of server.py under the loads of benchmarks/serving.py, in short, and on several devices."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tiny_model import endless_model, save_tiny_model

from benchmarks import serving

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at processes as Linux shows them"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", endless_model()))


@pytest.fixture(scope="module")
def one_server(folder):
    flags = ["--device", "cpu", "--idle_timeout", "1", "--body_timeout", "1", "--max_waiting", "64"]
    with serving.Server(folder, *flags) as server:
        yield server


def test_many_clients_get_right_answers_and_health_answers_meanwhile(one_server):
    result = asyncio.run(serving.load(one_server.url, clients=8, seconds=2))
    assert set(result["outcomes"]) == {"right"} and result["outcomes"]["right"] > 20
    assert result["/health p99 ms"] < 500


def test_beyond_the_capacity_requests_are_refused_at_once_and_the_others_served(one_server):
    result = serving.overload(one_server.port, clients=8, seconds=2)
    assert set(result["outcomes"]) <= {"status 200", "status 429"}
    # How many and how fast is benchmarks/serving.py's to say: machines that run tests are shared.
    assert result["served per second"] > 0
    assert result["outcomes"]["status 200"] > 20


def test_abuse_leaves_nothing_behind(one_server):
    result = asyncio.run(serving.abuse(one_server, requests=400, clients=16, idle=2))
    assert set(result["outcomes"]) == {"good, status 200", "bad, refused", "left"}
    before, after = result["before"], result["after"]
    assert after["threads"] == before["threads"] and after["files"] <= before["files"] + 2
    assert after["tasks"] <= before["tasks"] and after["megabytes"] < before["megabytes"] + 40
    assert result["an aborted request frees its slots, ms"] < 1000


def test_slow_connections_are_closed_and_the_good_ones_go_on(one_server):
    result = asyncio.run(serving.slow(one_server.url, one_server.port, connections=40, seconds=1))
    assert result["all closed after s"] < 6
    assert result["times"] < 20


def test_sigterm_under_load_loses_no_admitted_request(folder):
    with serving.Server(folder, "--device", "cpu") as server:
        outcomes = asyncio.run(serving.terminated(server, clients=8, after=0.5))
    assert outcomes["ended with status 0"] == 1 and "LOST" not in outcomes
    assert outcomes["status 200"] > 0


def test_a_model_that_takes_its_process_down_leaves_a_server_that_says_so(folder):
    def request(path: str, body: bytes | None = None) -> tuple[int, dict]:
        try:
            with urllib.request.urlopen(server.url + path, body, timeout=10) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def long_request() -> None:
        answers.append(request("/generate", b'{"context": "a", "maxlength": 1024, "samples": 16}'))

    answers: list[tuple[int, dict]] = []
    with serving.Server(folder, "--device", "cpu", "--batch_size", "1") as server:
        own, model = server.processes()
        assert "libtorch" in Path(f"/proc/{model}/maps").read_text(encoding="utf-8")
        assert "libtorch" not in Path(f"/proc/{own}/maps").read_text(encoding="utf-8")
        waiting = threading.Thread(target=long_request)
        waiting.start()
        deadline = time.monotonic() + 10
        while not request("/health")[1]["running"]:
            assert time.monotonic() < deadline
        os.kill(model, signal.SIGKILL)
        begin = time.monotonic()
        while (health := request("/health"))[1]["status"] == "ready":
            assert time.monotonic() - begin < 5
        assert health[0] == 503 and health[1]["status"] == "restarting"
        waiting.join(10)
        ((status, answer),) = answers
        assert (status, answer["error"]["code"]) == (503, "engine_stopped") and server.process.poll() is None
        while request("/health")[0] != 200:  # it comes back
            assert time.monotonic() - begin < 60
        assert request("/generate", b'{"context": "a"}')[0] == 200


def test_two_devices_are_two_processes_on_one_port_and_one_that_ends_ends_all(folder):
    command = [sys.executable, str(ROOT / "server.py"), "--model_path", folder, "--port", "0", "--device", "cpu,cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            while not lines or not lines[-1].startswith("serving on "):  # when both are ready
                lines.append(process.stdout.readline())
                assert lines[-1], "the server has ended"
            assert sum(" on cpu, " in line for line in lines) == 2, lines
            url = lines[-1].split()[2]
            body = json.dumps({"context": "一", "maxlength": 5, "samples": 1, "seed": 1}).encode()

            def ask() -> list[str]:
                with urllib.request.urlopen(f"{url}/generate", body, timeout=30) as response:
                    return json.load(response)

            assert len({tuple(ask()) for _ in range(20)}) == 1
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
            assert len(children) == 2
            begin = time.monotonic()
            os.kill(int(children[0]), signal.SIGKILL)
            _, err = process.communicate(timeout=30)
            assert time.monotonic() - begin < 20
            assert process.returncode != 0 and "the process of device cpu has ended" in err
            assert not Path(f"/proc/{children[1]}").exists()
        finally:
            process.kill()


def test_several_devices_stop_together_at_sigterm(folder):
    command = [sys.executable, str(ROOT / "server.py"), "--model_path", folder, "--port", "0", "--device", "cpu,cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = 0
            while ready < 2:
                line = process.stdout.readline()
                assert line, "the server has ended"
                ready += " on cpu, " in line
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0 and out.count("stopped") == 2 and "Traceback" not in err
